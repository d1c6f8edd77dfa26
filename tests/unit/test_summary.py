"""The run's summary: of all stages that measure by label, whichever was made last."""

from __future__ import annotations

import json

from megakd.config import parse
from megakd.evaluation.summary import write_summary
from megakd.manifest import Manifest
from tests.recipes import tiny_recipe


def finish(folder, stage: str, kind: str, metrics: dict) -> None:
    (folder / "stages" / stage).mkdir(parents=True)
    Manifest(stage, kind, "", {}, {}, {}, {}, 1, "", "", 0.0, 0, metrics).write(folder / "stages" / stage)


def test_figures_of_several_stages(tmp_path):
    raw = tiny_recipe(tmp_path)
    both = {"models": {"a": raw["student"]["model"], "b": raw["student"]["model"]}}
    judge = {"kind": "command", "command": ["judge"]}
    raw["stages"] = [
        {"name": "eval", "kind": "eval", **both}, {"name": "win", "kind": "win_rate", **both, "judge": judge},
        {"name": "mt", "kind": "answers", **both, "questions": "q.jsonl", "format": "mt_bench"},
        {"name": "lm", "kind": "lm_eval", **both, "tasks": ["t"]},
    ]
    raw["teacher"]["model"] = raw["reference"]["model"]
    recipe = parse(raw)
    run = tmp_path / "run"

    def summary() -> dict:
        return json.loads((run / "summary.json").read_text())

    run.mkdir()
    write_summary(recipe, "eval", {"a": {"kl": 1.0}, "b": {"kl": 2.0}})
    assert summary() == {"a": {"kl": 1.0}, "b": {"kl": 2.0}}
    finish(run, "eval", "eval", {"a": {"kl": 1.0}, "b": {"kl": 2.0}})
    finish(run, "mt", "answers", {"a": {"questions": 3}})
    finish(run, "lm", "lm_eval", {"b": {"t/acc": 0.5}})
    write_summary(recipe, "win", {"a": {}, "b": {"win_rate": 0.25}})
    assert summary() == {"a": {"kl": 1.0}, "b": {"kl": 2.0, "win_rate": 0.25, "t/acc": 0.5}}
    # The eval stage is made again: its old figures go, the others' stay.
    finish(run, "win", "win_rate", {"a": {}, "b": {"win_rate": 0.25}})
    (run / "stages" / "eval" / "manifest.json").unlink()
    write_summary(recipe, "eval", {"a": {"rouge_l": 0.1}})
    assert summary() == {"a": {"rouge_l": 0.1}, "b": {"win_rate": 0.25, "t/acc": 0.5}}
