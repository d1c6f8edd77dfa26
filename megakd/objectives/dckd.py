"""Dual-constrained distillation (DCKD, arXiv 2502.17927): the teacher's distribution on both answers of a pair.

Legend: T loss positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from megakd.batch import Batch, Kind
from megakd.losses import fused_divergence
from megakd.objectives.base import LossContext, LossTerms, Requires, RoleOutput, Term
from megakd.objectives.sft import chosen_log_probs, nll_term

if TYPE_CHECKING:
    from megakd.config import DckdObjective


class Dckd:
    """SFT on the chosen answers + alpha * (KL(teacher || student) on the chosen + the same on the rejected)."""

    requires: ClassVar[Requires] = Requires(
        teachers=("teacher",),
        kinds=(Kind.CHOSEN, Kind.REJECTED),
        teacher_kinds={"teacher": (Kind.CHOSEN, Kind.REJECTED)},
    )

    def __init__(self, config: DckdObjective):
        self.config = config

    def loss(
        self, student: RoleOutput, teachers: dict[str, RoleOutput], batch: Batch, context: LossContext
    ) -> LossTerms:
        """Terms `kl_chosen` and `kl_rejected`, and `nll` unless its weight is 0."""
        kinds_T, teacher, config = batch.positions.kinds_T, teachers["teacher"], self.config
        kl_T = fused_divergence(
            "forward_kl", student.hidden_TH, student.head_VH, teacher.hidden_TH, teacher.head_VH,
            temperature=config.temperature, **context.arguments(),
        )
        terms = [
            Term("kl_chosen", kl_T[kinds_T == Kind.CHOSEN], config.alpha, "chosen_tokens"),
            Term("kl_rejected", kl_T[kinds_T == Kind.REJECTED], config.alpha, "rejected_tokens"),
        ]
        if config.sft_weight > 0:
            terms.append(nll_term(chosen_log_probs(student, batch, context), weight=config.sft_weight))
        return LossTerms(tuple(terms))
