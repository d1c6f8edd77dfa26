"""Divergences between a teacher's and the student's next-token distributions, over the full vocabulary.

Legend: T tokens, C tokens of a chunk, V local vocabulary columns, K AKL candidates of a rank, G those of all ranks.
P is the teacher's distribution and Q the student's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.errors import LossInputError
from megakd.losses.statistics import (
    Chunk,
    Columns,
    RowLoss,
    check_logits,
    check_positive,
    exp_,
    group_size_and_rank,
    logits_row_loss,
    sum_over_ranks,
)

KINDS = ("forward_kl", "reverse_kl", "jsd", "akl")


class ForwardKL(RowLoss):
    """Row loss KL(P || Q); gradient Q - P."""

    roles: ClassVar[int] = 2
    spares: ClassVar[int] = 2

    def local_sums(self, number: int, block: Chunk, state_SC: Tensor) -> Tensor:
        (student_CV, teacher_CV), (spare_CV, log_ratio_CV) = block.logits, block.spares
        max_C, teacher_max_C = state_SC
        sum_C = exp_(torch.sub(student_CV, max_C[:, None], out=log_ratio_CV)).sum(1)
        torch.sub(teacher_CV, student_CV, out=log_ratio_CV).add_((max_C - teacher_max_C)[:, None])
        teacher_exp_CV = exp_(torch.sub(teacher_CV, teacher_max_C[:, None], out=spare_CV))
        return torch.stack([sum_C, teacher_exp_CV.sum(1), log_ratio_CV.mul_(teacher_exp_CV).sum(1)])

    def combine(self, number: int, state_SC: Tensor, sums_SC: Tensor, chunk: Chunk) -> Tensor:
        sum_C, teacher_sum_C, cross_C = sums_SC
        log_sums_RC = sums_SC[:2].log()
        value_C = cross_C / teacher_sum_C - log_sums_RC[1] + log_sums_RC[0]
        return torch.cat([value_C[None], state_SC + log_sums_RC])

    def gradient(self, block: Chunk, saved_SC: Tensor) -> None:
        for logits_CV, lse_C in zip(block.logits, saved_SC, strict=True):
            exp_(logits_CV.sub_(lse_C[:, None]))
        block.logits[0].sub_(block.logits[1])


class ReverseKL(RowLoss):
    """Row loss KL(Q || P); gradient Q (log Q - log P - KL(Q || P))."""

    roles: ClassVar[int] = 2
    spares: ClassVar[int] = 2

    def local_sums(self, number: int, block: Chunk, state_SC: Tensor) -> Tensor:
        (student_CV, teacher_CV), (spare_CV, log_ratio_CV) = block.logits, block.spares
        max_C, teacher_max_C = state_SC
        teacher_sum_C = exp_(torch.sub(teacher_CV, teacher_max_C[:, None], out=log_ratio_CV)).sum(1)
        torch.sub(student_CV, teacher_CV, out=log_ratio_CV).add_((teacher_max_C - max_C)[:, None])
        exp_CV = exp_(torch.sub(student_CV, max_C[:, None], out=spare_CV))
        return torch.stack([exp_CV.sum(1), teacher_sum_C, log_ratio_CV.mul_(exp_CV).sum(1)])

    def combine(self, number: int, state_SC: Tensor, sums_SC: Tensor, chunk: Chunk) -> Tensor:
        sum_C, teacher_sum_C, cross_C = sums_SC
        max_C, teacher_max_C = state_SC
        cross_C, log_sum_C = cross_C / sum_C, sum_C.log()
        # log Q - log P - KL is the difference of the logits less its mean under Q: the normalisers cancel.
        value_C = cross_C - log_sum_C + teacher_sum_C.log()
        return torch.stack([value_C, max_C + log_sum_C, max_C - teacher_max_C + cross_C])

    def gradient(self, block: Chunk, saved_SC: Tensor) -> None:
        student_CV, teacher_CV = block.logits
        lse_C, mean_C = saved_SC
        torch.sub(student_CV, teacher_CV, out=teacher_CV).sub_(mean_C[:, None])
        exp_(student_CV.sub_(lse_C[:, None])).mul_(teacher_CV)


@dataclass(frozen=True)
class JensenShannon(RowLoss):
    """Row loss beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q (GKD eq. 1).

    With x = log(beta P) - log((1 - beta) Q):
        KL(Q || M) = -log(1 - beta) - sum Q softplus(x)
        KL(P || M) = -log(beta) - sum P softplus(-x)
        gradient = -(1 - beta) Q (softplus(x) - sum Q softplus(x))
    This form, unlike one in log Q - log M, loses no digits where M is almost (1 - beta) Q. x needs the normalisers of P
    and Q: hence a second SUM.
    """

    roles: ClassVar[int] = 2
    spares: ClassVar[int] = 2
    passes: ClassVar[int] = 2
    beta: float

    def local_sums(self, number: int, block: Chunk, state_SC: Tensor) -> Tensor:
        spare_CV, x_CV = block.spares
        if number == 0:
            return torch.stack(
                [
                    exp_(torch.sub(logits_CV, max_C[:, None], out=spare_CV)).sum(1)
                    for logits_CV, max_C in zip(block.logits, state_SC, strict=True)
                ]
            )
        student_CV, teacher_CV = block.logits
        max_C, teacher_max_C = state_SC[:2]
        parts = []
        # Q softplus(x), then P softplus(-x), both without their normalisers.
        for logits_CV, its_max_C, sign in ((student_CV, max_C, 1.0), (teacher_CV, teacher_max_C, -1.0)):
            torch.sub(teacher_CV, student_CV, out=x_CV).add_(self._shift(state_SC)[:, None])
            _softplus_(x_CV if sign > 0 else x_CV.neg_())
            parts.append(exp_(torch.sub(logits_CV, its_max_C[:, None], out=spare_CV)).mul_(x_CV).sum(1))
        return torch.stack(parts)

    def combine(self, number: int, state_SC: Tensor, sums_SC: Tensor, chunk: Chunk) -> Tensor:
        if number == 0:
            return torch.cat([state_SC, sums_SC.log()])
        max_C, _, log_sum_C, teacher_log_sum_C = state_SC
        student_part_C, teacher_part_C = sums_SC[0] / log_sum_C.exp(), sums_SC[1] / teacher_log_sum_C.exp()
        student_kl_C, teacher_kl_C = -math.log(1.0 - self.beta) - student_part_C, -math.log(self.beta) - teacher_part_C
        value_C = self.beta * teacher_kl_C + (1.0 - self.beta) * student_kl_C
        return torch.stack([value_C, max_C + log_sum_C, self._shift(state_SC), student_part_C])

    def gradient(self, block: Chunk, saved_SC: Tensor) -> None:
        student_CV, teacher_CV = block.logits
        lse_C, shift_C, student_part_C = saved_SC
        x_CV = torch.sub(teacher_CV, student_CV, out=teacher_CV).add_(shift_C[:, None])
        part_CV = _softplus_(x_CV).sub_(student_part_C[:, None]).mul_(self.beta - 1.0)
        exp_(student_CV.sub_(lse_C[:, None])).mul_(part_CV)

    def _shift(self, state_SC: Tensor) -> Tensor:
        """What x is more than the teacher's logit less the student's. The logarithms of the sums are small beside large
        maxima: they are not added to these before the maxima have cancelled."""
        max_C, teacher_max_C, log_sum_C, teacher_log_sum_C = state_SC
        return (max_C - teacher_max_C) + (log_sum_C - teacher_log_sum_C + math.log(self.beta / (1.0 - self.beta)))


def _softplus_(x: Tensor) -> Tensor:
    """log(1 + exp(x)) in place, but at most 80: beyond, the probability that it multiplies is below exp(-80)."""
    return exp_(x.clamp_(max=80.0)).log1p_()


@dataclass(frozen=True)
class AdaptiveKL(RowLoss):
    """Row loss w_h KL(P || Q) + w_l KL(Q || P), detached weights by where P and Q differ (AKL).

    Tokens by falling P, equal ones by rising id: the head is the longest prefix of a total of at most mu, and never
    empty. w_h is the head's share of sum |P - Q|, w_l = 1 - w_h.

    The head is found from each rank's CANDIDATES most probable tokens. Where they are not enough for some row of
    the chunk (a flat teacher, or ties), one more all-reduce brings those whole rows together: as exact, but slower.
    Asking whether they are enough waits for the device.
    """

    CANDIDATES: ClassVar[int] = 64
    """Sent along with the sums, in the same all-reduce."""
    roles: ClassVar[int] = 2
    spares: ClassVar[int] = 3
    passes: ClassVar[int] = 2
    mu: float

    def local_sums(self, number: int, block: Chunk, state_SC: Tensor) -> Tensor:
        student_CV, teacher_CV = block.logits
        if number == 0:
            max_C1, teacher_max_C1 = state_SC[:, :, None]
            student_exp_CV, teacher_exp_CV, log_ratio_CV = block.spares
            torch.sub(student_CV, max_C1, out=student_exp_CV)
            torch.sub(teacher_CV, teacher_max_C1, out=teacher_exp_CV)
            torch.sub(student_exp_CV, teacher_exp_CV, out=log_ratio_CV)
            local = [exp_(student_exp_CV).sum(1), exp_(teacher_exp_CV).sum(1)]
            local += [student_exp_CV.mul_(log_ratio_CV).sum(1), teacher_exp_CV.mul_(log_ratio_CV).sum(1)]
            return torch.cat([torch.stack(local), self._candidates(teacher_CV, block.columns)])
        gap_CV, teacher_prob_CV, _ = block.spares
        lse_C1, teacher_lse_C1, _, _, last_C1, last_id_C1 = state_SC[:, :, None]
        exp_(torch.sub(student_CV, lse_C1, out=gap_CV))
        gap_CV.sub_(exp_(torch.sub(teacher_CV, teacher_lse_C1, out=teacher_prob_CV))).abs_()
        gap_C = gap_CV.sum(1)
        first, width = block.columns.first, block.columns.width
        ids_V = torch.arange(first, first + width, device=gap_CV.device, dtype=gap_CV.dtype)
        in_head_CV = (teacher_CV > last_C1) | ((teacher_CV == last_C1) & (ids_V <= last_id_C1))
        return torch.stack([gap_C, gap_CV.mul_(in_head_CV).sum(1)])

    def combine(self, number: int, state_SC: Tensor, sums_SC: Tensor, chunk: Chunk) -> Tensor:
        if number == 0:
            sum_C, teacher_sum_C, reverse_C, forward_C = sums_SC[:4]
            log_ratio_C = sum_C.log() - teacher_sum_C.log()
            forward_C, reverse_C = log_ratio_C - forward_C / teacher_sum_C, reverse_C / sum_C - log_ratio_C
            lse_RC = state_SC + sums_SC[:2].log()
            last_C, last_id_C = self._head(chunk, sums_SC[4:], lse_RC[1])
            return torch.stack([*lse_RC, reverse_C, forward_C, last_C, last_id_C])
        lse_C, teacher_lse_C, reverse_C, forward_C = state_SC[:4]
        gap_C, head_gap_C = sums_SC
        # P = Q has no gap and no gradient: any share will do, 0 / tiny is one.
        head_share_C = head_gap_C / gap_C.clamp(min=torch.finfo(gap_C.dtype).tiny)
        value_C = head_share_C * forward_C + (1.0 - head_share_C) * reverse_C
        return torch.stack([value_C, lse_C, teacher_lse_C, reverse_C, head_share_C])

    def gradient(self, block: Chunk, saved_SC: Tensor) -> None:
        (student_CV, teacher_CV), (teacher_prob_CV, _, _) = block.logits, block.spares
        lse_C1, teacher_lse_C1, reverse_C1, head_share_C1 = saved_SC[:, :, None]
        student_CV.sub_(lse_C1)
        teacher_CV.sub_(teacher_lse_C1)
        torch.exp(teacher_CV, out=teacher_prob_CV).mul_(head_share_C1)
        torch.sub(student_CV, teacher_CV, out=teacher_CV)
        teacher_CV.sub_(reverse_C1).mul_(1.0 - head_share_C1).add_(head_share_C1)
        exp_(student_CV).mul_(teacher_CV).sub_(teacher_prob_CV)

    def _candidates(self, teacher_CV: Tensor, columns: Columns) -> Tensor:
        """[2 G, C]: all ranks' candidates' logits, then ids; those of other ranks are 0, to be summed over ranks."""
        size, rank = group_size_and_rank(columns.group)
        found = min(self.CANDIDATES, columns.width)
        packed = teacher_CV.new_zeros(2, size, self.CANDIDATES, teacher_CV.shape[0])
        packed[0, rank] = float("-inf")
        if found:
            values_CK, local_CK = _top(teacher_CV, found)
            packed[0, rank, :found] = values_CK.t()
            packed[1, rank, :found] = (local_CK + columns.first).t()  # float32 holds whole numbers up to 2^24
        return packed.flatten(0, 2)

    def _head(self, chunk: Chunk, packed: Tensor, teacher_lse_C: Tensor) -> tuple[Tensor, Tensor]:
        """The head's last token of each row: its logit and id [C]."""
        columns, teacher_CV = chunk.columns, chunk.logits[1]
        values_CG, ids_CG = packed.unflatten(0, (2, -1)).transpose(1, 2)
        ids_CG, by_id_CG = ids_CG.sort(dim=1)
        last_C1, last_id_C1 = self._last_of_head(values_CG.gather(1, by_id_CG), ids_CG, teacher_lse_C)
        # A rank may have more tokens like its last candidate: unless that one is beyond the head, they are needed too.
        smallest_C1 = values_CG.unflatten(1, (-1, self.CANDIDATES)).amin(2).amax(1, keepdim=True)
        short_C = (smallest_C1 >= last_C1)[:, 0]
        if bool(short_C.any()):
            whole = teacher_CV.new_zeros(int(short_C.sum()), columns.vocab_size)
            whole[:, columns.first : columns.first + columns.width] = teacher_CV[short_C]
            sum_over_ranks(whole, columns)
            ids = torch.arange(columns.vocab_size, device=whole.device).to(whole.dtype).expand_as(whole)
            last_C1[short_C], last_id_C1[short_C] = self._last_of_head(whole, ids, teacher_lse_C[short_C])
        return last_C1[:, 0], last_id_C1[:, 0]

    def _last_of_head(self, values_CG: Tensor, ids_CG: Tensor, teacher_lse_C: Tensor) -> tuple[Tensor, Tensor]:
        """Logit and id [C, 1] of the head's last token among candidates that are ordered by id."""
        values_CG, by_value_CG = values_CG.sort(dim=1, descending=True, stable=True)
        totals_CG = (values_CG.double() - teacher_lse_C.double()[:, None]).exp().cumsum(1)
        last_C1 = (totals_CG <= self.mu).sum(1, keepdim=True).sub_(1).clamp_(min=0)
        return values_CG.gather(1, last_C1), ids_CG.gather(1, by_value_CG).gather(1, last_C1)


def _top(logits_CV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row [C, count] and their columns; of equal ones at the edge, any.

    They lie in the `count` spans of columns with the largest maxima: so many numbers are at least as large as the
    maximum of any other span. Maxima cost one pass over the row, where `topk` of all of it costs many times that.
    """
    span = 64
    spans, rest = divmod(logits_CV.shape[1], span)
    if spans <= 2 * count:
        return logits_CV.topk(count, dim=1)
    whole_CSW = logits_CV[:, : spans * span].unflatten(1, (spans, span))
    chosen_CK = whole_CSW.amax(2).topk(count, dim=1).indices
    candidates_CN = whole_CSW.gather(1, chosen_CK[:, :, None].expand(-1, -1, span)).flatten(1)
    columns_CN = (chosen_CK[:, :, None] * span + torch.arange(span, device=logits_CV.device)).flatten(1)
    if rest:
        last_V = torch.arange(spans * span, logits_CV.shape[1], device=logits_CV.device)
        candidates_CN = torch.cat([candidates_CN, logits_CV[:, spans * span :]], 1)
        columns_CN = torch.cat([columns_CN, last_V.expand(len(logits_CV), -1)], 1)
    values_CK, places_CK = candidates_CN.topk(count, dim=1)
    return values_CK, columns_CN.gather(1, places_CK)


def row_divergence(kind: str, *, beta: float, mu: float) -> RowLoss:
    """The row loss of a kind of divergence; raises LossInputError on settings that none has."""
    match kind:
        case "forward_kl":
            return ForwardKL()
        case "reverse_kl":
            return ReverseKL()
        case "jsd":
            if not 0.0 < beta < 1.0:
                rule = "it must be in (0, 1); the limits are the kinds forward_kl (0) and reverse_kl (1)"
                raise LossInputError(f"beta = {beta}: {rule}")
            return JensenShannon(beta)
        case "akl":
            if not 0.0 <= mu < 1.0:
                raise LossInputError(f"mu = {mu}: it must be in [0, 1); at 1 it would be the kind forward_kl")
            return AdaptiveKL(mu)
    raise LossInputError(f"kind = {kind!r}: it must be one of {', '.join(KINDS)}")


def divergence(
    kind: str,
    student_TV: Tensor,
    teacher_TV: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    mu: float = 0.5,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Divergence of each token's distributions.

    forward_kl is KL(P || Q), the teacher first (DCKD, arXiv 2502.17927); reverse_kl KL(Q || P) (MiniLLM, arXiv
    2306.08543); jsd the generalised one of GKD (arXiv 2306.13649, eq. 1); akl AKL (arXiv 2404.02657).

    Args:
        kind: one of KINDS.
        student_TV, teacher_TV: logits, local columns, any floating dtype; only the student's get a gradient.
        beta: jsd: weight of the teacher in the mixture, in (0, 1).
        temperature: both models' logits are divided by it; the loss is not multiplied by its square.
        mu: akl: teacher mass of the head, in [0, 1).
        tp_group: ranks over which V is cut; None means not cut.
        vocab_size: real vocabulary; columns at or above it get no probability and no gradient. Logits below -1e3 count
            as -1e3.

    Returns:
        loss_T, float32 (float64 for float64 student logits).

    Collectives: one MAX and one SUM all-reduce for 512 tokens forward, one more SUM for jsd and akl (and another for
    akl where the head is not among the exchanged candidates, see AdaptiveKL); none backward.

    Raises:
        LossInputError: an unknown kind, shapes that do not match, a setting or vocab_size out of range.
    """
    loss = row_divergence(kind, beta=beta, mu=mu)
    check_positive("temperature", temperature)
    logits = {"student_TV": student_TV, "teacher_TV": teacher_TV}
    columns = check_logits(logits, tp_group, vocab_size)
    return logits_row_loss(loss, columns, logits, temperature=temperature)
