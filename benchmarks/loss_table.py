"""The table and the plots of benchmarks/losses.py, from its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.plots import Bar, bar_plot

MIB = 2**20


def table(record: dict[str, Any]) -> str:
    """One line for each loss, TP size and implementation."""
    titles = ["loss", "TP", "implementation", "chunk", "seconds [quartiles]", "x GEMMs", "x megakd", "peak MiB",
              "collectives", "MiB sent", "err value", "d(hidden)", "d(head)", "note"]
    lines: list[list[str]] = [titles]
    missing: dict[tuple[str, int], dict[str, None]] = {}
    for row in record["results"]:
        start = [row["loss"], str(row["tp"]), row["name"]]
        if "unavailable" in row:
            missing.setdefault((row["unavailable"], row["tp"]), {})[row["name"]] = None
            continue
        seconds = row["seconds"]
        spread = f"{seconds['first_quartile']:.3g}-{seconds['third_quartile']:.3g}"
        cells = [_setting(row), f"{seconds['median']:.3g} [{spread}]", f"{row['over_limit']:.2f}",
                 f"{row['over_megakd']:.2f}"]
        if "errors" in row:
            calls = row["collectives"]["calls"]
            errors = [f"{row['errors'][name]:.1e}" for name in ("value", "hidden", "head")]
            cells += [f"{row['peak_extra_bytes'] / MIB:.4g}", str(sum(calls.values())),
                      f"{row['collectives']['bytes'] / MIB:.3g}", *errors]
        else:
            cells += ["-"] * 6
        lines.append([*start, *cells, row["note"]])
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles) - 1)]
    shown, before = [], None
    for number, line in enumerate(lines):
        if number and line[:2] != before:
            shown.append("")
        before = line[:2]
        cells = [cell.ljust(width) if column in (0, 2, 3) else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(line, widths, strict=False))]
        shown.append("  ".join([*cells, line[-1]]).rstrip())
    notes = [f"Not run at TP {tp}: {'; '.join(names)}: {reason}." for (reason, tp), names in missing.items()]
    cores = record["machine"]["cores"]
    if max(record["options"]["tp"]) > cores:
        notes.append(f"TP beyond the machine's {cores} cores: ranks share them, times are no speed-up.")
    notes.append("x GEMMs, x megakd: medians of the ratios within a round. One thread a rank; TP > 1: slowest rank.")
    notes.append("Peak: bytes of one rank beyond inputs and returned gradients. Errors: largest, against float64.")
    return "\n".join([*shown, "", *notes])


def _setting(row: dict[str, Any]) -> str:
    """The chunk in words."""
    setting = row["setting"]
    if setting is None:
        return "its default" if row["name"] == "megakd" else "all tokens"
    if isinstance(setting, int):
        return f"{setting} {row['unit']}"
    return " x ".join("all" if size is None else str(size) for size in setting)


def write_plots(record: dict[str, Any], out: Path) -> list[Path]:
    """One SVG a metric, named after the JSON file."""
    options = record["options"]
    shape = f"T {options['tokens']}, V {options['vocab']}, H {options['hidden']}; {record['machine']['cpu']}"
    written = []
    for metric, (title, unit, log) in _PLOTS.items():
        groups = []
        for loss, tp in dict.fromkeys((row["loss"], row["tp"]) for row in record["results"]):
            rows = [row for row in record["results"] if (row["loss"], row["tp"]) == (loss, tp) and "seconds" in row]
            bars = [_bar(metric, row) for row in rows if metric == "time" or "errors" in row]
            if bars and (metric != "collectives" or tp > 1):
                groups.append((f"{loss}, TP {tp}", bars))
        if groups:
            path = out.with_name(f"{out.stem}_{metric}.svg")
            path.write_text(bar_plot(title, f"{unit}. {shape}", groups, log=log), encoding="utf-8")
            written.append(path)
    return written


_PLOTS = {
    "time": ("Time, forward and backward", "over that of the bare matrix products, median of the ratios", False),
    "memory": ("Peak extra memory", "MiB of one rank, without inputs and returned gradients", True),
    "collectives": ("Collectives, forward and backward", "number of calls", False),
    "error": ("Largest relative error", "of value, d(hidden) and d(head) against float64", True),
}


def _bar(metric: str, row: dict[str, Any]) -> Bar:
    match metric:
        case "time":
            value, text = row["over_limit"], f"{row['over_limit']:.2f} ({row['seconds']['median']:.3g} s)"
        case "memory":
            value = row["peak_extra_bytes"] / MIB
            text = f"{value:,.4g}"
        case "collectives":
            value = sum(row["collectives"]["calls"].values())
            text = f"{value} ({row['collectives']['bytes'] / MIB:.3g} MiB)"
        case _:
            value = max(row["errors"].values())
            text = f"{value:.1e}"
    return Bar(row["name"], value, text, strong=row["name"] == "megakd")
