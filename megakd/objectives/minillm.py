"""MiniLLM (arXiv 2306.08543): reverse KL on the student's own answers by policy gradient.

Legend: T loss positions, N those of rollouts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.batch import Batch, Kind
from megakd.losses import clipped_policy_gradient, fused_divergence, fused_token_log_probs
from megakd.objectives.base import LossContext, LossTerms, Requires, RoleOutput, TeacherOutput, Term
from megakd.objectives.sft import ANSWERS, answer_log_probs, nll_term

if TYPE_CHECKING:
    from megakd.config_objectives import MiniLlmObjective


class MiniLlm:
    """mean over the rollouts' tokens of the clipped policy gradient and of the next token's reverse KL, and SFT on the
    chosen answers or on text. What the tokens are worth was found out when they were drawn (`rollout/online.py`)."""

    def __init__(self, config: MiniLlmObjective):
        self.config = config
        self.lm_kind = ANSWERS[config.lm_on]
        given = config.lm_weight > 0 and self.lm_kind is Kind.CHOSEN
        kinds = (Kind.ROLLOUT, Kind.CHOSEN) if given else (Kind.ROLLOUT,)
        self.requires = Requires(
            teachers=config.roles, kinds=kinds, teacher_kinds={"teacher": (Kind.ROLLOUT,)}, draws=True
        )

    def loss(
        self, student: RoleOutput, teachers: dict[str, TeacherOutput], batch: Batch, context: LossContext
    ) -> LossTerms:
        """Terms `policy_gradient` and `reverse_kl`, and `nll` unless its weight is 0."""
        config, teacher = self.config, teachers["teacher"]
        places_N = batch.positions.of_kind[Kind.ROLLOUT]
        hidden_NH = student.hidden_TH[places_N]
        # recompute: the weight of a token depends on its own probability.
        log_probs_N = fused_token_log_probs(
            hidden_NH, student.head_VH, batch.positions.labels_T[places_N], recompute=True, **context.arguments()
        )
        policy_N = clipped_policy_gradient(
            log_probs_N, batch.draw_log_probs_T[places_N], batch.returns_T[places_N], clip=config.clip
        )
        reverse_kl_N = fused_divergence(
            "reverse_kl", hidden_NH, student.head_VH, teacher.hidden_TH, teacher.head_VH, **context.arguments()
        )
        terms = [
            Term("policy_gradient", policy_N, 1.0, "rollout_tokens"),
            Term("reverse_kl", reverse_kl_N, config.single_step_weight, "rollout_tokens"),
        ]
        if config.lm_weight > 0:
            log_probs_N = answer_log_probs(student, batch, context, self.lm_kind)
            terms.append(nll_term(log_probs_N, weight=config.lm_weight, kind=self.lm_kind))
        return LossTerms(tuple(terms))
