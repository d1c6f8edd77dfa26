"""What a stage says while it runs: a line of `metrics.jsonl` a step, always; a progress bar, TensorBoard and Weights &
Biases where asked. Only rank 0 writes or shows anything. Imports no torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import secrets
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TextIO

from megakd.disk import atomic_writer
from megakd.errors import ConfigError, DataError

METRICS = "metrics.jsonl"
_PLAIN_SECONDS = 10.0  # between two lines where there is no terminal to draw a bar on
_SMOOTHING = 0.2  # weight of the newest step in the shown speed


def require_loggers(*, wandb: bool, tensorboard: bool) -> None:
    """Checks at setup that what is asked for is installed.

    Raises:
        ConfigError: it is not.
    """
    for field, asked, module, extra in (("wandb", wandb, "wandb", "wandb"),
                                        ("tensorboard", tensorboard, "tensorboard", "tensorboard")):
        if asked and importlib.util.find_spec(module) is None:
            raise ConfigError(field, True, f"the package {module} is not installed",
                              f"Run `pip install {extra}`, or set {field} to false; metrics.jsonl is always written")


class RunLog:
    """The log of one stage; a context manager.

    Args:
        folder: the stage's folder; it is made if need be.
        rank: this process; all but rank 0 do nothing.
        total_steps: steps of the whole stage, for the bar and the ETA.
        stage: name that is shown.
        progress: whether to show a bar (on a terminal) or a plain line every ten seconds (elsewhere).
        first_step: the next step to come; above zero after a resume. Logged steps from there on are cut off, as they
            will be made again.
        tensorboard: also write TensorBoard files into the folder.
        wandb_project: also log to this Weights & Biases project.
        stream: where progress goes; stderr if None.

    Raises:
        ConfigError: a wanted logger is not installed.
        DataError: `metrics.jsonl` has a line that is none of ours.
    """

    def __init__(self, folder: Path | str, *, rank: int, total_steps: int, stage: str, progress: bool,
                 first_step: int = 0, tensorboard: bool = False, wandb_project: str | None = None,
                 stream: TextIO | None = None):
        require_loggers(wandb=wandb_project is not None, tensorboard=tensorboard)
        self.folder, self.total_steps, self.stage = Path(folder), total_steps, stage
        self.first_step, self.stream = first_step, stream if stream is not None else sys.stderr
        self.active, self.progress = rank == 0, progress and rank == 0
        self.tensorboard, self.wandb_project = tensorboard, wandb_project
        self.seconds_before = 0.0
        """That the steps before `first_step` took, in earlier starts; on rank 0."""

    def __enter__(self) -> Self:
        self._closing = contextlib.ExitStack()
        self._bar = self._board = self._wandb = None
        self._smooth_seconds = self._smooth_tokens = 0.0
        if not self.active:
            return self
        with contextlib.ExitStack() as opened:  # closes what is open if a later one fails
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = cut_metrics(self.folder / METRICS, self.first_step)
            self.seconds_before = sum(line["seconds"] for line in kept)
            self._file = opened.enter_context((self.folder / METRICS).open("a", encoding="utf-8"))
            if self.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(self.folder), purge_step=self.first_step)
                opened.callback(self._board.close)
            if self.wandb_project is not None:
                self._wandb = self._open_wandb()
                opened.callback(self._wandb.finish)
            if self.progress and self.stream.isatty():
                from tqdm import tqdm

                self._bar = opened.enter_context(tqdm(total=self.total_steps, initial=self.first_step, desc=self.stage,
                                                      unit="step", file=self.stream, dynamic_ncols=True))
            self._closing = opened.pop_all()
        self._last = self._shown = time.monotonic()  # a slow logger's start is no step's time
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.close()

    def step(self, step: int, metrics: Mapping[str, float], tokens: int) -> None:
        """Logs a finished step.

        Args:
            step: its number, from 0.
            metrics: numbers of the step, the same on every rank; the first is shown on the bar. One that is not finite
                is written as null, as JSON has no word for it, and named in the line's `non_finite`.
            tokens: what the whole job worked on in this step.
        """
        if not self.active:
            return
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        line: dict[str, Any] = {"step": step, **{name: finite.get(name) for name in metrics}, "tokens": tokens,
                                "seconds": round(seconds, 6)}
        if len(finite) < len(metrics):
            line["non_finite"] = {name: str(value) for name, value in metrics.items() if name not in finite}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        weight = 1.0 if step == self.first_step else _SMOOTHING
        self._smooth_seconds += weight * (seconds - self._smooth_seconds)
        self._smooth_tokens += weight * (tokens - self._smooth_tokens)
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**metrics, "tokens": tokens, "seconds": seconds}, step=step)
        if self.progress:
            self._show(step, metrics, now)

    def note(self, text: str) -> None:
        """Shows a line of text without disturbing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        elif self.progress:
            print(text, file=self.stream, flush=True)

    def _show(self, step: int, metrics: Mapping[str, float], now: float) -> None:
        speed = f"{self._smooth_tokens / max(self._smooth_seconds, 1e-9):,.0f} tokens/s"
        first = [f"{name} {value:.4g}" for name, value in list(metrics.items())[:1]]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join([*first, speed]), refresh=False)
            self._bar.update()
            return
        last = step + 1 == self.total_steps
        if last or step == self.first_step or now - self._shown >= _PLAIN_SECONDS:
            self._shown = now
            left = timedelta(seconds=round(self._smooth_seconds * (self.total_steps - step - 1)))
            parts = [f"{self.stage}: step {step + 1}/{self.total_steps}", *first, speed, f"ETA {left}"]
            print("  ".join(parts), file=self.stream, flush=True)

    def _open_wandb(self) -> Any:
        """A resumed stage goes on in its own wandb run, whose id lies in the folder."""
        import wandb

        note = self.folder / "wandb_id.txt"
        if self.first_step == 0 or not note.exists():
            note.write_text(secrets.token_hex(8), encoding="utf-8")
        return wandb.init(project=self.wandb_project, name=self.stage, id=note.read_text(encoding="utf-8"),
                          resume="allow", dir=str(self.folder))


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line without its end (a killed writer) is left out.

    Raises:
        DataError: a line is not a JSON object with a step.
    """
    pieces = Path(path).read_bytes().split(b"\n")
    lines = []
    for number, piece in enumerate(pieces[:-1], start=1):
        try:
            line = json.loads(piece)
        except ValueError as error:
            raise DataError(path, number, None, f"is not JSON ({error})", "Remove the line") from error
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise DataError(path, number, "step", "has no step number", "Remove the line")
        lines.append(line)
    return lines


def cut_metrics(path: Path | str, first_step: int) -> list[dict[str, Any]]:
    """Removes the lines of `first_step` and later ones, and a half-written last line, from a `metrics.jsonl`; returns
    the others."""
    path = Path(path)
    if not path.exists():
        return []
    lines = [line for line in read_metrics(path) if line["step"] < first_step]
    kept = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    if kept != path.read_bytes():
        with atomic_writer(path) as stream:
            stream.write(kept)
    return lines
