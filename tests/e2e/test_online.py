"""Answers drawn while a stage trains: the same in another layout, and after a run was killed between two draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.test_chain import curve, weights
from tests.ranks import Killed
from tests.recipes import run_in_pool, tiny_recipe, write_recipe

STAGES = {
    "minillm": {"objective": {"kind": "minillm"},
                "online": {"every": 4, "passes": 2, "teacher_mix": 0.3, "max_new_tokens": 20, "slots": 4}},
    "dpkd": {"objective": {"kind": "dpkd"}, "online": {"every": 2, "max_new_tokens": 6}},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """The recipe and the folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("online")
    raw = tiny_recipe(folder)
    raw["teacher"]["model"] = raw["reference"]["model"]
    raw["student"]["parallel"]["sequence"] = True  # it decodes without
    raw["stages"] = [
        {"name": name, "kind": "distill", "init": raw["student"]["model"], "save_as": name, "steps": 8,
         "global_batch": 4, "checkpoint_every": 4, "chunk_tokens": 16, "optimizer": {"lr": 1e-3}, **settings}
        for name, settings in STAGES.items()
    ]
    recipe = write_recipe(folder, raw)
    run_in_pool(recipe)
    return recipe, Path(raw["output"])


def test_another_layout_draws_and_learns_the_same(finished, tmp_path):
    recipe, folder = finished
    layout = ("student.parallel={context: 2}", "teacher.parallel.tensor=2", "teacher.parallel.pipeline=1",
              "teacher.parallel.pad_heads=true")
    run_in_pool(recipe, f"output={tmp_path / 'other'}", *layout)
    for name in STAGES:
        assert curve(tmp_path / "other", name) == pytest.approx(curve(folder, name), rel=1e-3)


def test_a_run_that_goes_on_draws_what_it_would_have_drawn(finished, tmp_path):
    recipe, folder = finished
    other = tmp_path / "killed"
    checkpoints = other / "stages" / "minillm" / "checkpoints"
    with pytest.raises(Killed):
        run_in_pool(recipe, f"output={other}", kill_when=lambda: any(checkpoints.glob("step-*/checkpoint.json")))
    assert not (other / "models" / "minillm" / "config.json").exists(), "it was over before it could be killed"
    run_in_pool(recipe, f"output={other}")
    for name in STAGES:
        assert curve(other, name) == curve(folder, name)
        mine, theirs = weights(other, name), weights(folder, name)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
