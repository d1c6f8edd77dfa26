"""Programs of others that a stage runs on one rank. Imports no torch."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megakd.errors import ConfigError

_LAUNCHER = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
_LAST_WORDS = 400  # characters of a failed program's output that a message repeats


def run_program(field: str, command: Sequence[str], log: Path, timeout: float | None) -> None:
    """Runs a program to its end; what it prints goes into `log`. It hears nothing of this run's other processes.

    Args:
        field: the setting that names it, for messages.
        command: program and arguments.
        log: a file that is made anew.
        timeout: seconds; None waits for ever.

    Raises:
        ConfigError: it cannot be started, takes too long (it and its children are killed) or ends with an error.
    """
    environment = {name: value for name, value in os.environ.items()
                   if name not in _LAUNCHER and not name.startswith("TORCHELASTIC_")}
    shown = " ".join(command)
    with log.open("wb") as stream:
        try:
            # A group of its own, so that nothing of it is left when it is killed.
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                                       env=environment, process_group=0)
        except OSError as error:
            raise ConfigError(field, shown, f"cannot be started: {error}", "Name a program that is there") from error
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise ConfigError(field, shown, f"did not end within {timeout:g} seconds and was killed",
                              f"Give it more time, or see what it printed: {log}") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code != 0:
        words = " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-_LAST_WORDS:]
        rule = f"ended with exit code {code}" + (f" ({words})" if words else "")
        raise ConfigError(field, shown, rule, f"See what it printed: {log}")
