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
    KernelForm,
    RowLoss,
    check_logits,
    check_positive,
    exp_,
    group_size_and_rank,
    kernels,
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

    def kernel_form(self) -> KernelForm:
        return KernelForm("forward_kl")

    def from_parts(self, sums_SPC: Tensor, shift_RPC: Tensor, chunk: Chunk, state_SC: Tensor) -> Tensor:
        shift_PC, teacher_shift_PC = shift_RPC
        cross_PC = shifted_cross(sums_SPC[2], sums_SPC[1], teacher_shift_PC - shift_PC, teacher_shift_PC)
        return torch.stack([*(sums_SPC[:2] * shift_RPC.exp()).sum(1), cross_PC.sum(0)])


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

    def kernel_form(self) -> KernelForm:
        return KernelForm("reverse_kl")

    def from_parts(self, sums_SPC: Tensor, shift_RPC: Tensor, chunk: Chunk, state_SC: Tensor) -> Tensor:
        shift_PC, teacher_shift_PC = shift_RPC
        cross_PC = shifted_cross(sums_SPC[2], sums_SPC[0], shift_PC - teacher_shift_PC, shift_PC)
        return torch.stack([*(sums_SPC[:2] * shift_RPC.exp()).sum(1), cross_PC.sum(0)])


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
    spares: ClassVar[int] = 3
    passes: ClassVar[int] = 2
    beta: float

    def local_sums(self, number: int, block: Chunk, state_SC: Tensor) -> Tensor:
        spare_CV, x_CV, softplus_CV = block.spares
        if number == 0:
            return torch.stack(
                [
                    exp_(torch.sub(logits_CV, max_C[:, None], out=spare_CV)).sum(1)
                    for logits_CV, max_C in zip(block.logits, state_SC, strict=True)
                ]
            )
        student_CV, teacher_CV = block.logits
        max_C, teacher_max_C = state_SC[:2]
        torch.sub(teacher_CV, student_CV, out=x_CV).add_(self._shift(state_SC)[:, None])
        _softplus_of_minus_abs(x_CV, out=spare_CV)
        torch.clamp(x_CV, min=0.0, out=softplus_CV).add_(spare_CV)
        softplus_of_minus_CV = x_CV.neg_().clamp_(min=0.0).add_(spare_CV)
        parts = [
            exp_(torch.sub(logits_CV, its_max_C[:, None], out=spare_CV)).mul_(factor_CV).sum(1)
            for logits_CV, its_max_C, factor_CV in (
                (student_CV, max_C, softplus_CV), (teacher_CV, teacher_max_C, softplus_of_minus_CV)
            )
        ]
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
        tail_CV = _softplus_of_minus_abs(x_CV, out=block.spares[0])
        part_CV = x_CV.clamp_(min=0.0).add_(tail_CV).sub_(student_part_C[:, None]).mul_(self.beta - 1.0)
        exp_(student_CV.sub_(lse_C[:, None])).mul_(part_CV)

    def kernel_form(self) -> KernelForm:
        return KernelForm("jsd", beta=self.beta)

    def from_parts(self, sums_SPC: Tensor, shift_RPC: Tensor, chunk: Chunk, state_SC: Tensor) -> Tensor:
        return (sums_SPC[:2] * shift_RPC.exp()).sum(1)

    def kernel_sums(self, number: int, chunk: Chunk, state_SC: Tensor) -> Tensor:
        return kernels().mixture_sums(chunk, torch.cat([state_SC[:2], self._shift(state_SC)[None]]))

    def _shift(self, state_SC: Tensor) -> Tensor:
        """What x is more than the teacher's logit less the student's. The logarithms of the sums are small beside large
        maxima: they are not added to these before the maxima have cancelled."""
        max_C, teacher_max_C, log_sum_C, teacher_log_sum_C = state_SC
        return (max_C - teacher_max_C) + (log_sum_C - teacher_log_sum_C + math.log(self.beta / (1.0 - self.beta)))


def _softplus_of_minus_abs(x: Tensor, *, out: Tensor) -> Tensor:
    """log(1 + exp(-|x|)), which softplus(x) is more than max(x, 0), and softplus(-x) more than max(-x, 0)."""
    return exp_(torch.abs(x, out=out).neg_()).log1p_()


@dataclass(frozen=True)
class AdaptiveKL(RowLoss):
    """Row loss w_h KL(P || Q) + w_l KL(Q || P), detached weights by where P and Q differ (AKL).

    Tokens by falling P, equal ones by rising id: the head is the longest prefix of a total of at most mu, and never
    empty. w_h is the head's share of sum |P - Q|, w_l = 1 - w_h.

    Nothing is sorted but a few tokens. The first pass adds up P over BINS spans of logits from a row's largest one down
    to where the head has ended in any case (`_span`), which tells the bin that it ends in. The second pass adds up the
    gap of the bins before it, and brings together that bin's own tokens, of each rank an equal share of CANDIDATES at
    most. Where a rank has more of them (many equal logits), further all-reduces bring those whole rows together: as
    exact, but slower. Asking whether that is so waits for the device.
    """

    BINS: ClassVar[int] = 1024
    CANDIDATES: ClassVar[int] = 384
    """A bin of a teacher whose logits have a deviation of 1 has some 280 of 128,256 tokens, of deviation 3 five."""
    roles: ClassVar[int] = 2
    spares: ClassVar[int] = 3
    passes: ClassVar[int] = 2
    mu: float

    @property
    def maxima(self) -> int:
        return 3

    def local_maxima(self, block: Chunk) -> Tensor:
        """Of both models, and of the teacher's logits with their sign turned."""
        student_CV, teacher_CV = block.logits
        return torch.stack([student_CV.amax(1), teacher_CV.amax(1), -teacher_CV.amin(1)])

    def local_sums(self, number: int, block: Chunk, state_SC: Tensor) -> Tensor:
        student_CV, teacher_CV = block.logits
        if number == 1:
            return self._gaps(block, state_SC)
        max_C1, teacher_max_C1 = state_SC[:2, :, None]
        student_exp_CV, teacher_exp_CV, log_ratio_CV = block.spares
        torch.sub(student_CV, max_C1, out=student_exp_CV)
        torch.sub(teacher_CV, teacher_max_C1, out=teacher_exp_CV)
        torch.sub(student_exp_CV, teacher_exp_CV, out=log_ratio_CV)
        local = [exp_(student_exp_CV).sum(1), exp_(teacher_exp_CV).sum(1)]
        local += [student_exp_CV.mul_(log_ratio_CV).sum(1)]
        local += [log_ratio_CV.mul_(teacher_exp_CV).sum(1)]
        mass_CB = teacher_CV.new_zeros(len(teacher_CV), self.BINS)
        # By way of int32, which takes a CPU half the time (measured). NaN becomes the least number: it gets a bin too,
        # so that it is named later by its role instead of being an index out of range.
        bins_a_logit_C = self._bins_a_logit(*state_SC[1:3], block)
        bins_CV = self._places(teacher_CV, state_SC[1], bins_a_logit_C, out=log_ratio_CV).int().clamp_(0, self.BINS - 1)
        mass_CB.scatter_add_(1, bins_CV.long(), teacher_exp_CV)
        return torch.cat([torch.stack(local), mass_CB.t()])

    def combine(self, number: int, state_SC: Tensor, sums_SC: Tensor, chunk: Chunk) -> Tensor:
        if number == 0:
            max_C, teacher_max_C, teacher_low_C = state_SC
            sum_C, teacher_sum_C, reverse_C, forward_C = sums_SC[:4]
            log_ratio_C = sum_C.log() - teacher_sum_C.log()
            forward_C, reverse_C = log_ratio_C - forward_C / teacher_sum_C, reverse_C / sum_C - log_ratio_C
            lse_C, teacher_lse_C = max_C + sum_C.log(), teacher_max_C + teacher_sum_C.log()
            totals_BC = (sums_SC[4:].double() / teacher_sum_C.double()).cumsum(0)
            last_bin_C = (totals_BC <= self.mu).sum(0).clamp_(max=self.BINS - 1)
            before_C = torch.cat([torch.zeros_like(totals_BC[:1]), totals_BC]).gather(0, last_bin_C[None])[0]
            ends = [teacher_max_C, self._bins_a_logit(teacher_max_C, teacher_low_C, chunk), last_bin_C, before_C]
            numbers = [lse_C, teacher_lse_C, reverse_C, forward_C, *ends]
            return torch.stack([number.to(max_C.dtype) for number in numbers])
        lse_C, teacher_lse_C, reverse_C, forward_C = state_SC[:4]
        gap_C, head_gap_C = sums_SC[0], sums_SC[1] + self._gap_in_last_bin(state_SC, sums_SC[2:], chunk)
        # P = Q has no gap and no gradient: any share will do, 0 / tiny is one.
        head_share_C = head_gap_C / gap_C.clamp(min=torch.finfo(gap_C.dtype).tiny)
        value_C = head_share_C * forward_C + (1.0 - head_share_C) * reverse_C
        return torch.stack([value_C, lse_C, teacher_lse_C, reverse_C, head_share_C])

    def gradient(self, block: Chunk, saved_SC: Tensor) -> None:
        (student_CV, teacher_CV), (teacher_prob_CV, _, _) = block.logits, block.spares
        lse_C1, teacher_lse_C1, reverse_C1, head_share_C1 = saved_SC[:, :, None]
        student_CV.sub_(lse_C1)
        exp_(torch.sub(teacher_CV, teacher_lse_C1, out=teacher_prob_CV)).mul_(head_share_C1)
        torch.sub(student_CV, teacher_CV.sub_(teacher_lse_C1), out=teacher_CV)
        teacher_CV.sub_(reverse_C1).mul_(1.0 - head_share_C1).add_(head_share_C1)
        exp_(student_CV).mul_(teacher_CV).sub_(teacher_prob_CV)

    def kernel_form(self) -> KernelForm:
        return KernelForm("akl")

    def from_parts(self, sums_SPC: Tensor, shift_RPC: Tensor, chunk: Chunk, state_SC: Tensor) -> Tensor:
        shift_PC, teacher_shift_PC, _ = shift_RPC
        ratio_PC = shift_PC - teacher_shift_PC
        local = [*(sums_SPC[:2] * shift_RPC[:2].exp()).sum(1)]
        for cross_PC, sum_PC, own_PC in zip(sums_SPC[2:4], sums_SPC[:2], shift_RPC[:2], strict=True):
            local.append(shifted_cross(cross_PC, sum_PC, ratio_PC, own_PC).sum(0))
        bins_a_logit_C = self._bins_a_logit(*state_SC[1:3], chunk)
        # A rank's own part of the sum is less than the sum, so what is beyond the head by it is beyond it.
        ends_C = ((self._span(chunk) - local[1].log()) * bins_a_logit_C).clamp_(max=self.BINS)
        mass_BC = kernels().bin_masses(chunk, torch.stack([state_SC[1], bins_a_logit_C, ends_C]), self.BINS)
        return torch.cat([torch.stack(local), mass_BC])

    def kernel_sums(self, number: int, chunk: Chunk, state_SC: Tensor) -> Tensor:
        numbers_6C = torch.cat([state_SC[:2], state_SC[4:7], self._end(state_SC[6])[None]])
        gaps_2C, own_3KC, counts_C = kernels().bin_gaps(chunk, numbers_6C, self._candidates(chunk))
        by_id_KC = own_3KC[1].argsort(0)
        return self._packed(gaps_2C, own_3KC[::2].gather(1, by_id_KC.expand(2, -1, -1)), counts_C, chunk)

    def _places(self, teacher_CV: Tensor, max_C: Tensor, bins_a_logit_C: Tensor, *, out: Tensor) -> Tensor:
        """Where each local column lies among the bins: its bin is the whole part, but at most the last one.

        Rises where the logit falls, is the same for equal logits.
        """
        return torch.sub(max_C[:, None], teacher_CV, out=out).mul_(bins_a_logit_C[:, None])

    def _bins_a_logit(self, max_C: Tensor, low_C: Tensor, chunk: Chunk) -> Tensor:
        """Of the span from a row's largest logit to its smallest one, or to where the head has ended."""
        return self.BINS / (max_C + low_C).clamp(min=1e-3, max=self._span(chunk))

    def _span(self, chunk: Chunk) -> float:
        """How far below log sum exp a logit is beyond the head. V tokens of P < (1 - mu) / 1.1 V are together less than
        what the head leaves over, by a tenth, which no rounding makes up for: it ends among the others."""
        return math.log(1.1 * chunk.columns.vocab_size / (1.0 - self.mu))

    def _candidates(self, chunk: Chunk) -> int:
        """Tokens that a rank can tell of in a row."""
        return -(-self.CANDIDATES // group_size_and_rank(chunk.columns.group)[0])

    def _end(self, last_bin_C: Tensor) -> Tensor:
        """Where each row's last bin ends: the last of all has no end."""
        return (last_bin_C + 1).masked_fill_(last_bin_C == self.BINS - 1, float("inf"))

    def _gaps(self, block: Chunk, state_SC: Tensor) -> Tensor:
        """|P - Q| of all tokens, of those in the bins before the head's last, and this rank's tokens in the last one.

        The latter as [2 * ranks * K + 1, C]: logit and gap of each by rising id, 0 in the place of other ranks, then
        how many did not fit.
        """
        (student_CV, teacher_CV), (gap_CV, spare_CV, before_CV) = block.logits, block.spares
        lse_C1, teacher_lse_C1 = state_SC[:2, :, None]
        last_bin_C1 = state_SC[6, :, None]
        exp_(torch.sub(student_CV, lse_C1, out=gap_CV))
        gap_CV.sub_(exp_(torch.sub(teacher_CV, teacher_lse_C1, out=spare_CV))).abs_()
        places_CV = self._places(teacher_CV, *state_SC[4:6], out=spare_CV)
        # As 0 and 1 in the logits' dtype: comparisons that give booleans take six times as long on a CPU (measured).
        torch.lt(places_CV, last_bin_C1, out=before_CV)
        in_bin_CV = torch.lt(places_CV, self._end(last_bin_C1), out=places_CV).sub_(before_CV).bool()
        rows_N, columns_N = in_bin_CV.nonzero(as_tuple=True)
        gaps_N, logits_N = gap_CV[rows_N, columns_N], teacher_CV[rows_N, columns_N]
        gap_C, before_C = gap_CV.sum(1), before_CV.mul_(gap_CV).sum(1)

        counts_C = torch.bincount(rows_N, minlength=len(gap_CV))
        places_N = torch.arange(len(rows_N), device=rows_N.device) - (counts_C.cumsum(0) - counts_C)[rows_N]
        # What does not fit goes to one more place, which is cut off.
        candidates = self._candidates(block)
        own = gap_CV.new_zeros(2, candidates + 1, len(gap_CV))
        own[0] = float("-inf")
        own[:, places_N.clamp_(max=candidates), rows_N] = torch.stack([logits_N, gaps_N])
        return self._packed(torch.stack([gap_C, before_C]), own[:, :-1], counts_C, block)

    def _packed(self, gaps_2C: Tensor, own_2KC: Tensor, counts_C: Tensor, block: Chunk) -> Tensor:
        """What `_gaps` returns, of this rank's sums, its tokens in the last bin, and how many it has there."""
        size, rank = group_size_and_rank(block.columns.group)
        packed = own_2KC.new_zeros(2, size, *own_2KC.shape[1:])
        packed[:, rank] = own_2KC
        missing_C = (counts_C - own_2KC.shape[1]).clamp(min=0).to(own_2KC.dtype)
        return torch.cat([gaps_2C, packed.flatten(0, 2), missing_C[None]])

    def _gap_in_last_bin(self, state_SC: Tensor, packed: Tensor, chunk: Chunk) -> Tensor:
        """The head's gap [C] within its last bin."""
        values_CG, gaps_CG = packed[:-1].unflatten(0, (2, -1)).transpose(1, 2)
        gap_C = self._gap_of_head(values_CG, gaps_CG, state_SC)
        short_C = packed[-1] > 0
        if bool(short_C.any()):
            gap_C[short_C] = self._gap_of_whole_rows(state_SC[:, short_C], short_C, chunk)
        return gap_C

    def _gap_of_whole_rows(self, state_SC: Tensor, rows_C: Tensor, chunk: Chunk) -> Tensor:
        """`_gap_in_last_bin` of rows with too many tokens there. Two SUM all-reduces."""
        columns, (student_CV, teacher_CV) = chunk.columns, (logits_CV[rows_C] for logits_CV in chunk.logits)
        here = slice(columns.first, columns.first + columns.width)
        gap_CV = (student_CV - state_SC[0][:, None]).exp() - (teacher_CV - state_SC[1][:, None]).exp()
        places_CV = self._places(teacher_CV, *state_SC[4:6], out=torch.empty_like(teacher_CV))
        bins_CV = places_CV.floor_().clamp_(max=self.BINS - 1)
        whole = teacher_CV.new_zeros(2, len(teacher_CV), columns.vocab_size)
        whole[0, :, here] = teacher_CV.masked_fill(bins_CV != state_SC[6][:, None], float("-inf"))
        whole[1, :, here] = gap_CV.abs()
        values, gaps = sum_over_ranks(whole, columns)
        return self._gap_of_head(values, gaps, state_SC)

    def _gap_of_head(self, values_CG: Tensor, gaps_CG: Tensor, state_SC: Tensor) -> Tensor:
        """The gaps' sum [C] of those of a bin's tokens, given by rising id, that belong to the head; -inf stands for no
        token."""
        lse_C1, before_C1 = state_SC[1].double()[:, None], state_SC[7].double()[:, None]
        ordered_CG, order_CG = values_CG.sort(dim=1, descending=True, stable=True)
        in_head_CG = (ordered_CG.double() - lse_C1).exp().cumsum(1) + before_C1 <= self.mu
        in_head_CG[:, :1] |= before_C1 == 0  # never empty
        return (gaps_CG.gather(1, order_CG) * in_head_CG).sum(1)


def shifted_cross(cross_PC: Tensor, sum_PC: Tensor, ratio_shift_PC: Tensor, shift_PC: Tensor) -> Tensor:
    """A part's sum of exp(y) * ratio, of which y is to be `shift_PC` more and the ratio `ratio_shift_PC` more; `sum_PC`
    is that of exp(y) alone."""
    return (cross_PC + ratio_shift_PC * sum_PC) * shift_PC.exp()


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
