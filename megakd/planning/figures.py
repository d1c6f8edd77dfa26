"""Figures of plans as SVG, without a plotting library: stacked bars and lines over a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from megakd.report import nice_ticks

COLOURS = ("#1f6fb2", "#e69f00", "#009e73", "#cc4c3b", "#8e6bb8", "#56b4e9", "#8a6d3b", "#e377c2", "#6b7785", "#2f4858")
STYLE = (
    "svg{font:13px sans-serif;max-width:100%;height:auto}svg text{fill:#222}svg .tick{fill:#555}"
    "svg .grid{stroke:#e2e2e2}svg .axis{stroke:#555;fill:none}"
)
_WIDTH, _LEFT, _RIGHT, _TOP = 880, 220, 80, 30
_BAR, _LEGEND = 24, 20


def stacked_bars(unit: str, bars: Sequence[tuple[str, Mapping[str, float]]], order: Sequence[str] = (), *,
                 sums: bool = True) -> str:
    """A horizontal bar for each label, its parts behind one another.

    Args:
        unit: of the numbers, at the axis.
        bars: (label, part -> value); parts have the same colour in all bars.
        order: names of parts, for the same colours in several figures; parts that it does not name follow.
        sums: whether a bar's sum stands at its end.
    """
    there = list(dict.fromkeys(name for _, values in bars for name, value in values.items() if value > 0))
    every = list(dict.fromkeys([*order, *there]))
    parts = {name: COLOURS[every.index(name) % len(COLOURS)] for name in every if name in there}
    high = max((sum(values.values()) for _, values in bars), default=0.0) or 1.0
    legend, down = _legend(parts, _TOP - 14)
    bottom = down + _BAR * len(bars)
    drawn = [legend]
    for tick in nice_ticks(0.0, high, 8):
        x = f"{_across(tick / high):.1f}"
        drawn.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{down}" y2="{bottom}"/>'
                     f'<text class="tick" x="{x}" y="{bottom + 17}" text-anchor="middle">{tick:g}</text>')
    drawn.append(f'<text class="tick" x="{_across(0.5):.0f}" y="{bottom + 36}" text-anchor="middle">'
                 f'{escape(unit)}</text>')
    for row, (label, values) in enumerate(bars):
        y, start = down + _BAR * row, 0.0
        drawn.append(f'<text x="{_LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(label)}</text>')
        for part in parts:
            width = values.get(part, 0.0) / high * (_WIDTH - _LEFT - _RIGHT)
            if width > 0:
                drawn.append(f'<rect x="{_across(start / high):.1f}" y="{y + 3}" width="{width:.2f}" '
                             f'height="{_BAR - 6}" fill="{parts[part]}"/>')
            start += values.get(part, 0.0)
        if sums:
            drawn.append(f'<text x="{_across(start / high) + 6:.1f}" y="{y + 16}">{start:.3g}</text>')
    return _svg(bottom + 44, drawn)


def line_chart(x_name: str, y_name: str, series: Mapping[str, Sequence[tuple[float, float]]], *, log_y: bool = False,
               dashed: Sequence[str] = (), dots: Sequence[str] = (), integers: bool = True) -> str:
    """Lines over a logarithmic x axis.

    Args:
        x_name: text at the x axis.
        y_name: text above the y axis.
        series: name -> points; both numbers are positive where their axis is logarithmic.
        log_y: whether the y axis is logarithmic too; else it begins at zero.
        dashed: names of series that are drawn dashed (ideals).
        dots: names of series that are drawn as dots alone.
        integers: whether the x axis has its ticks at the points themselves (numbers of ranks), else at powers of ten.
    """
    points = [point for line in series.values() for point in line]
    xs = sorted({x for x, _ in points})
    low, high = _ends([y for _, y in points], log_y)
    first, last = (math.log10(xs[0]), math.log10(xs[-1])) if integers else _ends(xs, True)
    left, width, height, span = 80, _WIDTH - 80 - 40, 300, (last - first) or 1.0
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(series)}
    legend, down = _legend(colours, _TOP - 14, dashed)
    bottom = down + height

    def across(x: float) -> float:
        return left + (math.log10(x) - first) / span * width

    def up(y: float) -> float:
        return bottom - ((math.log10(y) if log_y else y) - low) / (high - low) * height

    drawn = [legend, f'<text class="tick" x="8" y="{down - 14}">{escape(y_name)}</text>']
    y_ticks = [10.0 ** power for power in range(round(low), round(high) + 1)] if log_y else nice_ticks(low, high, 6)
    for tick in y_ticks:
        y = up(tick)
        drawn.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    x_ticks = xs if integers else [10.0 ** power for power in range(round(first), round(last) + 1)]
    room = width / max(1, len(x_ticks))
    for number, tick in enumerate(x_ticks):
        drawn.append(f'<line class="axis" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="{bottom}" '
                     f'y2="{bottom + 5}"/>')
        if number % math.ceil(52 / room) == 0:
            text = f"{tick:,.0f}" if integers else f"{tick:g}"
            drawn.append(f'<text class="tick" x="{across(tick):.1f}" y="{bottom + 19}" text-anchor="middle">{text}'
                         "</text>")
    drawn.append(f'<path class="axis" d="M{left},{down}V{bottom}H{left + width}"/>'
                 f'<text class="tick" x="{left + width / 2:.0f}" y="{bottom + 38}" text-anchor="middle">'
                 f'{escape(x_name)}</text>')
    for name, line in series.items():
        colour, places = colours[name], [(across(x), up(y)) for x, y in sorted(line)]
        if name not in dots:
            dash = ' stroke-dasharray="6 4"' if name in dashed else ""
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if name not in dashed:
            drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if name in dots else 3}" fill="{colour}"/>'
                      for x, y in places]
    return _svg(bottom + 46, drawn)


def _short(value: float) -> str:
    """1,500 as 1.5k."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _ends(values: Sequence[float], log: bool) -> tuple[float, float]:
    if log:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        return float(low), float(max(high, low + 1))
    return 0.0, max(values) * 1.05 or 1.0


def _across(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _legend(colours: Mapping[str, str], y: float, dashed: Sequence[str] = ()) -> tuple[str, float]:
    """Names with their colours in as many lines as they need; and where the figure below them begins."""
    drawn, x = [], 12.0
    for name, colour in colours.items():
        width = 34 + 7.4 * len(name)
        if x + width > _WIDTH and x > 12:
            x, y = 12.0, y + _LEGEND
        dash = ' stroke-dasharray="6 4"' if name in dashed else ""
        drawn.append(f'<line x1="{x}" x2="{x + 18}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="6"{dash}/>'
                     f'<text x="{x + 24}" y="{y + 5}">{escape(name)}</text>')
        x += width
    return "".join(drawn), y + 46


def _svg(height: float, drawn: Sequence[str]) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" '
            f'role="img"><rect width="100%" height="100%" fill="#fff"/>{"".join(drawn)}</svg>')
