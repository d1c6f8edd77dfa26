"""The chain of jobs: which jobs, which commands, what is refused before anything is submitted. Needs no SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "slurm"
sys.path.insert(0, str(SLURM))  # its files are scripts beside one another

import job as job_script  # noqa: E402
import submit  # noqa: E402

from megakd.config import load  # noqa: E402
from megakd.errors import ConfigError  # noqa: E402
from megakd.planning.cluster import cluster_named  # noqa: E402
from megakd.planning.recipe import setup_of_stage  # noqa: E402
from megakd.planning.timing import training_time  # noqa: E402
from megakd.planning.work import Lengths  # noqa: E402
from tests.planning_cases import LLAMA_8B, LLAMA_70B, write_config  # noqa: E402

RECIPE = SLURM / "adpa_70b_to_7b.yaml"
NODES = "dckd=16,generate=4,adpa=16,export=1"
NO_SBATCH = "sbatch = None: there is no such program on this machine. Run this on a login node of the cluster, or add"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """No run of the recipe is there, and no sbatch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(submit.shutil, "which", lambda name: None)


def jobs(nodes: str, time: str | None = None, *settings: str) -> list[submit.Job]:
    return submit.jobs_of(load(RECIPE, settings), nodes, time)


def finish(*stages: str) -> None:
    for name in stages:
        folder = Path("runs/adpa_70b_to_7b/stages") / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")


def refusal(capsys, *arguments: object) -> str:
    assert submit.main([str(RECIPE), *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("submit: error: ")
    [line] = err.removeprefix("submit: error: ").splitlines()
    return line


# ------------------------------------------------------------------------------------------------------------ the jobs
def test_neighbours_of_one_size_share_a_job_and_stages_that_are_not_named_follow():
    assert [(job.stages, job.nodes, job.time) for job in jobs(NODES)] == [
        (("dckd",), 16, "24:00:00"), (("generate",), 4, "24:00:00"), (("adpa", "eval"), 16, "24:00:00"),
        (("export", "report"), 1, "24:00:00")]
    assert [(job.stages, job.nodes) for job in jobs("dckd=2,generate=2,adpa=1")] == [
        (("dckd", "generate"), 2), (("adpa", "eval", "export", "report"), 1)]
    [whole] = jobs("3")
    assert whole.stages == ("dckd", "generate", "adpa", "eval", "export", "report") and whole.nodes == 3


def test_stages_that_are_done_may_be_left_out():
    finish("dckd", "generate")
    assert [job.stages for job in jobs("adpa=4,export=1")] == [("adpa", "eval"), ("export", "report")]


def test_each_job_has_its_time():
    times = [job.time for job in jobs(NODES, "dckd=2-00,adpa=30:00:00,export=20")]
    assert times == ["2-00", "24:00:00", "30:00:00", "20"]
    assert {job.time for job in jobs(NODES, "90")} == {"90"}


@pytest.mark.parametrize("text, seconds", [
    ("5", 300), ("5:30", 330), ("1:00:01", 3601), ("2-0", 172800), ("1-2:03", 93780), ("1-02:03:04", 93784)])
def test_walltimes_are_sbatchs(text, seconds):
    assert submit.seconds_of(text) == seconds


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize("nodes, message", [
    ("dkcd=1", "--nodes = 'dkcd': the recipe has no such stage. There are: dckd, generate, adpa, eval, export, report"),
    ("adpa=1,dckd=1", "--nodes = 'adpa, dckd': the recipe runs these stages as dckd, adpa. Name them in this order"),
    ("dckd=1,dckd=2", "--nodes = 'dckd=1,dckd=2': names the stage 'dckd' twice. Name it once"),
    ("dckd=1,adpa", "--nodes = 'adpa': is not of the form STAGE=VALUE. Write e.g. dckd=..."),
    ("dckd=0", "--nodes = 'dckd=0': has to be a whole number of at least 1. Correct it"),
    ("dckd=many", "--nodes = 'dckd=many': has to be a whole number of at least 1. Correct it"),
    ("adpa=16", "--nodes = 'adpa=16': leaves out the stage 'dckd', which comes before and is not done. Name it, too: "
     "dckd=N"),
])
def test_nodes_that_do_not_fit_the_recipe(capsys, nodes, message):
    assert refusal(capsys, "--nodes", nodes) == message


def test_fewer_gpus_than_the_layout(capsys):
    assert refusal(capsys, "--nodes", "dckd=16,generate=4,adpa=1,export=1", "--gpus-per-node", 4) == (
        "--nodes = 1: 1 x 4 = 4 ranks are fewer than one copy of the teacher takes in stage adpa: tensor 8 x pipeline "
        "1 x context 1. Give it at least 2 nodes, or lower teacher.parallel")


def test_roles_bind_only_the_jobs_that_they_are_in(capsys):
    """The teacher's 16 ranks are more than the node that exports has, and than that where the student generates."""
    assert submit.main([str(RECIPE), "--nodes", "dckd=2,generate=1,adpa=2,export=1", "--dry-run",
                        "teacher.parallel.pipeline=2"]) == 0
    assert "teacher TP8 x PP2 x DP1" in capsys.readouterr().out


def test_ranks_that_a_layout_or_a_batch_does_not_divide(capsys):
    line = refusal(capsys, "--nodes", "dckd=3,generate=4,adpa=16,export=1", "teacher.parallel.pipeline=2")
    assert line.startswith("teacher.parallel = 'tensor 8 x pipeline 2 x context 1': 16 ranks for one copy do not div")
    line = refusal(capsys, "--nodes", "dckd=3,generate=4,adpa=16,export=1")
    assert line.startswith("stages.dckd.global_batch = 128: has to be a multiple of student's data-parallel size 6 x")


def test_a_walltime_shorter_than_the_first_checkpoint(capsys):
    arguments = ("--nodes", NODES, "--time", "dckd=2:00:00,adpa=40")
    assert refusal(capsys, *arguments, "--seconds-per-step", 60) == (
        "--time = '40': is shorter than the 50 steps of 60.0 s (--seconds-per-step) to the first checkpoint of stage "
        "adpa. Give it at least 50 minutes, or write stages.adpa.checkpoint_every=40 or less")
    assert refusal(capsys, *arguments, "--seconds-per-step", 48.5).startswith("--time = '40': ")
    assert refusal(capsys, *arguments, "--seconds-per-step", 48.0).startswith(NO_SBATCH)
    assert refusal(capsys, *arguments, "--seconds-per-step", 60, "stages.adpa.steps=40").startswith(NO_SBATCH)


def test_the_runs_own_steps_say_how_long_one_takes(capsys):
    folder = Path("runs/adpa_70b_to_7b/stages/dckd")
    folder.mkdir(parents=True)
    lines = [{"step": number, "seconds": seconds} for number, seconds in enumerate((300.0, 20.0, 22.0))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert refusal(capsys, "--nodes", NODES, "--time", "18").startswith(
        "--time = '18': is shorter than the 50 steps of 22.0 s (metrics.jsonl) to the first checkpoint of stage dckd.")
    assert refusal(capsys, "--nodes", NODES, "--time", "19").startswith(NO_SBATCH)


# ------------------------------------------------------------------------------------------------------------ the plan
LENGTHS = ("--prompt-tokens", 300, "--answer-tokens", 300)


@pytest.fixture
def _configs():
    """Of the models of the recipe, the config.json alone."""
    for role, model in (("student", LLAMA_8B), ("teacher", LLAMA_70B), ("reference", LLAMA_70B)):
        write_config(Path("models") / role, model)


@pytest.mark.usefixtures("_configs")
def test_what_does_not_fit_is_not_submitted(capsys):
    arguments = ("--nodes", NODES, "--cluster", "h100", *LENGTHS)
    line = refusal(capsys, *arguments, "student.micro_batch=4", "data.max_length=8192", "--prompt-tokens", 4000)
    assert line.startswith("stages.dckd = 'student TP4 x PP1 x DP32, micro-batch 4; ")
    assert "most of it is 'activations'" in line and ". Set student." in line
    assert refusal(capsys, *arguments).startswith(NO_SBATCH)
    # Of the stages that are left, on the nodes that they get.
    finish("dckd", "generate")
    line = refusal(capsys, "--nodes", "adpa=1", "--cluster", "h100", *LENGTHS, "student.micro_batch=64")
    assert line.startswith("stages.adpa = 'student TP4 x PP1 x DP2, micro-batch 64; ") and "; 8 GPUs'" in line


@pytest.mark.usefixtures("_configs")
def test_the_planned_time_of_a_step_is_what_a_walltime_is_checked_with(capsys):
    arguments = ("--nodes", NODES, "--cluster", "h100", *LENGTHS)
    stages = load(RECIPE).stages
    setup = setup_of_stage(load(RECIPE), stages[0], 128, Lengths(300, 300))
    seconds = training_time(cluster_named("h100"), setup).total
    needed = -int(-50 * seconds // 60)
    line = refusal(capsys, *arguments, "--time", f"dckd=0:{int(50 * seconds) - 1}")
    assert line.startswith(f"--time = '0:{int(50 * seconds) - 1}': is shorter than the 50 steps of {seconds:.1f} s "
                           f"(--cluster) to the first checkpoint of stage dckd. Give it at least {needed} minutes")
    assert refusal(capsys, *arguments, "--time", f"dckd={needed}").startswith(NO_SBATCH)
    # What is known better comes first.
    assert "of 60.0 s (--seconds-per-step)" in refusal(capsys, *arguments, "--time", 1, "--seconds-per-step", 60)
    folder = Path("runs/adpa_70b_to_7b/stages/dckd")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": 22.0}) + "\n")
    assert "of 22.0 s (metrics.jsonl)" in refusal(capsys, *arguments, "--time", 1)


@pytest.mark.parametrize("arguments, message", [
    (("--cluster", "h1000"), "--cluster = 'h1000': there is no such file. Give one of "),
    (("--cluster", "h100"), "models/student: no config.json there."),
    (("--cluster", "h100", "device=cpu"), "device = 'cpu': H100 x 8 has devices of type cuda."),
    (("--answer-tokens", 300), "--answer-tokens = 300.0: is what a plan is made with, and there is none."),
])
def test_what_a_plan_lacks(capsys, arguments, message):
    assert refusal(capsys, "--nodes", NODES, *arguments).startswith(message)


@pytest.mark.parametrize("arguments, message", [
    (("--time", "soon"), "--time = 'soon': is no walltime. Write hours:minutes:seconds or days-hours"),
    (("--time", "dckd=1,export=x"), "--time = 'x': is no walltime."),
    (("--overrides", "none.txt"), "--overrides = 'none.txt': there is no such file."),
    (("student.paralel.tensor=2",), "student.paralel = {'tensor': 2}: there is no such setting."),
    ((), NO_SBATCH),
])
def test_other_mistakes(capsys, arguments, message):
    assert refusal(capsys, "--nodes", NODES, *arguments).startswith(message)


def test_a_time_for_a_stage_that_no_job_runs(capsys):
    finish("dckd", "generate")
    assert refusal(capsys, "--nodes", "adpa=16", "--time", "dckd=10") == (
        "--time = 'dckd=10': no job runs the stage 'dckd'. Leave it out, or name it in --nodes")


def test_a_missing_recipe(capsys):
    assert submit.main(["none.yaml", "--nodes", "1"]) == 2
    assert "recipe = 'none.yaml': there is no such file" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- the commands
def test_a_dry_run_prints_the_plan_and_the_lines_and_submits_nothing(capfd, monkeypatch):
    ran = []
    monkeypatch.setattr(submit.subprocess, "run", (lambda run: lambda words, **rest: ran.append(words) or run(
        words, **rest))(subprocess.run))
    assert submit.main([str(RECIPE), "--nodes", NODES, "--container", "/images/megakd.sqsh", "--dry-run",
                        "--sbatch=--partition=long", "seed=7"]) == 0
    assert {words[0] for words in ran} == {"bash"}
    lines = capfd.readouterr().out.splitlines()
    submitted = [line for line in lines if line.startswith("sbatch")]
    assert submitted[0] == (
        "sbatch --parsable --job-name=adpa_70b_to_7b-dckd --nodes=16 --ntasks-per-node=8 --gpus-per-node=8 "
        f"--time=24:00:00 --partition=long {submit.SCRIPT} --recipe {RECIPE} --container /images/megakd.sqsh "
        "--stage dckd seed=7")
    assert len(submitted) == 4 and all("afterok" in line for line in submitted[1:])
    started = [line for line in lines if line.startswith("srun")]
    assert [line.split()[1:3] for line in started] == [[f"--nodes={n}", f"--ntasks={8 * n}"] for n in (16, 4, 16, 1)]
    assert all("--container-image=/images/megakd.sqsh" in line for line in started)
    assert started[2].rstrip().endswith("--stage adpa --stage eval")
    assert "  adpa (distill): student TP4 x PP1 x DP32, teacher TP8 x PP1 x DP16, reference TP8 x PP1 x DP16" in lines


def test_every_job_waits_for_the_one_before(capsys, monkeypatch):
    """With an sbatch that says its arguments, one a line, in place of the real one."""
    programs = Path("programs")
    programs.mkdir()
    (programs / "sbatch").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "asked.$$"\necho "$$;cluster"\n')
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs.absolute()}:{os.environ['PATH']}")
    monkeypatch.setattr(submit.shutil, "which", lambda name: str(programs / name))
    assert submit.main([str(RECIPE), "--nodes", NODES, "device=cpu", "precision=fp32"]) == 0
    told = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [what for _, what in told] == [
        "dckd on 16 nodes, at most 24:00:00", "generate on 4 nodes, at most 24:00:00",
        "adpa, eval on 16 nodes, at most 24:00:00", "export, report on 1 nodes, at most 24:00:00"]
    asked = [Path(f"asked.{number}").read_text().splitlines() for number, _ in told]
    assert [[word for word in words if word.startswith("--dependency")] for words in asked] == [
        [], *([f"--dependency=afterok:{number}"] for number, _ in told[:3])]
    assert all("--gpus-per-node=0" in words and "--ntasks-per-node=8" in words for words in asked)


# ------------------------------------------------------------------------------------------------------ the job script
def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(submit.SCRIPT), *arguments], capture_output=True, text=True,
                          env=os.environ | {"MEGAKD_PYTHON": sys.executable} | environment, timeout=120)


def test_the_script_shows_what_it_would_do():
    Path("mine.txt").write_text("# ours\n\nseed=9\n  teacher.model=/models/teacher  \n")
    done = run_script("--overrides", "mine.txt", "--stage", "generate", "--dry-run", "student.parallel.tensor=2")
    assert done.returncode == 0, done.stderr
    plan, stage, line = done.stdout.splitlines()
    assert plan == "adpa_70b_to_7b: 16 nodes x 8 = 128 ranks on cuda, output runs/adpa_70b_to_7b"
    assert stage == "  generate (generate): student TP2 x PP1 x DP64"
    assert line.startswith("srun --nodes=16 --ntasks=128 ") and line.rstrip().endswith("--stage generate")


@pytest.mark.parametrize("arguments, message", [
    (("--chekc",), "slurm: error: '--chekc' is no option of this script"),
    (("--stage",), "slurm: error: --stage needs a value."),
    (("recipe.yaml",), "slurm: error: 'recipe.yaml' is neither an option nor key.key=value"),
    ((), "slurm: error: this is no job of SLURM. Submit it with sbatch, or add --dry-run"),
    (("--dry-run", "--stage", "dkcd"), "slurm: error: --stage = 'dkcd': the recipe has no such stage."),
    (("--dry-run", "--overrides", "bad.txt"), "slurm: error: --overrides = 'bad.txt:2: seed 9': is not of the form"),
    (("--dry-run", "teacher.parallel.tensor=256"), "slurm: error: --nodes = 16: 16 x 8 = 128 ranks are fewer than one"),
])
def test_what_the_script_refuses(arguments, message):
    Path("bad.txt").write_text("seed=8\nseed 9\n")
    done = run_script(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith(message)


def test_a_python_that_is_not_there():
    done = run_script("--dry-run", MEGAKD_PYTHON="/nowhere/python")
    assert done.returncode == 2 and "MEGAKD_PYTHON = '/nowhere/python': there is no such program" in done.stderr


def test_a_job_keeps_the_recipe_that_it_began_with(capsys):
    arguments = [str(RECIPE), "--nodes", "1", "--ranks-per-node", "8", "--keep", "12"]
    assert job_script.main([*arguments, "seed=1"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder == Path("runs/adpa_70b_to_7b/slurm/job-12").absolute()
    assert job_script.main([*arguments, "seed=2"]) == 0
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["seed"] == 1
    assert (folder / "plan.txt").read_text().startswith("adpa_70b_to_7b: 1 node x 8 = 8 ranks on cuda")


def test_the_last_setting_wins():
    Path("mine.txt").write_text("seed=1\nseed=2\n")
    assert job_script.load_with(RECIPE, Path("mine.txt"), ()).seed == 2
    assert job_script.load_with(RECIPE, Path("mine.txt"), ("seed=3",)).seed == 3
    with pytest.raises(ConfigError, match="no such file"):
        job_script.read_overrides(Path("none.txt"))
