"""Comparing methods: settings, runs, what the finished ones came to; made-up summaries, no training."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml

from megakd.comparison import (
    START,
    ComparedRun,
    Comparison,
    Figure,
    as_json,
    as_markdown,
    collect,
    compared_runs,
    load_comparison,
    t_quantile,
)
from megakd.comparison_plot import comparison_plot
from megakd.config import dump
from megakd.config_stages import ReportStage, TrainStage
from megakd.errors import ConfigError
from megakd.manifest import Manifest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
OURS = "runs/quickstart/models/"  # what the examples' recipes name
SETTINGS = {
    "output": "out", "methods": ["sft", "adpa_plus", "dpo"], "seeds": [1, 2], "tokens": 1001, "start": "my/start",
    "teacher": "my/teacher", "reference": "my/reference", "train": ["a.jsonl"], "eval": ["b.jsonl"],
}


def comparison(**changes) -> Comparison:
    return Comparison.model_validate(SETTINGS | changes)


def trained(run: ComparedRun) -> list[TrainStage]:
    return [stage for stage in run.recipe.stages if isinstance(stage, TrainStage)]


# ----------------------------------------------------------------------------------------------------------- settings
def refused(tmp_path: Path, **changes) -> ConfigError:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in (SETTINGS | changes).items() if value is not None}))
    with pytest.raises(ConfigError) as caught:
        load_comparison(file)
    return caught.value


def test_the_example_can_be_read():
    settings = load_comparison(EXAMPLES / "compare" / "settings.yaml")
    runs = compared_runs(settings, EXAMPLES)
    assert len(runs) == len(settings.methods) * len(settings.seeds)


@pytest.mark.parametrize("changes, field", [
    ({"tokens": 0}, "tokens"), ({"tokens": None}, "tokens"), ({"seeds": []}, "seeds"), ({"seeds": [1, 1]}, "seeds"),
    ({"methods": []}, "methods"), ({"methods": ["start"]}, "methods"), ({"methods": ["a/b"]}, "methods"),
    ({"methods": {"sft": {"lr": -1.0}}}, "methods.sft.lr"), ({"models": 1}, "models"),
])
def test_settings_that_cannot_be(tmp_path, changes, field):
    assert refused(tmp_path, **changes).field == field


def test_files_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        load_comparison(tmp_path / "none.yaml")
    for text, rule in (("[a", "cannot be read"), ("- a", "holds no mapping")):
        (tmp_path / "settings.yaml").write_text(text)
        with pytest.raises(ConfigError, match=rule):
            load_comparison(tmp_path / "settings.yaml")


def test_methods_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file.*adpa_plus, akl"):
        compared_runs(comparison(methods=["stf"]), EXAMPLES)
    with pytest.raises(ConfigError, match="the comparison has no such method. There are: sft, adpa_plus, dpo"):
        compared_runs(comparison(), EXAMPLES, ["kd"])
    whole = yaml.safe_load((EXAMPLES / "sft" / "recipe.yaml").read_text())
    for left, rule in ((whole["stages"][:1], "no stage of kind 'eval'"), (whole["stages"][2:], "'eval'")):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(whole | {"stages": left}))
        with pytest.raises(ConfigError, match=rule):
            compared_runs(comparison(methods={"mine": {"recipe": str(tmp_path / "recipe.yaml")}}), EXAMPLES)


# --------------------------------------------------------------------------------------------------------------- runs
def test_every_method_runs_with_every_seed_on_the_models_and_data_given():
    runs = compared_runs(comparison(), EXAMPLES)
    assert [(run.method, run.seed) for run in runs] == [(m, s) for s in (1, 2) for m in SETTINGS["methods"]]
    for run in runs:
        recipe = run.recipe
        assert (recipe.seed, recipe.output) == (run.seed, Path("out") / run.method / f"seed-{run.seed}")
        assert (recipe.data.train, recipe.data.eval) == ((Path("a.jsonl"),), (Path("b.jsonl"),))
        assert [recipe.role(role).model for role in ("student", "teacher", "reference")] == \
            ["my/start", "my/teacher", "my/reference"]
        assert OURS not in dump(recipe)
        assert trained(run)[0].init == "my/start"
    assert trained(runs[2])[0].reference == "my/start"  # DPO's
    assert [run.method for run in compared_runs(comparison(), EXAMPLES, ["dpo"])] == ["dpo", "dpo"]


def test_tokens_are_shared_out_over_a_methods_trainings():
    runs = {run.method: run for run in compared_runs(comparison(seeds=[1]), EXAMPLES)}
    assert [stage.tokens for stage in trained(runs["sft"])] == [1001]
    assert [stage.tokens for stage in trained(runs["adpa_plus"])] == [500, 501]
    assert all(stage.steps is None for run in runs.values() for stage in trained(run))


def test_learning_rates_and_overrides_are_a_methods_own():
    mine = {"recipe": str(EXAMPLES / "adpa_plus" / "recipe.yaml"), "lr": 2e-3,
            "overrides": ["stages.train.objective.gamma=9"]}
    methods = {"sft": {"lr": 1e-3}, "kd": None, "mine": mine}
    runs = {run.method: run for run in compared_runs(
        comparison(methods=methods, seeds=[1], overrides=["data.max_length=77"]), EXAMPLES)}
    assert [trained(run)[0].optimizer.lr for run in runs.values()] == [1e-3, 2e-4, 2e-3]
    assert trained(runs["mine"])[1].optimizer.lr == 2e-3 and trained(runs["mine"])[1].objective.gamma == 9
    assert {run.recipe.data.max_length for run in runs.values()} == {77}


# ------------------------------------------------------------------------------------------------------------- results
def finish(run: ComparedRun, final: dict, start: dict, *, without: str | None = None) -> None:
    """Writes what a finished run leaves: 100 tokens and 10 seconds a stage."""
    for stage in run.recipe.stages:
        if not isinstance(stage, ReportStage) and stage.name != without:
            folder = run.recipe.output / "stages" / stage.name
            folder.mkdir(parents=True)
            Manifest(stage.name, stage.kind, "", {}, {}, {}, {}, 1, "", "", 10.0, 100, {}).write(folder)
    (run.recipe.output / "recipe.yaml").write_text(dump(run.recipe))
    (run.recipe.output / "summary.json").write_text(json.dumps({"start": start, "final": final}))


@pytest.fixture
def runs(tmp_path) -> list[ComparedRun]:
    """Three methods with two seeds; seed 2 of dpo is still without its evaluation."""
    made = compared_runs(comparison(output=str(tmp_path / "out")), EXAMPLES)
    for number, run in enumerate(made):
        final = {"rouge_l": 0.1 * (number + 1), "rouge_l_error": 0.01, "kl_to_teacher": 1.0, "pairs": 4, "new": number,
                 "text": "a", "nested": {"a": 1}, "yes": True, "nan": math.nan}
        last = (run.method, run.seed) == ("dpo", 2)
        finish(run, final, {"rouge_l": 0.5, "kl_to_teacher": 2.0}, without="eval" if last else None)
    return made


def test_finished_runs_are_collected_and_the_others_named(runs):
    results = collect(runs)
    assert list(results.figures) == [START, "sft", "adpa_plus", "dpo"]
    assert results.seeds == {START: (1, 2), "sft": (1, 2), "adpa_plus": (1, 2), "dpo": (1,)}
    assert results.missing == ("dpo, seed 2: eval",)
    assert results.names == ["kl_to_teacher", "rouge_l", "new", "seconds", "student_tokens"]  # no detail such as pairs
    assert results.figures["sft"]["pairs"].values == (4, 4)
    assert results.figures["sft"]["rouge_l"].values == pytest.approx((0.1, 0.4))
    assert results.figures["sft"]["new"].values == (0, 3)
    assert results.figures[START]["kl_to_teacher"].values == (2.0, 2.0) and "seconds" not in results.figures[START]
    # ADPA+ trains twice and generates in between; the evaluation's time is no cost of the method.
    assert results.figures["adpa_plus"]["student_tokens"].values == (200, 200)
    assert results.figures["adpa_plus"]["seconds"].values == (30, 30)


def test_a_finished_run_with_other_settings_is_refused(runs, tmp_path):
    other = compared_runs(comparison(output=str(tmp_path / "out"), tokens=5), EXAMPLES)
    with pytest.raises(ConfigError, match="holds a finished run with other settings"):
        collect(other)


def test_nothing_finished(tmp_path):
    results = collect(compared_runs(comparison(output=str(tmp_path / "out")), EXAMPLES))
    assert results.figures == {} and len(results.missing) == 6
    assert "- sft, seed 1: train, eval" in as_markdown(results)


@pytest.mark.parametrize("freedom, expected", [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (10, 2.2281),
                                               (30, 2.0423), (1000, 1.9623)])
def test_quantiles_of_t_are_those_of_the_tables(freedom, expected):
    assert t_quantile(0.975, freedom) == pytest.approx(expected, abs=6e-5)
    assert t_quantile(0.5, freedom) == pytest.approx(0, abs=1e-9)


def test_an_interval_over_seeds():
    figure = Figure((1.0, 2.0, 3.0))
    assert figure.mean == 2 and figure.half_width == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert Figure((1.0,)).half_width is None and Figure((1.0, 1.0)).half_width == 0


def test_table_and_json_say_the_same(runs):
    results = collect(runs)
    lines = as_markdown(results).splitlines()
    assert lines[0] == "| method | seeds | KL to the teacher ↓ | ROUGE-L ↑ | new | Seconds before the evaluation | " \
        "Student tokens |"
    half = t_quantile(0.975, 1) * 0.15
    assert lines[3] == f"| sft | 2 | 1.000 ± 0.000 | 0.250 ± {half:.3f} | 1.500 ± {10 * half:.3f} | 10 ± 0 | 100 ± 0 |"
    assert lines[5].startswith("| dpo | 1 | 1.000 | 0.300 |")
    assert lines[2].endswith("| - | - | - |") and lines[-1] == "- dpo, seed 2: eval"
    told = json.loads(json.dumps(as_json(results), allow_nan=False))
    assert told["methods"]["sft"]["figures"]["rouge_l"]["half_width"] == pytest.approx(half)
    assert told["methods"]["dpo"]["figures"]["rouge_l"]["half_width"] is None
    assert told["missing"] == ["dpo, seed 2: eval"]


def test_the_figure_has_a_panel_for_each_number(runs):
    results = collect(runs)
    root = ET.fromstring(comparison_plot(results))
    tags = [element.get("class") for element in root.iter() if element.get("class")]
    assert tags.count("title") == len(results.names) == 5
    assert tags.count("mean") == 3 * 5 and tags.count("seed") == (2 + 2 + 1) * 5
    assert tags.count("interval") == 2 * 5 and tags.count("start") == 2
    width, height = map(float, root.get("viewBox").split()[2:])
    assert all(0 <= float(element.get("cx")) <= width / 3 for element in root.iter() if element.get("cx"))
