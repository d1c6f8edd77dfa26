"""A real SLURM of two nodes on this machine, with munge, ports, folder and slurm.conf of its own.

The two "nodes" n1 and n2 are two slurmd of this host. Two partitions: a job in `urgent` preempts those in `main`, which
have `GRACE` seconds to leave and are queued again.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch", "srun", "scontrol", "squeue")
NODES = ("n1", "n2")
GRACE = 90
"""Seconds between the signal of a preemption and the end of a job that does not leave."""


def missing() -> str | None:
    """Why no cluster can be started here; None where one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "slurmd starts jobs as their users, which takes root"
    return None


def search_path() -> str:
    """PATH with the folders of daemons, which a user's PATH may lack."""
    return os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


class Cluster:
    """A running cluster; a context manager.

    Args:
        folder: for its sockets, logs and state; the path has to be short (a socket's is at most 107 bytes).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "PATH": search_path(), "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self.daemons: list[psutil.Process] = []

    def __enter__(self) -> Cluster:
        with ExitStack() as opened:
            opened.callback(self._stop)
            self._start()
            opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    # -------------------------------------------------------------------------------------------------------- daemons
    def _start(self) -> None:
        for name in ("state", *NODES):
            (self.folder / name).mkdir(parents=True)
        self._start_munge()
        self._write_configuration()
        self._daemon("slurmctld", "-f", self.environment["SLURM_CONF"])
        for node in NODES:
            self._daemon("slurmd", "-N", node, "-f", self.environment["SLURM_CONF"])
        self.wait("its nodes to come up", lambda: self.command("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D")
                  == str(len(NODES)), seconds=60)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], env=self.environment, check=True)
        # Without --force munged takes neither key nor log in a folder below one that others can write to, such as /tmp.
        self._daemon("munged", "--force", f"--socket={self.folder / 'munge.socket'}", f"--key-file={key}",
                     f"--pid-file={self.folder / 'munged.pid'}", f"--log-file={self.folder / 'munged.log'}",
                     f"--seed-file={self.folder / 'munged.seed'}")

    def _write_configuration(self) -> None:
        controller, *ports = free_ports(1 + len(NODES))
        host = socket.gethostname().split(".")[0]
        lines = [
            "ClusterName=megakd-test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={controller}",
            "AuthType=auth/munge",
            # A job that is queued again waits until its old credential has run out.
            f"AuthInfo=socket={self.folder / 'munge.socket'},cred_expire=5",
            "CredType=cred/munge",
            "SlurmUser=root",
            "SlurmdUser=root",
            f"StateSaveLocation={self.folder / 'state'}",
            f"SlurmdSpoolDir={self.folder}/%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/slurmd-%n.pid",
            f"SlurmctldLogFile={self.folder}/slurmctld.log",
            f"SlurmdLogFile={self.folder}/slurmd-%n.log",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "MpiDefault=none",
            "ReturnToService=2",
            "SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0",
            "SlurmdParameters=config_overrides",  # two CPUs a node, whatever this machine has
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            *(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN"
              for node, port in zip(NODES, ports, strict=True)),
            f"PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={GRACE}",
            "PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10",
        ]
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _daemon(self, name: str, *arguments: str) -> None:
        """Starts a program that goes into the background, and finds its process by the pid file that it writes."""
        subprocess.run([name, *arguments], env=self.environment, check=True, timeout=60)
        label = f"slurmd-{arguments[1]}" if name == "slurmd" else name
        file = self.folder / f"{label}.pid"
        self.wait(f"{label} to write its pid", lambda: file.is_file() and file.read_text().strip(), seconds=30)
        self.daemons.append(psutil.Process(int(file.read_text())))

    def _stop(self) -> None:
        """Ends jobs and daemons, and whatever is left of either, each process by its own id."""
        if len(self.daemons) == 2 + len(NODES):
            subprocess.run(["scancel", "--user=root"], env=self.environment, timeout=60)
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and self.command("squeue", "-h"):
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            if daemon.is_running():
                daemon.send_signal(signal.SIGTERM)
        psutil.wait_procs(self.daemons, timeout=20)
        for process in self._own_processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _own_processes(self) -> list[psutil.Process]:
        """The daemons, and the processes of jobs: these are no children of slurmd, but have our SLURM_CONF."""
        own = [daemon for daemon in self.daemons if daemon.is_running()]
        sign = f"SLURM_CONF={self.environment['SLURM_CONF']}\0".encode()
        for process in psutil.process_iter():
            # psutil's own reading ends at the first gap, and slurmstepd writes its title over the beginning.
            with suppress(OSError, psutil.NoSuchProcess):  # it has ended meanwhile
                environment = Path(f"/proc/{process.pid}/environ").read_bytes()
                # Not the shell of somebody who looks at this cluster.
                of_a_job = b"SLURM_JOB_ID=" in environment or process.name() == "slurmstepd"
                if sign in environment and of_a_job and process not in own:
                    own.append(process)
        return own

    # ---------------------------------------------------------------------------------------------------------- using
    def command(self, *words: str) -> str:
        """Runs one of SLURM's programs; returns what it printed. One that only looks is tried again: on a machine that
        is very busy the controller may not answer."""
        for tries_left in (2, 1, 0):
            done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
            if done.returncode == 0 or words[0] not in ("scontrol", "squeue", "sinfo") or not tries_left:
                break
            time.sleep(1)
        assert done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """A job's state in SLURM's word: PENDING, RUNNING, COMPLETED, FAILED, ..."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        words = self.command("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.removeprefix(f"{name}=") for word in words if word.startswith(f"{name}="))

    def wait(self, what: str, condition, seconds: float) -> None:
        """Waits for a condition.

        Raises:
            TimeoutError: it has not come true in time; the message has the daemons' last lines.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(f"{file.name}: {file.read_text(errors='replace')[-1500:]}"
                                 for file in sorted(self.folder.glob("*.log")))
                raise TimeoutError(f"waited {seconds} s for {what}\n{logs}")
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at."""
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
