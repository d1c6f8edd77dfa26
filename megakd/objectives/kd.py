"""Distillation token by token: KD, reverse KL, GKD's JSD with the student's own answers, AKL, and SeqKD's mixture.

Legend: T loss positions, W = 2 weights of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megakd.batch import Batch, Kind
from megakd.losses import fused_distillation, fused_topk_distillation
from megakd.objectives.base import LossContext, LossTerms, Requires, RoleOutput, TeacherOutput, Term
from megakd.objectives.sft import ANSWERS, nll_term

if TYPE_CHECKING:
    from megakd.config_objectives import KdObjective


class Kd:
    """(1 - weight) * mean NLL of the given answers + weight * mean divergence over all answers' tokens."""

    def __init__(self, config: KdObjective):
        self.config = config
        self.answers = ANSWERS[config.answers]
        kinds = (self.answers, Kind.ROLLOUT) if config.on_policy > 0 else (self.answers,)
        self.requires = Requires(
            teachers=config.roles, kinds=(self.answers,), teacher_kinds={"teacher": kinds}, on_policy=config.on_policy
        )

    def loss(
        self, student: RoleOutput, teachers: dict[str, TeacherOutput], batch: Batch, context: LossContext
    ) -> LossTerms:
        """Terms by the divergence's name, and `nll` unless its weight is 0, in one pass of the heads."""
        teacher, config, positions = teachers["teacher"], self.config, batch.positions
        given_T = positions.kinds_T == self.answers
        nll_weight, denominator = 1.0 - config.weight, f"{self.answers.name.lower()}_tokens"
        weights_WT = torch.zeros(2, len(given_T), dtype=torch.float64, device=given_T.device)
        weights_WT[0] = context.factor(config.weight, "tokens")
        weights_WT[1].masked_fill_(given_T, -context.factor(nll_weight, denominator))
        weights = {"divergence_weights_T": weights_WT[0], "log_prob_weights_T": weights_WT[1]}
        if config.top_k is None:
            loss, divergence_T, log_probs_T = fused_distillation(
                config.divergence, student.hidden_TH, student.head_VH, teacher.hidden_TH, teacher.head_VH,
                positions.labels_T, beta=config.beta, mu=config.mu, temperature=config.temperature, **weights,
                **context.arguments(),
            )
        else:
            loss, divergence_T, log_probs_T = fused_topk_distillation(
                student.hidden_TH, student.head_VH, teacher.top_k(config.top_k, context), positions.labels_T,
                released=config.released, **weights, **context.arguments(),
            )
        terms = [Term(config.divergence, divergence_T, config.weight, "tokens")]
        if nll_weight > 0:
            terms.append(nll_term(log_probs_T[positions.of_kind[self.answers]], weight=nll_weight, kind=self.answers))
        return LossTerms(tuple(terms), loss=loss)
