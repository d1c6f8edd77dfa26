"""Leaving a run when asked to: a scheduler's signal sets a flag, all ranks agree, what can be kept is kept.

SIGUSR1 (a job's time is nearly over) and SIGTERM (preemption, a machine that goes down) ask for it. A training saves a
checkpoint after the step that it is at; any other stage is finished first. The exit status says that the same command
goes on from there. torch is imported late: the command line reads this file before it knows that a recipe is sound.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

INTERRUPTED = 75
"""Exit status of a run that left when asked to (sysexits.h: EX_TEMPFAIL, try again)."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_asked = False  # of this process, as signals are


class Interrupted(Exception):
    """The run leaves because it was asked to; every rank raises it at the same place. Nothing is wrong."""

    def __init__(self, where: str):
        super().__init__(f"interrupted {where}; run the same command to go on")


@contextmanager
def heard() -> Iterator[None]:
    """While it lasts, SIGNALS ask the run to leave in place of ending this process. Main thread only."""
    global _asked
    _asked = False
    before = {number: signal.signal(number, _remember) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = False


def _remember(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True


def asked(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether any rank of `group` has been asked to leave: the same answer on all of them.

    Schedulers signal nodes one after the other, and some only one of them, so no rank may act on its own flag.

    Collectives: one MAX all-reduce of one number over `group`.
    """
    import torch
    import torch.distributed as dist

    flag = torch.tensor([int(_asked)], dtype=torch.int32, device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    return bool(flag.item())
