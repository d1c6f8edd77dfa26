"""The per-token losses from hidden states: LM heads are applied inside, a chunk of tokens at a time.

No [T, V] tensor lives between forward and backward: the forward pass keeps up to four numbers a token, and the backward
pass makes each chunk's logits again. Peak memory is a chunk's logits for each model, one to three spares, and the
gradients of hidden and head.

Legend: T tokens, C tokens of a chunk, V local vocabulary columns, H student width, K teacher width, J reference width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megakd.errors import LossInputError
from megakd.losses.advantage import ExpectedAdvantage
from megakd.losses.divergence import row_divergence
from megakd.losses.likelihood import NegativeLogProb, check_labels
from megakd.losses.statistics import (
    Columns,
    RowLoss,
    check_matrix,
    check_positive,
    chunks,
    local_columns,
    statistics_dtype,
)

CHUNK_TOKENS = 256


def fused_token_log_probs(
    hidden_TH: Tensor,
    head_VH: Tensor,
    labels_T: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """`token_log_probs` of logits `hidden @ head^T`, without those logits.

    Args:
        hidden_TH: last hidden states at the loss positions, complete on every rank; any floating dtype.
        head_VH: local rows of the LM head.
        labels_T: global token ids (int64), the same on all ranks.
        tp_group: ranks over which V is cut; None means not cut.
        vocab_size: real vocabulary; head rows at or above it get no probability and no gradient.
        chunk_tokens: tokens whose logits are held at a time.

    Returns:
        logp_T, float32 (float64 for float64 hidden states). d(hidden) is complete on every rank, d(head) is the local
        rows'.

    Collectives: forward one MAX and one SUM all-reduce of a few numbers a token for each chunk; backward one SUM of
    d(hidden).

    Raises:
        LossInputError: shapes that do not match, labels out of range (on CPU tensors; a NaN value on others),
            vocab_size beyond the head.
    """
    columns = _check_models({"": (hidden_TH, head_VH)}, tp_group, vocab_size, chunk_tokens)
    check_labels(labels_T, hidden_TH.shape[0], columns.vocab_size)
    return -hidden_row_loss(NegativeLogProb(labels_T), columns, chunk_tokens, hidden_TH, head_VH)


def fused_divergence(
    kind: str,
    student_hidden_TH: Tensor,
    student_head_VH: Tensor,
    teacher_hidden_TK: Tensor,
    teacher_head_VK: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    mu: float = 0.5,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """`divergence` of logits `hidden @ head^T`, without those logits. Only the student gets a gradient.

    Args:
        kind, beta, temperature, mu: as `divergence` has them.
        student_hidden_TH, teacher_hidden_TK: last hidden states at the loss positions, complete on every rank.
        student_head_VH, teacher_head_VK: local rows of the LM heads, cut alike.
        tp_group, vocab_size, chunk_tokens: as `fused_token_log_probs` has them.

    Returns:
        loss_T, float32 (float64 for float64 hidden states). d(hidden) is complete on every rank, d(head) is the local
        rows'.

    Collectives: forward those of `divergence` for each chunk; backward one SUM all-reduce of d(hidden).

    Raises:
        LossInputError: an unknown kind, shapes that do not match, a setting or vocab_size out of range.
    """
    loss = row_divergence(kind, beta=beta, mu=mu)
    check_positive("temperature", temperature)
    models = {"student_": (student_hidden_TH, student_head_VH), "teacher_": (teacher_hidden_TK, teacher_head_VK)}
    columns = _check_models(models, tp_group, vocab_size, chunk_tokens)
    tensors = (student_hidden_TH, student_head_VH, teacher_hidden_TK, teacher_head_VK)
    return hidden_row_loss(loss, columns, chunk_tokens, *tensors, temperature=temperature)


def fused_expected_advantage(
    student_hidden_TH: Tensor,
    student_head_VH: Tensor,
    teacher_hidden_TK: Tensor,
    teacher_head_VK: Tensor,
    reference_hidden_TJ: Tensor,
    reference_head_VJ: Tensor,
    *,
    beta: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """`expected_advantage` of logits `hidden @ head^T`, without those logits. Only the student gets a gradient.

    Args:
        student_hidden_TH, teacher_hidden_TK, reference_hidden_TJ: last hidden states at the loss positions, complete on
            every rank.
        student_head_VH, teacher_head_VK, reference_head_VJ: local rows of the LM heads, cut alike.
        beta: scale of the advantage.
        tp_group, vocab_size, chunk_tokens: as `fused_token_log_probs` has them.

    Returns:
        value_T, float32 (float64 for float64 hidden states). d(hidden) is complete on every rank, d(head) is the local
        rows'.

    Collectives: forward one MAX and one SUM all-reduce of a few numbers a token for each chunk; backward one SUM of
    d(hidden).

    Raises:
        LossInputError: shapes that do not match, vocab_size beyond a head.
    """
    models = {
        "student_": (student_hidden_TH, student_head_VH),
        "teacher_": (teacher_hidden_TK, teacher_head_VK),
        "reference_": (reference_hidden_TJ, reference_head_VJ),
    }
    columns = _check_models(models, tp_group, vocab_size, chunk_tokens)
    tensors = (tensor for model in models.values() for tensor in model)
    return beta * hidden_row_loss(ExpectedAdvantage(), columns, chunk_tokens, *tensors)


def hidden_row_loss(
    loss: RowLoss, columns: Columns, chunk_tokens: int, *tensors: Tensor, temperature: float = 1.0
) -> Tensor:
    """Values [T] of a row loss from `tensors`: hidden and head of the student, then of each teacher."""
    return _FromHidden.apply(loss, columns, chunk_tokens, 1.0 / temperature, *tensors)


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: RowLoss, columns: Columns, chunk_tokens: int, scale: float, *tensors: Tensor) -> Tensor:
        logits = _ChunkLogits(loss, columns, chunk_tokens, scale, tensors)
        values, saved = [], []
        for rows in logits.chunks:
            value_C, saved_SC = loss.forward(logits.of(rows), rows, columns)
            values.append(value_C)
            saved.append(saved_SC)
        ctx.save_for_backward(torch.cat(saved, 1), *tensors)
        ctx.arguments = loss, columns, chunk_tokens, scale
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_T: Tensor) -> tuple[Tensor | None, ...]:
        saved_ST, hidden_TH, head_VH, *teachers = ctx.saved_tensors
        loss, columns, chunk_tokens, scale = ctx.arguments
        wants_hidden, wants_head = ctx.needs_input_grad[4:6]
        logits = _ChunkLogits(loss, columns, chunk_tokens, scale, (hidden_TH, head_VH, *teachers))
        grad_hidden_TH = torch.empty_like(hidden_TH, dtype=logits.dtype) if wants_hidden else None
        grad_head_VH = torch.zeros_like(head_VH, dtype=logits.dtype) if wants_head else None
        student_hidden_TH, student_head_VH = logits.models[0]
        for rows in logits.chunks:
            gradient_CV = loss.gradient(logits.of(rows), saved_ST[:, rows], rows, columns).to(student_head_VH.dtype)
            # The rows' weights are applied on the side of H, which is narrower than V.
            weight_C1 = (upstream_T[rows] * scale)[:, None]
            if wants_hidden:
                _multiply(gradient_CV, student_head_VH, grad_hidden_TH[rows]).mul_(weight_C1)
            if wants_head:
                weighted_CH = (student_hidden_TH[rows] * weight_C1).to(gradient_CV.dtype)
                _multiply(gradient_CV.t(), weighted_CH, grad_head_VH[: columns.width], add=True)
        if wants_hidden:
            if columns.group is not None:
                dist.all_reduce(grad_hidden_TH, group=columns.group)
            grad_hidden_TH = grad_hidden_TH.to(hidden_TH.dtype)
        if wants_head:
            grad_head_VH = grad_head_VH.to(head_VH.dtype)
        return None, None, None, None, grad_hidden_TH, grad_head_VH, *(None for _ in teachers)


class _ChunkLogits:
    """Logits of all models for one chunk after another, in buffers that are used again."""

    def __init__(self, loss: RowLoss, columns: Columns, chunk_tokens: int, scale: float, tensors: tuple[Tensor, ...]):
        hidden_TH = tensors[0]
        self.dtype = statistics_dtype(hidden_TH)
        self.scale = scale
        self.chunks = chunks(hidden_TH.shape[0], chunk_tokens)
        self.models = [
            _operands(hidden, head[: columns.width], self.dtype)
            for hidden, head in zip(tensors[::2], tensors[1::2], strict=False)
        ]
        shape = (min(hidden_TH.shape[0], chunk_tokens), columns.width)
        self.buffers = [
            torch.empty(shape, dtype=self.dtype, device=hidden_TH.device) for _ in range(loss.roles + loss.spares)
        ]

    def of(self, rows: slice) -> list[Tensor]:
        """The models' logits [C, V] of the tokens `rows`, divided by the temperature, then the spare buffers."""
        buffers = [buffer[: rows.stop - rows.start] for buffer in self.buffers]
        for (hidden, head), out_CV in zip(self.models, buffers, strict=False):
            _multiply(hidden[rows], head.t(), out_CV)
            if self.scale != 1.0:
                out_CV.mul_(self.scale)
        return buffers


def _operands(hidden: Tensor, head: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states and head as a matrix product takes them.

    A GPU multiplies 16-bit numbers and adds up in float32, so both stay as they are there. A CPU would round the logits
    to 16 bits, so both become `dtype` first.
    """
    common = torch.promote_types(hidden.dtype, head.dtype)
    if not (hidden.is_cuda and common.itemsize == 2 and dtype == torch.float32):
        common = dtype
    return hidden.to(common), head.to(common)


def _multiply(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """out = left @ right, or out += left @ right, in out's dtype whatever the operands'. Returns out."""
    if left.dtype == out.dtype:
        return out.addmm_(left, right, beta=1.0 if add else 0.0)
    product = torch.mm(left, right, out_dtype=out.dtype)
    return out.add_(product) if add else out.copy_(product)


def _check_models(
    models: dict[str, tuple[Tensor, Tensor]],
    tp_group: dist.ProcessGroup | None,
    vocab_size: int | None,
    chunk_tokens: int,
) -> Columns:
    """Checks each model's hidden states and head, by the prefix of their arguments' names; gives the rank's columns."""
    tokens, widths = None, {}
    for prefix, (hidden, head) in models.items():
        check_matrix(f"{prefix}hidden", hidden, rows=tokens)
        check_matrix(f"{prefix}head", head)
        if hidden.shape[1] != head.shape[1]:
            sizes = f"{prefix}hidden has width {hidden.shape[1]} and {prefix}head {head.shape[1]}"
            raise LossInputError(f"{sizes}: they must be equal")
        tokens, widths[f"{prefix}head"] = hidden.shape[0], head.shape[0]
    if chunk_tokens < 1:
        raise LossInputError(f"chunk_tokens = {chunk_tokens}: it must be at least 1")
    return local_columns(widths, tp_group, vocab_size)
