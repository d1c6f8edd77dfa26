"""torchrun for `megakd run` on one machine, with a run's own exit status where it leaves when asked to.

torchrun itself ends with 1 whatever its ranks ended with, gives them 30 seconds after a SIGTERM and dies of a SIGUSR1.
Here both signals are passed on to the ranks, which take the time that a checkpoint takes (megakd/interruption.py).
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import psutil
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megakd.interruption import INTERRUPTED, SIGNALS

_asked = False


def main() -> int:
    """Runs `torchrun ARGUMENTS`; returns the exit status."""
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
    global _asked
    _asked = True
    ranks = psutil.Process().children()
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    if not ranks:
        sys.exit(INTERRUPTED)  # nothing has been started


if __name__ == "__main__":
    sys.exit(main())
