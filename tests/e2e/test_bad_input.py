"""Bad input through the real command: exit status 2, one readable line, no output folder, and no rank started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes import tiny_recipe, tiny_rows, write_recipe, write_rows

ROOT = Path(__file__).parents[2]
NO_LAUNCHER = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a good recipe; each test spoils something of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    write_recipe(folder, tiny_recipe(folder))
    return folder


def refused(folder: Path, *overrides: str) -> str:
    """What `megakd run` tells of a recipe that it refuses."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    command = [sys.executable, "-m", "megakd.cli", "run", "recipe.yaml", *overrides]
    environment = NO_LAUNCHER | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    [line] = done.stderr.splitlines()
    assert line.startswith("megakd: error: ") and len(line) < 400
    return line.removeprefix("megakd: error: ")


def test_unknown_key(folder):
    assert refused(folder, "stages.adpa.objective.gama=2") == (
        "stages.adpa.objective.gama = 2: the kind 'adpa' has no such setting. Did you mean 'gamma'?")


def test_row_without_chosen(folder):
    rows = tiny_rows(10)
    del rows[3]["chosen"]
    file = write_rows(folder / "no_chosen.jsonl", rows)
    assert refused(folder, f"data.train=[{file}]") == (
        f"{file}:4: field 'chosen': missing, and it is needed to train on or to compare with. "
        "Add it to every row")


def test_layout_that_does_not_divide_the_heads(folder):
    line = refused(folder, "student.parallel.pad_heads=false")
    assert line.startswith("student.parallel.tensor = 2: the model's 6 query heads in 3 key/value groups do not divide")
    assert "Set student.parallel.pad_heads=true" in line


def test_output_folder_of_another_recipe(folder):
    other = folder / "other"
    other.mkdir()
    (other / "recipe.yaml").write_text("name: another\n")
    assert refused(folder, f"output={other}") == (
        f"output = '{other}': holds a run of the recipe 'another', this one is 'tiny'. Choose another folder")
