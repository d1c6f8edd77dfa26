"""The examples' recipes are alike except for their method, and each stands in the table of methods."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakd.config import load
from megakd.config_stages import EvalStage, ReportStage, TrainStage

EXAMPLES = Path(__file__).parents[2] / "examples"
METHODS = sorted(path.parent.name for path in EXAMPLES.glob("*/recipe.yaml") if path.parent.name != "quickstart")
EXPECTED = {"sft", "kd", "reverse_kl", "gkd", "akl", "seqkd", "dpo", "ipo", "cpo", "simpo", "dckd", "adpa", "adpa_plus",
            "pad", "pad_decomposed", "dpkd", "minillm"}
OF_A_METHOD = {"name", "output", "stages"}


def test_there_is_one_for_each_method():
    assert set(METHODS) >= EXPECTED


@pytest.mark.parametrize("method", METHODS)
def test_only_the_stages_are_the_methods_own(method):
    recipe, other = load(EXAMPLES / method / "recipe.yaml"), load(EXAMPLES / "sft" / "recipe.yaml")
    assert recipe.model_dump(exclude=OF_A_METHOD) == other.model_dump(exclude=OF_A_METHOD)
    assert (recipe.name, recipe.output) == (method, Path("runs/examples") / method)
    *first, evaluation, report = recipe.stages
    assert isinstance(evaluation, EvalStage) and isinstance(report, ReportStage)
    assert evaluation == other.stages[-2]
    trained = [stage for stage in first if isinstance(stage, TrainStage)]
    assert trained[0].init == recipe.student.model and trained[-1].save_as == "student"
    assert sum(stage.steps for stage in trained) == other.stages[0].steps
    assert {stage.global_batch for stage in trained} == {other.stages[0].global_batch}


@pytest.mark.parametrize("method", METHODS)
def test_each_is_explained(method):
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert f"[{method}]({method}/README.md)" in table
    text = (EXAMPLES / method / "README.md").read_text(encoding="utf-8")
    assert f"megakd run examples/{method}/recipe.yaml" in text
