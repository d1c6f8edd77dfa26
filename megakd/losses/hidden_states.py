"""How a per-token loss runs from hidden states: LM heads applied a chunk of tokens at a time, gradients made with them.

The student's gradient is made in the forward pass, while a chunk's logits are at hand: made in the backward pass, every
model's head would have to be applied once more. In the forward pass the weights of the tokens in the final loss are not
known, so d(head) is made for equal weights. Where the backward pass then meets others (values of one call that were
weighted or masked one by one), it makes the logits again, which is as exact and slower; a caller that knows that
beforehand says `recompute`. No [T, V] tensor lives between forward and backward either way.

On CUDA a chunk's gradient by the logits is 16-bit numbers beside float32 logits. There a few chunks' gradients are kept
until d(hidden) and d(head) are made of them together (GRADIENT_CHUNKS): every product reads and writes all of d(head).

Legend: T tokens, C tokens of a chunk, G tokens of a few chunks, V local vocabulary columns, H hidden width, R models
(student first), S numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megakd.chunks import GRADIENT_CHUNKS, chunk_tokens_on
from megakd.errors import LossInputError
from megakd.losses.combined import Softcapped
from megakd.losses.statistics import (
    Chunk,
    Columns,
    Room,
    RowLoss,
    check_matrix,
    check_positive,
    check_values,
    chunks,
    give_gradient,
    group_size_and_rank,
    kernels,
    local_columns,
    run_chunk,
    runs_kernels,
    statistics_dtype,
)


@dataclass(frozen=True)
class HeadInput:
    """One model: last hidden states at the loss positions, the local rows of its LM head, and how logits are made.

    logits = cap * tanh(scale * (hidden @ head^T + bias) / cap), without the cap where `softcap` is None.
    """

    name: str
    """Prefix of its arguments' names, for messages."""
    hidden_TH: Tensor
    head_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Settings:
    """How a call runs; see the arguments of `fused_token_log_probs`."""

    chunk_tokens: int | None
    """None: the device's own (chunks.py)."""
    temperature: float
    recompute: bool
    sequence_parallel: bool


@dataclass(frozen=True)
class Plan:
    """What a call does besides its tensors."""

    loss: RowLoss
    columns: Columns
    settings: Settings
    names: tuple[str, ...]
    scales: tuple[float, ...]
    softcaps: tuple[float | None, ...]


def hidden_row_loss(
    loss: RowLoss, models: Sequence[HeadInput], columns: Columns, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Values [T] of a row loss of models that `check_models` has seen; and what it reports [., T], without a gradient.

    Collectives: those of `evaluate` for each chunk, and of d(hidden) as `fused_token_log_probs` says.

    Raises:
        LossInputError: a setting out of range; on CPU tensors, values that are not finite.
    """
    check_positive("temperature", settings.temperature)
    settings = replace(settings, chunk_tokens=chunk_tokens_on(models[0].hidden_TH.device.type, settings.chunk_tokens))
    if settings.chunk_tokens < 1:
        raise LossInputError(f"chunk_tokens = {settings.chunk_tokens}: it must be at least 1")
    if not torch.is_grad_enabled():
        settings = replace(settings, recompute=True)
    cap = models[0].softcap
    plan = Plan(
        loss if cap is None else Softcapped(loss, cap / settings.temperature),
        columns,
        settings,
        tuple(model.name for model in models),
        tuple(model.scale for model in models),
        tuple(model.softcap for model in models),
    )
    tensors = [tensor for model in models for tensor in (model.hidden_TH, model.head_VH, model.bias_V)]
    return _FromHidden.apply(plan, *tensors)


def check_models(models: Sequence[HeadInput], tp_group: dist.ProcessGroup | None, vocab_size: int | None) -> Columns:
    """This rank's columns of the models' heads.

    Raises:
        LossInputError: tensors that do not go together, by their arguments' names.
    """
    tokens, widths = None, {}
    for model in models:
        check_matrix(f"{model.name}hidden", model.hidden_TH, rows=tokens)
        check_matrix(f"{model.name}head", model.head_VH)
        hidden_width, head_width = model.hidden_TH.shape[1], model.head_VH.shape[1]
        if hidden_width != head_width:
            sizes = f"{model.name}hidden has width {hidden_width} and {model.name}head {head_width}"
            raise LossInputError(f"{sizes}: they must be equal")
        if model.bias_V is not None and model.bias_V.shape != model.head_VH.shape[:1]:
            sizes = f"{list(model.bias_V.shape)} and {model.name}head {list(model.head_VH.shape)}"
            raise LossInputError(f"{model.name}bias is {sizes}: it must have one number for each of the head's rows")
        if model.softcap is not None:
            check_positive(f"logit_softcap of {model.name or 'the model'}", model.softcap)
        tokens, widths[f"{model.name}head"] = model.hidden_TH.shape[0], model.head_VH.shape[0]
    return local_columns(widths, tp_group, vocab_size)


def all_tokens(student: HeadInput, labels_T: Tensor, columns: Columns, sequence_parallel: bool) -> int:
    """Number T of tokens, of which the hidden states are this rank's share under sequence parallelism.

    Raises:
        LossInputError: the ranks' shares do not make up the labels, as where their number does not divide.
    """
    size, _ = group_size_and_rank(columns.group)
    rows = len(student.hidden_TH)
    if not sequence_parallel:
        return rows
    if len(labels_T) != rows * size:
        found = f"{student.name}hidden has {rows} rows on each of {size} ranks, and labels_T is {list(labels_T.shape)}"
        rule = f"with sequence_parallel T must be {size} equal shares; fill T up to a multiple of {size}"
        raise LossInputError(f"{found}: {rule}")
    return rows * size


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[1:4]
        with_gradient = not plan.settings.recompute and any(wanted)
        heads = _Heads(plan, tensors, with_gradient=with_gradient)
        gradients = _StudentGradients(heads, wanted) if with_gradient else None
        states = []
        for chunk in heads.chunks():
            states.append(run_chunk(plan.loss, chunk, with_gradient=with_gradient))
            if gradients is not None:
                gradients.add(chunk, None)
        state_ST = torch.cat(states, 1)
        check_values(state_ST[0], _named(plan, tensors))
        ctx.save_for_backward(state_ST[1:], *tensors)
        ctx.plan = plan
        ctx.gradients = None if gradients is None else gradients.finish()
        reported_ST = state_ST[len(state_ST) - plan.loss.reported :].clone()
        ctx.mark_non_differentiable(reported_ST)
        return state_ST[0].clone(), reported_ST

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_T: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved_ST, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:4]
        # They are scaled in place, so a second backward pass through the same graph has to make them again.
        made, ctx.gradients = ctx.gradients, None
        if made is not None and _equal_weights(upstream_T):
            weight = upstream_T[0] if len(upstream_T) else upstream_T.new_ones(())
            student = [None if tensor is None else _scaled(tensor, weight, like.dtype)
                       for tensor, like in zip(made, tensors[:3], strict=True)]
        else:
            heads = _Heads(ctx.plan, tensors, with_gradient=True)
            gradients = _StudentGradients(heads, wanted)
            for chunk in heads.chunks():
                give_gradient(ctx.plan.loss, chunk, saved_ST[:, chunk.rows])
                gradients.add(chunk, upstream_T)
            student = [None if tensor is None else tensor.to(like.dtype)
                       for tensor, like in zip(gradients.finish(), tensors[:3], strict=True)]
        return None, *student, *(None for _ in tensors[3:])


def _equal_weights(upstream_T: Tensor) -> bool:
    """Whether all tokens have one weight. After a plain sum the tensor's strides say so. After a mean or `-values` its
    numbers must be looked at, which waits for an accelerator, and takes a fraction of making the logits again."""
    return len(upstream_T) < 2 or upstream_T.stride(0) == 0 or bool((upstream_T == upstream_T[0]).all())


class _Heads:
    """All models' logits for one chunk after another, in buffers that are used again."""

    def __init__(self, plan: Plan, tensors: Sequence[Tensor | None], *, with_gradient: bool):
        self.plan = plan
        width = plan.columns.width
        self.dtype = statistics_dtype(tensors[0])
        self.models = []
        for hidden_TH, head_VH, bias_V in zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True):
            if plan.settings.sequence_parallel:
                hidden_TH = _gather_rows(hidden_TH, plan.columns.group)
            hidden_TH, head_VH = _operands(hidden_TH, head_VH[:width], self.dtype)
            self.models.append((hidden_TH, head_VH, None if bias_V is None else bias_V[:width].to(self.dtype)))
        self.tokens = self.models[0][0].shape[0]
        rows, device = min(self.tokens, plan.settings.chunk_tokens), tensors[0].device
        # d(bias) adds the gradient up as it is; the products take it in their operands' dtype.
        in_float = not with_gradient or self.models[0][2] is not None
        gradient_dtype = self.dtype if in_float else self.models[0][1].dtype
        several = min(self.tokens, GRADIENT_CHUNKS * plan.settings.chunk_tokens)
        self.room = Room(plan.loss, rows, plan.columns, self.dtype, device, gradient_dtype, several)

    def chunks(self) -> Iterator[Chunk]:
        """The chunks with their logits, which the caller may overwrite."""
        for rows in chunks(self.tokens, self.plan.settings.chunk_tokens):
            chunk = self.room.chunk(rows)
            settings = zip(self.models, self.plan.scales, self.plan.softcaps, chunk.logits, strict=True)
            for (hidden, head, bias_V), scale, cap, out_CV in settings:
                factor = scale / (self.plan.settings.temperature if cap is None else cap)
                _multiply(hidden[rows], head.t(), out_CV, factor=factor)
                if bias_V is not None:
                    out_CV.add_(bias_V, alpha=factor)
                if cap is not None:
                    out_CV.tanh_().mul_(cap / self.plan.settings.temperature)
            yield chunk


class _StudentGradients:
    """d(hidden), d(head) and d(bias) of the student, made of a chunk or of a few together and added up; None for what
    is not wanted.

    The tokens' weights are applied on the side of H, which is narrower than V.
    """

    def __init__(self, heads: _Heads, wanted: Sequence[bool]):
        self.heads, self.plan = heads, heads.plan
        hidden_TH, head_VH, _ = heads.models[0]
        rows, device = self.plan.columns.head_rows, hidden_TH.device
        self.hidden_TH = torch.empty_like(hidden_TH, dtype=heads.dtype) if wanted[0] else None
        self.head_VH = torch.empty(rows, head_VH.shape[1], dtype=heads.dtype, device=device) if wanted[1] else None
        self.bias_V = torch.zeros(rows, dtype=heads.dtype, device=device) if wanted[2] else None
        self.works: list[dist.Work] = []

    def add(self, chunk: Chunk, weight_T: Tensor | None) -> None:
        """Adds what follows from a chunk's d value / d logits, by all tokens' weights (None: 1 each), as soon as there
        is no room for another chunk's.

        Collectives: begins one SUM all-reduce of these tokens' d(hidden), which goes on beside the next products (one
        reduce-scatter of all d(hidden) at the end under sequence parallelism).
        """
        first = chunk.rows.start - chunk.rows.start % max(1, self.heads.room.gradient_rows)
        rows = slice(first, chunk.rows.stop)
        if rows.stop - rows.start < self.heads.room.gradient_rows and rows.stop < self.heads.tokens:
            return
        width = self.plan.columns.width
        hidden_TH, head_VH, _ = self.heads.models[0]
        gradient_GV = self.heads.room.gradients(rows)
        operand_GV = gradient_GV.to(head_VH.dtype)
        # A number for all tokens is a factor of the products; numbers of their own take a pass over [G, H].
        factor = self.plan.scales[0] / self.plan.settings.temperature
        weight_G1 = None if weight_T is None else weight_T[rows, None]
        if self.hidden_TH is not None:
            made_GH = _multiply(operand_GV, head_VH, self.hidden_TH[rows], factor=factor)
            if weight_G1 is not None:
                made_GH.mul_(weight_G1)
            if self.plan.columns.group is not None and not self.plan.settings.sequence_parallel:
                self.works.append(dist.all_reduce(made_GH, group=self.plan.columns.group, async_op=True))
        if self.head_VH is not None:
            hidden_GH = hidden_TH[rows] if weight_G1 is None else (hidden_TH[rows] * weight_G1).to(operand_GV.dtype)
            # The first product is written, not added: a pass over zeros is saved.
            _multiply(operand_GV.t(), hidden_GH, self.head_VH[:width], factor=factor, add=rows.start > 0)
            if rows.start == 0:
                self.head_VH[width:].zero_()
        if self.bias_V is not None:
            ones_G = gradient_GV.new_ones(len(gradient_GV))
            self.bias_V[:width] += ((ones_G if weight_G1 is None else weight_G1[:, 0]) * factor) @ gradient_GV

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients, when all chunks have been added."""
        for work in self.works:
            work.wait()
        hidden_TH = self.hidden_TH
        if hidden_TH is not None and self.plan.settings.sequence_parallel and self.plan.columns.group is not None:
            group = self.plan.columns.group
            hidden_TH = hidden_TH.new_empty(len(hidden_TH) // dist.get_world_size(group), hidden_TH.shape[1])
            dist.reduce_scatter_tensor(hidden_TH, self.hidden_TH, group=group)
        return hidden_TH, self.head_VH, self.bias_V


def _gather_rows(hidden_TH: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' shares of the tokens, in the order of the ranks. One all-gather."""
    if group is None:
        return hidden_TH
    whole_TH = hidden_TH.new_empty(len(hidden_TH) * dist.get_world_size(group), hidden_TH.shape[1])
    dist.all_gather_into_tensor(whole_TH, hidden_TH.contiguous(), group=group)
    return whole_TH


def _operands(hidden: Tensor, head: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states and head as a matrix product takes them.

    A GPU multiplies 16-bit numbers and adds up in float32, so both stay as they are there. A CPU would round the logits
    to 16 bits, so both become `dtype` first.
    """
    common = torch.promote_types(hidden.dtype, head.dtype)
    if not (hidden.is_cuda and common.itemsize == 2 and dtype == torch.float32):
        common = dtype
    return hidden.to(common), head.to(common)


def _multiply(left: Tensor, right: Tensor, out: Tensor, *, factor: float = 1.0, add: bool = False) -> Tensor:
    """out = factor * left @ right, added to out where asked, in out's dtype whatever the operands'. Returns out.

    The product is written to out itself: one of [C, V] or [V, H] beside it would take its memory and two passes again.
    """
    beta = 1.0 if add else 0.0
    if left.dtype == out.dtype:
        return out.addmm_(left, right, beta=beta, alpha=factor)
    return torch.addmm(out, left, right, beta=beta, alpha=factor, out_dtype=out.dtype, out=out)


def _scaled(made: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient times a 0-d weight, in the dtype of what it is the gradient of; `made` may be lost.

    On CUDA in one pass: d(head) of 128,256 x 4,096 is 2.1 GB, which torch would read and write to weigh it, and read
    again to round it.
    """
    if made.dtype == torch.float32 and runs_kernels(made.device):
        return kernels().scaled(made, weight, made if dtype == made.dtype else torch.empty_like(made, dtype=dtype))
    return made.mul_(weight).to(dtype)


def _named(plan: Plan, tensors: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """The tensors by their arguments' names, without the padding."""
    width, named = plan.columns.width, {}
    for name, hidden_TH, head_VH, bias_V in zip(plan.names, tensors[::3], tensors[1::3], tensors[2::3], strict=True):
        named |= {f"{name}hidden": hidden_TH, f"{name}head": head_VH[:width]}
        named |= {} if bias_V is None else {f"{name}bias": bias_V[:width]}
    return named
