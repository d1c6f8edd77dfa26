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
from megakd.losses.statistics import Columns, check_logits, logits_row_loss, row_sums, subtract_maxima


class NegativeLogProb:
    """Row loss `-log Q(label)`; its gradient is `Q - 1[label]`."""

    roles: ClassVar[int] = 1
    spares: ClassVar[int] = 0

    def __init__(self, labels_T: Tensor):
        self.labels_T = labels_T

    def forward(self, buffers: list[Tensor], rows: slice, columns: Columns) -> tuple[Tensor, Tensor]:
        (student_CV,) = buffers
        (max_C,) = subtract_maxima(buffers, columns)
        local_C1, owned_C = self._local_labels(rows, columns)
        if columns.width:
            label_C = student_CV.gather(1, local_C1)[:, 0].mul_(owned_C)
        else:
            label_C = torch.zeros_like(max_C)
        sum_C, label_C = row_sums([student_CV.exp_().sum(1), label_C], columns)
        log_sum_C = sum_C.log()
        labels_C = self.labels_T[rows]
        # No rank owns a label that is out of range. On the CPU such labels were refused before; elsewhere looking at
        # them would wait for the device, so they make the value NaN, which the trainer's check of the loss meets.
        outside_C = (labels_C < 0) | (labels_C >= columns.vocab_size)
        return (log_sum_C - label_C).masked_fill_(outside_C, float("nan")), (max_C + log_sum_C)[None]

    def gradient(self, buffers: list[Tensor], saved_SC: Tensor, rows: slice, columns: Columns) -> Tensor:
        (student_CV,) = buffers
        (lse_C,) = saved_SC
        student_CV.sub_(lse_C[:, None]).exp_()
        if columns.width:
            local_C1, owned_C = self._local_labels(rows, columns)
            student_CV.scatter_add_(1, local_C1, -owned_C.to(student_CV.dtype)[:, None])
        return student_CV

    def _local_labels(self, rows: slice, columns: Columns) -> tuple[Tensor, Tensor]:
        """Local column [C, 1] of each label, 0 where it is another rank's, and whether it is this rank's [C]."""
        local_C = self.labels_T[rows] - columns.first
        owned_C = (local_C >= 0) & (local_C < columns.width)
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
    columns = check_logits({"logits_TV": logits_TV}, tp_group, vocab_size)
    check_labels(labels_T, logits_TV.shape[0], columns.vocab_size)
    return -logits_row_loss(NegativeLogProb(labels_T), columns, logits_TV)


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


def sequence_sums(values_T: Tensor, rows_T: Tensor, rows: int) -> Tensor:
    """Sums of a micro-batch's token values over each sequence.

    Args:
        values_T: a value a token, e.g. log-probabilities.
        rows_T: the sequence of each token, in [0, rows).
        rows: number N of sequences; one without tokens gets 0.

    Returns:
        sums_N, differentiable; no collectives.
    """
    if values_T.dim() != 1 or values_T.shape != rows_T.shape:
        raise LossInputError(f"values_T is {list(values_T.shape)} and rows_T {list(rows_T.shape)}: both must be [T]")
    # Masked sums rather than index_add: that one adds in an arbitrary order on CUDA, and runs must repeat bit for bit.
    sequences_N1 = torch.arange(rows, device=rows_T.device)[:, None]
    return torch.where(rows_T == sequences_N1, values_T, 0.0).sum(1)


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
