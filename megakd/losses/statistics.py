"""What all per-token losses share: a tensor-parallel rank's columns, reductions over them, and the logits form.

A per-token loss (`RowLoss`) sees the logits of one chunk of tokens on one rank's share of the vocabulary. Its forward
pass reduces them to a few numbers a token with one MAX and one SUM all-reduce, and saves only such numbers. Given
these, the gradient of every loss here is local to a column, so no collective over the vocabulary is left for the
backward pass. Plain autograd over an all-reduce gives the right value and a wrong gradient.

Two autograd functions run a `RowLoss`: `logits_row_loss` here, and `hidden_row_loss` in fused_head.py.

Legend: T tokens, C tokens of a chunk, V local vocabulary columns, R models of a loss (student first), S statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megakd.errors import LossInputError

LOGITS_CHUNK_TOKENS = 512
LOWEST_LOGIT = -1e3
"""Logits given as tensors count as this where they are lower (-inf included): exp is exactly 0 at it and differences
stay finite, so that no 0 * inf or inf - inf arises where a model rules a token out."""


@dataclass(frozen=True)
class Columns:
    """The real vocabulary columns of one rank: global columns `first` to `first + width`.

    Columns at or above `vocab_size` are tensor-parallel padding. They are at the end of the last ranks' shares and
    are simply cut off, so nothing that stands in them matters; `width` may be 0.
    """

    group: dist.ProcessGroup | None
    first: int
    width: int
    vocab_size: int


class RowLoss(Protocol):
    """A loss of one value a token. Buffers are scratch that a method may overwrite; rows is the chunk's slice of T."""

    roles: ClassVar[int]
    """Number R of models whose logits it takes, the student first."""
    spares: ClassVar[int]
    """Number of further buffers of the logits' shape that it needs."""

    def forward(self, buffers: list[Tensor], rows: slice, columns: Columns) -> tuple[Tensor, Tensor]:
        """From R logits [C, V] and the spares to value_C and saved_SC."""
        ...

    def gradient(self, buffers: list[Tensor], saved_SC: Tensor, rows: slice, columns: Columns) -> Tensor:
        """From fresh R logits [C, V] and the spares to d value_C / d student logits [C, V], in one of the buffers."""
        ...


def group_size_and_rank(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Size of a group and this process's rank in it; None is a group of one."""
    return (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))


def local_columns(widths: dict[str, int], tp_group: dist.ProcessGroup | None, vocab_size: int | None) -> Columns:
    """This rank's share of the vocabulary.

    Args:
        widths: for each argument (by its name, for messages; the student first) its number of local columns.
        tp_group: ranks over which the columns are cut, in order; None means not cut.
        vocab_size: real vocabulary; None means that all columns are real.

    Raises:
        LossInputError: widths that do not go together.
    """
    size, rank = group_size_and_rank(tp_group)
    (student, width), *others = widths.items()
    for name, other in others:
        # With one rank, each model is cut to vocab_size on its own. With more, columns must lie on the same ranks.
        if other != width and (vocab_size is None or size > 1):
            rule = "of equal width" if vocab_size is None else f"padded alike when cut over {size} ranks"
            raise LossInputError(f"{name} has {other} local columns and {student} {width}: they must be {rule}")
    if vocab_size is None:
        vocab_size = width * size
    narrowest = min(widths, key=widths.__getitem__)
    if not 1 <= vocab_size <= widths[narrowest] * size:
        columns = f"{size} x {widths[narrowest]} columns of {narrowest}"
        raise LossInputError(f"vocab_size = {vocab_size}: it must be at least 1 and not exceed the {columns}")
    return Columns(tp_group, rank * width, min(max(vocab_size - rank * width, 0), width), vocab_size)


def row_maxima(logits: list[Tensor], columns: Columns) -> Tensor:
    """Maxima of each row over all ranks, stacked [R, C]. One MAX all-reduce."""
    if columns.width:
        maxima_RC = torch.stack([logits_CV.amax(1) for logits_CV in logits])
    else:
        maxima_RC = logits[0].new_full((len(logits), logits[0].shape[0]), float("-inf"))
    if columns.group is not None:
        dist.all_reduce(maxima_RC, op=dist.ReduceOp.MAX, group=columns.group)
    return maxima_RC


def row_sums(sums: list[Tensor], columns: Columns) -> Tensor:
    """Sums over all ranks of local sums [C] or [., C], stacked. One SUM all-reduce."""
    sums_SC = torch.cat([part if part.dim() == 2 else part[None] for part in sums])
    if columns.group is not None:
        dist.all_reduce(sums_SC, group=columns.group)
    return sums_SC


def subtract_maxima(logits: list[Tensor], columns: Columns) -> Tensor:
    """Shifts logits in place so that each row's maximum over all ranks is 0, and returns the maxima [R, C]."""
    maxima_RC = row_maxima(logits, columns)
    for logits_CV, maxima_C in zip(logits, maxima_RC, strict=False):
        logits_CV.sub_(maxima_C[:, None])
    return maxima_RC


def statistics_dtype(student: Tensor) -> torch.dtype:
    """float64 where the student's tensor is float64, else float32."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def chunks(tokens: int, chunk_tokens: int) -> list[slice]:
    """Slices of at most `chunk_tokens` rows; one empty slice for no tokens, so that collectives happen all the same."""
    return [slice(start, min(start + chunk_tokens, tokens)) for start in range(0, max(tokens, 1), chunk_tokens)]


def check_matrix(name: str, tensor: Tensor, rows: int | None = None) -> None:
    """Raises LossInputError unless `tensor` is a floating-point matrix, with `rows` rows where they are given."""
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise LossInputError(f"{name} is {tensor.dtype} {list(tensor.shape)}: it must be a floating-point matrix")
    if rows is not None and tensor.shape[0] != rows:
        raise LossInputError(f"{name} has {tensor.shape[0]} rows: it must have the student's, {rows}")


def check_positive(name: str, value: float) -> None:
    """Raises LossInputError unless `value` is positive."""
    if not value > 0:
        raise LossInputError(f"{name} = {value}: it must be positive")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises LossInputError where a tensor on the CPU holds NaN or an infinity.

    On an accelerator the values are not looked at, as that would wait for the device.
    """
    if tensor.device.type == "cpu":
        wrong = tensor.numel() - int(tensor.isfinite().sum())
        if wrong:
            raise LossInputError(f"{name} holds {wrong} of {tensor.numel()} values that are NaN or infinite")


def check_logits(
    logits: dict[str, Tensor], tp_group: dist.ProcessGroup | None, vocab_size: int | None
) -> Columns:
    """Checks local logits [T, V] by their arguments' names, the student's first, and returns this rank's columns."""
    tokens = None
    for name, tensor in logits.items():
        check_matrix(name, tensor, rows=tokens)
        tokens = tensor.shape[0]
    return local_columns({name: tensor.shape[1] for name, tensor in logits.items()}, tp_group, vocab_size)


def logits_row_loss(loss: RowLoss, columns: Columns, *logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Values [T] of a row loss from local logits [T, V]; the first of `logits` gets a gradient, the others none.

    Collectives: those of `loss.forward` for each chunk of LOGITS_CHUNK_TOKENS tokens; none in backward.
    """
    return _FromLogits.apply(loss, columns, 1.0 / temperature, *logits)


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: RowLoss, columns: Columns, scale: float, *logits: Tensor) -> Tensor:
        scratch = _scratch(loss, columns, logits)
        values, saved = [], []
        for rows in chunks(logits[0].shape[0], LOGITS_CHUNK_TOKENS):
            value_C, saved_SC = loss.forward(_load(logits, rows, columns, scale, scratch), rows, columns)
            values.append(value_C)
            saved.append(saved_SC)
        ctx.save_for_backward(torch.cat(saved, 1), *logits)
        ctx.loss, ctx.columns, ctx.scale = loss, columns, scale
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_T: Tensor) -> tuple[Tensor | None, ...]:
        saved_ST, *logits = ctx.saved_tensors
        loss, columns = ctx.loss, ctx.columns
        scratch = _scratch(loss, columns, logits)
        gradient_TV = torch.zeros_like(logits[0])
        for rows in chunks(logits[0].shape[0], LOGITS_CHUNK_TOKENS):
            buffers = _load(logits, rows, columns, ctx.scale, scratch)
            gradient_CV = loss.gradient(buffers, saved_ST[:, rows], rows, columns)
            weight_C1 = (upstream_T[rows] * ctx.scale)[:, None]
            gradient_TV[rows, : columns.width] = gradient_CV.mul_(weight_C1)
        return None, None, None, gradient_TV, *(None for _ in logits[1:])


def _scratch(loss: RowLoss, columns: Columns, logits: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    shape = (min(logits[0].shape[0], LOGITS_CHUNK_TOKENS), columns.width)
    dtype = statistics_dtype(logits[0])
    return [torch.empty(shape, dtype=dtype, device=logits[0].device) for _ in range(loss.roles + loss.spares)]


def _load(
    logits: tuple[Tensor, ...] | list[Tensor], rows: slice, columns: Columns, scale: float, scratch: list[Tensor]
) -> list[Tensor]:
    """Copies a chunk's real columns into the scratch, scaled and clamped."""
    buffers = [buffer[: rows.stop - rows.start] for buffer in scratch]
    for logits_TV, buffer_CV in zip(logits, buffers, strict=False):
        buffer_CV.copy_(logits_TV[rows, : columns.width]).clamp_(min=LOWEST_LOGIT)
        if scale != 1.0:
            buffer_CV.mul_(scale)
    return buffers
