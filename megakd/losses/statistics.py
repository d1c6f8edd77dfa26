"""What all per-token losses share: a tensor-parallel rank's columns, reductions over them, and the logits form.

A per-token loss (`RowLoss`) sees the logits of one chunk of tokens on one rank's share of the vocabulary. Its sums
over the columns are added up over the ranks with one MAX and one SUM all-reduce (one more SUM for jsd and akl), and a
few numbers a token are kept. Given these, the gradient of every loss here is local to a column, so no collective over
the vocabulary is left for the backward pass. Plain autograd over an all-reduce gives the right value and a wrong
gradient.

On a CPU a chunk is worked through in blocks of a few rows, which stay in the processor's cache from one operation to
the next; the matrix products that make the logits want many more rows than that. On CUDA the passes over the logits are
Triton kernels (kernels/) where a loss has them: each pass reads the logits once, and the first one finds maxima and
sums together. A loss then shares `combine` and what it saves with its torch form.

Two autograd functions run a `RowLoss`: `logits_row_loss` here, and `hidden_row_loss` in hidden_states.py.

Legend: T tokens, C tokens of a chunk, V local vocabulary columns, R models of a loss (student first), S numbers a
token.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megakd.errors import LossInputError

LOGITS_CHUNK_TOKENS = 512
BLOCK_NUMBERS = 3 << 17
"""Elements of a block on a CPU: the fewest at which the calls themselves no longer count beside the work (measured)."""
LOG2_E = math.log2(math.e)
LOWEST_LOGIT = -1e3
"""Logits given as tensors count as this where they are lower (-inf included): exp is exactly 0 at it and differences
stay finite, so that no 0 * inf or inf - inf arises where a model rules a token out."""
KERNEL_DEVICES = {"cuda"}
"""Types of devices on which losses run as Triton kernels, where they have them and statistics are float32. Tests add
"cpu", where Triton's interpreter runs them."""
ROW_BYTES = 128
"""The kernels' rows begin at multiples of this: whatever the vocabulary, a row is read in whole sectors of memory, and
the matrix products meet no odd leading dimension."""


@dataclass(frozen=True)
class Columns:
    """The real vocabulary columns of one rank: global columns `first` to `first + width`.

    Columns at or above `vocab_size` are tensor-parallel padding. They are at the end of the last ranks' shares and
    are simply cut off, so nothing that stands in them matters; `width` may be 0. `head_rows` counts the student's local
    columns with the padding.
    """

    group: dist.ProcessGroup | None
    first: int
    width: int
    vocab_size: int
    head_rows: int


@dataclass(frozen=True)
class KernelForm:
    """What the kernels compute of a row loss: which loss, and what `combined.py` puts around it."""

    kind: str
    """log_prob, advantage, or a kind of divergence."""
    beta: float = 1.0
    labels_T: Tensor | None = None
    inner_weights_T: Tensor | None = None
    log_prob_weights_T: Tensor | None = None
    """With weights there are log-probabilities beside the loss."""
    temperature: float = 1.0
    cap: float | None = None
    """The student's logits were softcapped at this."""


@dataclass(frozen=True)
class Chunk:
    """Some tokens' local logits of all models [C, V] each, and scratch of at least the size of a block.

    `rows` are the tokens' places in T; `gradient_CV` is where the gradient is left, which may be the student's logits.
    With a `form` the kernels work on it, all rows at once and without scratch.
    """

    logits: list[Tensor]
    spares: list[Tensor]
    rows: slice
    columns: Columns
    gradient_CV: Tensor
    form: KernelForm | None = None

    def blocks(self) -> Iterator[tuple[slice, Chunk]]:
        """Runs of rows that are worked on together, with their places in C."""
        tokens = self.rows.stop - self.rows.start
        size = block_rows(self.columns.width, self.logits[0].device)
        for start in range(0, max(tokens, 1), size):
            part = slice(start, min(start + size, tokens))
            spares = [spare[: part.stop - part.start] for spare in self.spares]
            rows = slice(self.rows.start + part.start, self.rows.start + part.stop)
            logits = [logits[part] for logits in self.logits]
            yield part, replace(self, logits=logits, spares=spares, rows=rows, gradient_CV=self.gradient_CV[part])


class RowLoss:
    """A loss of one value a token.

    Its numbers a token (`state_SC`) are maxima at first. In each pass every rank sums over its own columns
    (`local_sums`, block by block), the sums are added up over ranks, and `combine` makes new numbers of them. After the
    last pass the first row of the state is the value, the others are what `gradient` needs, and the last `reported`
    ones of those are of interest to the caller.
    """

    roles: ClassVar[int]
    """Number R of models whose logits it takes, the student first."""
    spares: ClassVar[int]
    """Number of scratch tensors that a block needs."""
    passes: ClassVar[int] = 1
    """Number of SUM all-reduces a chunk."""
    reported: ClassVar[int] = 0
    """Number of further values a token, at the end of the state, that the caller is told."""

    @property
    def maxima(self) -> int:
        """Number of maxima a token that it begins with."""
        return self.roles

    def local_maxima(self, block: Chunk) -> Tensor:
        """Maxima [., C] over the local columns, of which there is at least one: each model's, if not said otherwise."""
        return torch.stack([logits_CV.amax(1) for logits_CV in block.logits])

    def local_sums(self, number: int, block: Chunk, state_SC: Tensor) -> Tensor:
        """Sums [S, C] of pass `number` over the local columns. The logits are only read; scratch may be written."""
        raise NotImplementedError

    def combine(self, number: int, state_SC: Tensor, sums_SC: Tensor, chunk: Chunk) -> Tensor:
        """The next state, from sums over all columns."""
        raise NotImplementedError

    def gradient(self, block: Chunk, saved_SC: Tensor) -> None:
        """Writes d value_C / d student logits over the student's logits; `saved_SC` is the last state but its first
        row. The other models' logits and the scratch may be written too."""
        raise NotImplementedError

    def kernel_form(self) -> KernelForm | None:
        """What the kernels compute of it; None where it has torch operations only."""
        return None

    def from_parts(self, sums_SPC: Tensor, shift_RPC: Tensor, chunk: Chunk, state_SC: Tensor) -> Tensor:
        """`local_sums` of the first pass, from the kernels': those of parts, relative to the parts' own maxima, which
        `shift_RPC` are more than the state's (0 or less)."""
        raise NotImplementedError

    def kernel_sums(self, number: int, chunk: Chunk, state_SC: Tensor) -> Tensor:
        """`local_sums` of a later pass by the kernels."""
        raise NotImplementedError


def run_chunk(loss: RowLoss, chunk: Chunk, *, with_gradient: bool) -> Tensor:
    """The last state [S, C] of a chunk, value first; `with_gradient` leaves the gradient in `chunk.gradient_CV`.

    Where the vocabulary is cut, the whole chunk's sums go over the ranks together. Where it is not, a block is finished
    before the next is begun, and comes from memory once.

    Collectives: those of `evaluate`, once.
    """
    whole = chunk.columns.group is not None or chunk.form is not None
    parts = [chunk] if whole else [block for _, block in chunk.blocks()]
    states = []
    for part in parts:
        states.append(evaluate(loss, part))
        if with_gradient:
            give_gradient(loss, part, states[-1][1:])
    return torch.cat(states, 1)


def give_gradient(loss: RowLoss, chunk: Chunk, saved_SC: Tensor) -> None:
    """Writes the gradient of a chunk's values to `chunk.gradient_CV`; the logits may be lost."""
    if chunk.form is not None:
        kernels().write_gradient(chunk, saved_SC)
        return
    for part, block in chunk.blocks():
        loss.gradient(block, saved_SC[:, part])


def evaluate(loss: RowLoss, chunk: Chunk) -> Tensor:
    """The last state [S, C] of a chunk: value first. Collectives: one MAX, and one SUM for each pass."""
    maxima_RPC = parts_SPC = None
    if chunk.form is None:
        state_SC = local_maxima(loss, chunk)
    else:
        maxima_RPC, parts_SPC = kernels().local_statistics(chunk)
        state_SC = maxima_RPC.amax(1)
    if chunk.columns.group is not None:
        dist.all_reduce(state_SC, op=dist.ReduceOp.MAX, group=chunk.columns.group)
    for number in range(loss.passes):
        if chunk.form is None:
            local = [loss.local_sums(number, block, state_SC[:, part]) for part, block in chunk.blocks()]
            local_SC = torch.cat(local, 1)
        elif number == 0:
            local_SC = loss.from_parts(parts_SPC, maxima_RPC - state_SC[:, None], chunk, state_SC)
        else:
            local_SC = loss.kernel_sums(number, chunk, state_SC)
        state_SC = loss.combine(number, state_SC, sum_over_ranks(local_SC, chunk.columns), chunk)
    return state_SC


def local_maxima(loss: RowLoss, chunk: Chunk) -> Tensor:
    """The loss's maxima of each row over this rank's columns, -inf where it has none."""
    if chunk.columns.width:
        return torch.cat([loss.local_maxima(block) for _, block in chunk.blocks()], 1)
    return chunk.logits[0].new_full((loss.maxima, chunk.rows.stop - chunk.rows.start), float("-inf"))


def runs_kernels(device: torch.device) -> bool:
    """Whether there are Triton kernels for float32 numbers on a device."""
    return device.type in KERNEL_DEVICES


def kernels() -> ModuleType:
    """The Triton kernels, imported where they are to run: a CPU does without. ModelError where Triton is missing."""
    return importlib.import_module("megakd.losses.kernels")


def sum_over_ranks(sums_SC: Tensor, columns: Columns) -> Tensor:
    """Sums over all ranks of local sums, in place. One SUM all-reduce."""
    if columns.group is not None:
        dist.all_reduce(sums_SC, group=columns.group)
    return sums_SC


def block_rows(width: int, device: torch.device) -> int:
    """Rows of a block: few on a CPU; on an accelerator, where each operation is a launch, a chunk is one block."""
    return max(1, BLOCK_NUMBERS // max(1, width)) if device.type == "cpu" else 1 << 62


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
    return Columns(tp_group, rank * width, min(max(vocab_size - rank * width, 0), width), vocab_size, width)


def exp_(exponents: Tensor) -> Tensor:
    """exp in place.

    On a CPU as 2^(x log2 e): torch's exp2 takes a third of exp's time there (measured), and the product's rounding
    changes exp(x) by no more than |x| times float32's, which a probability of exp(x) makes nothing of.
    """
    if exponents.device.type == "cpu" and exponents.dtype == torch.float32:
        return exponents.mul_(LOG2_E).exp2_()
    return exponents.exp_()


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


def check_values(values_T: Tensor, tensors: dict[str, Tensor]) -> None:
    """Raises LossInputError where a value is not finite, and says which of the tensors, by name, is to blame.

    On a CPU only: elsewhere looking would wait for the device at every micro-batch, and the trainer refuses the step.
    """
    if values_T.device.type != "cpu" or bool(values_T.isfinite().all()):
        return
    counts = {name: tensor.numel() - int(tensor.isfinite().sum()) for name, tensor in tensors.items()}
    blame = [f"{name} holds {bad} of {tensors[name].numel()}" for name, bad in counts.items() if bad]
    found = "; ".join(blame) or "none in this rank's tensors (another rank's columns, or logits beyond float32)"
    bad = len(values_T) - int(values_T.isfinite().sum())
    raise LossInputError(f"{bad} of {len(values_T)} values are not finite. Numbers that are not finite: {found}")


def logits_row_loss(
    loss: RowLoss, columns: Columns, logits: dict[str, Tensor], *, temperature: float = 1.0
) -> Tensor:
    """Values [T] of a row loss from local logits [T, V] by their arguments' names; the first one gets a gradient.

    Collectives: those of `evaluate` for each chunk of LOGITS_CHUNK_TOKENS tokens; none in backward.
    """
    return _FromLogits.apply(loss, columns, 1.0 / temperature, tuple(logits), *logits.values())


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, loss: RowLoss, columns: Columns, scale: float, names: tuple[str, ...], *logits: Tensor
    ) -> Tensor:
        load = _LogitsChunks(loss, columns, scale, logits)
        states = [run_chunk(loss, load(rows), with_gradient=False) for rows in load.chunks]
        state_ST = torch.cat(states, 1)
        check_values(state_ST[0], {name: part[:, : columns.width] for name, part in zip(names, logits, strict=True)})
        ctx.save_for_backward(state_ST[1:], *logits)
        ctx.arguments = loss, columns, scale
        return state_ST[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_T: Tensor) -> tuple[Tensor | None, ...]:
        saved_ST, *logits = ctx.saved_tensors
        loss, columns, scale = ctx.arguments
        load = _LogitsChunks(loss, columns, scale, logits)
        gradient_TV = torch.zeros_like(logits[0])
        for rows in load.chunks:
            for _, block in load(rows).blocks():
                give_gradient(loss, block, saved_ST[:, block.rows])
                weight_C1 = (upstream_T[block.rows] * scale)[:, None]
                gradient_TV[block.rows, : columns.width] = block.gradient_CV.mul_(weight_C1)
        return None, None, None, None, gradient_TV, *(None for _ in logits[1:])


class _LogitsChunks:
    """Given logits, copied chunk by chunk into scratch: real columns only, scaled and clamped."""

    def __init__(self, loss: RowLoss, columns: Columns, scale: float, logits: tuple[Tensor, ...] | list[Tensor]):
        self.columns, self.scale, self.logits = columns, scale, logits
        tokens, device = logits[0].shape[0], logits[0].device
        self.chunks = chunks(tokens, LOGITS_CHUNK_TOKENS)
        rows = min(tokens, LOGITS_CHUNK_TOKENS)
        dtype = statistics_dtype(logits[0])
        self.room = Room(loss, rows, columns, dtype, device, gradient_dtype=dtype,
                         gradient_rows=rows)

    def __call__(self, rows: slice) -> Chunk:
        chunk = self.room.chunk(rows)
        for logits_TV, buffer_CV in zip(self.logits, chunk.logits, strict=True):
            buffer_CV.copy_(logits_TV[rows, : self.columns.width]).clamp_(min=LOWEST_LOGIT)
            if self.scale != 1.0:
                buffer_CV.mul_(self.scale)
        return chunk


class Room:
    """Memory for the logits of a chunk of at most `rows` tokens, and what a loss needs beside it, used again and again.

    With kernels the gradient has memory of its own where it is wanted in another dtype: its product with the head takes
    16-bit numbers, and is spared a pass that rounds it. There is room for `gradient_rows` tokens then, a multiple of
    `rows` or all that there are, so that products are made of several chunks at once.
    """

    def __init__(
        self,
        loss: RowLoss,
        rows: int,
        columns: Columns,
        dtype: torch.dtype,
        device: torch.device,
        gradient_dtype: torch.dtype,
        gradient_rows: int,
    ):
        self.columns, self.gradient, self.gradient_rows = columns, None, rows
        self.form = loss.kernel_form() if runs_kernels(device) and dtype == torch.float32 else None
        if self.form is None:
            in_block = min(rows, block_rows(columns.width, device))
            shapes = [(rows, columns.width)] * loss.roles + [(in_block, columns.width)] * loss.spares
            tensors = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
            self.logits, self.spares = tensors[: loss.roles], tensors[loss.roles :]
            return
        self.logits = [_aligned_rows(rows, columns.width, dtype, device) for _ in range(loss.roles)]
        self.spares: list[Tensor] = []
        if gradient_dtype != dtype:
            self.gradient_rows = gradient_rows
            self.gradient = _aligned_rows(gradient_rows, columns.width, gradient_dtype, device)

    def chunk(self, rows: slice) -> Chunk:
        """The memory for the tokens at `rows`, which begin at a multiple of the room's rows."""
        logits = [buffer[: rows.stop - rows.start] for buffer in self.logits]
        return Chunk(logits, self.spares, rows, self.columns, self.gradients(rows), self.form)

    def gradients(self, rows: slice) -> Tensor:
        """Gradients by the student's logits of the tokens at `rows`, no more than `gradient_rows`: of one chunk, or of
        several that follow one another from a multiple of `gradient_rows` on."""
        first = rows.start % max(1, self.gradient_rows)
        memory = self.logits[0] if self.gradient is None else self.gradient
        return memory[first : first + rows.stop - rows.start]


def _aligned_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory [rows, width] whose rows begin at multiples of ROW_BYTES."""
    step = ROW_BYTES // dtype.itemsize
    return torch.empty(rows, -(-width // step) * step, dtype=dtype, device=device)[:, :width]
