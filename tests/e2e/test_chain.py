"""The whole chain of stages as a user runs it: separate processes, three layouts, tiny models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakd.cli import USAGE_ERROR, main
from megakd.interruption import INTERRUPTED
from megakd.log import METRICS, read_metrics
from tests.ranks import Killed
from tests.recipes import run_in_pool, stage, tiny_recipe, write_recipe

ROOT = Path(__file__).parents[2]
STAGES = ("dpo", "dckd", "generate", "adpa", "eval", "export", "report")
TRAINED = ("dpo", "dckd", "adpa")
KILLED = ("dckd", "generate", "eval")
ROLES = {"dpo": {"student", "teacher", "reference"}, "dckd": {"student", "teacher"},
         "adpa": {"student", "teacher", "reference"}, "generate": {"student"}, "report": {"student"}}
"""In whose layouts stages run."""
FIGURES = ("kl_to_teacher", "expected_advantage", "reward_accuracy", "nll_chosen", "rouge_l")


def start(recipe: Path, *overrides: str) -> subprocess.Popen:
    """`megakd run` in processes of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "megakd.cli", "run", str(recipe), *overrides],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(recipe: Path, *overrides: str) -> str:
    """Runs to the end; returns what was printed."""
    process = start(recipe, *overrides)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-4000:]
    return output


def curve(folder: Path, name: str) -> list[float]:
    """The losses of a training stage."""
    lines = (folder / "stages" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def manifests(folder: Path) -> dict[str, float]:
    """When each finished stage was finished."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("stages/*/manifest.json")}


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """A saved model's tensors; one that was trained over pipeline stages has a file a stage."""
    files = (folder / "models" / name).glob("*.safetensors")
    return {key: values for file in files for key, values in load_file(file).items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[dict, Path]:
    """A finished run of the tiny recipe, with a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("chain")
    raw = tiny_recipe(folder)
    for name in TRAINED:
        stage(raw, name).update(steps=4, checkpoint_every=1)
    recipe = write_recipe(folder, raw)
    output = run(recipe)
    assert "report.html" in output
    return raw, recipe


def test_a_run_leaves_what_it_promises(finished):
    raw, recipe = finished
    folder = Path(raw["output"])
    assert set(manifests(folder)) == set(STAGES)
    assert (folder / "recipe.yaml").is_file()
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == {"start", "dckd", "final"}
    assert all(name in figures for figures in summary.values() for name in FIGURES)
    for name in ("teacher", "student_dckd", "student"):
        model = AutoModelForCausalLM.from_pretrained(folder / "models" / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / "models" / name)
        assert model.config.vocab_size >= len(tokenizer)
    assert model.config.num_hidden_layers == 2
    html = (folder / "report.html").read_text()
    assert "<svg" in html and "http" not in html.split("<body", 1)[1].split("</body", 1)[0]
    for name in TRAINED:
        manifest = json.loads((folder / "stages" / name / "manifest.json").read_text())
        assert manifest["layout"]["student"] == {"tensor": 2, "pipeline": 1, "context": 1, "data": 1}
        assert manifest["layout"]["teacher"]["pipeline"] == 2
        assert len(curve(folder, name)) == 4 and not (folder / "stages" / name / "checkpoints").exists()
    layouts = {name: json.loads((folder / "stages" / name / "manifest.json").read_text())["layout"] for name in ROLES}
    assert {name: set(layout) for name, layout in layouts.items()} == ROLES
    assert layouts["adpa"]["reference"]["data"] == 2


def test_a_second_run_redoes_nothing_but_the_report(finished):
    raw, recipe = finished
    folder = Path(raw["output"])
    before = manifests(folder)
    told = run_in_pool(recipe)
    after = manifests(folder)
    assert {name for name in STAGES if after[name] != before[name]} == {"report"}
    assert told.count("already done") == len(STAGES) - 1


def test_another_layout_gives_the_same_curves(finished, tmp_path):
    raw, recipe = finished
    other = tmp_path / "other"
    run_in_pool(
        recipe,
        f"output={other}",
        "student.parallel.tensor=1",
        "teacher.parallel.tensor=2",
        "teacher.parallel.pipeline=1",
        "teacher.parallel.pad_heads=true",
    )
    for name in TRAINED:
        assert curve(other, name) == pytest.approx(curve(Path(raw["output"]), name), rel=1e-3)
    # Until the student's own answers differ by a rounding, everything before is equal far more closely.
    assert curve(other, "dckd") == pytest.approx(curve(Path(raw["output"]), "dckd"), rel=1e-5)


def test_the_tool_that_compares_layouts(finished, tmp_path):
    raw, recipe = finished
    figures = tmp_path / "figures.json"
    command = [sys.executable, "tools/compare_layouts.py", str(recipe), "--stage", "adpa", "--json", str(figures)]
    command.append("--other")
    layout = ["student.parallel.tensor=1", "teacher.parallel.tensor=2", "teacher.parallel.pipeline=1",
              "teacher.parallel.pad_heads=true"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *layout], cwd=ROOT, env=environment, check=True, timeout=120)
    assert json.loads(figures.read_text())["relative_error"] < 1e-5


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and to every rank, at once."""
    family = [process_of for process_of in psutil.Process(process.pid).children(recursive=True)]
    for member in [*family, psutil.Process(process.pid)]:
        member.send_signal(signal.SIGKILL)
    process.communicate()
    psutil.wait_procs(family, timeout=20)


def interrupt(recipe: Path, folder: Path, name: str) -> None:
    """Runs until the training stage `name` has made a step, and asks it to leave there."""
    process = start(recipe, f"output={folder}")
    metrics = folder / "stages" / name / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > 0):
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == INTERRUPTED, output[-4000:]
    told = re.search(rf"megakd: interrupted after step (\d) of stage {name}, checkpoint saved; run the same", output)
    assert told is not None, output[-4000:]
    [saved] = (folder / "stages" / name / "checkpoints").iterdir()
    assert saved.name == f"step-{int(told[1]):08}" and "Traceback" not in output


def test_killed_in_the_middle_of_each_stage(finished, tmp_path):
    """After every kill, and a signal that asks to leave, the finished stages stand, and the end is that of an
    undisturbed run, bit for bit. The signal and the first kill reach the launcher, the others the ranks alone."""
    raw, recipe = finished
    folder = tmp_path / "killed"
    killed = []
    interrupt(recipe, folder, "dpo")
    for name in KILLED:
        begun = folder / "stages" / name
        before: dict[str, float] = {}

        def in_the_middle(name: str = name, begun: Path = begun, before: dict[str, float] = before) -> bool:
            # A training stage is killed once it has a checkpoint to go on from, any other as soon as it has begun.
            if not (any(begun.glob("checkpoints/step-*")) if name in TRAINED else begun.exists()):
                return False
            before.update(manifests(folder))
            return name not in before

        if name == KILLED[0]:
            process = start(recipe, f"output={folder}")
            while process.poll() is None and not in_the_middle():
                time.sleep(0.005)
            if process.poll() is None:
                kill_all(process)
                killed.append(name)
        else:
            try:
                run_in_pool(recipe, f"output={folder}", kill_when=in_the_middle)
            except Killed:
                killed.append(name)
        finished_before = manifests(folder)
        assert {n: t for n, t in finished_before.items() if n in before} == before
    told = run_in_pool(recipe, f"output={folder}")
    assert len(killed) >= 2, f"too fast to be killed in the middle: only {killed}"
    for name, when in finished_before.items():
        assert manifests(folder)[name] == when or name == "report"
    for name in ("teacher", "student_dckd", "student_adpa"):
        undisturbed = weights(Path(raw["output"]), name)
        for tensor, values in weights(folder, name).items():
            assert torch.equal(values, undisturbed[tensor]), f"{name}: {tensor}"
    for name in TRAINED:  # one that went on from a checkpoint counts what earlier starts did
        manifest = json.loads((folder / "stages" / name / "manifest.json").read_text())
        assert manifest["seconds"] > sum(step["seconds"] for step in read_metrics(begun.parent / name / METRICS))
    assert "already done" in told
    assert not list(folder.rglob("*partial*"))
    assert json.loads((folder / "summary.json").read_text()) == json.loads(
        (Path(raw["output"]) / "summary.json").read_text()
    )


def test_other_settings_in_the_same_folder_are_refused(finished, capsys):
    raw, recipe = finished
    before = manifests(Path(raw["output"]))
    assert main(["run", str(recipe), "stages.dckd.objective.alpha=0.7", "--check"]) == USAGE_ERROR
    told = capsys.readouterr().err
    assert "alpha" in told and "0.7" in told
    assert manifests(Path(raw["output"])) == before
