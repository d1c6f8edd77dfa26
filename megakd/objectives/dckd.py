"""Dual-constrained distillation (DCKD, arXiv 2502.17927): the teacher's distribution on both answers of a pair.

Legend: T loss positions, W = 2 weights of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megakd.batch import Batch, Kind
from megakd.losses import fused_distillation, fused_topk_distillation
from megakd.objectives.base import LossContext, LossTerms, Requires, RoleOutput, TeacherOutput, Term
from megakd.objectives.sft import nll_term

if TYPE_CHECKING:
    from megakd.config_objectives import DckdObjective


class Dckd:
    """SFT on the chosen answers + alpha * (KL(teacher || student) on the chosen + the same on the rejected)."""

    def __init__(self, config: DckdObjective):
        self.config = config
        kinds = (Kind.CHOSEN, Kind.REJECTED)
        self.requires = Requires(teachers=config.roles, kinds=kinds, teacher_kinds={config.teacher: kinds})

    def loss(
        self, student: RoleOutput, teachers: dict[str, TeacherOutput], batch: Batch, context: LossContext
    ) -> LossTerms:
        """Terms `kl_chosen` and `kl_rejected`, and `nll` unless its weight is 0, in one pass of the heads."""
        teacher, config = teachers[self.config.teacher], self.config
        chosen_T, of_kind = batch.positions.kinds_T == Kind.CHOSEN, batch.positions.of_kind
        kl = [context.factor(config.alpha, f"{kind}_tokens") for kind in ("rejected", "chosen")]
        log_prob = [0.0, -context.factor(config.sft_weight, "chosen_tokens")]
        weights = {
            name: torch.full(chosen_T.shape, of_rejected, dtype=torch.float64, device=chosen_T.device)
            .masked_fill_(chosen_T, of_chosen)
            for name, (of_rejected, of_chosen) in (("divergence_weights_T", kl), ("log_prob_weights_T", log_prob))
        }
        if config.top_k is None:
            loss, kl_T, log_probs_T = fused_distillation(
                "forward_kl", student.hidden_TH, student.head_VH, teacher.hidden_TH, teacher.head_VH,
                batch.positions.labels_T, temperature=config.temperature, **weights, **context.arguments(),
            )
        else:
            loss, kl_T, log_probs_T = fused_topk_distillation(
                student.hidden_TH, student.head_VH, teacher.top_k(config.top_k, context), batch.positions.labels_T,
                released=config.released, **weights, **context.arguments(),
            )
        terms = [
            Term("kl_chosen", kl_T[of_kind[Kind.CHOSEN]], config.alpha, "chosen_tokens"),
            Term("kl_rejected", kl_T[of_kind[Kind.REJECTED]], config.alpha, "rejected_tokens"),
        ]
        if config.sft_weight > 0:
            terms.append(nll_term(log_probs_T[of_kind[Kind.CHOSEN]], weight=config.sft_weight))
        return LossTerms(tuple(terms), loss=loss)
