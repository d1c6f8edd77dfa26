"""DPKD token by token, as its released code has it (the method itself is in preference.py).

Legend: T loss positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.batch import Batch
from megakd.losses import fused_dpkd_token
from megakd.objectives.base import LossContext, LossTerms, Requires, RoleOutput, TeacherOutput, Term
from megakd.objectives.sft import ANSWERS, answer_log_probs, nll_term

if TYPE_CHECKING:
    from megakd.config_objectives import DpkdTokenObjective


class DpkdToken:
    """(1 - weight) * mean NLL of the answers + weight * mean over their tokens of the preference of two tokens."""

    def __init__(self, config: DpkdTokenObjective):
        self.config = config
        self.kind = ANSWERS[config.answers]
        self.requires = Requires(teachers=config.roles, kinds=(self.kind,), teacher_kinds={"teacher": (self.kind,)})

    def loss(
        self, student: RoleOutput, teachers: dict[str, TeacherOutput], batch: Batch, context: LossContext
    ) -> LossTerms:
        """Terms `dpkd_token`, and `nll` unless its weight is 0."""
        teacher, config = teachers["teacher"], self.config
        values_T = fused_dpkd_token(
            student.hidden_TH, student.head_VH, teacher.hidden_TH, teacher.head_VH, beta=config.beta,
            **context.arguments(),
        )
        terms = [Term("dpkd_token", values_T, config.weight, "tokens")]
        if config.weight < 1:
            log_probs_T = answer_log_probs(student, batch, context, self.kind)
            terms.append(nll_term(log_probs_T, weight=1.0 - config.weight, kind=self.kind))
        return LossTerms(tuple(terms))
