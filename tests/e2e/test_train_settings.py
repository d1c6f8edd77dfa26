"""Settings of a training stage that decide its length and its reference, on tiny models in one process."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megakd.config import load
from megakd.manifest import Manifest, hash_path
from tests.ranks import run_ranks
from tests.recipes import run_here, tiny_recipe, write_recipe

STEPS = 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """DPO of the student, on the layouts of one process."""
    folder = tmp_path_factory.mktemp("train_settings")
    raw = tiny_recipe(folder)
    start = raw["student"]["model"]
    raw["processes"], raw["student"]["parallel"], raw["teacher"] = 1, {}, {"model": raw["reference"]["model"]}
    raw["stages"] = [{"name": "train", "kind": "dpo", "init": start, "save_as": "student", "global_batch": 4,
                      "objective": {"kind": "dpo"}, "optimizer": {"lr": 1e-3, "warmup": 0.5}, "steps": STEPS}]
    run_ranks(1, run_here, write_recipe(folder, raw))
    return folder / "recipe.yaml"


def run(recipe: Path, *overrides: str) -> Path:
    """Runs the recipe with changes in a folder of its own; returns that."""
    folder = recipe.parent / "-".join(text.rpartition("=")[2].rpartition("/")[2] for text in overrides)
    run_ranks(1, run_here, recipe, f"output={folder}", *overrides)
    return folder


def steps(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "stages" / "train" / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "models" / "student" / "model.safetensors")


def budget(recipe: Path, tokens: int) -> Path:
    return run(recipe, "stages.train.steps=null", f"stages.train.tokens={tokens}")


def test_a_budget_of_tokens_is_met_by_the_fewest_steps(recipe):
    """The schedule spans those steps, so the model is that of as many steps asked for as such, bit for bit."""
    whole = recipe.parent / "run"
    spent = [line["tokens"] for line in steps(whole)]
    assert len(spent) == STEPS and len(set(spent)) > 1, "steps of equal lengths test little"
    exact = budget(recipe, sum(spent))
    assert steps(exact)[-1]["lr"] == steps(whole)[-1]["lr"] != steps(whole)[0]["lr"]
    assert all(torch.equal(values, weights(exact)[name]) for name, values in weights(whole).items())
    manifest = Manifest.read(exact / "stages" / "train")
    assert (manifest.tokens, manifest.config["tokens"], manifest.config["steps"]) == (sum(spent), sum(spent), None)
    assert [line["tokens"] for line in steps(budget(recipe, sum(spent) + 1))][:STEPS] == spent
    assert len(steps(budget(recipe, sum(spent) + 1))) == STEPS + 1
    assert len(steps(budget(recipe, sum(spent[:-1]) + 1))) == STEPS
    assert len(steps(budget(recipe, 1))) == 1


def test_a_student_is_compared_with_the_reference_that_its_stage_names(recipe):
    """Against its own start every log-ratio of the first step is zero, and DPO's loss log 2."""
    start = load(recipe).student.model
    own = run(recipe, f"stages.train.reference={start}", "stages.train.steps=1")
    assert steps(own)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(steps(recipe.parent / "run")[0]["loss"] - math.log(2)) > 1e-3
    manifest = Manifest.read(own / "stages" / "train")
    assert manifest.inputs["reference"] == hash_path(start)


def test_offloaded_states_make_the_same_model_and_no_other_stage(recipe):
    """Bit for bit; and a finished stage stays finished when the setting changes."""
    folder = run(recipe, "stages.train.optimizer.offload=true")
    assert all(torch.equal(values, weights(folder)[name]) for name, values in weights(recipe.parent / "run").items())
    before = (folder / "models" / "student" / "model.safetensors").stat().st_mtime_ns
    run_ranks(1, run_here, recipe, f"output={folder}")
    assert (folder / "models" / "student" / "model.safetensors").stat().st_mtime_ns == before
