"""Expected advantage of the student's distribution under two teachers (ADPA).

Legend: T tokens, C tokens of a chunk, V local vocabulary columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.losses.divergence import shifted_cross
from megakd.losses.statistics import Chunk, KernelForm, RowLoss, check_logits, exp_, logits_row_loss


@dataclass(frozen=True)
class ExpectedAdvantage(RowLoss):
    """Row loss `sum_a Q(a) A(a)`, A = beta (log P - log R), of student Q, teacher P and reference R.

    Its gradient `Q (A - sum_a Q(a) A(a))` is the same for A plus any constant, so the backward pass takes the
    difference of the teachers' logits for A, without their normalisers.
    """

    roles: ClassVar[int] = 3
    spares: ClassVar[int] = 2
    beta: float

    def local_sums(self, number: int, block: Chunk, state_SC: Tensor) -> Tensor:
        student_CV, teacher_CV, reference_CV = block.logits
        spare_CV, advantage_CV = block.spares
        max_C1, teacher_max_C1, reference_max_C1 = state_SC[:, :, None]
        teacher_sum_C = exp_(torch.sub(teacher_CV, teacher_max_C1, out=spare_CV)).sum(1)
        reference_sum_C = exp_(torch.sub(reference_CV, reference_max_C1, out=spare_CV)).sum(1)
        torch.sub(teacher_CV, reference_CV, out=advantage_CV).add_(reference_max_C1 - teacher_max_C1)
        exp_CV = exp_(torch.sub(student_CV, max_C1, out=spare_CV))
        return torch.stack([exp_CV.sum(1), teacher_sum_C, reference_sum_C, advantage_CV.mul_(exp_CV).sum(1)])

    def combine(self, number: int, state_SC: Tensor, sums_SC: Tensor, chunk: Chunk) -> Tensor:
        max_C, teacher_max_C, reference_max_C = state_SC
        log_sum_C, teacher_log_sum_C, reference_log_sum_C = sums_SC[:3].log()
        gain_C = sums_SC[3] / sums_SC[0]
        value_C = self.beta * (gain_C - teacher_log_sum_C + reference_log_sum_C)
        return torch.stack([value_C, max_C + log_sum_C, teacher_max_C - reference_max_C + gain_C])

    def gradient(self, block: Chunk, saved_SC: Tensor) -> None:
        student_CV, teacher_CV, reference_CV = block.logits
        lse_C, mean_C = saved_SC
        teacher_CV.sub_(reference_CV).sub_(mean_C[:, None]).mul_(self.beta)
        exp_(student_CV.sub_(lse_C[:, None])).mul_(teacher_CV)

    def kernel_form(self) -> KernelForm:
        return KernelForm("advantage", beta=self.beta)

    def from_parts(self, sums_SPC: Tensor, shift_RPC: Tensor, chunk: Chunk, state_SC: Tensor) -> Tensor:
        shift_PC, teacher_shift_PC, reference_shift_PC = shift_RPC
        gain_PC = shifted_cross(sums_SPC[3], sums_SPC[0], teacher_shift_PC - reference_shift_PC, shift_PC)
        return torch.stack([*(sums_SPC[:3] * shift_RPC.exp()).sum(1), gain_PC.sum(0)])


def expected_advantage(
    student_TV: Tensor,
    teacher_TV: Tensor,
    reference_TV: Tensor,
    *,
    beta: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """sum_a pi_student(a) * beta * (log pi_teacher(a) - log pi_reference(a)) of each token.

    It is a gain, which ADPA subtracts. Source: ADPA (arXiv 2502.17927) eq. 9-10, over the full vocabulary, signed and
    unclamped.

    Args:
        student_TV, teacher_TV, reference_TV: logits, local columns, any floating dtype. Only the student's get a
            gradient.
        beta: scale of the advantage.
        tp_group: ranks over which V is cut; None means not cut.
        vocab_size: real vocabulary; columns at or above it get no probability and no gradient. Logits below -1e3 count
            as -1e3.

    Returns:
        value_T, float32 (float64 for float64 student logits).

    Collectives: one MAX and one SUM all-reduce for 512 tokens forward, none backward.

    Raises:
        LossInputError: shapes that do not match, vocab_size beyond the columns.
    """
    logits = {"student_TV": student_TV, "teacher_TV": teacher_TV, "reference_TV": reference_TV}
    columns = check_logits(logits, tp_group, vocab_size)
    return logits_row_loss(ExpectedAdvantage(beta), columns, logits)
