"""What the job's shell scripts decide, with a made-up scontrol and ranks that are one-liners. No SLURM is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "slurm"


# --------------------------------------------------------------------------------------------------- how a job ends
@pytest.fixture
def job(tmp_path):
    """Ends a job whose ranks left `statuses` (rank -> exit status, the first one first); returns the script's status,
    what it said last, and whether it asked for a place in the queue."""
    logs = tmp_path / "run" / "slurm" / "job-7" / "start-0"
    logs.mkdir(parents=True)

    def end(statuses: dict[int, int], *, srun: int, state: str = "RUNNING", reason: str = "None",
            preempted: str = "None", progress: bool = True) -> tuple[int, str, bool]:
        for moment, (rank, status) in enumerate(statuses.items()):
            (logs / f"rank-{rank:05}.status").write_text(f"{moment} {status} {rank:05} n{rank}\n")
        if progress:
            checkpoint = tmp_path / "run" / "stages" / "dckd" / "checkpoints" / "step-00000003"
            checkpoint.mkdir(parents=True)
            (checkpoint / "checkpoint.json").write_text("{}")
        programs = tmp_path / "programs"
        programs.mkdir()
        (programs / "scontrol").write_text(
            f'#!/bin/sh\ncase "$*" in requeue*) touch {tmp_path}/queued;; '
            f'*) echo "JobId=7 JobState={state} Reason={reason} PreemptTime={preempted}";; esac\n')
        (programs / "scontrol").chmod(0o755)
        code = f"source {SLURM}/common.sh; job_folder={logs.parent} logs={logs} ranks=2 progress_before=; finish {srun}"
        done = subprocess.run(["bash", "-uc", code], capture_output=True, text=True, timeout=60,
                              env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"})
        said = (done.stdout + done.stderr).splitlines()
        assert len(said) == 1, said
        return done.returncode, said[0], (tmp_path / "queued").exists()

    end.logs = logs
    return end


def test_a_job_is_done(job):
    status, said, queued = job({1: 0, 0: 0}, srun=0)
    assert (status, queued) == (0, False) and said.endswith("job 7 is done")


def test_a_job_that_is_done_is_done_though_it_should_have_given_way(job):
    assert job({0: 0, 1: 0}, srun=0, preempted="2026-11-22T10:00:00")[::2] == (0, False)


def test_time_is_up(job):
    status, said, queued = job({0: 75, 1: 75}, srun=0)
    assert (status, queued) == (75, True) and "job 7 goes into the queue again" in said


def test_a_signal_that_came_before_the_ranks_could_hear_it(job):
    assert job({0: 138, 1: 143}, srun=143)[::2] == (75, True)


def test_a_start_without_progress_is_the_last(job):
    status, said, queued = job({0: 75, 1: 75}, srun=0, progress=False)
    assert (status, queued) == (1, False)
    assert "brought no new checkpoint and no finished stage" in said and "Give it more time (sbatch --time)" in said


@pytest.mark.parametrize("statuses, srun", [({0: 75, 1: 75}, 0), ({0: 143, 1: 143}, 143), ({0: 2, 1: 2}, 2), ({}, 143)])
def test_a_preempted_job_comes_back_whatever_it_has_done(job, statuses, srun):
    status, said, queued = job(statuses, srun=srun, preempted="2026-11-22T10:00:00", progress=False)
    assert (status, queued) == (75, True) and "preempted; job 7 goes into the queue again" in said


@pytest.mark.parametrize("preempted", ["None", "2026-11-22T10:00:00"])
def test_slurm_is_left_to_end_what_it_ends(job, preempted):
    """A cancelled job must not come back; one that is preempted without grace is put into the queue by SLURM."""
    status, said, queued = job({0: 75, 1: 75}, srun=0, state="COMPLETING", preempted=preempted)
    assert (status, queued) == (75, False) and "What job 7 has done stands: the same command goes on" in said


@pytest.mark.parametrize("statuses", [{}, {1: 1}])
@pytest.mark.parametrize("reason, progress, ending", [("None", True, (75, False)), ("TimeLimit", True, (75, True)),
                                                      ("TimeLimit", False, (1, False))])
def test_ranks_that_slurm_killed_inside_a_stage(job, statuses, reason, progress, ending):
    """srun says 0 of ranks that were killed with their shells, and some rank may complain of one that is gone."""
    assert job(statuses, srun=0, state="COMPLETING", reason=reason, progress=progress)[::2] == ending


def test_ranks_that_saved_in_the_last_seconds_of_their_time(job):
    assert job({0: 75, 1: 143}, srun=143, state="COMPLETING", reason="TimeLimit")[::2] == (75, True)


def test_the_first_rank_that_failed_is_told(job):
    log = "step 1\nTraceback (most recent call last):\n  File x\nValueError: bad\nbye\n"
    (job.logs / "rank-00003.log").write_text(log)
    status, said, queued = job({2: 143, 3: 1, 0: 1}, srun=143)
    assert (status, queued) == (1, False)
    assert said.startswith("slurm: job 7 failed: rank 3 on n3 ended with exit status 1; its log says: ValueError: bad.")
    assert "submit the same command" in said and said.endswith(f"Logs: {job.logs}")


def test_a_mistake_that_rank_0_alone_tells(job):
    (job.logs / "rank-00000.log").write_text("megakd: error: data.train = []: a stage reads these rows. Name files\n")
    assert "its log says: megakd: error: data.train = []: a stage reads" in job({9: 2, 0: 2}, srun=2)[1]


def test_a_rank_that_was_killed(job):
    (job.logs / "rank-00000.log").write_text("RuntimeError: Connection closed by peer\n")
    said = job({1: 137}, srun=137)[1]
    assert "rank 1 on n1 was ended by signal 9 (KILL); its log says: nothing" in said
    assert "the node was out of memory" in said


@pytest.mark.parametrize("statuses", [{}, {0: 0}])
def test_a_node_that_is_lost(job, statuses):
    status, said, queued = job(statuses, srun=0)
    assert (status, queued) == (1, False) and "no rank says why; a node may be lost" in said


# --------------------------------------------------------------------------------------------------------- one rank
def start_rank(folder: Path, rank: int, code: str, node: int = 1, tasks: str = "2(x2)") -> subprocess.Popen:
    environment = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURMD_NODENAME": "n7",
                   "SLURM_NODEID": str(node), "SLURM_STEP_TASKS_PER_NODE": tasks, "MEGAKD_LOGS": str(folder)}
    return subprocess.Popen(["bash", SLURM / "rank.sh", sys.executable, "-uc", code], env=os.environ | environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


@pytest.mark.parametrize("rank, status, left", [(0, 0, 0), (0, 3, 3), (2, 3, 3), (2, 75, 0)])
def test_a_rank_knows_its_place_and_leaves_its_log_and_status(tmp_path, rank, status, left):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    code = (f"import os, sys; print(*(os.environ[name] for name in {names})); "
            f"print('oh', file=sys.stderr); sys.exit({status})")
    process = start_rank(tmp_path, rank, code)
    shown, _ = process.communicate(timeout=60)
    said = f"{rank} 4 1 2\noh\n"
    assert (process.returncode, shown) == (left, said if rank == 0 else "")
    assert (tmp_path / f"rank-0000{rank}.log").read_text() == said
    written = [file.read_text().split()[1:] for file in tmp_path.glob("*.status")]
    assert written == [[str(status), f"0000{rank}", "n7"]]


@pytest.mark.parametrize("tasks, ranks", [("8", [8]), ("4(x3)", [4, 4, 4]), ("8(x2),4,16(x2)", [8, 8, 4, 16, 16])])
def test_a_rank_knows_how_many_its_node_has(tmp_path, tasks, ranks):
    code = "import os; print(os.environ['LOCAL_WORLD_SIZE'])"
    started = [start_rank(tmp_path, 0, code, node, tasks) for node in range(len(ranks))]
    assert [int(process.communicate(timeout=60)[0]) for process in started] == ranks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_of_a_task_reaches_the_rank_and_ends_nobody_else(tmp_path, number):
    """As slurmstepd does: to the task's process group, in which are this shell and rank 0's tee."""
    code = (f"import signal, sys, time; signal.signal({int(number)}, lambda *_: (time.sleep(0.2), print('saved'), "
            "sys.exit(75))); print('ready'); time.sleep(60)")
    process = start_rank(tmp_path, 0, code)
    log, deadline = tmp_path / "rank-00000.log", time.monotonic() + 60
    while not (log.exists() and "ready" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    shown, _ = process.communicate(timeout=60)
    assert (process.returncode, shown) == (0, "ready\nsaved\n") and log.read_text() == "ready\nsaved\n"
    [status] = tmp_path.glob("*.status")
    assert status.read_text().split()[1] == "75"


# --------------------------------------------------------------------------------------------------------- one node
@pytest.mark.parametrize("recipe, python, device, message", [
    ("none.yaml", sys.executable, "cpu", "node n7: cannot read none.yaml."),
    ("recipe.yaml", "/nowhere/python", "cpu", "node n7: /nowhere/python is not there or older than 3.11."),
    ("recipe.yaml", sys.executable, "cuda", "node n7: 3 ranks and 2 GPUs (nvidia-smi -L)."),
    ("recipe.yaml", sys.executable, "cpu", None),
])
def test_what_a_node_lacks(tmp_path, recipe, python, device, message):
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: H100'\necho 'GPU 1: H100'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURMD_NODENAME": "n7"}
    done = subprocess.run(["bash", SLURM / "check_node.sh", recipe, python, device, "3"], cwd=tmp_path, text=True,
                          capture_output=True, timeout=60, env=os.environ | environment)
    assert done.returncode == (0 if message is None else 2) and done.stdout == ""
    assert done.stderr.startswith(f"slurm: error: {message}") if message else done.stderr == ""
