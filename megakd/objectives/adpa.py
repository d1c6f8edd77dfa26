"""Advantage-guided distillation for preference alignment (ADPA, arXiv 2502.17927).

Legend: T loss positions, N those of rollouts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from megakd.batch import Batch, Kind
from megakd.losses import fused_expected_advantage
from megakd.objectives.base import LossContext, LossTerms, Requires, RoleOutput, Term
from megakd.objectives.sft import chosen_log_probs, nll_term

if TYPE_CHECKING:
    from megakd.config import AdpaObjective


class Adpa:
    """SFT on the chosen answers - gamma * mean over the rollouts' tokens of the expected advantage.

    The advantage is that of the aligned teacher over the reference that it was aligned from.
    """

    requires: ClassVar[Requires] = Requires(
        teachers=("teacher", "reference"),
        kinds=(Kind.CHOSEN, Kind.ROLLOUT),
        teacher_kinds={"teacher": (Kind.ROLLOUT,), "reference": (Kind.ROLLOUT,)},
    )

    def __init__(self, config: AdpaObjective):
        self.config = config

    def loss(
        self, student: RoleOutput, teachers: dict[str, RoleOutput], batch: Batch, context: LossContext
    ) -> LossTerms:
        """Terms `expected_advantage`, and `nll` unless its weight is 0."""
        teacher, reference = teachers["teacher"], teachers["reference"]
        advantage_N = fused_expected_advantage(
            student.hidden_TH[batch.positions.kinds_T == Kind.ROLLOUT], student.head_VH,
            teacher.hidden_TH, teacher.head_VH, reference.hidden_TH, reference.head_VH,
            beta=self.config.beta, **context.arguments(),
        )
        terms = [Term("expected_advantage", advantage_N, -self.config.gamma, "rollout_tokens")]
        if self.config.sft_weight > 0:
            terms.append(nll_term(chosen_log_probs(student, batch, context), weight=self.config.sft_weight))
        return LossTerms(tuple(terms))
