"""A pool of ranks for tests: `run_ranks(world, function, *args)` runs `function(*args)` on each of them.

Importing torch (and megatron-core) costs more than most multi-rank tests, so a pool of each world size is started once
a session and kept. The processes are forked from a server process that has run nothing but the imports that the
session's tests have made: as clean as spawned ones, and the imports are paid once for all the ranks of all the pools.
They talk by gloo; with `device="cuda"` they are spawned and started as those of a run on GPUs are
(`megakd.mcore.runtime.start`), with NCCL.

In a test file (`function` and its arguments must be picklable, so it lives at the module's top level):

    from tests.ranks import run_ranks, subgroup

    def _sum_of_ranks():
        total = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(total, group=subgroup((0, 1)))
        return total.item()

    def test_sum():
        assert run_ranks(2, _sum_of_ranks) == [1.0, 1.0]
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import re
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_START_SECONDS = 180.0
_GRACE_SECONDS = 1.0  # after a first failure: how long other ranks may take to report theirs
_POLL_SECONDS = 0.005
_HEAVY_MODULES = re.compile(r"torch(\.distributed)?|megatron\.core|megakd\..+|transformers\.models\..+\.modeling_\w+")
"""Importing them brings the rest. Few enough: the server's command line names them all, and its length is limited."""

_pools: dict[tuple[int, str], _Pool] = {}
_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


class Killed(Exception):
    """The ranks were killed, as `run_ranks` was asked to."""


class RankError(AssertionError):
    """A function failed on a rank. The message holds the rank and its traceback; `rank` is the first that failed."""

    def __init__(self, rank: int, world: int, text: str):
        self.rank = rank
        super().__init__(f"rank {rank} of {world} failed:\n{text}")


def run_ranks(world: int, function: Callable, *args: Any, device: str = "cpu", timeout: float = 120,
              kill_when: Callable[[], bool] | None = None) -> list[Any]:
    """Runs a module-level function on every rank of a pool and returns its results in the order of the ranks.

    Args:
        world: number of ranks. The default process group has them all; `subgroup` makes smaller ones.
        function: called as `function(*args)` on each rank; results and arguments are copied, tensors included. Results
            hold no CUDA tensors: they would start CUDA in this process.
        device: "cpu" (gloo) or "cuda" (NCCL).
        timeout: seconds after which a pool that has not answered is killed.
        kill_when: asked again and again while the ranks work; once it says so they are killed, all at once.

    Raises:
        Killed: by `kill_when`.
        RankError: the function raised on some rank. The pool is thrown away, as its ranks may be out of step.
        TimeoutError: some rank did not answer in time. The pool is killed.
    """
    pool = world, device
    if pool not in _pools:
        _pools[pool] = _Pool(world, device)
    try:
        return _pools[pool].call(function, args, timeout, kill_when)
    except BaseException:
        _pools.pop(pool).kill()
        raise


def subgroup(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """Inside a rank: the process group of `ranks`, made once and kept.

    All ranks of the pool must call it with the same tuples in the same order, members or not.
    """
    if ranks == tuple(range(dist.get_world_size())):
        return dist.group.WORLD
    if ranks not in _groups:
        _groups[ranks] = dist.new_group(list(ranks))
    return _groups[ranks]


def close_pools() -> None:
    """Ends all pools; the session fixture in conftest.py calls it.

    So do those of tests/mcore and tests/e2e: a grid has over a dozen process groups, and gloo has a thread for each
    that wakes up a hundred times a second as long as the pool lives.
    """
    while _pools:
        _pools.popitem()[1].close()


class _Pool:
    def __init__(self, world: int, device: str):
        self.world = world
        self.directory = tempfile.mkdtemp(prefix="ranks-")
        # A process that has met CUDA cannot be forked, and an import may be enough.
        context = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
        if device != "cuda":
            context.set_forkserver_preload([name for name in sys.modules if _HEAVY_MODULES.fullmatch(name)])
        start = (_start_cuda, _free_port()) if device == "cuda" else (_start_gloo, self.directory)
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        self.pipes, self.processes = [], []
        try:
            for rank in range(world):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(rank, world, *start, theirs), daemon=True)
                process.start()
                theirs.close()
                self.pipes.append(ours)
                self.processes.append(process)
            self.collect(time.monotonic() + _START_SECONDS)
        except BaseException:
            self.kill()
            raise
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before

    def call(self, function: Callable, args: tuple, timeout: float, kill_when: Callable[[], bool] | None) -> list[Any]:
        # Plain pickle, not the connection's own: that one would pass tensors by shared memory, whose life is tied to
        # both processes. The import path goes ahead, as the function's module may be new to the rank.
        payload = pickle.dumps((function, args))
        for rank, pipe in enumerate(self.pipes):
            try:
                pipe.send_bytes(pickle.dumps(sys.path))
                pipe.send_bytes(payload)
            except OSError as error:
                raise RankError(rank, self.world, f"the process has ended ({error})") from error
        return self.collect(time.monotonic() + timeout, kill_when)

    def collect(self, deadline: float, kill_when: Callable[[], bool] | None = None) -> list[Any]:
        """One answer of each rank, in their order; raises the first failure with those that follow at once."""
        answers: dict[int, Any] = {}
        failures: list[tuple[int, str]] = []
        waiting = dict(zip(self.pipes, range(self.world), strict=False))
        while waiting:
            left = max(0.0, deadline - time.monotonic())
            for pipe in (ready := wait(list(waiting), timeout=left if kill_when is None else min(left, _POLL_SECONDS))):
                rank = waiting.pop(pipe)
                try:
                    succeeded, value = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError) as error:
                    self.processes[rank].join(_GRACE_SECONDS)
                    code = self.processes[rank].exitcode
                    succeeded, value = False, f"the process ended, exit code {code} ({error!r})"
                if succeeded:
                    answers[rank] = value
                else:
                    failures.append((rank, value))
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            if kill_when is not None and kill_when():
                raise Killed
            if not ready and time.monotonic() >= deadline:
                break
        if failures:
            others = [f"\nrank {rank} too: {text.strip().splitlines()[-1]}" for rank, text in failures[1:]]
            raise RankError(failures[0][0], self.world, failures[0][1] + "".join(others))
        if waiting:
            raise TimeoutError(f"ranks {sorted(waiting.values())} of {self.world} did not answer in time")
        return [answers[rank] for rank in range(self.world)]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()  # a rank that waits for work ends at the end of its pipe
        for process in self.processes:
            process.join(2)
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join()
        shutil.rmtree(self.directory, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _start_gloo(rank: int, world: int, directory: str) -> None:
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine's host name need not resolve
    store = dist.FileStore(str(Path(directory) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=10))


def _start_cuda(rank: int, world: int, port: int) -> None:
    from megakd.mcore import runtime  # it imports megatron-core, which few of the tests on gloo need

    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # float32 products in float32, as on the CPU; cuBLAS reads it at its start
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    runtime.start("cuda", timeout=timedelta(minutes=10))


def _serve(rank: int, world: int, start: Callable, where: Any, pipe: Connection) -> None:
    """Life of one rank: join the group, say so, then answer calls until the pipe ends."""
    torch.set_num_threads(1)
    start(rank, world, where)
    pipe.send_bytes(pickle.dumps((True, rank)))
    while True:
        try:
            paths = pickle.loads(pipe.recv_bytes())
            payload = pipe.recv_bytes()
        except (EOFError, OSError):
            break
        sys.path.extend(path for path in paths if path not in sys.path)
        pipe.send_bytes(_answer(payload))
    # No destroy_process_group: peers may be gone already, and the process ends here.
    os._exit(0)


def _answer(payload: bytes) -> bytes:
    try:
        function, args = pickle.loads(payload)
        return pickle.dumps((True, function(*args)))
    except Exception:  # whatever it is, the test gets it
        text = io.StringIO()
        traceback.print_exc(file=text)
        return pickle.dumps((False, text.getvalue()))
