"""The page of tools/scaling_study.py: figures, each with what it shows, in one file that loads nothing."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megakd.hf.families import Architecture
from megakd.planning.cluster import Cluster
from megakd.planning.figures import STYLE, line_chart, stacked_bars
from megakd.planning.sizes import parameter_count

Row = Mapping[str, Any]
TIME_PARTS = {
    "student: layers": ("student: layers", "student: products", "student: attention", "student: other kernels",
                        "student: calls"),
    "loss": ("time: loss",), "teachers: forward": (": forward",), "teachers: scoring before": ("scoring seconds",),
    "hidden states' way": (": hidden states",), "pipeline's wait": ("pipeline's wait",),
    "student: messages": ("tensor messages", "messages between stages", "gradients between replicas",
                          "parameters to replicas"),
    "optimizer": ("optimizer",),
}
MEMORY_PARTS = {
    "weights": ("memory: weights", "weights in fp8"), "gradients": ("memory: gradients",),
    "optimizer": ("optimizer",), "teachers: weights": (": weights",), "teachers: heads": ("head for the loss",),
    "hidden states": (": hidden states", "rows to send"), "activations": ("activations", ": forward"),
    "loss": ("memory: loss", "loss positions", "head's gradient", "embedding's gradient"),
}
_ORDER = tuple(TIME_PARTS)
LISTED = (64, 1024)
"""Likely tokens a position of the top-k lists that are drawn."""
LIST_BYTES = 6
"""Of a listed token: its number (4) and its log-probability in bf16."""
_STYLE = STYLE + (
    "body{font:15px/1.5 sans-serif;color:#222;margin:0;background:#fff}main{max-width:900px;margin:0 auto;"
    "padding:24px 16px}h1{font-size:26px}h2{font-size:19px;margin:36px 0 4px}figure{margin:12px 0}.note{color:#555}"
)


def page(cluster: Cluster, rows: Sequence[Row], measured: Sequence[Row], options: argparse.Namespace,
         models: Mapping[str, Architecture]) -> str:
    """The whole page.

    Args:
        cluster: that the rows are of.
        rows: of the study; none in the measured mode.
        measured: of the measured mode; none in the study.
        options: the command line.
        models: name -> sizes.
    """
    fitting = [row for row in rows if row["place"] != "none fits"]
    sections = [f"<h1>A training step at scale: {escape(cluster.name)}</h1>"]
    if rows:
        sections.append(f'<p class="note">From arithmetic, with the rates of {escape(Path(options.cluster).name)}: '
                        "nothing here was measured. Every case has the best layout that the search finds. The method "
                        f"is {options.method} where no other is named; ADPA has a teacher and a reference of the "
                        "teacher's size.</p>")
    if fitting:
        sections += [_time(fitting, options), _memory(fitting, options), _hours(fitting, options),
                     _shares(fitting, options), _weak(fitting, options), _strong(fitting, options),
                     _varied(fitting, options), _signals(cluster, options, models)]
        sections.append(_missing(rows))
    if measured:
        sections.append(_measured(measured))
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Scaling study</title>'
            f"<style>{_STYLE}</style></head>\n<body><main>{''.join(filter(None, sections))}</main></body></html>\n")


def _missing(rows: Sequence[Row]) -> str:
    """The cases that have no row in some place."""
    def names(chosen: Iterable[Row]) -> str:
        return "; ".join(dict.fromkeys(
            f"{_label(row)} on {row['world']:,} GPUs ({row['method']}, {row['groups']:,} prompts a step of "
            f"{row['length']:,} tokens)" for row in chosen))

    none = [row for row in rows if row["place"] == "none fits"]
    places: dict[tuple, set[str]] = {}
    for row in rows:
        places.setdefault(_key(row), set()).add(row["place"])
    before = [row for row in rows if row["place"] == "before" and "beside" not in places[_key(row)]]
    texts = [f"No layout that the search looks at fits for {names(none)}."] if none else []
    texts += [f"Only with teachers that score before: {names(before)}."] if before else []
    return _section("What does not fit", "", " ".join(texts)) if none or before else ""


def _key(row: Row) -> tuple:
    return tuple(row[name] for name in ("figure", "teacher", "student", "method", "world", "groups", "length",
                                        "vocabulary", "dtype"))


def _section(title: str, figure: str, text: str) -> str:
    drawn = f"<figure>{figure}</figure>" if figure else ""
    return f"<h2>{escape(title)}</h2>{drawn}<p>{escape(text)}</p>\n"


def grouped(row: Row, prefix: str, groups: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """A row's parts put together as the figures show them; what no group names is `other`. The sum stays."""
    found = dict.fromkeys([*groups, "other"], 0.0)
    for name, value in row.items():
        if name.startswith(prefix) and value:
            found[next((group for group, ends in groups.items() if name.endswith(tuple(ends))), "other")] += value
    return {name: value for name, value in found.items() if value}


def _times(row: Row) -> dict[str, float]:
    return grouped(row, "time: ", TIME_PARTS) | (
        {"teachers: scoring before": row["scoring seconds"]} if row["scoring seconds"] else {})


def _of(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def _pairs(rows: Sequence[Row], options: argparse.Namespace, place: str = "beside") -> list[Row]:
    return _of(rows, figure="weak", world=options.world, place=place)


def _label(row: Row) -> str:
    return f"{row['teacher']} into {row['student']}"


def _time(rows: Sequence[Row], options: argparse.Namespace) -> str:
    bars = [(f"{_label(row)}, {row['place']}: {row['seconds']:.3g} s",
             {part: 100 * seconds / row["seconds"] for part, seconds in _times(row).items()})
            for row in _of(rows, figure="weak", world=options.world)]
    own = _of(_pairs(rows, options), teacher=options.teacher, student=options.student)
    text = (f"{options.world} GPUs, {options.groups_a_gpu} prompts a GPU and step. \"Beside\": teachers run on the "
            "same GPUs in the same step; \"before\": they have scored the answers in a stage of their own, whose time "
            "is in the bar.")
    if own:
        share = _times(own[0]).get("teachers: forward", 0.0) / own[0]["seconds"]
        text += (f" Of {_label(own[0])} the teachers' forward passes are {share:.0%} of the step, the loss "
                 f"{_times(own[0]).get('loss', 0.0) / own[0]['seconds']:.1%}.")
    return _section("Time of a step", stacked_bars("% of a step", bars, _ORDER, sums=False), text)


def _memory(rows: Sequence[Row], options: argparse.Namespace) -> str:
    bars = [(f"{_label(row)}, {row['place']}", grouped(row, "memory: ", MEMORY_PARTS))
            for row in _of(rows, figure="weak", world=options.world)]
    return _section("Memory of the fullest GPU", stacked_bars("GiB", bars), (
        f"{options.world} GPUs, at the fullest moment of a step. The search takes the quickest layout that fits, so it "
        "fills what there is: a small bar is a case that gains nothing from more memory."))


def _hours(rows: Sequence[Row], options: argparse.Namespace) -> str:
    bars, ratios = [], []
    for row in _pairs(rows, options):
        for other in _of(_pairs(rows, options, "before"), teacher=row["teacher"], student=row["student"]):
            hour = other["GPU-hours"] / other["seconds"]  # of a step's second on all GPUs
            student = hour * other["training seconds"]
            both = {"student": student, "teachers": hour * other["scoring seconds"]}
            bars += [(f"{_label(row)}, beside", _student_and_teachers(row)), (f"{_label(row)}, separate", {
                "student": student, "teachers": other["separate: GPU-hours"] - student}),
                (f"{_label(row)}, before", both)]
            ratios.append((row["GPU-hours"] / other["GPU-hours"], _label(row)))
    text = (f"For {options.tokens:.3g} student tokens on {options.world} GPUs. \"Separate\" are teachers on GPUs of "
            "their own that keep pace with the student and send hidden states over the network; the engine does not "
            "have this, it is counted to compare. Scores made before can be used again: a second training on the same "
            "answers pays the student's part alone.")
    if ratios:
        text += (f" Beside costs {min(ratios)[0]:.2f} ({min(ratios)[1]}) to {max(ratios)[0]:.2f} ({max(ratios)[1]}) "
                 "times what scoring before costs; files are not counted.")
    return _section("GPU-hours, and where the teachers run", stacked_bars("GPU-hours", bars), text)


def _student_and_teachers(row: Row) -> dict[str, float]:
    parts = _times(row)
    teachers = parts.get("teachers: forward", 0.0) + parts.get("hidden states' way", 0.0)
    share = teachers / row["seconds"]
    return {"student": row["GPU-hours"] * (1 - share), "teachers": row["GPU-hours"] * share}


def _series(rows: Sequence[Row], value) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        series.setdefault(_label(row), []).append((row["world"], value(row)))
    return series


def _messages(row: Row) -> float:
    return sum(value for name, value in row.items() if name.startswith("messages: ")) / row["training seconds"]


def _shares(rows: Sequence[Row], options: argparse.Namespace) -> str:
    mine = _of(rows, figure="weak", place="beside", student=options.student)
    if not mine:
        return ""
    own = _of(mine, teacher=options.teacher) or mine
    first, last = (min(own, key=lambda row: row["world"]), max(own, key=lambda row: row["world"]))
    text = (f"Share of a step in which messages travel, student {options.student}: tensor groups' sums of student and "
            "teachers, stages' messages, gradients and parameters that no computation hides, and the teachers' hidden "
            f"states. With equal work a GPU it is {_messages(first):.0%} on {first['world']:,} GPUs and "
            f"{_messages(last):.0%} on {last['world']:,} for {_label(last)}. It jumps where the search changes the "
            "layout.")
    return _section("Communication", line_chart("GPUs", "share of a step, %", _series(
        mine, lambda row: 100 * _messages(row))), text)


def _weak(rows: Sequence[Row], options: argparse.Namespace) -> str:
    mine = _of(rows, figure="weak", place="beside", student=options.student)
    if not mine:
        return ""
    series = _series(mine, lambda row: row["tokens a second"] / row["world"])
    falls = {name: sorted(line)[-1][1] / max(y for _, y in line) for name, line in series.items()}
    told = ", ".join(f"{share:.0%} ({name})" for name, share in falls.items())
    text = (f"Equal work a GPU: {options.groups_a_gpu} prompts each, student {options.student}. A flat line is perfect "
            f"scaling. On the most GPUs the rate is {told} of its best.")
    return _section("Weak scaling", line_chart("GPUs", "student tokens a second and GPU", series, log_y=True), text)


def _strong(rows: Sequence[Row], options: argparse.Namespace) -> str:
    mine = sorted(_of(rows, figure="strong", place="beside"), key=lambda row: row["world"])
    if len(mine) < 2:
        return ""
    first = mine[0]
    real = [(row["world"], row["tokens a second"]) for row in mine]
    ideal = [(row["world"], first["tokens a second"] * row["world"] / first["world"]) for row in mine]
    kept = real[-1][1] / ideal[-1][1]
    half = [world for (world, rate), (_, best) in zip(real, ideal, strict=True) if rate >= best / 2]
    text = (f"Equal work in all: {options.strong_groups} prompts a step ({first['tokens a step']:,.0f} tokens), "
            f"{_label(first)}. On {mine[-1]['world']:,} GPUs {kept:.0%} of the ideal is left; up to {max(half):,} at "
            f"least half. The student's layout goes from {first['layout']} to {mine[-1]['layout']}: with so many "
            "GPUs a prompt is shared by many, which wait for one another and send more for the same work.")
    return _section("Strong scaling", line_chart("GPUs", "student tokens a second", {
        "planned": real, "ideal": ideal}, log_y=True, dashed=("ideal",)), text)


def _varied(rows: Sequence[Row], options: argparse.Namespace) -> str:
    names = {"length": lambda row: f"{row['length']:,} tokens",
             "vocabulary": lambda row: f"{row['vocabulary']:,} words",
             "precision": lambda row: row["dtype"], "method": lambda row: row["method"]}
    bars = [(f"{figure}: {label(row)}", {part: 1e6 * seconds * row["world"] / row["tokens a step"]
                                         for part, seconds in _times(row).items()})
            for figure, label in names.items() for row in rows
            if row["figure"] == figure and (row["place"] == "beside" or row["method"] in ("sft",))]
    if not bars:
        return ""
    text = (f"{options.teacher} into {options.student} on {options.world} GPUs, teachers beside: GPU-time for a "
            "million student tokens, so that steps of different sizes compare. Attention grows with the length. The "
            "vocabulary touches the loss alone, and no message (docs/cluster.md); where other parts change with it, "
            "the search has found another layout to be quicker. DPO's reference is of the student's "
            "size, SFT has no teacher.")
    return _section("Length, vocabulary, precision, method",
                    stacked_bars("GPU-seconds for a million student tokens", bars, _ORDER), text)


def _signals(cluster: Cluster, options: argparse.Namespace, models: Mapping[str, Architecture]) -> str:
    words = [2.0**power * 1000 for power in range(4, 9)]
    bytes_of = {"logits, bf16": [(count, 2 * count) for count in words]}
    for name in dict.fromkeys((options.teachers[0], options.teacher, options.teachers[-1])):
        bytes_of[f"hidden states of {name}"] = [(count, 2.0 * models[name].hidden_size) for count in words]
    for listed in LISTED:
        bytes_of[f"top {listed}"] = [(count, float(LIST_BYTES * listed)) for count in words]
    teacher = models[options.teacher]
    hidden, vocabulary = teacher.hidden_size, teacher.vocab_size
    rates = cluster.device.rates["bf16" if "bf16" in cluster.device.rates else "fp32"]
    speed = rates.peak_tflops * 1e12 * rates.efficiency
    network = (cluster.network_link or cluster.node_link).gb_s * 1e9
    again, forward = 2.0 * hidden * vocabulary, 2.0 * parameter_count(teacher)
    us = {"hidden": 1e6 * (2 * hidden / network), "head": 1e6 * again / speed, "logits": 1e6 * 2 * vocabulary / network}
    ahead = "less" if us["hidden"] + us["head"] < us["logits"] else "more"
    text = ("A hidden state is smaller than logits wherever the vocabulary is larger than the teacher's width (for "
            f"{options.teacher} {hidden:,} against {vocabulary:,}: {vocabulary / hidden:.0f} times fewer bytes). A "
            f"list of k tokens is smaller than a hidden state below k = width / 3 ({hidden // 3:,}), but no longer the "
            f"whole distribution. The head that is applied again costs {again / 1e9:.1f} GFLOP a token, "
            f"{again / forward:.1%} of the teacher's forward pass. On this cluster a token's hidden state takes "
            f"{us['hidden']:.2f} us of one GPU's network and {us['head']:.2f} us of its arithmetic, {ahead} than the "
            f"{us['logits']:.2f} us of its logits; the student's tensor group shares both, and logits would also have "
            "to be held.")
    return _section("Hidden states, logits or top-k", line_chart(
        "words of the vocabulary", "bytes a token", bytes_of, log_y=True), text)


def _measured(rows: Sequence[Row]) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = f"{row['method']}, TP{row['tensor']} x DP{row['world'] // row['tensor']}"
        series.setdefault(name, []).append((row["planned seconds"], row["measured seconds"]))
    every = [x for line in series.values() for x, _ in line]
    series["as planned"] = [(min(every), min(every)), (max(every), max(every))]
    ratios = sorted(row["measured seconds"] / row["planned seconds"] for row in rows)
    text = (f"{len(rows)} real training steps on this machine's CPU, the median of {rows[0]['steps']} each. Measured "
            f"is {ratios[0]:.2f} to {ratios[-1]:.2f} times the planned time, in the middle "
            f"{ratios[len(ratios) // 2]:.2f}. A point above the line took longer than planned.")
    return _section("Measured and planned", line_chart(
        "planned seconds a step", "measured seconds a step", series, log_y=True, dashed=("as planned",),
        dots=[name for name in series if name != "as planned"], integers=False), text)
