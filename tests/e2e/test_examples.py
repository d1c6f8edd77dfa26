"""Every method's example recipe, cut down to seconds, on the first layers of the real model and in one process.

The environment variable MEGAKD_TEST_MODEL names the Hugging Face directory of the model (float32 weights).
"""

from __future__ import annotations

import json
import math
import os
import runpy
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megakd.config import load
from megakd.config_stages import EvalStage, GenerateStage, TrainStage
from tests.ranks import run_ranks
from tests.recipes import run_here

pytestmark = pytest.mark.skipif("MEGAKD_TEST_MODEL" not in os.environ,
                                reason="MEGAKD_TEST_MODEL names no model directory")

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in ROOT.glob("examples/*/recipe.yaml") if path.parent.name != "quickstart")
LAYERS = {"reference": range(3), "teacher": range(4), "student_start": (0, 2)}
"""Layers of the real model that each of the three has: three different models."""
ROWS = 4
EVALUATED = "adpa_plus"
"""The eval stage is one and the same in all (tests/unit/test_example_recipes.py): it runs in this one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder where the recipes' paths hold: the examples' data, and the three models."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "examples").symlink_to(ROOT / "examples")
    prepare = runpy.run_path(str(ROOT / "examples" / "quickstart" / "prepare.py"))
    source = Path(os.environ["MEGAKD_TEST_MODEL"])
    whole = range(json.loads((source / "config.json").read_text())["num_hidden_layers"])
    for name, kept in LAYERS.items():
        dropped = [layer for layer in whole if layer not in kept]
        prepare["drop_layers"](source, folder / "runs" / "quickstart" / "models" / name, dropped, {})
    return folder


def cut_down(recipe: Path) -> list[str]:
    """Overrides with which a recipe takes seconds: one step of one micro-batch, few rows, short answers."""
    overrides = [f"data.train_rows={ROWS}", "data.eval_rows=2"]
    for stage in load(recipe).stages:
        match stage:
            case TrainStage():
                settings = {"steps": 1, "global_batch": 2}
                if stage.online is not None:
                    settings["online.max_new_tokens"] = 4
            case GenerateStage():
                settings = {"max_new_tokens": 4}
            case EvalStage():
                settings = {"prompts": 1, "max_new_tokens": 4}
            case _:
                settings = {}
        overrides += [f"stages.{stage.name}.{name}={value}" for name, value in settings.items()]
    return overrides


def _run_in(folder: Path, recipe: Path, overrides: list[str], only: list[str]) -> None:
    os.chdir(folder)
    run_here(recipe, *overrides, only=only)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.parent.name)
def test_an_example_runs_to_its_end(folder, recipe):
    loaded = load(recipe)
    evaluated = recipe.parent.name == EVALUATED
    only = [stage.name for stage in loaded.stages if evaluated or not isinstance(stage, EvalStage)]
    run_ranks(1, _run_in, folder, recipe, cut_down(recipe), only)
    output = folder / loaded.output
    start = folder / "runs" / "quickstart" / "models" / "student_start"
    for stage in loaded.stages:
        if not isinstance(stage, TrainStage):
            continue
        [line] = map(json.loads, (output / "stages" / stage.name / "metrics.jsonl").read_text().splitlines())
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0
        before = start if stage.init.endswith("student_start") else output / "models" / stage.init.removeprefix("run:")
        old, new = (load_file(directory / "model.safetensors")
                    for directory in (before, output / "models" / stage.save_as))
        assert old.keys() == new.keys()
        moved = [name for name in old if not old[name].equal(new[name])]
        assert len(moved) == len(old) and all(values.isfinite().all() for values in new.values())
    assert (output / "report.html").is_file()
    if evaluated:
        summary = json.loads((output / "summary.json").read_text())
        assert list(summary) == ["start", "final"]
        assert all(math.isfinite(value) for figures in summary.values() for value in figures.values())
        assert summary["final"]["nll_chosen"] != summary["start"]["nll_chosen"]
    shutil.rmtree(output / "models")  # 15 of them would stay for pytest's next runs
