"""What the Triton kernels of the losses are timed by, with the bytes they move: each alone, all statistics of a loss.

`cases` gives them for benchmarks/gpu.py, which compares them with the device's copy bandwidth. Bytes are those that the
logits and the gradient must move, as in the table of megakd/losses/kernels/launch.py; the numbers a row are left out.
Gradients are written in bfloat16, as for 16-bit heads.

Legend: C rows, V columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megakd.losses.advantage import ExpectedAdvantage
from megakd.losses.combined import WithLogProbs
from megakd.losses.divergence import KINDS, row_divergence
from megakd.losses.kernels import launch
from megakd.losses.likelihood import LogProb
from megakd.losses.statistics import Chunk, Columns, RowLoss, evaluate

GRADIENT_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class KernelCase:
    """One thing to time: `run` may be called again and again, and moves `bytes` each time."""

    name: str
    run: Callable[[], Any]
    bytes: int


def cases(rows: int, width: int, dtype: torch.dtype, device: torch.device | str) -> list[KernelCase]:
    """All of them, of random logits [rows, width] of a dtype, which all cases share. None runs a kernel before its own
    `run` does, so that one that fails is found by its name."""
    generator = torch.Generator(device=device).manual_seed(0)
    models = [torch.randn(rows, width, generator=generator, device=device, dtype=torch.float32).mul_(3.0).to(dtype)
              for _ in range(3)]
    gradient_CV = torch.empty(rows, width, dtype=GRADIENT_DTYPE, device=device)
    labels_C = torch.randint(0, width, (rows,), generator=generator, device=device)
    weights_C = torch.ones(rows, device=device)
    kinds: dict[str, RowLoss] = {kind: row_divergence(kind, beta=0.5, mu=0.5) for kind in KINDS}
    losses: dict[str, RowLoss] = {"log_prob": LogProb(labels_C), "advantage": ExpectedAdvantage(1.0)}
    losses["forward_kl with log_prob"] = WithLogProbs(kinds["forward_kl"], labels_C, weights_C, weights_C, 2.0)
    losses |= kinds
    found = []
    for name, loss in losses.items():
        columns = Columns(None, 0, width, width, width)
        chunk = Chunk(models[: loss.roles], [], slice(0, rows), columns, gradient_CV, loss.kernel_form())
        found += _of_loss(name, loss, chunk)
    return found


def _of_loss(name: str, loss: RowLoss, chunk: Chunk) -> list[KernelCase]:
    model = chunk.logits[0].numel() * chunk.logits[0].element_size()
    once = loss.roles * model
    later = {"jsd": 2 * model, "akl": 3 * model}.get(chunk.form.kind, 0)
    saved: list[Tensor] = []

    def write_gradient() -> None:
        if not saved:
            saved.append(evaluate(loss, chunk)[1:])
        launch.write_gradient(chunk, saved[0])

    return [
        KernelCase(f"{name}: local_statistics", lambda: launch.local_statistics(chunk), once),
        KernelCase(f"{name}: all statistics", lambda: evaluate(loss, chunk), once + later),
        KernelCase(f"{name}: write_gradient", write_gradient,
                   once + chunk.gradient_CV.numel() * chunk.gradient_CV.element_size()),
    ]
