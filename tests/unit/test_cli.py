"""The command line: what it starts, what it refuses, and how it says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megakd import cli
from megakd.cli import main
from tests.recipes import tiny_recipe, write_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """A good recipe, and a command line that reports a start of ranks in place of starting them."""
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)

    def start(started):
        raise AssertionError(f"{started} ranks were started")

    monkeypatch.setattr(cli, "start_ranks", start)
    return write_recipe(tmp_path, tiny_recipe(tmp_path))


def refusal(capsys, *arguments: object) -> str:
    """The one line on stderr of a command that is refused."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("megakd: error: ") and err.endswith("\n") and err.count("\n") == 1
    return err.removeprefix("megakd: error: ").removesuffix("\n")


def test_check_says_what_can_run_and_starts_nothing(recipe, capsys):
    assert main(["run", str(recipe), "--check"]) == 0
    assert capsys.readouterr().out == f"{recipe}: can run on 2 ranks\n"
    assert not (recipe.parent / "run").exists()


def test_run_starts_the_ranks_once_all_is_well(recipe):
    with pytest.raises(AssertionError, match="2 ranks were started"):
        main(["run", str(recipe)])


OVERRIDES = ("processes=4", "reference.micro_batch=1")


@pytest.mark.parametrize("order", [
    ("--check", "recipe", *OVERRIDES),
    ("recipe", *OVERRIDES, "--check"),
    pytest.param(("recipe", "--check", *OVERRIDES)),
    pytest.param(("recipe", OVERRIDES[0], "--check", OVERRIDES[1])),
])
def test_overrides_may_stand_before_and_behind_options(recipe, capsys, order):
    assert main(["run", *(str(recipe) if word == "recipe" else word for word in order)]) == 0
    assert "can run on 4 ranks" in capsys.readouterr().out


def test_a_mistake_is_told_in_one_line(recipe, capsys):
    assert refusal(capsys, "run", recipe, "devise=cpu") == (
        "devise = 'cpu': there is no such setting. Did you mean 'device'?")
    assert refusal(capsys, "run", recipe.with_name("none.yaml")) == (
        f"recipe = '{recipe.with_name('none.yaml')}': there is no such file. Give the path of a recipe.yaml")
    (recipe.parent / "train.jsonl").write_text("{}\n")
    assert refusal(capsys, "run", recipe).startswith(f"{recipe.parent}/train.jsonl:1: field 'prompt': missing")
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize("option", ["--stage", "--redo"])
def test_an_unknown_stage_is_told_with_the_known_ones(recipe, capsys, option):
    known = "dpo, dckd, generate, adpa, eval, export, report"
    assert refusal(capsys, "run", recipe, option, "adpa", option, "adap") == (
        f"{option} = 'adap': the recipe has no such stage. There are: {known}")


def test_only_rank_0_tells_a_mistake(recipe, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert main(["run", str(recipe)]) == 2
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    message = refusal(capsys, "run", recipe)
    assert "do not divide the world of 3 ranks" in message  # the launcher's number, not the recipe's


@pytest.mark.parametrize("arguments", [[], ["train"], ["run"], ["run", "recipe.yaml", "--chekc"], ["report"]])
def test_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: megakd" in capsys.readouterr().err


def test_report_of_a_folder_that_is_no_run(tmp_path, capsys):
    assert str(tmp_path / "none") in refusal(capsys, "report", tmp_path / "none")


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "megatron-core" in out


def test_a_mistake_in_the_recipe_is_told_before_torch_is_loaded(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: small\nstudnt: {}\n")
    code = ("import sys; from megakd.cli import main; status = main(['run', 'recipe.yaml']); "
            "print(*sorted({'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules))); sys.exit(status)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (2, "\n")
    [line] = done.stderr.splitlines()
    assert line.startswith("megakd: error: output = None: has to be set and is not")
