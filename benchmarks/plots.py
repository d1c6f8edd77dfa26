"""Horizontal bars as one SVG file, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megakd.report import nice_ticks


@dataclass(frozen=True)
class Bar:
    """A bar and its text; `strong` draws it in the colour of the project."""

    label: str
    value: float
    text: str
    strong: bool = False


_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _GROUP = 820, 170, 120, 52, 18, 26
_STYLE = (
    "text{font:12px sans-serif;fill:#222}.title{font-size:15px;font-weight:bold}.group{font-weight:bold}"
    ".grid{stroke:#ddd}.tick{fill:#777}.bar{fill:#9aa7b5}.strong{fill:#1f6fb2}"
)


def bar_plot(title: str, unit: str, groups: Sequence[tuple[str, Sequence[Bar]]], *, log: bool = False) -> str:
    """Bars in named groups over one axis from zero, or over a logarithmic one. Bars without a place are left out."""
    groups = [(name, [bar for bar in bars if _drawn(bar.value, log)]) for name, bars in groups]
    values = [bar.value for _, bars in groups for bar in bars] or [1.0]
    low = math.floor(math.log10(min(values)) - 0.1) if log else 0.0
    high = math.log10(max(values)) if log else max(values)
    high = max(high, low + 1.0) if log else high or 1.0
    ticks = [float(power) for power in range(int(low), math.floor(high) + 1)] if log else nice_ticks(0.0, high, 6)

    def across(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    drawn, y = [], _TOP
    for name, bars in groups:
        drawn.append(f'<text class="group" x="8" y="{y + 17}">{escape(name)}</text>')
        y += _GROUP
        for bar in bars:
            end = across(math.log10(bar.value) if log else bar.value)
            look = "bar strong" if bar.strong else "bar"
            drawn.append(f'<text x="{_LEFT - 6}" y="{y + 12}" text-anchor="end">{escape(bar.label)}</text>'
                         f'<rect class="{look}" x="{_LEFT}" y="{y + 2}" width="{end - _LEFT:.1f}" height="{_ROW - 4}"/>'
                         f'<text x="{end + 4:.1f}" y="{y + 12}">{escape(bar.text)}</text>')
            y += _ROW
    grid = []
    for tick in ticks:
        text = f"1e{tick:.0f}" if log else f"{tick:g}"
        grid.append(f'<line class="grid" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="{_TOP}" y2="{y}"/>'
                    f'<text class="tick" x="{across(tick):.1f}" y="{y + 15}" text-anchor="middle">{text}</text>')
    head = (f'<text class="title" x="8" y="20">{escape(title)}</text>'
            f'<text class="tick" x="8" y="38">{escape(unit)}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 24}" width="{_WIDTH}">'
            f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
            f'{head}{"".join(grid)}{"".join(drawn)}</svg>\n')


def _drawn(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 if log else value >= 0)
