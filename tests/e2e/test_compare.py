"""A comparison of two methods over two seeds as a user runs it, on tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from megakd.config import load
from tests.recipes import tiny_rows, write_rows, write_tiny_model

ROOT = Path(__file__).parents[2]
TOKENS = 400


def compare(settings: Path, *options: str, status: int = 0) -> str:
    """Runs the command; returns all that it printed."""
    command = [sys.executable, str(ROOT / "examples" / "compare" / "compare.py"), str(settings), *options]
    no_launcher = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment = {**no_launcher, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=400)
    assert done.returncode == status, done.stdout
    return done.stdout


def test_two_methods_with_two_seeds(tmp_path):
    models = {"start": {"seed": 1, "layers": 2}, "teacher": {"seed": 2}, "reference": {"seed": 3}}
    raw = {
        "output": str(tmp_path / "out"), "tokens": TOKENS, "seeds": [1, 2],
        **{name: str(write_tiny_model(tmp_path / name, **settings)) for name, settings in models.items()},
        "train": [str(write_rows(tmp_path / "train.jsonl", tiny_rows(12)))],
        "eval": [str(write_rows(tmp_path / "eval.jsonl", tiny_rows(3, start=100)))],
        "methods": {"sft": {"lr": 1e-3}, "dckd": {"lr": 2e-3}},
        "overrides": ["processes=1", "data.train_rows=null", "data.eval_rows=null", "data.max_length=96",
                      "stages.train.global_batch=2", "stages.eval.prompts=2", "stages.eval.max_new_tokens=4"],
    }
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(raw, sort_keys=False))

    compare(settings, "--only", "sft")
    told = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(told["methods"]) == ["start", "sft"]
    assert told["missing"] == [f"dckd, seed {seed}: train, eval" for seed in (1, 2)]

    # One run of DCKD fails, and keeps the other from nothing.
    (tmp_path / "out" / "dckd").mkdir()
    (tmp_path / "out" / "dckd" / "seed-1").write_text("in the way")
    output = compare(settings, "--jobs", "2", status=1)
    assert "2 of 4 runs are done" in output and "dckd, seed 1 failed" in output
    assert "is a file" in (tmp_path / "out" / "dckd" / "seed-1.log").read_text()
    (tmp_path / "out" / "dckd" / "seed-1").unlink()
    assert "3 of 4 runs are done" in compare(settings)

    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*/stages/*/manifest.json")}
    assert "dckd" in compare(settings, "--collect") and "4 of 4 runs are done" in compare(settings)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished and len(finished) == 4 * 3

    told = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert told["missing"] == [] and list(told["methods"]) == ["start", "sft", "dckd"]
    for method in ("sft", "dckd"):
        figures = told["methods"][method]["figures"]
        assert all(TOKENS <= tokens < TOKENS + 4 * 96 for tokens in figures["student_tokens"]["values"])
        assert {"rouge_l", "reward_accuracy", "relative_reward_accuracy", "kl_to_teacher", "nll_chosen",
                "expected_advantage", "answer_tokens", "seconds"} <= set(figures)
        for seed, value in zip(told["methods"][method]["seeds"], figures["kl_to_teacher"]["values"], strict=True):
            folder = tmp_path / "out" / method / f"seed-{seed}"
            assert json.loads((folder / "summary.json").read_text())["final"]["kl_to_teacher"] == value
            assert load(folder / "recipe.yaml").seed == seed
        assert figures["kl_to_teacher"]["half_width"] > 0
    assert "| dckd | 2 |" in (tmp_path / "out" / "comparison.md").read_text()
    assert (tmp_path / "out" / "comparison.svg").read_text().startswith("<svg")
