"""Advantage-guided distillation for preference alignment (ADPA, arXiv 2502.17927).

Legend: T loss positions, N those of rollouts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.batch import Batch, Kind
from megakd.losses import fused_expected_advantage
from megakd.objectives.base import LossContext, LossTerms, Requires, RoleOutput, Term
from megakd.objectives.sft import answer_log_probs, nll_term

if TYPE_CHECKING:
    from megakd.config_objectives import AdpaObjective


class Adpa:
    """SFT on the chosen answers - gamma * mean over the rollouts' tokens of the expected advantage.

    The advantage is that of the aligned teacher over the reference that it was aligned from.
    """

    def __init__(self, config: AdpaObjective):
        self.config = config
        self.requires = Requires(
            teachers=config.roles,
            kinds=(Kind.CHOSEN, Kind.ROLLOUT),
            teacher_kinds={role: (Kind.ROLLOUT,) for role in config.roles},
        )

    def loss(
        self, student: RoleOutput, teachers: dict[str, RoleOutput], batch: Batch, context: LossContext
    ) -> LossTerms:
        """Terms `expected_advantage`, and `nll` unless its weight is 0."""
        teacher = teachers["teacher"]
        reference = teachers["reference"] if self.config.reference else _uniform_beside(teacher)
        advantage_N = fused_expected_advantage(
            student.hidden_TH[batch.positions.kinds_T == Kind.ROLLOUT], student.head_VH,
            teacher.hidden_TH, teacher.head_VH, reference.hidden_TH, reference.head_VH,
            beta=self.config.beta, **context.arguments(),
        )
        terms = [Term("expected_advantage", advantage_N, -self.config.gamma, "rollout_tokens")]
        if self.config.sft_weight > 0:
            log_probs_N = answer_log_probs(student, batch, context, Kind.CHOSEN)
            terms.append(nll_term(log_probs_N, weight=self.config.sft_weight))
        return LossTerms(tuple(terms))


def _uniform_beside(teacher: RoleOutput) -> RoleOutput:
    """A reference to which all tokens are alike: the advantage is the teacher's log-probability and a constant, and a
    constant changes no gradient."""
    return RoleOutput(teacher.hidden_TH.new_zeros(len(teacher.hidden_TH), 1),
                      teacher.head_VH.new_zeros(len(teacher.head_VH), 1))
