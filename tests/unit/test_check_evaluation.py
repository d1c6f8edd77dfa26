"""What is found before a run starts of stages that measure models, and what their results depend on."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megakd.check import check_recipe
from megakd.config import parse
from megakd.errors import ConfigError, DataError, MegakdError
from megakd.provenance import stage_config, stage_inputs
from tests.recipes import tiny_recipe, tiny_rows, write_rows

COMMAND = {"kind": "command", "command": [sys.executable, "judge.py"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("recipe")
    return folder, tiny_recipe(folder)


@pytest.fixture
def raw(made) -> dict[str, Any]:
    raw = json.loads(json.dumps(made[1]))
    raw["teacher"]["model"] = raw["reference"]["model"]
    return raw


def stage_of(raw: dict[str, Any], kind: str, **settings) -> dict[str, Any]:
    """A recipe of one stage."""
    models = {"a": raw["student"]["model"], "b": raw["student"]["model"]}
    return raw | {"stages": [{"name": "x", "kind": kind, "models": models, **settings}]}


def refused(kind: type[MegakdError], raw: dict[str, Any]) -> str:
    with pytest.raises(kind) as caught:
        check_recipe(parse(raw), 2)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": {"kind": "person"}}, "stages.x.judge.kind = 'person': there is no such kind. "
                                        "Write one of command, reward_model"),
        ({"judge": {"kind": "command", "command": []}}, "stages.x.judge.command = []: must not be empty. Fill it"),
        ({"judge": {**COMMAND, "timout": 3}}, "stages.x.judge.timout = 3: the kind 'command' has no such setting. "
                                              "Did you mean 'timeout'?"),
        ({"judge": COMMAND, "top_p": 0}, "stages.x.top_p = 0: has to be more than 0.0. Correct the value"),
        ({"judge": COMMAND, "models": {"a": "m"}}, "stages.x.models = {'a': 'm'}: has to hold at least 2. Add more"),
    ],
)
def test_settings_of_a_win_rate(raw, changes, message):
    with pytest.raises(ConfigError) as caught:
        parse(stage_of(raw, "win_rate", **changes))
    assert str(caught.value) == message


def test_labels_become_file_names(raw):
    recipe = stage_of(raw, "win_rate", judge=COMMAND)
    recipe["stages"][0]["models"] = {"a/b": "m", "c": "m"}
    with pytest.raises(ConfigError) as caught:
        parse(recipe)
    assert str(caught.value) == ("stages.x.models.a/b = 'a/b': it becomes the name of a file or folder. "
                                 "Use letters, digits, _ and - only")


def test_seeds_come_once(raw):
    recipe = stage_of(raw, "eval", sampling={"seeds": [1, 2, 1]})
    with pytest.raises(ConfigError, match="the same seed gives the same answers"):
        parse(recipe)
    assert parse(stage_of(raw, "eval", sampling={})).stages[0].sampling.seeds == (10, 20, 30, 40, 50)
    with pytest.raises(ConfigError, match="stages.x.sampling.temperature"):
        parse(stage_of(raw, "eval", sampling={"temperature": 0}))


def test_a_judge_that_is_not_there(raw, tmp_path):
    message = refused(ConfigError, stage_of(raw, "win_rate", judge={**COMMAND, "command": ["no-such-judge"]}))
    assert message.startswith("stages.x.judge.command = 'no-such-judge': there is no such program")
    script = tmp_path / "judge.py"
    script.write_text("")
    message = refused(ConfigError, stage_of(raw, "win_rate", judge={**COMMAND, "command": [str(script)]}))
    assert "is a file that cannot be executed" in message
    judge = {"kind": "reward_model", "model": str(tmp_path / "nowhere")}
    message = refused(ConfigError, stage_of(raw, "win_rate", judge=judge))
    assert message.startswith("stages.x.judge.model = ") and "there is no such directory" in message
    check_recipe(parse(stage_of(raw, "win_rate", judge=COMMAND)), 2)


def test_held_out_prompts_are_enough_to_compare_answers(raw, tmp_path):
    file = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in tiny_rows(3)])
    raw["data"]["eval"] = [str(file)]
    check_recipe(parse(stage_of(raw, "win_rate", judge=COMMAND)), 2)
    assert "field 'chosen': missing" in refused(DataError, stage_of(raw, "eval"))
    raw["data"]["eval"] = []
    assert refused(ConfigError, stage_of(raw, "win_rate", judge=COMMAND)).startswith("data.eval = []: a stage reads")


def test_questions_that_do_not_fit(raw, tmp_path):
    file = write_rows(tmp_path / "q.jsonl", [{"question_id": 1, "turns": ["one", "two"]}])
    asked = {"questions": str(file), "format": "mt_bench"}
    message = refused(DataError, stage_of(raw, "answers", **asked, max_new_tokens=90))
    assert message.startswith(f"{file}:1: field 'turns': its last prompt may have ")
    assert message.endswith(", or lower the stage's max_new_tokens")
    check_recipe(parse(stage_of(raw, "answers", **asked, max_new_tokens=10)), 2)
    message = refused(DataError, stage_of(raw, "answers", **{**asked, "questions": str(tmp_path / "no.jsonl")}))
    assert "no.jsonl" in message


@pytest.mark.parametrize(("kind", "module", "package", "extra", "settings"), [
    ("eval", "rouge_score", "rouge-score", "eval", {}),
    ("lm_eval", "lm_eval", "lm-eval", "lm-eval", {"tasks": ["t"]}),
    ("win_rate", "transformers", "transformers", "hf", {"judge": {"kind": "reward_model", "model": "m"}}),
])
def test_packages_that_are_missing(raw, monkeypatch, kind, module, package, extra, settings):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else real(name, *rest))
    message = refused(ConfigError, stage_of(raw, kind, **settings))
    assert f"needs the package {package}, which is not installed. pip install 'megakd[{extra}]'" in message


def test_tasks_of_a_folder_that_is_not_there(raw, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: object() if name == "lm_eval" else real(name, *rest))
    recipe = stage_of(raw, "lm_eval", tasks=["t"], include_path=str(tmp_path / "no"))
    assert refused(ConfigError, recipe).startswith("stages.x.include_path = ")
    check_recipe(parse(stage_of(raw, "lm_eval", tasks=["t"], include_path=str(tmp_path))), 2)


def test_what_results_depend_on(raw, tmp_path):
    script = tmp_path / "judge.py"
    script.write_text("1")
    (tmp_path / "tasks").mkdir()
    questions = write_rows(tmp_path / "q.jsonl", [{"instruction": "i"}])
    cases = {
        "win_rate": ({"judge": {**COMMAND, "command": ["python3", str(script)]}}, {"eval.0", "judge.command.1"}),
        "answers": ({"questions": str(questions), "format": "alpaca_eval"}, {"questions"}),
        "lm_eval": ({"tasks": ["t"], "include_path": str(tmp_path / "tasks")}, {"include_path"}),
    }
    for kind, (settings, inputs) in cases.items():
        recipe = parse(stage_of(raw, kind, **settings))
        assert set(stage_inputs(recipe, recipe.stages[0])) == {"models.a", "models.b", *inputs}

    def config(**judge) -> dict:
        recipe = parse(stage_of(raw, "win_rate", judge={**COMMAND, **judge}))
        return stage_config(recipe, recipe.stages[0])

    # How long a judge may take is no part of what it says; in which orders it is asked is.
    assert config() == config(timeout=1) != config(both_orders=False)
    before = stage_inputs(recipe := parse(stage_of(raw, "win_rate", **cases["win_rate"][0])), recipe.stages[0])
    script.write_text("2")
    after = stage_inputs(recipe, recipe.stages[0])
    assert {name for name in before if before[name] != after[name]} == {"judge.command.1"}
