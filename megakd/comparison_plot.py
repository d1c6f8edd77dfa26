"""The figure of a comparison: a panel a number, a row a method, as one SVG file without a plotting library."""

from __future__ import annotations

from html import escape

from megakd.comparison import START, Figure, Results, label_of
from megakd.report import METRIC_TEXTS, nice_ticks

_COLUMNS, _PANEL, _LEFT, _RIGHT, _TOP, _ROW, _FOOT, _LEGEND = 3, 330, 92, 14, 40, 20, 34, 24
_STYLE = (
    "text{font:11px sans-serif;fill:#222}.title{font-size:13px;font-weight:bold}.grid{stroke:#e2e2e2}"
    ".tick{fill:#777}.seed{fill:#9aa7b5}.mean{fill:#1f6fb2}.interval{stroke:#1f6fb2;stroke-width:2}"
    ".start{stroke:#b3382c;stroke-dasharray:4 3}"
)


def comparison_plot(results: Results) -> str:
    """Each seed as a grey dot, the mean and its 95 % interval in blue, the start as a dashed line.

    Returns:
        SVG text, of the size that its panels need.
    """
    methods = [method for method in results.figures if method != START]
    height = _TOP + _ROW * len(methods) + _FOOT
    panels = []
    names = [name for name in results.names if any(name in results.figures[method] for method in methods)]
    for number, name in enumerate(names):
        across, down = number % _COLUMNS * _PANEL, number // _COLUMNS * height
        panels.append(f'<g transform="translate({across},{down})">{_panel(results, name, methods)}</g>')
    rows = -(-len(names) // _COLUMNS)
    size = (_PANEL * _COLUMNS, height * rows + _LEGEND)
    legend = "grey: a seed; blue: the mean over seeds and its 95 % interval; dashed: the start"
    panels.append(f'<text class="tick" x="8" y="{size[1] - 8}">{legend}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}">'
            f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(panels)}</svg>\n')


def _panel(results: Results, name: str, methods: list[str]) -> str:
    figures = {method: results.figures[method][name] for method in methods if name in results.figures[method]}
    start = results.figures[START].get(name) if START in results.figures else None
    low, high = _range([*figures.values(), *([start] if start is not None else [])])

    def place(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_PANEL - _LEFT - _RIGHT)

    bottom = _TOP + _ROW * len(methods)
    better = METRIC_TEXTS[name].better if name in METRIC_TEXTS else 0
    aim = {1: " (more is better)", -1: " (less is better)", 0: ""}[better]
    drawn = [f'<text class="title" x="8" y="18">{escape(label_of(name))}<tspan class="tick" font-weight="normal">'
             f'{aim}</tspan></text>']
    for tick in nice_ticks(low, high, 4):
        x = f"{place(tick):.1f}"
        drawn.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP - 8}" y2="{bottom}"/>'
                     f'<text class="tick" x="{x}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>')
    if start is not None:
        x = f"{place(start.mean):.1f}"
        drawn.append(f'<line class="start" x1="{x}" x2="{x}" y1="{_TOP - 8}" y2="{bottom}"/>')
    for row, method in enumerate(methods):
        y = _TOP + _ROW * row + _ROW / 2
        drawn.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(method)}</text>')
        if method in figures:
            drawn.append(_row(figures[method], y, place))
    return "".join(drawn)


def _row(figure: Figure, y: float, place) -> str:
    dots = "".join(f'<circle class="seed" cx="{place(value):.1f}" cy="{y}" r="2.5"/>' for value in figure.values)
    half = figure.half_width
    line = "" if half is None else (f'<line class="interval" x1="{place(figure.mean - half):.1f}" '
                                    f'x2="{place(figure.mean + half):.1f}" y1="{y}" y2="{y}"/>')
    return f'{line}{dots}<circle class="mean" cx="{place(figure.mean):.1f}" cy="{y}" r="4"/>'


def _range(figures: list[Figure]) -> tuple[float, float]:
    """What an axis has to hold: all values and the ends of all intervals, with a margin."""
    ends = [value for figure in figures for value in figure.values]
    ends += [figure.mean + sign * (figure.half_width or 0.0) for figure in figures for sign in (-1, 1)]
    margin = (max(ends) - min(ends)) * 0.05 or abs(max(ends)) * 0.1 or 1.0
    return min(ends) - margin, max(ends) + margin
