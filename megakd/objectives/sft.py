"""Supervised fine-tuning on the chosen answers.

Legend: T loss positions, N those of chosen answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from megakd.batch import Batch, Kind
from megakd.losses import fused_token_log_probs
from megakd.objectives.base import LossContext, LossTerms, Requires, RoleOutput, Term

if TYPE_CHECKING:
    from megakd.config import SftObjective


class Sft:
    """mean over chosen tokens of -log Q(token)."""

    requires: ClassVar[Requires] = Requires(teachers=(), kinds=(Kind.CHOSEN,), teacher_kinds={})

    def __init__(self, config: SftObjective):
        self.config = config

    def loss(
        self, student: RoleOutput, teachers: dict[str, RoleOutput], batch: Batch, context: LossContext
    ) -> LossTerms:
        """One term `nll`."""
        return LossTerms((nll_term(chosen_log_probs(student, batch, context), weight=1.0),))


def chosen_log_probs(student: RoleOutput, batch: Batch, context: LossContext) -> Tensor:
    """Log-probabilities [N] of the chosen answers' tokens."""
    chosen_T = batch.positions.kinds_T == Kind.CHOSEN
    hidden_NH, labels_N = student.hidden_TH[chosen_T], batch.positions.labels_T[chosen_T]
    return fused_token_log_probs(hidden_NH, student.head_VH, labels_N, **context.arguments())


def nll_term(log_probs_N: Tensor, *, weight: float) -> Term:
    """The SFT term that other objectives add to theirs."""
    return Term("nll", -log_probs_N, weight, "chosen_tokens")
