"""Losses on the K likeliest tokens of a teacher and one bucket for the rest, from the student's hidden states.

What is stored of a teacher, or made of its hidden states in place: the ids and log-probabilities of its K likeliest
tokens a position, exact over a vocabulary that is cut by tensor parallelism, the same on all of its ranks. The losses
themselves (`TopKForwardKL`, `TopKAdvantage`) stand with their forms from logits in released.py, as the released codes
have them with other limits.

Legend: T tokens, C tokens of a chunk, V local vocabulary columns, H hidden width, K listed ids of a token, S numbers,
D tensor-parallel ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.errors import LossInputError
from megakd.losses.combined import WithLogProbs
from megakd.losses.hidden_states import HeadInput, Settings, check_models, hidden_row_loss
from megakd.losses.likelihood import check_labels, check_weights
from megakd.losses.released import (
    STUDENT_FLOOR,
    TopKAdvantage,
    TopKForwardKL,
    check_stored,
    local_ids,
    pick_columns,
)
from megakd.losses.statistics import Chunk, RowLoss, exp_, group_size_and_rank, statistics_dtype


@dataclass(frozen=True)
class TopK:
    """A model's K likeliest tokens a position, the likeliest first, of equal ones the lowest id first.

    `ids_TK` are global ids (int64), `log_probs_TK` their log-probabilities over the whole vocabulary; what they leave
    of 1 is the rest's.
    """

    ids_TK: Tensor
    log_probs_TK: Tensor

    def first(self, k: int) -> TopK:
        """The `k` likeliest of them."""
        return TopK(self.ids_TK[:, :k], self.log_probs_TK[:, :k])


# ------------------------------------------------------------------------------------------------- numbers of a teacher
class LikeliestTokens(RowLoss):
    """Row loss without a gradient: reports ids and log-probabilities of the K likeliest tokens; its value is the
    likeliest one's log-probability.

    Each rank puts its own K likeliest in a place of their own, 0 elsewhere, so that the one SUM gathers them. Ids are
    exact in float32 up to 2^24.
    """

    roles: ClassVar[int] = 1
    spares: ClassVar[int] = 1

    def __init__(self, k: int):
        self.k, self.reported = k, 2 * k

    def local_sums(self, number: int, block: Chunk, state_SC: Tensor) -> Tensor:
        (logits_CV,), (spare_CV,), (max_C,) = block.logits, block.spares, state_SC
        size, rank = group_size_and_rank(block.columns.group)
        held_D2KC = max_C.new_zeros(size, 2, self.k, len(max_C))
        if block.columns.width:
            ids_CK = _likeliest(logits_CV, min(self.k, block.columns.width))
            listed = slice(ids_CK.shape[1])
            # From 1: a place with 0 is nobody's.
            held_D2KC[rank, 0, listed] = (ids_CK + block.columns.first + 1).t().to(max_C.dtype)
            held_D2KC[rank, 1, listed] = (logits_CV.gather(1, ids_CK) - max_C[:, None]).t()
        sum_C = exp_(torch.sub(logits_CV, max_C[:, None], out=spare_CV)).sum(1)
        return torch.cat([sum_C[None], held_D2KC.flatten(0, 2)])

    def combine(self, number: int, state_SC: Tensor, sums_SC: Tensor, chunk: Chunk) -> Tensor:
        size, _ = group_size_and_rank(chunk.columns.group)
        ids_NC, values_NC = sums_SC[1:].unflatten(0, (size, 2, self.k)).transpose(0, 1).flatten(1, 2)
        # Ids rise from rank to rank and within equal values of one, so a stable sort leaves the lowest first.
        values_NC = values_NC.masked_fill(ids_NC == 0, float("-inf"))
        sorted_NC, order_NC = values_NC.sort(dim=0, descending=True, stable=True)
        log_probs_KC = sorted_NC[: self.k] - sums_SC[0].log()
        return torch.cat([log_probs_KC[:1], ids_NC.gather(0, order_NC[: self.k]) - 1, log_probs_KC])


def _likeliest(logits_CV: Tensor, k: int) -> Tensor:
    """The columns [C, K] of the `k` largest logits, largest first, of equal ones the lowest first."""
    if k == logits_CV.shape[1]:
        return logits_CV.sort(dim=1, descending=True, stable=True).indices
    largest = logits_CV.topk(k + 1, dim=1)
    columns_CK = largest.indices[:, :k].sort(dim=1).values
    order_CK = logits_CV.gather(1, columns_CK).sort(dim=1, descending=True, stable=True).indices
    columns_CK = columns_CK.gather(1, order_CK)
    # topk takes any of several equal ones at its end.
    (tied_N,) = (largest.values[:, k - 1] == largest.values[:, k]).nonzero(as_tuple=True)
    if len(tied_N):
        columns_CK[tied_N] = logits_CV[tied_N].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return columns_CK


class LogProbsAt(RowLoss):
    """Row loss without a gradient: reports the log-probabilities of K given ids; its value is their sum."""

    roles: ClassVar[int] = 1
    spares: ClassVar[int] = 1

    def __init__(self, ids_TK: Tensor):
        self.ids_TK, self.reported = ids_TK, ids_TK.shape[1]

    def local_sums(self, number: int, block: Chunk, state_SC: Tensor) -> Tensor:
        (logits_CV,), (spare_CV,), (max_C,) = block.logits, block.spares, state_SC
        local_CK, owned_CK = local_ids(self.ids_TK[block.rows], block.columns)
        picked_CK = (pick_columns(logits_CV, local_CK) - max_C[:, None]) * owned_CK
        sum_C = exp_(torch.sub(logits_CV, max_C[:, None], out=spare_CV)).sum(1)
        return torch.cat([sum_C[None], picked_CK.t()])

    def combine(self, number: int, state_SC: Tensor, sums_SC: Tensor, chunk: Chunk) -> Tensor:
        log_probs_KC = sums_SC[1:] - sums_SC[0].log()
        ids_KC = self.ids_TK[chunk.rows].t()
        log_probs_KC = log_probs_KC.masked_fill((ids_KC < 0) | (ids_KC >= chunk.columns.vocab_size), float("nan"))
        return torch.cat([log_probs_KC.sum(0, keepdim=True), log_probs_KC])


def fused_top_k(
    hidden_TH: Tensor,
    head_VH: Tensor,
    k: int,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> TopK:
    """The `k` likeliest tokens of each position under a model, without the whole logits; no gradient.

    Args:
        hidden_TH: last hidden states, complete on every rank; any floating dtype.
        head_VH: local rows of the LM head.
        k: tokens listed, at most the vocabulary's.
        tp_group, vocab_size, chunk_tokens: as `fused_token_log_probs` has them.

    Returns:
        Ids and log-probabilities (float32, float64 for float64 hidden states), the same on every rank.

    Collectives: one MAX of a number a token and one SUM of 1 + 2 k D numbers a token for each chunk.

    Raises:
        LossInputError: shapes that do not match, k out of range, numbers that are not finite (on CPU tensors).
    """
    models = [HeadInput("", hidden_TH, head_VH)]
    columns = check_models(models, tp_group, vocab_size)
    if not 1 <= k <= columns.vocab_size:
        raise LossInputError(f"k = {k}: it must be between 1 and the vocabulary's {columns.vocab_size} tokens")
    with torch.no_grad():
        _, reported_ST = hidden_row_loss(LikeliestTokens(k), models, columns, Settings(chunk_tokens, 1.0, True, False))
    ids_KT, log_probs_KT = reported_ST.split(k)
    return TopK(ids_KT.t().long(), log_probs_KT.t().contiguous())


def fused_log_probs_at(
    hidden_TH: Tensor,
    head_VH: Tensor,
    token_ids_TK: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Log-probabilities of K given tokens of each position under a model, without the whole logits; no gradient.

    Args:
        hidden_TH, head_VH, tp_group, vocab_size, chunk_tokens: as `fused_top_k` has them.
        token_ids_TK: global ids (int64), different within a row, the same on all ranks.

    Returns:
        log_probs_TK, float32 (float64 for float64 hidden states), the same on every rank.

    Collectives: one MAX of a number a token and one SUM of 1 + K numbers a token for each chunk.

    Raises:
        LossInputError: shapes that do not match; on CPU tensors also ids out of range (NaN values on others) or twice
            in a row, and numbers that are not finite.
    """
    models = [HeadInput("", hidden_TH, head_VH)]
    columns = check_models(models, tp_group, vocab_size)
    check_stored(len(hidden_TH), token_ids_TK, below=columns.vocab_size)
    with torch.no_grad():
        settings = Settings(chunk_tokens, 1.0, True, False)
        _, reported_ST = hidden_row_loss(LogProbsAt(token_ids_TK), models, columns, settings)
    return reported_ST.t().contiguous()


# ------------------------------------------------------------------------------------------------- losses of a student
def fused_topk_distillation(
    student_hidden_TH: Tensor,
    student_head_VH: Tensor,
    teacher: TopK,
    labels_T: Tensor,
    *,
    divergence_weights_T: Tensor,
    log_prob_weights_T: Tensor,
    released: bool,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_distillation` with KL(teacher || student) of the teacher's K likeliest tokens and the rest as one bucket.

    `sum_i P_i log(P_i / Q_i) + P_r log(P_r / Q_r)`, which is at most the whole KL. The released code of ADPA and DCKD
    has this form with K = 50.

    Args:
        student_hidden_TH, student_head_VH: as `fused_distillation` has them.
        teacher: its likeliest tokens of each position, the same on all ranks; no gradient goes to them.
        labels_T, divergence_weights_T, log_prob_weights_T: as `fused_distillation` has them.
        released: also the released code's limits, as `released_topk_kl(clamp=True)` has them.
        tp_group, vocab_size, chunk_tokens: as `fused_token_log_probs` has them.

    Returns:
        loss, divergence_T, logp_T: as `fused_distillation`.

    Collectives: one MAX of 2 numbers a token and one SUM of K + 3 for each chunk; those of `fused_token_log_probs` for
    d(hidden).

    Raises:
        LossInputError: as `fused_distillation` and `released_topk_kl`.
    """
    models = [HeadInput("student_", student_hidden_TH, student_head_VH)]
    columns = check_models(models, tp_group, vocab_size)
    tokens = len(student_hidden_TH)
    check_labels(labels_T, tokens, columns.vocab_size)
    check_weights(tokens, divergence=divergence_weights_T, log_prob=log_prob_weights_T)
    check_stored(tokens, teacher.ids_TK, below=columns.vocab_size, log_probs_TK=teacher.log_probs_TK)
    probs_TK = teacher.log_probs_TK.detach().to(statistics_dtype(student_hidden_TH)).exp()
    weights = divergence_weights_T.detach(), log_prob_weights_T.detach()
    loss = WithLogProbs(TopKForwardKL(teacher.ids_TK, probs_TK, released), labels_T, *weights, 1.0)
    values_T, reported_ST = hidden_row_loss(loss, models, columns, Settings(chunk_tokens, 1.0, False, False))
    return values_T.sum(), reported_ST[0], reported_ST[1]


def fused_topk_advantage(
    student_hidden_TH: Tensor,
    student_head_VH: Tensor,
    token_ids_TK: Tensor,
    advantages_TK: Tensor,
    *,
    released: bool,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`released_topk_advantage` of logits that are made from hidden states, a chunk at a time.

    Args:
        student_hidden_TH, student_head_VH, tp_group, vocab_size, chunk_tokens: as `fused_token_log_probs` has them.
        token_ids_TK, advantages_TK: as `released_topk_advantage` has them.
        released: limits the advantages as that one's `clamp` does.

    Returns:
        value_T: a gain, with gradients as `fused_token_log_probs` has them.
        mass_T: the student's probability of the listed ids together, without a gradient.

    Collectives: one MAX of a number a token and one SUM of 3 for each chunk; those of `fused_token_log_probs` for
    d(hidden).

    Raises:
        LossInputError: as `released_topk_advantage`.
    """
    models = [HeadInput("student_", student_hidden_TH, student_head_VH)]
    columns = check_models(models, tp_group, vocab_size)
    check_stored(len(student_hidden_TH), token_ids_TK, below=columns.vocab_size, advantages_TK=advantages_TK)
    loss = TopKAdvantage.of(token_ids_TK, advantages_TK, statistics_dtype(student_hidden_TH), clamp=released)
    value_T, reported_ST = hidden_row_loss(loss, models, columns, Settings(chunk_tokens, 1.0, False, False))
    return value_T, reported_ST[0]


def topk_advantages(teacher: TopK, reference_log_probs_TK: Tensor, *, beta: float) -> Tensor:
    """beta (log P - log R) at the aligned teacher's likeliest tokens [T, K], R the reference's own log-probabilities of
    them (ADPA, arXiv 2502.17927, eq. 9)."""
    return beta * (teacher.log_probs_TK - reference_log_probs_TK)


def released_topk_advantages(teacher: TopK, reference: TopK) -> Tensor:
    """The same as the released code of ADPA has it, from two lists: log( max(P, 1e-7) / d ) [T, K].

    d is max(R, 1e-7) where the token is in the reference's list too. Where it is not, d is max(the least P of the
    aligned teacher's list, 1e-7): the code takes the aligned teacher's for both models. `fused_topk_advantage` limits
    the result.
    """
    floor = math.log(STUDENT_FLOOR)
    # One column of the reference after the other: no [T, K, K] tensor.
    denominator_TK = teacher.log_probs_TK.amin(1, keepdim=True).expand_as(teacher.log_probs_TK)
    for column in range(reference.ids_TK.shape[1]):
        here_TK = teacher.ids_TK == reference.ids_TK[:, column : column + 1]
        denominator_TK = torch.where(here_TK, reference.log_probs_TK[:, column : column + 1], denominator_TK)
    return teacher.log_probs_TK.clamp(min=floor) - denominator_TK.clamp(min=floor)
