"""Advantage-guided distillation for preference alignment (ADPA, arXiv 2502.17927).

Legend: T loss positions, N those of rollouts, K listed tokens of a position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from megakd.batch import Batch, Kind
from megakd.losses import (
    fused_expected_advantage,
    fused_topk_advantage,
    released_topk_advantages,
    topk_advantages,
)
from megakd.objectives.base import LossContext, LossTerms, Metric, Requires, RoleOutput, TeacherOutput, Term
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
        self, student: RoleOutput, teachers: dict[str, TeacherOutput], batch: Batch, context: LossContext
    ) -> LossTerms:
        """Terms `expected_advantage`, and `nll` unless its weight is 0; with `top_k` the metric `top_k_mass`."""
        rollout_NH = student.hidden_TH[batch.positions.of_kind[Kind.ROLLOUT]]
        advantage_N, metrics = self._advantage(RoleOutput(rollout_NH, student.head_VH), teachers, context)
        terms = [Term("expected_advantage", advantage_N, -self.config.gamma, "rollout_tokens")]
        if self.config.sft_weight > 0:
            log_probs_N = answer_log_probs(student, batch, context, Kind.CHOSEN)
            terms.append(nll_term(log_probs_N, weight=self.config.sft_weight))
        return LossTerms(tuple(terms), metrics)

    def _advantage(
        self, student: RoleOutput, teachers: dict[str, TeacherOutput], context: LossContext
    ) -> tuple[Tensor, tuple[Metric, ...]]:
        """Expected advantages [N] at the rollouts' positions, and what to report of them."""
        teacher, config = teachers["teacher"], self.config
        if config.top_k is None:
            reference = teachers["reference"] if config.reference else _uniform_beside(teacher)
            advantage_N = fused_expected_advantage(
                student.hidden_TH, student.head_VH, teacher.hidden_TH, teacher.head_VH, reference.hidden_TH,
                reference.head_VH, beta=config.beta, **context.arguments(),
            )
            return advantage_N, ()
        listed, reference = teacher.top_k(config.top_k, context), teachers["reference"]
        if config.released:
            advantages_NK = released_topk_advantages(listed, reference.top_k(config.top_k, context))
        else:
            reference_NK = reference.log_probs_at(listed.ids_TK, context)
            advantages_NK = topk_advantages(listed, reference_NK, beta=config.beta)
        advantage_N, mass_N = fused_topk_advantage(
            student.hidden_TH, student.head_VH, listed.ids_TK, advantages_NK, released=config.released,
            **context.arguments(),
        )
        # How much of the student the listed tokens are: the advantage of the rest is nothing.
        return advantage_N, (Metric("top_k_mass", mass_N.sum(), "rollout_tokens"),)


def _uniform_beside(teacher: RoleOutput) -> RoleOutput:
    """A reference to which all tokens are alike: the advantage is the teacher's log-probability and a constant, and a
    constant changes no gradient."""
    return RoleOutput(teacher.hidden_TH.new_zeros(len(teacher.hidden_TH), 1),
                      teacher.head_VH.new_zeros(len(teacher.head_VH), 1))
