"""What the released codes of DPKD, ADPA and DCKD compute where it differs from the papers, from logits.

The methods themselves are `dpkd`, `expected_advantage` and `divergence`. Each function says what differs. top_k.py has
those of stored tokens from hidden states, for training. The token ids and numbers that the released codes store for
each token's likeliest ids are replicated over tensor-parallel ranks.

Legend: T tokens, C tokens of a chunk, V local vocabulary columns, K stored ids of a token, B = K + 1 with the rest of
the vocabulary, S statistics, D tensor-parallel ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megakd.errors import LossInputError
from megakd.losses.statistics import (
    LOWEST_LOGIT,
    Chunk,
    Columns,
    RowLoss,
    check_finite,
    check_logits,
    check_positive,
    group_size_and_rank,
    logits_row_loss,
    statistics_dtype,
)

BUCKET_BOUNDS = (1e-8, 1.0 - 1e-8)
"""What the released ADPA code limits both arguments of its losses to: probabilities, but advantages as well."""
STUDENT_FLOOR = 1e-7
"""The least probability that its DCKD loss gives the student."""


# ------------------------------------------------------------------------------------------------- DPKD, token by token
@dataclass(frozen=True)
class ArgmaxPreference(RowLoss):
    """Row loss -log sigmoid(beta rel), rel = (z_a - z_b) - (u_a - u_b) of student z and teacher u.

    a is the teacher's likeliest token and b the student's, the lowest id where several are. The normalisers cancel, and
    only z_a and z_b get a gradient: -+ beta sigmoid(-beta rel).
    """

    roles: ClassVar[int] = 2
    spares: ClassVar[int] = 0
    beta: float

    def local_sums(self, number: int, block: Chunk, state_SC: Tensor) -> Tensor:
        (student_CV, teacher_CV), (student_max_C, teacher_max_C) = block.logits, state_SC
        best = [_best_of_ranks(teacher_CV, teacher_max_C, student_CV, block.columns)]
        best += [_best_of_ranks(student_CV, student_max_C, teacher_CV, block.columns)]
        return torch.cat(best)

    def combine(self, number: int, state_SC: Tensor, sums_SC: Tensor, chunk: Chunk) -> Tensor:
        size, _ = group_size_and_rank(chunk.columns.group)
        student_max_C, teacher_max_C = state_SC
        held_2D3C = sums_SC.unflatten(0, (2, size, 3))
        (a_C, student_a_C), (b_C, teacher_b_C) = (_lowest_id(held_D3C) for held_D3C in held_2D3C)
        margin_C = self.beta * ((student_a_C - student_max_C) - (teacher_max_C - teacher_b_C))
        return torch.stack([-F.logsigmoid(margin_C), a_C, b_C, self.beta * torch.sigmoid(-margin_C)])

    def gradient(self, block: Chunk, saved_SC: Tensor) -> None:
        gradient_CV = block.logits[0].zero_()
        a_C, b_C, slope_C = saved_SC
        for id_C, share_C in ((a_C, -slope_C), (b_C, slope_C)):
            local_C1, owned_C1 = local_ids(id_C.long()[:, None], block.columns)
            if block.columns.width:
                # Added one after the other: where a = b they cancel exactly.
                gradient_CV.scatter_add_(1, local_C1, share_C[:, None] * owned_C1)


def _best_of_ranks(logits_CV: Tensor, max_C: Tensor, others_CV: Tensor, columns: Columns) -> Tensor:
    """[D * 3, C]: of each rank, whether it holds a row's maximum, and the first id that does with its other logit.

    To be summed over ranks: what belongs to other ranks is 0. Ids are exact in float32 up to 2^24.
    """
    size, rank = group_size_and_rank(columns.group)
    held_D3C = max_C.new_zeros(size, 3, len(max_C))
    if columns.width:
        value_C, local_C = logits_CV.max(1)  # of several maxima, torch gives the first
        holds_C = value_C == max_C
        other_C = others_CV.gather(1, local_C[:, None])[:, 0]
        held_D3C[rank] = torch.stack([torch.ones_like(max_C), (local_C + columns.first).to(max_C.dtype), other_C])
        held_D3C[rank].mul_(holds_C)
    return held_D3C.view(size * 3, -1)


def _lowest_id(held_D3C: Tensor) -> tuple[Tensor, Tensor]:
    """Id and other logit [C] of the first rank that holds the maximum: ids rise with ranks."""
    first_C = held_D3C[:, 0].argmax(0)
    id_C, other_C = held_D3C[first_C, 1:, torch.arange(held_D3C.shape[2], device=held_D3C.device)].t()
    return id_C, other_C


def dpkd_token(
    student_TV: Tensor,
    teacher_TV: Tensor,
    *,
    beta: float,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """DPKD as its released code has it, for reproduction only: a DPO loss of two tokens at each position.

    The chosen token a is the teacher's likeliest and the rejected one b the student's, both models being fed the same
    given text: `-log sigmoid( beta { [log Q(a) - log Q(b)] - [log P(a) - log P(b)] } )`. Where a = b it is log 2,
    without a gradient. The paper (arXiv 2406.19774, eq. 8-9, here `dpkd`) has sampled answers in the place of tokens.
    The released code takes the log-softmax in bfloat16; here it is float32. Ties go to the lowest id.

    Args:
        student_TV, teacher_TV: logits, local columns, any floating dtype; only the student's get a gradient.
        beta: scale of the rewards; 0.1 in the released code.
        tp_group: ranks over which V is cut; None means not cut.
        vocab_size: real vocabulary; columns at or above it are never the likeliest and get no gradient. Logits below
            -1e3 count as -1e3.

    Returns:
        loss_T, float32 (float64 for float64 student logits).

    Collectives: one MAX and one SUM all-reduce for 512 tokens forward, none backward.

    Raises:
        LossInputError: shapes that do not match, beta not positive, vocab_size beyond the columns.
    """
    check_positive("beta", beta)
    logits = {"student_TV": student_TV, "teacher_TV": teacher_TV}
    columns = check_logits(logits, tp_group, vocab_size)
    return logits_row_loss(ArgmaxPreference(beta), columns, logits)


# -------------------------------------------------------------------------------------------- ADPA on stored advantages
@dataclass(frozen=True)
class TopKAdvantage(RowLoss):
    """Row loss `sum_i Q(i) A_i` over stored ids, A = rest for all other tokens; gradient Q (A - its mean under Q).

    Reports the stored ids' probability under Q, all together.
    """

    roles: ClassVar[int] = 1
    spares: ClassVar[int] = 1
    reported: ClassVar[int] = 1
    token_ids_TK: Tensor
    advantages_TK: Tensor
    rest: float

    @staticmethod
    def of(token_ids_TK: Tensor, advantages_TK: Tensor, dtype: torch.dtype, *, clamp: bool) -> TopKAdvantage:
        """The loss of advantages as they are, 0 elsewhere; or, with `clamp`, of all of them within BUCKET_BOUNDS."""
        advantages_TK = advantages_TK.detach().to(dtype)
        if not clamp:
            return TopKAdvantage(token_ids_TK, advantages_TK, 0.0)
        return TopKAdvantage(token_ids_TK, advantages_TK.clamp(*BUCKET_BOUNDS), BUCKET_BOUNDS[0])

    def local_sums(self, number: int, block: Chunk, state_SC: Tensor) -> Tensor:
        exp_CV = torch.sub(block.logits[0], state_SC[0][:, None], out=block.spares[0]).exp_()
        local_CK, owned_CK, extra_CK = self._extra(block)
        picked_CK = pick_columns(exp_CV, local_CK)
        return torch.stack([exp_CV.sum(1), (picked_CK * extra_CK).sum(1), (picked_CK * owned_CK).sum(1)])

    def combine(self, number: int, state_SC: Tensor, sums_SC: Tensor, chunk: Chunk) -> Tensor:
        sum_C, gain_C, stored_C = sums_SC
        # What the mean has over the rest's advantage, which at 1e-8 would be lost beside it.
        gain_C = gain_C / sum_C
        ids_CK = self.token_ids_TK[chunk.rows]
        outside_C = ((ids_CK < 0) | (ids_CK >= chunk.columns.vocab_size)).any(1)
        value_C = (self.rest + gain_C).masked_fill(outside_C, float("nan"))
        return torch.stack([value_C, state_SC[0] + sum_C.log(), gain_C, stored_C / sum_C])

    def gradient(self, block: Chunk, saved_SC: Tensor) -> None:
        student_CV = block.logits[0]
        lse_C1, gain_C1, _ = saved_SC[:, :, None]
        local_CK, _, extra_CK = self._extra(block)
        picked_CK = pick_columns(student_CV.sub_(lse_C1).exp_(), local_CK)
        student_CV.mul_(-gain_C1)
        if block.columns.width:
            student_CV.scatter_add_(1, local_CK, picked_CK * extra_CK)

    def _extra(self, block: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """Local columns of the stored ids, whether they are this rank's, and their advantages over that of the rest, 0
        where another rank's."""
        local_CK, owned_CK = local_ids(self.token_ids_TK[block.rows], block.columns)
        return local_CK, owned_CK, (self.advantages_TK[block.rows] - self.rest) * owned_CK


def released_topk_advantage(
    student_TV: Tensor,
    token_ids_TK: Tensor,
    advantages_TK: Tensor,
    *,
    clamp: bool,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """ADPA's expected advantage as its released code has it, for reproduction only: on K stored tokens a position.

    `sum_i Q(i) A_i + (1 - sum_i Q(i)) A_rest`. The released code passes advantages through a limit that is meant for
    probabilities (clamp=True): A is limited to [1e-8, 1 - 1e-8], so every negative advantage is lost, and A_rest, which
    is 0, becomes 1e-8. The paper (arXiv 2502.17927, eq. 9-10, here `expected_advantage`) has signed advantages over the
    whole vocabulary. The code limits Q(i) to at least 1e-8 too, which changes the value by less than 1e-8 a stored
    token and is left out. It is a gain, which ADPA subtracts.

    Args:
        student_TV: logits, local columns, any floating dtype.
        token_ids_TK: global ids (int64), different within a row, the same on all ranks: the aligned teacher's
            likeliest.
        advantages_TK: log-ratio of the aligned teacher and its reference at these ids; no gradient goes to them.
        clamp: True as released; False for signed advantages, 0 outside the stored tokens.
        tp_group: ranks over which V is cut; None means not cut.
        vocab_size: real vocabulary; columns at or above it get no probability and no gradient. Logits below -1e3 count
            as -1e3.

    Returns:
        value_T, float32 (float64 for float64 student logits).

    Collectives: one MAX and one SUM all-reduce for 512 tokens forward, none backward.

    Raises:
        LossInputError: shapes that do not match, vocab_size beyond the columns; on CPU tensors also ids that are out of
            range (a NaN value on others) or twice in a row, and advantages that are not finite.
    """
    columns = check_logits({"student_TV": student_TV}, tp_group, vocab_size)
    check_stored(len(student_TV), token_ids_TK, below=columns.vocab_size, advantages_TK=advantages_TK)
    loss = TopKAdvantage.of(token_ids_TK, advantages_TK, statistics_dtype(student_TV), clamp=clamp)
    return logits_row_loss(loss, columns, {"student_TV": student_TV})


# ----------------------------------------------------------------------------------------- DCKD on stored probabilities
@dataclass(frozen=True)
class TopKForwardKL(RowLoss):
    """Row loss `sum_i P_i log(P_i / Q_i) + P_r log(P_r / Q_r)` over stored ids i and the rest r of the vocabulary.

    Gradient, with weight c = P where Q is not limited and 0 where it is: Q sum(c) less c_i at a stored id i, less c_r
    times the softmax over the rest elsewhere. The rest has its own maximum, so that it is right however small Q_r is.
    """

    roles: ClassVar[int] = 1
    spares: ClassVar[int] = 1
    token_ids_TK: Tensor
    teacher_probs_TK: Tensor
    clamp: bool

    @property
    def maxima(self) -> int:
        return 2

    def local_maxima(self, block: Chunk) -> Tensor:
        """The student's, as every row loss begins with (`WithLogProbs` reads it), and that of the rest alone."""
        return torch.stack([block.logits[0].amax(1), self._rest(block).amax(1)])

    def local_sums(self, number: int, block: Chunk, state_SC: Tensor) -> Tensor:
        rest_max_C1 = state_SC[1][:, None].clamp(min=LOWEST_LOGIT)
        rest_sum_C = self._rest(block).sub_(rest_max_C1).exp_().sum(1)
        local_CK, owned_CK = local_ids(self.token_ids_TK[block.rows], block.columns)
        return torch.cat([rest_sum_C[None], (pick_columns(block.logits[0], local_CK) * owned_CK).t()])

    def combine(self, number: int, state_SC: Tensor, sums_SC: Tensor, chunk: Chunk) -> Tensor:
        rows, rest_max_C = chunk.rows, state_SC[1].clamp(min=LOWEST_LOGIT)
        known_CK = self.token_ids_TK[rows] < chunk.columns.vocab_size
        stored_CK = sums_SC[1:].t().masked_fill(~known_CK, float("-inf"))
        max_C = torch.maximum(rest_max_C, stored_CK.amax(1))
        rest_C = rest_max_C - max_C + sums_SC[0].log()  # -inf where the stored ids are the whole vocabulary
        log_q_CB = torch.cat([stored_CK - max_C[:, None], rest_C[:, None]], 1)
        log_sum_C = log_q_CB.logsumexp(1)
        log_q_CB.sub_(log_sum_C[:, None])
        lse_C, p_CB = max_C + log_sum_C, self._teacher(rows, known_CK)
        free_CB = torch.cat([self._is_free(stored_CK - lse_C[:, None]), self._is_free(log_q_CB[:, -1:])], 1)
        weight_CB = p_CB * free_CB
        if self.clamp:
            log_q_CB.clamp_(min=math.log(STUDENT_FLOOR))
        # Nothing is 0 log 0, nor what rounding leaves of the teacher for a rest without tokens.
        nothing_CB = (p_CB == 0) | log_q_CB.isneginf()
        value_C = (p_CB * (p_CB.log() - log_q_CB)).masked_fill(nothing_CB, 0.0).sum(1)
        value_C.masked_fill_((self.token_ids_TK[rows] < 0).any(1), float("nan"))
        rest_lse_C = (max_C + rest_C).clamp(min=LOWEST_LOGIT)
        return torch.stack([value_C, lse_C, rest_lse_C, weight_CB.sum(1), weight_CB[:, -1]])

    def gradient(self, block: Chunk, saved_SC: Tensor) -> None:
        student_CV, rows, columns = block.logits[0], block.rows, block.columns
        lse_C1, rest_lse_C1, total_C1, rest_weight_C1 = saved_SC[:, :, None]
        known_CK = self.token_ids_TK[rows] < columns.vocab_size
        local_CK, owned_CK = local_ids(self.token_ids_TK[rows], columns)
        rest_CV = self._rest(block).sub_(rest_lse_C1).exp_().mul_(rest_weight_C1)
        free_CK = self._is_free(pick_columns(student_CV.sub_(lse_C1), local_CK))
        student_CV.exp_().mul_(total_C1).sub_(rest_CV)
        if columns.width:
            weight_CK = self._teacher(rows, known_CK)[:, :-1] * free_CK * owned_CK
            student_CV.scatter_add_(1, local_CK, -weight_CK)

    def _rest(self, block: Chunk) -> Tensor:
        """The student's logits with -inf at the stored ids, in the spare."""
        local_CK, owned_CK = local_ids(self.token_ids_TK[block.rows], block.columns)
        _without(block.logits[0], local_CK, owned_CK, block.columns, out=block.spares[0])
        return block.spares[0]

    def _teacher(self, rows: slice, known_CK: Tensor) -> Tensor:
        """The teacher's probabilities of the stored ids and of the rest [C, B]."""
        p_CK = self.teacher_probs_TK[rows] * known_CK
        # Stored in half precision they may add up to more than 1.
        p_CB = torch.cat([p_CK, (1.0 - p_CK.sum(1, keepdim=True)).clamp_(min=0.0)], 1)
        return p_CB.clamp_(*BUCKET_BOUNDS) if self.clamp else p_CB

    def _is_free(self, log_q: Tensor) -> Tensor:
        """Whether a probability of the student is not limited. Both passes must ask it of the same bits."""
        return log_q >= math.log(STUDENT_FLOOR) if self.clamp else torch.ones_like(log_q, dtype=torch.bool)


def released_topk_kl(
    student_TV: Tensor,
    token_ids_TK: Tensor,
    teacher_probs_TK: Tensor,
    *,
    clamp: bool,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """DCKD's KL as the released code of ADPA has it, for reproduction only: on K stored tokens and one rest a position.

    `sum_i P_i log(P_i / Q_i) + P_r log(P_r / Q_r)`, P_r = 1 - sum_i P_i and Q_r likewise. It is at most the KL(P || Q)
    of the whole vocabulary, which the paper (arXiv 2502.17927, section 4, here `divergence("forward_kl", ...)`) has.
    The released code (clamp=True) limits P to [1e-8, 1 - 1e-8] and Q to at least 1e-7, without a gradient through a
    limited Q; its upper limit of Q is 1 in float32 and left out. Probability that was stored for ids at or above the
    vocabulary belongs to the rest, as in that code.

    Args:
        student_TV: logits, local columns, any floating dtype.
        token_ids_TK: global ids (int64), different within a row, the same on all ranks: the teacher's likeliest.
        teacher_probs_TK: the teacher's probabilities of these ids; no gradient goes to them.
        clamp: True as released; False for the plain formula.
        tp_group: ranks over which V is cut; None means not cut.
        vocab_size: real vocabulary; columns at or above it get no probability and no gradient. Logits below -1e3 count
            as -1e3.

    Returns:
        loss_T, float32 (float64 for float64 student logits).

    Collectives: one MAX and one SUM all-reduce for 512 tokens forward (K + 1 sums a token, as the limits are on single
    probabilities), none backward.

    Raises:
        LossInputError: shapes that do not match, vocab_size beyond the columns; on CPU tensors also negative ids (a NaN
            value on others), ids that are twice in a row and probabilities outside [0, 1].
    """
    columns = check_logits({"student_TV": student_TV}, tp_group, vocab_size)
    check_stored(len(student_TV), token_ids_TK, below=None, teacher_probs_TK=teacher_probs_TK)
    if teacher_probs_TK.device.type == "cpu":
        wrong = int(((teacher_probs_TK < 0) | (teacher_probs_TK > 1)).sum())
        if wrong:
            rule = "give probabilities, not logits"
            raise LossInputError(f"teacher_probs_TK holds {wrong} values outside [0, 1]: {rule}")
    teacher_probs_TK = teacher_probs_TK.detach().to(statistics_dtype(student_TV))
    return logits_row_loss(TopKForwardKL(token_ids_TK, teacher_probs_TK, clamp), columns, {"student_TV": student_TV})


# ----------------------------------------------------------------------------------------------------------- stored ids
def local_ids(ids_CK: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """Local columns of ids, 0 where they are another rank's or nobody's, and whether they are this rank's."""
    local_CK = ids_CK - columns.first
    owned_CK = (local_CK >= 0) & (local_CK < columns.width)
    return local_CK.masked_fill(~owned_CK, 0), owned_CK


def pick_columns(values_CV: Tensor, local_CK: Tensor) -> Tensor:
    """The values of local columns; 0 on a rank without columns."""
    return values_CV.gather(1, local_CK) if values_CV.shape[1] else values_CV.new_zeros(local_CK.shape)


def _without(values_CV: Tensor, local_CK: Tensor, owned_CK: Tensor, columns: Columns, *, out: Tensor) -> None:
    """Copies values to `out` with -inf in the owned columns: by addition, as others' ids point to column 0."""
    out.copy_(values_CV)
    if columns.width:
        out.scatter_add_(1, local_CK, torch.zeros_like(local_CK, dtype=out.dtype).masked_fill_(owned_CK, float("-inf")))


def check_stored(tokens: int, token_ids_TK: Tensor, *, below: int | None, **values: Tensor) -> None:
    """Raises LossInputError unless ids, and values by their name, are [tokens, K] and, on the CPU, ids are in range and
    once in a row."""
    if token_ids_TK.dtype != torch.int64 or token_ids_TK.dim() != 2 or len(token_ids_TK) != tokens \
            or token_ids_TK.shape[1] < 1:
        found = f"token_ids_TK is {token_ids_TK.dtype} {list(token_ids_TK.shape)}"
        raise LossInputError(f"{found}: it must be torch.int64 [{tokens}, K], K at least 1")
    for name, values_TK in values.items():
        if not values_TK.is_floating_point() or values_TK.shape != token_ids_TK.shape:
            found = f"{name} is {values_TK.dtype} {list(values_TK.shape)}"
            raise LossInputError(f"{found}: it must be floating-point {list(token_ids_TK.shape)}")
        check_finite(name, values_TK)
    if token_ids_TK.device.type == "cpu" and tokens:
        low, high = (int(bound) for bound in token_ids_TK.aminmax())
        if low < 0 or (below is not None and high >= below):
            rule = "must not be negative" if below is None else f"must be in [0, {below})"
            raise LossInputError(f"token_ids_TK holds {low if low < 0 else high}: ids {rule}")
        twice = int((token_ids_TK.sort(1).values.diff(dim=1) == 0).any(1).sum())
        if twice:
            raise LossInputError(f"token_ids_TK has {twice} of {tokens} rows with an id twice: each may stand once")
