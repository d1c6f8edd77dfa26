"""Log-probabilities of given tokens, and their sums over sequences.

Legend: T tokens, C tokens of a chunk, V local vocabulary columns, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.errors import LossInputError
from megakd.losses.statistics import Chunk, KernelForm, RowLoss, check_logits, exp_, logits_row_loss


class LogProb(RowLoss):
    """Row loss `log Q(label)`; its gradient is `1[label] - Q`."""

    roles: ClassVar[int] = 1
    spares: ClassVar[int] = 1

    def __init__(self, labels_T: Tensor):
        self.labels_T = labels_T

    def local_sums(self, number: int, block: Chunk, state_SC: Tensor) -> Tensor:
        (student_CV,), (spare_CV,), (max_C,) = block.logits, block.spares, state_SC
        sum_C = exp_(torch.sub(student_CV, max_C[:, None], out=spare_CV)).sum(1)
        return torch.stack([sum_C, label_logits(student_CV, max_C, self.labels_T, block)])

    def combine(self, number: int, state_SC: Tensor, sums_SC: Tensor, chunk: Chunk) -> Tensor:
        sum_C, label_C = sums_SC
        log_sum_C = sum_C.log()
        value_C = outside_is_nan(label_C - log_sum_C, self.labels_T, chunk)
        return torch.stack([value_C, state_SC[0] + log_sum_C])

    def gradient(self, block: Chunk, saved_SC: Tensor) -> None:
        (student_CV,), (lse_C,) = block.logits, saved_SC
        exp_(student_CV.sub_(lse_C[:, None])).neg_()
        add_at_labels(student_CV, self.labels_T, block)

    def kernel_form(self) -> KernelForm:
        return KernelForm("log_prob", labels_T=self.labels_T)

    def from_parts(self, sums_SPC: Tensor, shift_RPC: Tensor, chunk: Chunk, state_SC: Tensor) -> Tensor:
        label_C = label_logits(chunk.logits[0], state_SC[0], self.labels_T, chunk)
        return torch.stack([(sums_SPC[0] * shift_RPC[0].exp()).sum(0), label_C])


def label_logits(student_CV: Tensor, max_C: Tensor, labels_T: Tensor, block: Chunk) -> Tensor:
    """The labels' logits less the maxima [C], 0 where the label is another rank's."""
    if not block.columns.width:
        return torch.zeros_like(max_C)
    local_C1, owned_C = _local_labels(labels_T, block)
    return torch.where(owned_C, student_CV.gather(1, local_C1)[:, 0] - max_C, 0.0)


def add_at_labels(gradient_CV: Tensor, labels_T: Tensor, block: Chunk) -> None:
    """Adds 1 at each label's local column, where it is this rank's."""
    if block.columns.width:
        local_C1, owned_C = _local_labels(labels_T, block)
        gradient_CV.scatter_add_(1, local_C1, owned_C.to(gradient_CV.dtype)[:, None])


def outside_is_nan(value_C: Tensor, labels_T: Tensor, chunk: Chunk) -> Tensor:
    """`value_C` with NaN where the label is out of range.

    No rank owns such a label. On the CPU it was refused before; elsewhere looking at labels would wait for the device,
    so the value says it, and meets the trainer's check of the loss.
    """
    labels_C = labels_T[chunk.rows]
    return value_C.masked_fill((labels_C < 0) | (labels_C >= chunk.columns.vocab_size), float("nan"))


def _local_labels(labels_T: Tensor, block: Chunk) -> tuple[Tensor, Tensor]:
    """Local column [C, 1] of each label, 0 where it is another rank's, and whether it is this rank's [C]."""
    local_C = labels_T[block.rows] - block.columns.first
    owned_C = (local_C >= 0) & (local_C < block.columns.width)
    return local_C.masked_fill(~owned_C, 0)[:, None], owned_C


def token_log_probs(
    logits_TV: Tensor,
    labels_T: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """log softmax(logits)[label] of each token.

    Args:
        logits_TV: local columns, any floating dtype.
        labels_T: global token ids (int64), the same on all ranks; positions without a loss are dropped before.
        tp_group: ranks over which V is cut; None means not cut.
        vocab_size: real vocabulary; columns at or above it get no probability and no gradient.

    Returns:
        logp_T, float32 (float64 for float64 logits).

    Collectives: one MAX and one SUM all-reduce for 512 tokens forward, none backward.

    Raises:
        LossInputError: shapes that do not match, labels out of range (on CPU tensors; a NaN value on others, see
            `check_labels`), vocab_size beyond the columns.
    """
    logits = {"logits_TV": logits_TV}
    columns = check_logits(logits, tp_group, vocab_size)
    check_labels(labels_T, logits_TV.shape[0], columns.vocab_size)
    return logits_row_loss(LogProb(labels_T), columns, logits)


def check_labels(labels_T: Tensor, tokens: int, vocab_size: int) -> None:
    """Raises LossInputError unless labels are [tokens] int64 and, where they are on the CPU, within the vocabulary.

    On an accelerator the range is not looked at, as that would wait for the device at every micro-batch.
    """
    if labels_T.dtype != torch.int64 or labels_T.shape != (tokens,):
        raise LossInputError(f"labels_T is {labels_T.dtype} {list(labels_T.shape)}: it must be torch.int64 [{tokens}]")
    if labels_T.device.type == "cpu" and tokens:
        low, high = (int(bound) for bound in labels_T.aminmax())
        if low < 0 or high >= vocab_size:
            raise LossInputError(f"labels_T holds {low if low < 0 else high}: labels must be in [0, {vocab_size})")


def check_weights(tokens: int, **weights: Tensor) -> None:
    """Raises LossInputError unless each of the tokens' weights, by the loss that it weighs, is [tokens] numbers."""
    for name, tensor in weights.items():
        if tensor.shape != (tokens,) or not tensor.is_floating_point():
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise LossInputError(f"{name}_weights_T is {found}: it must be one floating-point number for each token")


class _SumOverRanks(torch.autograd.Function):
    """SUM over a group whose ranks all make the same of the sums: each one's gradient is that of its own values."""

    @staticmethod
    def forward(ctx, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Negative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values_T: Tensor) -> Tensor:
        return -values_T

    @staticmethod
    def backward(ctx, gradient_T: Tensor) -> Tensor:
        if gradient_T.stride(0) == 0:  # of a sum: one number, seen T times
            return (-gradient_T[:1]).expand_as(gradient_T)
        return -gradient_T


def negative(values_T: Tensor) -> Tensor:
    """-values, [T]. Unlike torch's its backward pass hands on one number for all tokens as one number: the fused losses
    have their gradient then, and would look at T numbers to find them equal (which waits for an accelerator)."""
    return _Negative.apply(values_T)


def sequence_sums(
    values_T: Tensor, rows_T: Tensor, rows: int, *, cp_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Sums of a micro-batch's token values over each sequence.

    Args:
        values_T: a value a token, e.g. log-probabilities.
        rows_T: the sequence of each token, in [0, rows).
        rows: number N of sequences; one without tokens gets 0.
        cp_group: ranks that have the sequences' other tokens (context parallelism); None where there are none.

    Returns:
        sums_N, differentiable, over all ranks' tokens. Every rank's gradient is that of its own values, as long as all
        ranks make the same loss of the sums.

    Collectives: one SUM over `cp_group` [N], none in the backward pass.
    """
    if values_T.dim() != 1 or values_T.shape != rows_T.shape:
        raise LossInputError(f"values_T is {list(values_T.shape)} and rows_T {list(rows_T.shape)}: both must be [T]")
    # Masked sums rather than index_add: that one adds in an arbitrary order on CUDA, and runs must repeat bit for bit.
    sequences_N1 = torch.arange(rows, device=rows_T.device)[:, None]
    sums_N = torch.where(rows_T == sequences_N1, values_T, 0.0).sum(1)
    return sums_N if cp_group is None else _SumOverRanks.apply(sums_N, cp_group)


def sequence_weights(loss: Callable[..., Tensor], *scores: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A loss over sequences' scores, and the weights with which each sequence alone can be sent backward.

    A loss over a pair or a group needs the scores of all its sequences at once, and one graph over all of them needs
    their memory at once. Instead: compute the scores without a graph, call this, then make each sequence's score anew
    with its graph and run backward over `weight * score`. The sum of these gradients is that of the sum of the losses,
    exactly, by the chain rule, as long as nothing random (dropout) differs between the passes.

    Args:
        loss: maps the scores to any number of loss values, e.g. `partial(pad_vanilla, teacher_score_NG=..., beta=2.0)`.
            What gets no gradient, such as a reference's scores, is bound beforehand, and so is a weight of each value.
        scores: log-probabilities or rewards of sequences, of any shape; their graph, if any, is not used.

    Returns:
        The loss values, and for each of `scores` d(sum of the values) / d(score) in its shape: constants. No
        collectives but the loss's own.

    Raises:
        LossInputError: the loss does not depend on one of the scores; what the loss raises.
    """
    leaves = [score.detach().requires_grad_() for score in scores]
    weights: tuple[Tensor | None, ...] = (None,) * len(leaves)
    with torch.enable_grad():  # the first pass is likely to be inside no_grad
        values = loss(*leaves)
        if values.requires_grad:
            weights = torch.autograd.grad(values.sum(), leaves, allow_unused=True)
    unused = [place for place, weight in enumerate(weights) if weight is None]
    if unused:
        raise LossInputError(f"scores {unused}: the loss sends them no gradient; bind such arguments beforehand")
    return values.detach(), weights
