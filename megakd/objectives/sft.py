"""Supervised fine-tuning on the chosen answers, or on the teacher's (SeqKD).

Legend: T loss positions, N those of the answers trained on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from megakd.batch import Batch, Kind
from megakd.losses import fused_token_log_probs, negative
from megakd.objectives.base import LossContext, LossTerms, Requires, RoleOutput, TeacherOutput, Term

if TYPE_CHECKING:
    from megakd.config_objectives import SftObjective

ANSWERS = {"chosen": Kind.CHOSEN, "teacher": Kind.TEACHER_ANSWER, "text": Kind.TEXT}
"""What the settings `answers` and `lm_on` of an objective name."""


class Sft:
    """mean over the answers' tokens of -log Q(token)."""

    def __init__(self, config: SftObjective):
        self.kind = ANSWERS[config.answers]
        self.requires = Requires(teachers=(), kinds=(self.kind,), teacher_kinds={})

    def loss(
        self, student: RoleOutput, teachers: dict[str, TeacherOutput], batch: Batch, context: LossContext
    ) -> LossTerms:
        """One term `nll`."""
        return LossTerms((nll_term(answer_log_probs(student, batch, context, self.kind), weight=1.0, kind=self.kind),))


def answer_log_probs(student: RoleOutput, batch: Batch, context: LossContext, kind: Kind) -> Tensor:
    """Log-probabilities [N] of the tokens of a kind of answers."""
    places_N = batch.positions.of_kind[kind]
    hidden_NH, labels_N = student.hidden_TH[places_N], batch.positions.labels_T[places_N]
    return fused_token_log_probs(hidden_NH, student.head_VH, labels_N, **context.arguments())


def nll_term(log_probs_N: Tensor, *, weight: float, kind: Kind = Kind.CHOSEN) -> Term:
    """The SFT term, which other objectives add to theirs."""
    return Term("nll", negative(log_probs_N), weight, f"{kind.name.lower()}_tokens")
