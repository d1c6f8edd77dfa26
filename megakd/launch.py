"""torchrun for `megakd run` on one machine, with a run's own exit status where it leaves when asked to.

torchrun itself ends with 1 whatever its ranks ended with, gives them 30 seconds after a SIGTERM and dies of a SIGUSR1.
Here both signals are passed on to the ranks, which take the time that a checkpoint takes (megakd/interruption.py).
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from megakd.interruption import INTERRUPTED, SIGNALS

_asked = False


def on_ranks(processes: int, *program: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment that run `python PROGRAM` on `processes` ranks of this machine. Imports no torch."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    command = [sys.executable, "-m", "megakd.launch", "--standalone", f"--nproc-per-node={processes}", *program]
    return command, {
        # Two ranks that both use all cores get in each other's way many times over.
        "OMP_NUM_THREADS": str(threads),
        # Large CPU tensors come and go every micro-batch; in huge pages they cost half the page faults (measured).
        "THP_MEM_ALLOC_ENABLE": "1",
        **os.environ,
    }


def main() -> int:
    """Runs `torchrun ARGUMENTS`; returns the exit status."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Those that torchrun answers itself, by ending the ranks.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
    for number in SIGNALS:
        signal.signal(number, _pass_on)
    try:
        torchrun.run(torchrun.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        # A rank that is still being imported knows no better than to end by the signal.
        statuses = {failure.exitcode for failure in error.failures.values()}
        if INTERRUPTED in statuses or (_asked and statuses == {-signal.SIGTERM}):
            return INTERRUPTED
        raise
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    import psutil

    global _asked
    _asked = True
    ranks = psutil.Process().children()
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    if not ranks:
        sys.exit(INTERRUPTED)  # nothing has been started


if __name__ == "__main__":
    sys.exit(main())
