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
    Columns,
    RowLoss,
    check_logits,
    check_positive,
    group_size_and_rank,
    logits_row_loss,
    row_sums,
    subtract_maxima,
)

KINDS = ("forward_kl", "reverse_kl", "jsd", "akl")


class ForwardKL:
    """Row loss KL(P || Q); gradient Q - P."""

    roles: ClassVar[int] = 2
    spares: ClassVar[int] = 1

    def forward(self, buffers: list[Tensor], rows: slice, columns: Columns) -> tuple[Tensor, Tensor]:
        student_CV, teacher_CV, spare_CV = buffers
        maxima_RC = subtract_maxima(buffers[:2], columns)
        torch.exp(teacher_CV, out=spare_CV)
        teacher_sum_C = spare_CV.sum(1)
        cross_C = spare_CV.mul_(teacher_CV.sub_(student_CV)).sum(1)
        sum_C = student_CV.exp_().sum(1)
        sum_C, teacher_sum_C, cross_C = row_sums([sum_C, teacher_sum_C, cross_C], columns)
        log_sums_RC = torch.stack([sum_C, teacher_sum_C]).log_()
        return cross_C / teacher_sum_C - log_sums_RC[1] + log_sums_RC[0], maxima_RC + log_sums_RC

    def gradient(self, buffers: list[Tensor], saved_SC: Tensor, rows: slice, columns: Columns) -> Tensor:
        student_CV, teacher_CV, _ = buffers
        for logits_CV, lse_C in zip((student_CV, teacher_CV), saved_SC, strict=False):
            logits_CV.sub_(lse_C[:, None]).exp_()
        return student_CV.sub_(teacher_CV)


class ReverseKL:
    """Row loss KL(Q || P); gradient Q (log Q - log P - KL(Q || P))."""

    roles: ClassVar[int] = 2
    spares: ClassVar[int] = 1

    def forward(self, buffers: list[Tensor], rows: slice, columns: Columns) -> tuple[Tensor, Tensor]:
        student_CV, teacher_CV, spare_CV = buffers
        max_C, teacher_max_C = subtract_maxima(buffers[:2], columns)
        teacher_sum_C = torch.exp(teacher_CV, out=spare_CV).sum(1)
        torch.sub(student_CV, teacher_CV, out=teacher_CV)
        sum_C = student_CV.exp_().sum(1)
        cross_C = student_CV.mul_(teacher_CV).sum(1)
        sum_C, teacher_sum_C, cross_C = row_sums([sum_C, teacher_sum_C, cross_C], columns)
        cross_C, log_sum_C = cross_C / sum_C, sum_C.log()
        # log Q - log P - KL is the difference of the logits less its mean under Q: the normalisers cancel.
        saved_SC = torch.stack([max_C + log_sum_C, max_C - teacher_max_C + cross_C])
        return cross_C - log_sum_C + teacher_sum_C.log(), saved_SC

    def gradient(self, buffers: list[Tensor], saved_SC: Tensor, rows: slice, columns: Columns) -> Tensor:
        student_CV, teacher_CV, _ = buffers
        lse_C, mean_C = saved_SC
        torch.sub(student_CV, teacher_CV, out=teacher_CV).sub_(mean_C[:, None])
        return student_CV.sub_(lse_C[:, None]).exp_().mul_(teacher_CV)


@dataclass(frozen=True)
class JensenShannon:
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
    beta: float

    def forward(self, buffers: list[Tensor], rows: slice, columns: Columns) -> tuple[Tensor, Tensor]:
        student_CV, teacher_CV, student_exp_CV, teacher_exp_CV = buffers
        max_C, teacher_max_C = subtract_maxima(buffers[:2], columns)
        sums = [torch.exp(student_CV, out=student_exp_CV).sum(1), torch.exp(teacher_CV, out=teacher_exp_CV).sum(1)]
        sum_C, teacher_sum_C = row_sums(sums, columns)
        log_sum_C, odds = sum_C.log(), math.log(self.beta / (1.0 - self.beta))
        shift_C = log_sum_C - teacher_sum_C.log() + odds
        x_CV = torch.sub(teacher_CV, student_CV, out=student_CV).add_(shift_C[:, None])
        teacher_part_CV = _softplus_(torch.neg(x_CV, out=teacher_CV)).mul_(teacher_exp_CV)
        student_part_CV = _softplus_(x_CV).mul_(student_exp_CV)
        student_part_C, teacher_part_C = row_sums([student_part_CV.sum(1), teacher_part_CV.sum(1)], columns)
        student_part_C, teacher_part_C = student_part_C / sum_C, teacher_part_C / teacher_sum_C
        student_kl_C, teacher_kl_C = -math.log(1.0 - self.beta) - student_part_C, -math.log(self.beta) - teacher_part_C
        saved_SC = torch.stack([max_C + log_sum_C, max_C - teacher_max_C + shift_C, student_part_C])
        return self.beta * teacher_kl_C + (1.0 - self.beta) * student_kl_C, saved_SC

    def gradient(self, buffers: list[Tensor], saved_SC: Tensor, rows: slice, columns: Columns) -> Tensor:
        student_CV, teacher_CV = buffers[:2]
        lse_C, shift_C, student_part_C = saved_SC
        x_CV = torch.sub(teacher_CV, student_CV, out=teacher_CV).add_(shift_C[:, None])
        part_CV = _softplus_(x_CV).sub_(student_part_C[:, None]).mul_(self.beta - 1.0)
        return student_CV.sub_(lse_C[:, None]).exp_().mul_(part_CV)


def _softplus_(x: Tensor) -> Tensor:
    """log(1 + exp(x)) in place, but at most 80: beyond, the probability that it multiplies is below exp(-80)."""
    return x.clamp_(max=80.0).exp_().log1p_()


@dataclass(frozen=True)
class AdaptiveKL:
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
    spares: ClassVar[int] = 2
    mu: float

    def forward(self, buffers: list[Tensor], rows: slice, columns: Columns) -> tuple[Tensor, Tensor]:
        student_CV, teacher_CV, student_prob_CV, teacher_prob_CV = buffers
        max_C, teacher_max_C = subtract_maxima(buffers[:2], columns)
        torch.exp(student_CV, out=student_prob_CV)
        torch.exp(teacher_CV, out=teacher_prob_CV)
        difference_CV = student_CV.sub_(teacher_CV)
        local = [student_prob_CV.sum(1), teacher_prob_CV.sum(1)]
        local += [(student_prob_CV * difference_CV).sum(1), (teacher_prob_CV * difference_CV).sum(1)]
        sums_SC = row_sums([*local, self._candidates(teacher_CV, columns)], columns)
        sum_C, teacher_sum_C, reverse_C, forward_C = sums_SC[:4]
        log_ratio_C = sum_C.log() - teacher_sum_C.log()
        forward_C, reverse_C = log_ratio_C - forward_C / teacher_sum_C, reverse_C / sum_C - log_ratio_C

        in_head_CV = self._head(teacher_CV, sums_SC[4:], teacher_sum_C, columns)
        gap_CV = student_prob_CV.div_(sum_C[:, None]).sub_(teacher_prob_CV.div_(teacher_sum_C[:, None])).abs_()
        gap_C, head_gap_C = row_sums([gap_CV.sum(1), gap_CV.mul_(in_head_CV).sum(1)], columns)
        # P = Q has no gap and no gradient: any share will do, 0 / tiny is one.
        head_share_C = head_gap_C / gap_C.clamp(min=torch.finfo(gap_C.dtype).tiny)
        value_C = head_share_C * forward_C + (1.0 - head_share_C) * reverse_C
        lse_C, teacher_lse_C = max_C + sum_C.log(), teacher_max_C + teacher_sum_C.log()
        return value_C, torch.stack([lse_C, teacher_lse_C, reverse_C, head_share_C])

    def gradient(self, buffers: list[Tensor], saved_SC: Tensor, rows: slice, columns: Columns) -> Tensor:
        student_CV, teacher_CV, teacher_prob_CV, _ = buffers
        lse_C1, teacher_lse_C1, reverse_C1, head_share_C1 = saved_SC[:, :, None]
        student_CV.sub_(lse_C1)
        teacher_CV.sub_(teacher_lse_C1)
        torch.exp(teacher_CV, out=teacher_prob_CV).mul_(head_share_C1)
        torch.sub(student_CV, teacher_CV, out=teacher_CV)
        teacher_CV.sub_(reverse_C1).mul_(1.0 - head_share_C1).add_(head_share_C1)
        return student_CV.exp_().mul_(teacher_CV).sub_(teacher_prob_CV)

    def _candidates(self, teacher_CV: Tensor, columns: Columns) -> Tensor:
        """[2 G, C]: all ranks' candidates' logits, then ids; those of other ranks are 0, to be summed over ranks."""
        size, rank = group_size_and_rank(columns.group)
        found = min(self.CANDIDATES, columns.width)
        packed = teacher_CV.new_zeros(2, size, self.CANDIDATES, teacher_CV.shape[0])
        packed[0, rank] = float("-inf")
        if found:
            values_CK, local_CK = teacher_CV.topk(found, dim=1)
            packed[0, rank, :found] = values_CK.t()
            packed[1, rank, :found] = (local_CK + columns.first).t()  # float32 holds whole numbers up to 2^24
        return packed.flatten(0, 2)

    def _head(self, teacher_CV: Tensor, packed: Tensor, teacher_sum_C: Tensor, columns: Columns) -> Tensor:
        """Which local columns belong to the head, as the logits' dtype's 0 and 1."""
        values_CG, ids_CG = packed.unflatten(0, (2, -1)).transpose(1, 2)
        ids_CG, by_id_CG = ids_CG.sort(dim=1)
        last_C1, last_id_C1 = self._last_of_head(values_CG.gather(1, by_id_CG), ids_CG, teacher_sum_C)
        # A rank may have more tokens like its last candidate: unless that one is beyond the head, they are needed too.
        smallest_C1 = values_CG.unflatten(1, (-1, self.CANDIDATES)).amin(2).amax(1, keepdim=True)
        short_C = (smallest_C1 >= last_C1)[:, 0]
        if bool(short_C.any()):
            whole = teacher_CV.new_zeros(int(short_C.sum()), columns.vocab_size)
            whole[:, columns.first : columns.first + columns.width] = teacher_CV[short_C]
            (whole,) = row_sums([whole.flatten()[None]], columns)
            whole = whole.view(-1, columns.vocab_size)
            ids = torch.arange(columns.vocab_size, device=whole.device).to(whole.dtype).expand_as(whole)
            last_C1[short_C], last_id_C1[short_C] = self._last_of_head(whole, ids, teacher_sum_C[short_C])
        ids_V = torch.arange(columns.first, columns.first + columns.width, device=teacher_CV.device)
        in_head_CV = (teacher_CV > last_C1) | ((teacher_CV == last_C1) & (ids_V <= last_id_C1))
        return in_head_CV.to(teacher_CV.dtype)

    def _last_of_head(self, values_CG: Tensor, ids_CG: Tensor, teacher_sum_C: Tensor) -> tuple[Tensor, Tensor]:
        """Logit and id [C, 1] of the head's last token among candidates that are ordered by id."""
        values_CG, by_value_CG = values_CG.sort(dim=1, descending=True, stable=True)
        totals_CG = (values_CG.double().exp() / teacher_sum_C.double()[:, None]).cumsum(1)
        last_C1 = (totals_CG <= self.mu).sum(1, keepdim=True).sub_(1).clamp_(min=0)
        return values_CG.gather(1, last_C1), ids_CG.gather(1, by_value_CG).gather(1, last_C1)


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
    columns = check_logits({"student_TV": student_TV, "teacher_TV": teacher_TV}, tp_group, vocab_size)
    return logits_row_loss(loss, columns, student_TV, teacher_TV, temperature=temperature)
