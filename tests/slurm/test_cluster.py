"""The job script and the chain of jobs on a real SLURM of two nodes: slurmctld, two slurmd and munge on this machine.

Two runs of one recipe, slurm/adpa_70b_to_7b.yaml on tiny models and the CPU, one rank a node:
A, three dependent jobs of different sizes, is left alone; B, one job, loses a rank and is preempted. They end alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.recipes import tiny_rows, write_rows, write_tiny_model
from tests.slurm.cluster import Cluster, missing

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "adpa_70b_to_7b.sbatch"
STAGES = ("dckd", "generate", "adpa", "eval", "export", "report")
PATIENCE = 600
"""Seconds that a run may take on a busy machine."""

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no SLURM can be started here: {missing()}")


@pytest.fixture(scope="module")
def cluster():
    # Not pytest's own folder: the path of a socket is at most 107 bytes.
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        try:
            running = opened.enter_context(Cluster(folder))
        except (TimeoutError, subprocess.SubprocessError) as error:
            # The machine's doing, not the job script's.
            pytest.skip(f"SLURM is installed but does not start here: {error}")
        running.environment |= {"MEGAKD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        yield running


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> Path:
    """The settings that turn the 70B recipe into one of seconds: models, data, device, layouts over two ranks."""
    folder = tmp_path_factory.mktemp("slurm")
    start = write_tiny_model(folder / "student", seed=1, layers=2)
    teacher, reference = (write_tiny_model(folder / name, seed=seed) for name, seed in (("teacher", 2), ("ref", 3)))
    settings = {
        "name": "small", "device": "cpu", "precision": "fp32",
        "student.model": start, "student.parallel": "{}", "student.micro_batch": 2,
        "teacher.model": teacher, "teacher.parallel": "{pipeline: 2}", "teacher.micro_batch": 2,
        "reference.model": reference, "reference.parallel": "{}", "reference.micro_batch": 2,
        "data.train": f"[{write_rows(folder / 'train.jsonl', tiny_rows(10))}]",
        "data.eval": f"[{write_rows(folder / 'eval.jsonl', tiny_rows(4, start=100))}]", "data.max_length": 96,
        "stages.dckd.init": start, "stages.dckd.steps": 40, "stages.adpa.steps": 120,
        "stages.generate.max_new_tokens": 8, "stages.generate.slots": 8,
        "stages.eval.models": f"{{start: {start}, final: 'run:student_adpa'}}", "stages.eval.prompts": 4,
        "stages.eval.max_new_tokens": 8, "stages.eval.slots": 8, "stages.eval.chunk_tokens": 16,
    }
    for name in ("dckd", "adpa"):
        settings |= {f"stages.{name}.{key}": value for key, value in (
            ("optimizer.lr", "1.0e-3"), ("global_batch", 4), ("checkpoint_every", 10), ("chunk_tokens", 64))}
    file = folder / "overrides.txt"
    lines = ["# tiny models", "", *(f"{key}={value}" for key, value in settings.items())]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "models" / "student_adpa" / "model.safetensors")


def manifests(run: Path) -> dict[str, int]:
    """Ranks that each finished stage ran on."""
    return {file.parent.name: json.loads(file.read_text())["ranks"] for file in run.glob("stages/*/manifest.json")}


def steps_done(run: Path, stage: str) -> int:
    file = run / "stages" / stage / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def log_of(run: Path, job: str) -> str:
    [log] = run.parent.glob(f"slurm-*-{job}.log")
    return log.read_text()


def end_of(cluster: Cluster, run: Path, job: str) -> str:
    """Waits for a job's end; returns its state."""
    cluster.wait(f"job {job} to end", lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), PATIENCE)
    return cluster.state(job)


def submit(cluster: Cluster, overrides: Path, run: Path) -> str:
    """Run B's command; returns the job's id."""
    return cluster.command(
        "sbatch", "--parsable", f"--chdir={run.parent}", f"--output={run.parent}/slurm-%x-%j.log", "--nodes=2",
        "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=1:00:00", str(SCRIPT),
        "--overrides", str(overrides), f"output={run}")


@pytest.fixture(scope="module")
def undisturbed(cluster, overrides, tmp_path_factory) -> Path:
    """Run A: the chain of jobs, to its end."""
    run = tmp_path_factory.mktemp("chain") / "run"
    done = subprocess.run(
        [sys.executable, ROOT / "slurm" / "submit.py", ROOT / "slurm" / "adpa_70b_to_7b.yaml",
         "--nodes", "dckd=2,generate=1,adpa=2", "--gpus-per-node", "1", "--time", "1:00:00",
         "--sbatch=--cpus-per-task=1", "--overrides", overrides, f"output={run}"],
        cwd=run.parent, env=cluster.environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=120)
    assert done.returncode == 0, done.stderr
    jobs = [line.split()[0] for line in done.stdout.splitlines()]
    assert len(jobs) == 3
    waits_for = [cluster.field(job, "Dependency").split("(")[0] for job in jobs[1:]]
    assert waits_for == [f"afterok:{job}" for job in jobs[:2]]
    for job in jobs:
        assert end_of(cluster, run, job) == "COMPLETED", log_of(run, job)
    return run


def test_dependent_jobs_of_different_sizes_run_the_chain(undisturbed):
    assert manifests(undisturbed) == dict.fromkeys(STAGES, 2) | {"generate": 1}
    assert (undisturbed / "report.html").is_file()
    for folder in (undisturbed / "slurm").iterdir():
        assert (folder / "code" / "megakd" / "cli.py").is_file() and (folder / "code" / "COMMIT").read_text().strip()
        assert "device: cpu" in (folder / "recipe.yaml").read_text()
        assert "ranks on cpu" in (folder / "plan.txt").read_text()
    logs = {len(list(folder.glob("start-0/rank-*.log"))) for folder in (undisturbed / "slurm").iterdir()}
    assert logs == {1, 2}


def rank_process(cluster: Cluster, job: str, rank: int) -> psutil.Process:
    """The process of megakd that is a rank of a job."""
    sign = {"SLURM_CONF": cluster.environment["SLURM_CONF"], "SLURM_JOB_ID": job, "RANK": str(rank),
            "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for process in psutil.process_iter():
        try:
            environment, words = process.environ(), process.cmdline()
        except psutil.Error:  # it has ended, or is none of ours
            continue
        if "megakd.cli" in words[:5] and sign.items() <= environment.items():
            return process
    raise LookupError(f"job {job} has no rank {rank}")


def wait_for_steps(cluster: Cluster, run: Path, job: str, stage: str, steps: int) -> None:
    def there() -> bool:
        assert cluster.state(job) in ("PENDING", "RUNNING", "COMPLETING"), log_of(run, job)
        return steps_done(run, stage) >= steps

    cluster.wait(f"{steps} steps of {stage}", there, PATIENCE)


def test_a_job_that_loses_a_rank_and_is_preempted_ends_alike(cluster, overrides, undisturbed, tmp_path):
    run = tmp_path / "run"
    # A rank of the second node is killed: the job fails, and says which.
    job = submit(cluster, overrides, run)
    wait_for_steps(cluster, run, job, "dckd", 12)
    rank_process(cluster, job, 1).kill()
    assert end_of(cluster, run, job) == "FAILED"
    last = log_of(run, job).splitlines()[-1]
    assert last.startswith(f"slurm: job {job} failed: rank 1 on n2 was ended by signal 9 (KILL)"), last
    assert "submit the same command: it goes on from the newest checkpoint" in last and "rank0" not in last
    assert manifests(run) == {}
    killed_at = steps_done(run, "dckd")

    # The same command goes on; a job of more importance takes its place, and it comes back.
    job = submit(cluster, overrides, run)
    wait_for_steps(cluster, run, job, "adpa", 5)
    urgent = cluster.command("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive",
                             "--output=/dev/null", "--wrap", "sleep 1")
    cluster.wait("the job to give way", lambda: cluster.field(job, "Restarts") == "1", PATIENCE)
    assert end_of(cluster, run, urgent) == "COMPLETED"
    interrupted_at = steps_done(run, "adpa")
    [saved] = (run / "stages" / "adpa" / "checkpoints").iterdir()
    assert saved.name == f"step-{interrupted_at:08}" and 5 <= interrupted_at < 120
    assert end_of(cluster, run, job) == "COMPLETED", log_of(run, job)

    log = log_of(run, job)
    assert f"megakd: interrupted after step {interrupted_at} of stage adpa, checkpoint saved" in log
    assert f"preempted; job {job} goes into the queue again" in log and f"job {job}, start 1, on n[1-2]" in log
    assert log.splitlines()[-1].endswith(f"slurm: job {job} is done")
    assert 12 <= killed_at < 40 and manifests(run) == dict.fromkeys(STAGES, 2)
    expected = weights(undisturbed)
    assert all(torch.equal(values, expected[name]) for name, values in weights(run).items())
    logs = [len(list((run / "slurm" / f"job-{job}").glob(f"start-{start}/rank-*.log"))) for start in (0, 1)]
    assert logs == [2, 2]
