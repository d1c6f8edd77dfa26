"""A training that is asked to leave: what it saves, what it says, and that its end is that of an undisturbed one."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from megakd import train
from megakd.interruption import Interrupted, heard
from megakd.mcore import checkpoint
from tests.ranks import run_ranks
from tests.recipes import run_here, stage, tiny_recipe, write_recipe

STEPS = 5


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """DCKD and an export, on one process."""
    folder = tmp_path_factory.mktemp("interruption")
    raw = tiny_recipe(folder)
    raw["processes"], raw["student"]["parallel"], raw["teacher"] = 1, {}, {"model": raw["reference"]["model"]}
    raw["stages"] = [stage(raw, "dckd") | {"steps": STEPS, "checkpoint_every": 2},
                     stage(raw, "export") | {"model": "run:student_dckd"}]
    run_ranks(1, run_here, write_recipe(folder, raw))
    return folder / "recipe.yaml"


def _run_signalled(recipe: Path, *overrides: str, during: int) -> tuple[str | None, list[int], int | None]:
    """Runs a recipe in which a signal arrives during a step (from 0).

    Returns:
        What is said on leaving (None at the end of the run), the steps after which checkpoints were written, the
        newest checkpoint's step.
    """
    written: list[int] = []
    step_at, save = train.Training.step_at, checkpoint.save

    def signalled(self: train.Training, number: int):
        if number == during:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step_at(self, number)

    def counted(folder: Path, step: int, *rest):
        written.append(step)
        return save(folder, step, *rest)

    output = Path(overrides[0].removeprefix("output="))
    said = None
    with patch.object(train.Training, "step_at", signalled), patch.object(checkpoint, "save", counted), heard():
        try:
            run_here(recipe, *overrides)
        except Interrupted as interrupted:
            said = str(interrupted)
    found = checkpoint.latest(output / "stages" / "dckd" / "checkpoints")
    return said, written, None if found is None else found[1]


def run_signalled(recipe: Path, *overrides: str, during: int) -> tuple[str | None, list[int], int | None]:
    [result] = run_ranks(1, partial(_run_signalled, during=during), recipe, *overrides)
    return result


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "models" / "student_dckd" / "model.safetensors")


@pytest.mark.parametrize("during, after, written", [
    (0, 1, [1]),
    (1, 2, [2]),  # due anyway: written once
    (2, 3, [2, 3]),
])
def test_a_training_leaves_after_the_step_that_it_is_at(recipe, tmp_path, during, after, written):
    output = f"output={tmp_path / 'run'}"
    said, *found = run_signalled(recipe, output, during=during)
    assert said == f"interrupted after step {after} of stage dckd, checkpoint saved; run the same command to go on"
    assert found == [written, after]
    run_ranks(1, run_here, recipe, output)
    undisturbed = weights(recipe.parent / "run")
    assert all(torch.equal(values, undisturbed[name]) for name, values in weights(tmp_path / "run").items())


def test_after_the_last_step_the_stage_is_finished_first(recipe, tmp_path):
    said, written, _ = run_signalled(recipe, f"output={tmp_path}", during=STEPS - 1)
    assert said == "interrupted before stage export; run the same command to go on"
    assert written == [2, 4] and (tmp_path / "stages" / "dckd" / "manifest.json").is_file()
    assert not (tmp_path / "stages" / "export").exists()


def test_where_answers_are_drawn_a_training_leaves_between_two_draws(recipe, tmp_path):
    online = ("stages.dckd.objective={kind: kd, on_policy: 1.0}",
              "stages.dckd.online={every: 2, max_new_tokens: 4, slots: 8}")
    said, written, newest = run_signalled(recipe, f"output={tmp_path}", *online, during=2)
    assert said.startswith("interrupted after step 4 ") and (written, newest) == ([2, 4], 4)
