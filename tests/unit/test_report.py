"""The report of a made-up run: complete, self-contained, escaped, well-formed."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megakd import report
from megakd.errors import ConfigError, DataError
from megakd.manifest import Manifest, versions
from megakd.report import console_table, line_plot, nice_ticks, write_report

SUMMARY = {
    "start": {"kl_to_teacher": 1.2345, "expected_advantage": -0.031, "reward_accuracy": 0.531, "nll_chosen": 2.871,
              "rouge_l": 0.183},
    "dckd": {"kl_to_teacher": 0.412, "expected_advantage": 0.0123, "reward_accuracy": 0.594, "nll_chosen": 2.013,
             "rouge_l": 0.262},
    "final": {"kl_to_teacher": 0.451, "expected_advantage": 0.0872, "reward_accuracy": 0.641, "nll_chosen": 2.107,
              "rouge_l": 0.171},
}
EVIL = "<script>alert('x')</script> & \"quotes\""
LAYOUT = {"student": {"tensor": 2, "pipeline": 1, "context": 1, "data": 1},
          "teacher": {"tensor": 1, "pipeline": 2, "context": 1, "data": 1},
          "reference": {"tensor": 1, "pipeline": 1, "context": 1, "data": 2}}
STAGES = [("teacher_dpo", "dpo", 40, ("teacher", "reference")), ("dckd", "distill", 60, ("student", "teacher")),
          ("rollouts", "generate", 0, ("student",)), ("adpa", "distill", 400, ("student", "teacher", "reference")),
          ("eval", "eval", 0, ("student", "teacher", "reference")), ("export", "export", 0, ("student",))]
ANSWERS = [
    ("Why is the sky blue?", "Because it is.", "The sky is blue because of the air.",
     "Air scatters blue light more than red light, so blue comes from everywhere in the sky.",
     "Air molecules scatter short wavelengths of sunlight much more strongly than long ones."),
    ("Answer in one word: which metal is liquid at room temperature?", "Metals are many and they are " * 4, "Mercury.",
     "Mercury", "Mercury"),
    (EVIL, EVIL, EVIL, EVIL, EVIL),
]


def make_run(folder: Path) -> Path:
    """Writes a run folder as a finished run leaves it."""
    rng = random.Random(0)
    folder.mkdir()
    listed = "\n".join(f"- {{name: {name}, kind: {kind}}}" for name, kind, _, _ in STAGES)
    listed += "\n- {name: report, kind: report, more: 1}"
    (folder / "recipe.yaml").write_text(f"name: quickstart\n# {EVIL}\nstages:\n{listed}\n")
    (folder / "stages" / "report").mkdir(parents=True)  # as it is while the stage runs
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    for number, (name, kind, steps, roles) in enumerate(STAGES):
        stage = folder / "stages" / name
        stage.mkdir(parents=True)
        lines = []
        for step in range(steps):
            fall = math.exp(-6 * step / steps)
            line = {"step": step, "loss": 0.6 + 1.8 * fall + rng.gauss(0, 0.08),
                    "sft_loss": 1.9 + 0.9 * fall + rng.gauss(0, 0.1),
                    "advantage": None if step == 30 else 0.08 * (1 - fall) + rng.gauss(0, 0.01),
                    "grad_norm": 3 + 4 * fall + rng.gauss(0, 0.3), "lr": 1e-5 * (1 - step / steps), "tokens": 2000,
                    "seconds": 0.7}
            if step == 30:
                line["non_finite"] = {"advantage": "nan"}
            if step % 10 == 0:
                line["seldom"] = step * 123456.0
            lines.append(json.dumps(line))
        if lines:
            (stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        Manifest(stage=name, kind=kind, fingerprint="0" * 64, inputs={}, config={}, versions=versions(),
                 layout={role: LAYOUT[role] for role in roles}, ranks=2, started=f"2026-01-01T10:0{number}:00Z",
                 finished=f"2026-01-01T10:0{number}:50Z", seconds=12.0 + 40 * steps / 60, tokens=2000 * steps,
                 metrics={}).write(stage)
    names = ("prompt", "start", "dckd", "final", "chosen")
    rows = [dict(zip(names, answers, strict=True)) for answers in ANSWERS * 3]
    rows[1]["prompt"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": rows[1]["prompt"]}]
    (folder / "stages" / "eval" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class _Checker(HTMLParser):
    """Every tag closed in order; collects the tags and the visible text."""

    VOID = frozenset({"meta", "line", "path", "polyline", "circle"})

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(name in ("src", "href", "onload", "onclick") for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def test_a_finished_run(tmp_path):
    path = write_report(make_run(tmp_path / "quickstart"))
    page = path.read_text(encoding="utf-8")
    checked = _Checker(page)
    text = " ".join(checked.text)
    assert path == tmp_path / "quickstart" / "report.html" and page.startswith("<!DOCTYPE html>")
    assert "script" not in checked.tags and "<script" not in page and EVIL in text  # shown, not run
    assert "Not finished" not in text
    assert not re.search(r"https?:|//|url\(|@import", page.replace("</", "<"))
    for words in ["quickstart", "KL to the teacher", "1.2345", "0.6410", "▲ better", "▼ worse", "sft loss", "seldom",
                  "Air scatters blue light", "system: Be brief.", "megatron-core", "tensor 1", "pipeline 1", "data 1",
                  "2 ranks", "800,000", "69%", "recipe.yaml, resolved", "3 more"]:
        assert words in text, words
    assert checked.tags.count("svg") == 3 * 6  # three training stages; six metrics each
    assert len(page) < 300_000
    order = [text.index(f" {name} ") for name in ("teacher_dpo", "dckd", "rollouts", "adpa", "export")]
    assert order[0] < order[-1]


def test_an_unfinished_run_says_what_is_missing(tmp_path):
    run = make_run(tmp_path / "quickstart")
    (run / "summary.json").unlink()
    (run / "stages" / "eval" / "samples.jsonl").unlink()
    (run / "stages" / "eval" / "manifest.json").unlink()
    text = " ".join(_Checker(write_report(run).read_text()).text)
    assert "summary.json is missing" in text and "samples.jsonl is missing" in text and "Not finished: eval." in text
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.yaml").write_text("stages: []\n")
    text = " ".join(_Checker(write_report(empty).read_text()).text)
    assert "No stage has finished." in text and "No training stage has logged a step." in text


def test_refuses_what_is_no_run_or_unreadable(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no recipe\.yaml"):
        write_report(tmp_path)
    run = make_run(tmp_path / "quickstart")
    (run / "stages" / "eval" / "samples.jsonl").write_text('{"prompt": "a"}\n{"start": "b"}\n')
    with pytest.raises(DataError, match=r"samples.jsonl:2: field 'prompt': is missing"):
        write_report(run)
    (run / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary\.json: is not JSON"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_console_table():
    table = console_table(SUMMARY)
    lines = table.splitlines()
    assert lines[0].split() == ["start", "dckd", "final"]
    kl = next(line for line in lines if line.startswith("KL to the teacher ↓"))
    assert kl.split()[-5:] == ["1.2345", "0.4120", "+", "0.4510", "+"]
    assert "better" in lines[-1] and len({len(line) for line in lines if set(line) == {"-"}}) == 1
    worse = console_table({"a": {"rouge_l": 0.5, "pairs": 1000, "x_error": 2.0}, "b": {"rouge_l": 0.25}})
    assert re.search(r"ROUGE-L ↑ +0.5000 +0.2500 -", worse) and re.search(r"Pairs +1,000 +-", worse)
    assert re.search("x error +2.0000", worse)
    estimate = console_table({"a": {"rouge_l": 0.5, "rouge_l_error": 0.01}, "b": {"rouge_l": 1, "rouge_l_error": None}})
    assert "0.5000 ± 0.0100" in estimate and "error" not in estimate


@pytest.mark.parametrize("low, high", [(0, 1), (-0.013, 0.08), (0.1, 0.1004), (3, 4e6), (0, 7), (-1e-7, 2e-7)])
def test_ticks_are_round_few_and_inside(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 6 and all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks)
    step = ticks[1] - ticks[0]
    assert f"{step:.0e}"[0] in "125"
    texts = [report._tick_text(tick, ticks) for tick in ticks]
    assert len(set(texts)) == len(texts)


def _points(svg: str) -> list[list[tuple[float, float]]]:
    lines = re.findall('points="([^"]*)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in points.split()] for points in lines]


def test_plot_geometry():
    ((first, middle, last),) = _points(line_plot([(0, 1.0), (5, 3.0), (10, 2.0)], title="loss"))
    assert first[0] < middle[0] < last[0] and middle[0] - first[0] == pytest.approx(last[0] - middle[0], abs=0.11)
    assert middle[1] < last[1] < first[1]  # SVG counts downwards
    assert last[1] == pytest.approx((first[1] + middle[1]) / 2, abs=0.11)


def test_plot_of_odd_curves():
    gap = line_plot([(0, 1.0), (1, 2.0), (2, None), (3, 1.0), (4, 2.0), (5, None), (6, 3.0)], title="a<b")
    assert [len(run) for run in _points(gap)] == [2, 2] and gap.count("<circle") == 1 and "a&lt;b" in gap
    assert "No finite value" in line_plot([(0, None)], title="x")
    for flat in ([(3, 0.0)], [(0, 5.0), (1, 5.0)], [(0, -1e-30), (1, 1e-30)], [(0, 1e300), (1, -1e300)]):
        assert "nan" not in line_plot(flat, title="x") and "inf" not in line_plot(flat, title="x")


def test_long_curves_are_thinned_and_keep_their_spikes():
    points = [(step, 1.0 + 0.1 * math.sin(step)) for step in range(100_000)]
    points[54_321] = (54_321, 9.0)
    points[70_000] = (70_000, None)
    svg = line_plot(points, title="loss")
    assert len(svg) < 40_000 and svg.count("<polyline") == 3
    heights = [y for run in _points(svg) for _, y in run]
    assert min(heights) < 30 and sorted(heights)[1] > 100


@pytest.mark.parametrize("count", [30, 100, 4000])
def test_smoothing_does_not_lag(count):
    line = report._smoothed([(step, 2.0 - 3.0 * step) for step in range(count)])
    assert all(y == pytest.approx(2.0 - 3.0 * step) for step, y in line) and 25 < len(line) <= 300
    noisy = [(step, (-1.0) ** step) for step in range(count)]
    assert all(abs(y) <= 1 / 3 + 1e-9 for _, y in report._smoothed(noisy)[1:-1])


def test_imports_no_torch():
    code = "import sys, megakd.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(Path(report.__file__).parents[1])})
    assert done.stdout == "False\n"
