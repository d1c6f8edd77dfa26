"""What a run was worth and what it cost: one static HTML page, and the table at the end of a run. Imports no torch.

The page loads nothing: style, plots (inline SVG) and texts are in the one file. All that comes from files is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from megakd.disk import write_text_atomic
from megakd.errors import ConfigError, DataError
from megakd.layout import Layout
from megakd.log import METRICS, read_metrics
from megakd.manifest import Manifest

_BOOKKEEPING = {"step", "tokens", "seconds", "non_finite"}
_OPEN_SAMPLES = 6
_SMOOTH_FROM = 30  # points from which a smoothed line is drawn over the single steps
_MOST_POINTS = 300
_MOST_RANK_COLUMNS = 8


@dataclass(frozen=True)
class MetricText:
    """How a metric of the summary is shown."""

    label: str
    help: str
    better: int
    """+1 where more is better, -1 where less is, 0 where neither."""
    detail: bool = False
    """Whether a comparison of many runs leaves it out of table and figure."""


METRIC_TEXTS = {
    "kl_to_teacher": MetricText("KL to the teacher", "KL(teacher || student) in nats a token, held-out answers", -1),
    "reverse_kl": MetricText("KL from the teacher", "KL(student || teacher), nats a token of its own answers", -1),
    "expected_advantage": MetricText(
        "Expected advantage", "of the teacher over its reference, on the student's own answers, nats a token", +1
    ),
    "reward_accuracy": MetricText(
        "Reward accuracy", "share of held-out pairs whose chosen answer has the higher mean log-probability", +1
    ),
    "relative_reward_accuracy": MetricText(
        "Relative reward accuracy", "the same for log-probabilities relative to the start model (as in DPO)", +1
    ),
    "nll_chosen": MetricText("NLL of the chosen answer", "nats a token, held-out rows", -1),
    "rouge_l": MetricText("ROUGE-L", "F1 of the model's answer against the row's; standard error over the prompts", +1),
    "rouge_l_seed_error": MetricText("ROUGE-L, error over seeds", "standard error of the seeds' means", 0, detail=True),
    "exact_match": MetricText("Exact match", "share of the answers that are the row's words", +1),
    "exact_match_seed_error": MetricText("Exact match, error over seeds", "standard error of the seeds' means", 0,
                                          detail=True),
    **{
        f"{name}_words_{length}": MetricText(f"{label}, references of {words} words", "", better, detail=True)
        for name, label, better in (("rouge_l", "ROUGE-L", +1), ("exact_match", "Exact match", +1),
                                    ("references", "Prompts", 0))
        for length, words in (("1_30", "1 to 30"), ("31_70", "31 to 70"), ("71_up", "more than 70"))
    },
    "answer_tokens": MetricText("Length of an answer", "tokens, mean", 0),
    "distinct_answers": MetricText("Distinct answers", "different answers over prompts: 1 where none comes twice", 0),
    "stopped": MetricText("Answers that stopped", "share that ended by themselves, not at the limit", 0,
                          detail=True),
    "pairs": MetricText("Pairs", "held-out rows with a rejected answer", 0, detail=True),
    "win_rate": MetricText(
        "Win rate", "share of prompts on which the judge prefers it to the stage's first model, ties half", +1
    ),
    "win_rate_ties": MetricText("Win rate: ties", "share of the verdicts", 0, detail=True),
    "win_rate_consistent": MetricText("Win rate: consistent", "share of prompts judged alike in both orders", 0,
                                      detail=True),
    "win_rate_tokens": MetricText("Win rate: length of an answer", "tokens, mean", 0, detail=True),
}


# ------------------------------------------------------------------------------------------------------------ summary
@dataclass(frozen=True)
class _Row:
    """One metric over the models: texts to show, and whether each model is better (+1) or worse (-1) than the first."""

    text: MetricText
    cells: list[str]
    verdicts: list[int]
    best: int | None


def _summary_rows(summary: Mapping[str, Mapping[str, Any]]) -> list[_Row]:
    """The known metrics in their order, then any other number. `X_error` is shown with X, as its standard error."""
    given = {name for metrics in summary.values() for name in metrics}
    others = {name for name in given - set(METRIC_TEXTS) if name.removesuffix("_error") not in given - {name}}
    rows = []
    for name in [*METRIC_TEXTS, *sorted(others)]:
        values = [_number(metrics.get(name)) for metrics in summary.values()]
        if all(value is None for value in values):
            continue
        text = METRIC_TEXTS[name] if name in METRIC_TEXTS else MetricText(name.replace("_", " "), "", 0)
        cells = [_show(metrics.get(name), metrics.get(f"{name}_error")) for metrics in summary.values()]
        gains = [0.0 if value is None or values[0] is None else text.better * (value - values[0]) for value in values]
        ranked = [(text.better * value, -number) for number, value in enumerate(values) if value is not None]
        best = -max(ranked)[1] if text.better and len(ranked) > 1 else None
        rows.append(_Row(text, cells, [(gain > 0) - (gain < 0) for gain in gains], best))
    return rows


def _number(entry: Any) -> float | None:
    """A finite number as such, anything else as None."""
    if isinstance(entry, bool) or not isinstance(entry, int | float) or not math.isfinite(entry):
        return None
    return float(entry)


def _show(value: Any, error: Any) -> str:
    if _number(value) is None:
        return "-"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
    return text if _number(error) is None else f"{text} ± {error:.4f}"


def console_table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The before/after table for the end of a run.

    Args:
        summary: model label -> metric -> number; the first model is what the others are held against.
    """
    directions, marks = {1: "↑", -1: "↓", 0: " "}, {1: "+", -1: "-", 0: " "}
    lines = [["", *(f"{label}  " for label in summary)]]
    for row in _summary_rows(summary):
        cells = [f"{cell} {marks[verdict]}" for cell, verdict in zip(row.cells, row.verdicts, strict=True)]
        lines.append([f"{row.text.label} {directions[row.text.better]}", *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        shown.append("  ".join([line[0].ljust(widths[0]), *cells]).rstrip())
    rule = "-" * max(map(len, shown))
    first = next(iter(summary))
    legend = f"↑ more is better, ↓ less is better; + better, - worse than {first}"
    return "\n".join([shown[0], rule, *shown[1:], rule, legend])


# -------------------------------------------------------------------------------------------------------------- plots
def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most `count` + 1 round numbers (1, 2 or 5 times a power of ten apart) that lie within [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _tick_text(value: float, ticks: Sequence[float]) -> str:
    """All the ticks of an axis with the decimals that tell them apart."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    largest = max(abs(tick) for tick in ticks)
    if largest >= 1e6 or 0 < step < 1e-4:
        return f"{value:.3g}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value + 0.0:,.{decimals}f}"


def line_plot(points: Sequence[tuple[int, float | None]], *, title: str) -> str:
    """A metric over the steps as SVG with axes, ticks and labels.

    A value of None breaks the line. A curve of many steps gets a smoothed line over the single ones. The title is
    followed by the first value and the mean of the last fifteenth.
    """
    width, height, left, right, top, bottom = 400, 210, 52, 12, 8, 36
    known = [(x, y) for x, y in points if y is not None]
    if not known:
        return f'<figure><figcaption>{escape(title)}</figcaption><p class="note">No finite value.</p></figure>'
    x_low, x_high = points[0][0], max(points[-1][0], points[0][0] + 1)
    y_low, y_high = min(y for _, y in known), max(y for _, y in known)
    margin = (y_high - y_low) * 0.06 or abs(y_high) * 0.1 or 1.0
    y_low, y_high = y_low - margin, y_high + margin

    def place(x: float, y: float) -> str:
        across = left + (x - x_low) / (x_high - x_low) * (width - left - right)
        return f"{across:.1f},{height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom):.1f}"

    drawn = []
    y_ticks, x_ticks = nice_ticks(y_low, y_high, 6), sorted({round(tick) for tick in nice_ticks(x_low, x_high, 5)})
    for tick in y_ticks:
        y = place(x_low, tick).split(",")[1]
        text = _tick_text(tick, y_ticks)
        drawn.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>'
                     f'<text x="{left - 6}" y="{float(y) + 3.5:.1f}" text-anchor="end">{text}</text>')
    for tick in x_ticks:
        x = place(tick, y_low).split(",")[0]
        drawn.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{height - bottom}" y2="{height - bottom + 4}"/>'
                     f'<text x="{x}" y="{height - bottom + 15}" text-anchor="middle">{tick:,}</text>')
    drawn.append(f'<path class="axis" d="M{left},{top}V{height - bottom}H{width - right}"/>'
                 f'<text x="{(left + width - right) / 2:.0f}" y="{height - 4}" text-anchor="middle">step</text>')
    smooth = len(known) >= _SMOOTH_FROM
    drawn += [f'<polyline class="{"raw" if smooth else "line"}" points="{" ".join(place(*point) for point in run)}"/>'
              if len(run) > 1 else _dot(place(*run[0])) for run in _runs(_thinned(points))]
    if smooth:
        drawn.append(f'<polyline class="line" points="{" ".join(place(*point) for point in _smoothed(known))}"/>')
    tail = [y for _, y in known[-max(1, len(known) // 15) :]]
    ends = f"{known[0][1]:.3g} → {math.fsum(tail) / len(tail):.3g}"
    return (f'<figure><figcaption>{escape(title)} <span class="ends">{ends}</span></figcaption>'
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)} by step, {ends}">'
            f'{"".join(drawn)}</svg></figure>')


def _dot(place: str) -> str:
    x, y = place.split(",")
    return f'<circle class="dot" cx="{x}" cy="{y}" r="2.5"/>'


def _runs(points: Sequence[tuple[int, float | None]]) -> list[list[tuple[int, float]]]:
    """The unbroken parts of a curve."""
    runs: list[list[tuple[int, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def _thinned(points: Sequence[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    """At most about 2 * _MOST_POINTS points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    kept: list[tuple[int, float | None]] = []
    size = math.ceil(len(points) / _MOST_POINTS)
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        known = [point for point in stretch if point[1] is not None]
        if len(known) < len(stretch):
            kept.append((stretch[0][0], None))
        if known:
            kept += sorted({min(known, key=lambda point: point[1]), max(known, key=lambda point: point[1])})
    return kept


def _smoothed(known: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A centred mean over about a fifteenth of the curve, so it does not lag. It is narrower towards the ends, and left
    out where too few steps are on one side."""
    sums = list(accumulate((y for _, y in known), initial=0.0))
    line = []
    for number in range(0, len(known), math.ceil(len(known) / _MOST_POINTS)):
        half = min(number, len(known) - 1 - number, len(known) // 30)
        if half >= len(known) // 90:
            mean = (sums[number + half + 1] - sums[number - half]) / (2 * half + 1)
            line.append((known[number][0], mean))
    return line


# --------------------------------------------------------------------------------------------------------------- page
@dataclass(frozen=True)
class _Stage:
    name: str
    manifest: Manifest | None
    metrics: list[dict[str, Any]]


def write_report(run_dir: Path | str) -> Path:
    """Writes `run_dir/report.html` from what the run has left so far, and returns its path.

    Reads recipe.yaml, summary.json, stages/*/manifest.json, stages/*/metrics.jsonl and stages/*/samples.jsonl; what is
    not there yet is said to be missing on the page.

    Raises:
        ConfigError: the folder is no run folder.
        DataError: one of the files cannot be read.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "recipe.yaml").is_file():
        raise ConfigError("run folder", str(run_dir), "holds no recipe.yaml", "Give the output folder of a run")
    recipe_text = (run_dir / "recipe.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(recipe_text)
    stages = _read_stages(run_dir, recipe)
    summary = _read_json(run_dir / "summary.json") if (run_dir / "summary.json").exists() else None
    name = str(recipe["name"]) if isinstance(recipe, dict) and "name" in recipe else run_dir.resolve().name
    recipe_html = f"<details><summary>recipe.yaml, resolved</summary><pre>{escape(recipe_text)}</pre></details>"
    sections = [_header(name, recipe, stages), _section("Before and after", _summary_html(summary)),
                _section("Curves", _curves_html(stages)), _section("Answers", _samples_html(run_dir)),
                *_answer_files_html(stages),
                _section("Layout", _layout_html(stages)), _section("Cost", _cost_html(stages)),
                _section("Versions", _versions_html(stages)), _section("Recipe", recipe_html)]
    page = (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(name)} - megakd</title><style>{_STYLE}</style></head>\n"
            f"<body><main>{''.join(sections)}</main></body></html>\n")
    write_text_atomic(run_dir / "report.html", page)
    return run_dir / "report.html"


def _read_stages(run_dir: Path, recipe: Any) -> list[_Stage]:
    """Stages in the recipe's order, then any other folder."""
    folders = {folder.name: folder for folder in sorted((run_dir / "stages").glob("*")) if folder.is_dir()}
    listed = recipe["stages"] if isinstance(recipe, dict) and isinstance(recipe.get("stages"), list) else []
    order = [stage["name"] for stage in listed if isinstance(stage, dict) and stage.get("name") in folders]
    order += [name for name in folders if name not in order]
    # The report's own stage is not done while it writes this.
    reports = {stage.get("name") for stage in listed if isinstance(stage, dict) and stage.get("kind") == "report"}
    order = [name for name in order if name not in reports]
    return [_Stage(name, Manifest.read(folders[name]),
                   read_metrics(folders[name] / METRICS) if (folders[name] / METRICS).exists() else [])
            for name in order]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(path, None, None, f"is not JSON ({error})", "Make the stage that writes it again") from error


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _header(name: str, recipe: Any, stages: Sequence[_Stage]) -> str:
    done = [stage.manifest for stage in stages if stage.manifest is not None]
    facts = []
    if done:
        finished = max(manifest.finished for manifest in done).replace("T", " ").replace("+00:00", " UTC")
        facts = [f"finished {finished}",
                 f"{_duration(sum(manifest.seconds for manifest in done))} in all",
                 f"{max(manifest.ranks for manifest in done)} ranks", f"megakd {done[-1].versions.get('megakd')}"]
    unfinished = [stage.name for stage in stages if stage.manifest is None]
    warning = _note(f"Not finished: {', '.join(unfinished)}.") if unfinished else ""
    return f'<header><h1>{escape(name)}</h1><p>{escape(" · ".join(facts))}</p>{warning}</header>\n'


def _summary_html(summary: Any) -> str:
    if not summary:
        return _note("summary.json is missing: the eval stage has not finished.")
    labels = list(summary)
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    rows = []
    words = {1: ('<span class="better">▲ better</span>'), -1: ('<span class="worse">▼ worse</span>'), 0: ""}
    for row in _summary_rows(summary):
        aim = {1: "more is better", -1: "less is better", 0: ""}[row.text.better]
        help_text = "; ".join(part for part in (row.text.help, aim) if part)
        cells = ""
        for number, (label, cell, verdict) in enumerate(zip(labels, row.cells, row.verdicts, strict=True)):
            strong = " class=best" if number == row.best else ""
            cells += f'<td data-label="{escape(label)}"{strong}>{escape(cell)}{words[verdict]}</td>'
        rows.append(f"<tr><th scope=row>{escape(row.text.label)}<small>{escape(help_text)}</small></th>{cells}</tr>")
    return (f'<table class="stack"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
            + _note(f"Better and worse are against {labels[0]}; the best of a row is bold."))


def _curves_html(stages: Sequence[_Stage]) -> str:
    parts = []
    for stage in stages:
        names = [name for name in dict.fromkeys(name for line in stage.metrics for name in line)
                 if name not in _BOOKKEEPING and any(_number(line.get(name)) is not None for line in stage.metrics)]
        if not names:
            continue
        names.sort(key=lambda name: name != "loss")
        plots = [line_plot([(line["step"], _number(line[name])) for line in stage.metrics if name in line],
                           title=name.replace("_", " ")) for name in names]
        parts.append(f'<h3>{escape(stage.name)}</h3><div class="plots">{"".join(plots)}</div>')
    return "".join(parts) or _note("No training stage has logged a step.")


def _samples_html(run_dir: Path) -> str:
    parts = []
    for path in sorted((run_dir / "stages").glob("*/samples.jsonl")):
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                sample = json.loads(text)
            except ValueError as error:
                raise DataError(path, number, None, f"is not JSON ({error})", "Make the eval stage again") from error
            if not isinstance(sample, dict) or "prompt" not in sample:
                raise DataError(path, number, "prompt", "is missing", "Make the eval stage again")
            answers = [f'<div class="answer"><h4>{escape(label)}</h4><p>{escape(str(answer))}</p></div>'
                       for label, answer in sample.items() if label != "prompt"]
            parts.append(f'<article><p class="prompt">{escape(_prompt_text(sample["prompt"]))}</p>'
                         f'<div class="answers">{"".join(answers)}</div></article>')
    if not parts:
        return _note("samples.jsonl is missing: the eval stage has not finished.")
    more = parts[_OPEN_SAMPLES:]
    rest = f"<details><summary>{len(more)} more</summary>{''.join(more)}</details>" if more else ""
    return "".join(parts[:_OPEN_SAMPLES]) + rest


def _answer_files_html(stages: Sequence[_Stage]) -> list[str]:
    """A section of the files for benchmarks' own judges, where a stage has written some."""
    rows = [
        [stage.name, label, f"stages/{stage.name}/{found['file']}", str(found["questions"]), str(found["answers"]),
         f"{found['answer_tokens']:.1f}", f"{found['stopped']:.0%}"]
        for stage in stages if stage.manifest is not None and stage.manifest.kind == "answers"
        for label, found in stage.manifest.metrics.items()
    ]
    head = ["stage", "model", "file", "questions", "answers", "tokens an answer", "stopped"]
    return [_section("Answers to benchmarks", _table(head, rows))] if rows else []


def _prompt_text(prompt: Any) -> str:
    """A prompt is a text or a list of messages."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], last_is_total: bool = False) -> str:
    """A plain table: texts to the left, the rest to the right. Cells are escaped."""
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join(f"<tr{' class=total' if last_is_total and number == len(rows) - 1 else ''}><th scope=row>"
                   f"{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
                   for number, row in enumerate(rows))
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _layout_html(stages: Sequence[_Stage]) -> str:
    """Each role's axes with the stages that it took part in, and for few ranks what each of them holds."""
    used: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for stage in stages:
        if stage.manifest is not None:
            for role, axes in stage.manifest.layout.items():
                sizes = (stage.manifest.ranks, axes["tensor"], axes["pipeline"], axes["context"])
                used.setdefault((role, sizes), []).append(stage.name)
    if not used:
        return _note("No finished stage says its layout.")
    layouts = [(role, Layout(*sizes), names) for (role, sizes), names in used.items()]
    rows = []
    for role, layout, names in layouts:
        sizes = (layout.world, layout.tensor, layout.pipeline, layout.context, layout.data)
        rows.append([role, *map(str, sizes), ", ".join(names)])
    text = _table(["role", "ranks", "tensor", "pipeline", "context", "data", "stages"], rows)
    world = max(layout.world for _, layout, _ in layouts)
    if world > _MOST_RANK_COLUMNS:
        return text
    unique = {(role, layout): None for role, layout, _ in layouts}
    places = [[role, *(_place(layout, rank) if rank < layout.world else "" for rank in range(world))]
              for role, layout in unique]
    return text + _table(["what it holds", *(f"rank {rank}" for rank in range(world))], places)


def _place(layout: Layout, rank: int) -> str:
    at = layout.coordinates(rank)
    parts = [("data", at.data, layout.data), ("pipeline", at.pipeline, layout.pipeline),
             ("tensor", at.tensor, layout.tensor), ("context", at.context, layout.context)]
    return ", ".join(f"{word} {number}" for word, number, size in parts if size > 1) or "whole model"


def _cost_html(stages: Sequence[_Stage]) -> str:
    done = [stage.manifest for stage in stages if stage.manifest is not None]
    if not done:
        return _note("No stage has finished.")
    whole = sum(manifest.seconds for manifest in done)
    rows = [[manifest.stage, manifest.kind, _duration(manifest.seconds), f"{_share(manifest.seconds, whole):.0%}",
             f"{manifest.tokens:,}" if manifest.tokens else "-", _speed(manifest.tokens, manifest.seconds),
             str(manifest.ranks)] for manifest in done]
    rows.append(["all", "", _duration(whole), "100%", f"{sum(m.tokens for m in done):,}", "", ""])
    return _table(["stage", "kind", "time", "share", "tokens", "tokens/s", "ranks"], rows, last_is_total=True)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.0f}" if tokens and seconds > 0 else "-"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _versions_html(stages: Sequence[_Stage]) -> str:
    """One row a package; several versions where stages ran with different ones."""
    found: dict[str, list[str]] = {}
    for stage in stages:
        if stage.manifest is not None:
            for name, version in stage.manifest.versions.items():
                text = version if version is not None else "not installed"
                if text not in found.setdefault(name, []):
                    found[name].append(text)
    if not found:
        return _note("No stage has finished.")
    return _table(["package", "version"], [[name, ", ".join(texts)] for name, texts in found.items()])


_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1d2125; --soft: #5f6872; --rule: #e1e4e8;
  --accent: #1f6fb2; --raw: #a9c9e6; --good: #1a7f4b; --bad: #b3382c; --tint: #f1f5f9 }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e7eaed; --soft: #9aa4ae;
  --rule: #30363c; --accent: #6cb2ec; --raw: #36536b; --good: #5cc48d; --bad: #ef8276; --tint: #22282e } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font-variant-numeric: tabular-nums;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif }
main { max-width: 1040px; margin: 0 auto; padding: 28px 20px 60px }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px }
header p { color: var(--soft); margin: 0 }
h2 { font-size: 1.15rem; margin: 0 0 14px }
h3 { font-size: 1rem; margin: 22px 0 8px }
h3:first-of-type { margin-top: 0 }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 20px; margin-top: 18px }
.note { color: var(--soft); font-size: .87rem; margin: 10px 0 0 }
table { border-collapse: collapse; width: 100% }
.wide { overflow-x: auto }
.wide + .wide { margin-top: 18px }
th, td { padding: 7px 10px; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top }
th:first-child { text-align: left; padding-left: 0 }
thead th { color: var(--soft); font-weight: 600; font-size: .85rem }
.wide td, .wide thead th { text-align: left; white-space: nowrap }
tbody th { font-weight: 600 }
tbody tr:last-child > * { border-bottom: 0 }
.total > * { border-top: 2px solid var(--rule) }
th small { display: block; color: var(--soft); font-weight: 400; font-size: .82rem; max-width: 30em }
.best { font-weight: 700 }
.better, .worse { display: block; font-size: .78rem; font-weight: 400; color: var(--good) }
.worse { color: var(--bad) }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 14px 22px }
figure { margin: 0; break-inside: avoid; min-width: 0 }
figcaption { font-weight: 600; font-size: .88rem }
.ends { color: var(--soft); font-weight: 400 }
svg { display: block; width: 100%; height: auto }
svg text { fill: var(--soft); font-size: 11px }
.grid { stroke: var(--rule) }
.axis { stroke: var(--soft); fill: none }
.line, .raw { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round }
.raw { stroke: var(--raw); stroke-width: 1 }
.dot { fill: var(--accent) }
article { border-top: 1px solid var(--rule); padding: 14px 0; break-inside: avoid }
article:first-of-type { border-top: 0; padding-top: 0 }
.prompt { font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 8px }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr)); gap: 10px }
.answer { background: var(--tint); border-radius: 8px; padding: 8px 12px; min-width: 0 }
.answer h4 { margin: 0; color: var(--soft); font-size: .78rem; font-weight: 600 }
.answer p { margin: 2px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .92rem }
summary { cursor: pointer; color: var(--accent) }
pre { overflow-x: auto; font-size: .82rem; line-height: 1.4 }
@media (max-width: 620px) {
  main { padding: 18px 10px 40px } section { padding: 14px }
  .stack thead { display: none } .stack, .stack tbody { display: block }
  .stack tr { display: grid; grid-template-columns: repeat(auto-fit, minmax(80px, 1fr)); padding: 8px 0;
    border-bottom: 1px solid var(--rule) }
  .stack tr:last-child { border-bottom: 0 }
  .stack th { grid-column: 1 / -1; padding: 0 0 4px; border: 0; text-align: left }
  .stack td { border: 0; padding: 0; text-align: left }
  .stack td::before { content: attr(data-label); display: block; color: var(--soft); font-weight: 400;
    font-size: .78rem } }
@media print {
  :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --soft: #444; --rule: #ddd; --accent: #1f6fb2;
    --raw: #a9c9e6; --good: #1a7f4b; --bad: #b3382c; --tint: #f3f3f3 }
  html { font-size: 12px } body { font-size: 11px } main { max-width: none; padding: 0 }
  section { border: 0; padding: 8px 0; margin: 0 } h2, h3 { break-after: avoid }
  .plots { grid-template-columns: repeat(3, 1fr) }
  .answers { grid-template-columns: repeat(auto-fit, minmax(120px, 1fr)) } }
"""
