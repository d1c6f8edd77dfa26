"""Preference-aligned distillation (PAD, arXiv 2502.14272): the teacher's preferences over the student's own answers.

Legend: T loss positions, B sequences, N prompts, G answers to each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from megakd.batch import Batch, Kind
from megakd.losses import fused_token_log_probs, pad_probabilistic, pad_vanilla
from megakd.objectives.base import (
    LossContext,
    LossTerms,
    Metric,
    Requires,
    RoleOutput,
    SequenceScores,
    TeacherOutput,
    Term,
)

if TYPE_CHECKING:
    from megakd.config_objectives import PadObjective


class Pad:
    """mean over prompts of a loss between the student's and the teacher's rankings of the prompt's answers.

    The student's score of an answer is its mean log-probability a token; the teacher's was given by a `score` stage.
    """

    def __init__(self, config: PadObjective):
        self.config = config
        self.requires = Requires(teachers=(), kinds=(Kind.ROLLOUT,), teacher_kinds={})

    def loss(
        self, student: RoleOutput, teachers: dict[str, TeacherOutput], batch: Batch, context: LossContext
    ) -> LossTerms:
        """One term `pad`; the metric `best_agreed`, the share of prompts whose best answer both models agree on."""
        positions = batch.positions
        # recompute: the weight of a token depends on all answers to its prompt.
        log_probs_T = fused_token_log_probs(
            student.hidden_TH, student.head_VH, positions.labels_T, recompute=True, **context.arguments()
        )
        order_B, groups = batch.of_kind[Kind.ROLLOUT], batch.groups
        student_NG = SequenceScores.of(log_probs_T, batch, context).at(order_B).means_N.view(groups, -1)
        teacher_NG = batch.scores_B[order_B].view(groups, -1)
        agreed_N = student_NG.detach().argmax(1) == teacher_NG.argmax(1)
        return LossTerms(
            (Term("pad", self._values(student_NG, teacher_NG), 1.0, "groups"),),
            metrics=(Metric("best_agreed", agreed_N.to(student_NG.dtype).sum(), "groups"),),
        )

    def _values(self, student_NG: Tensor, teacher_NG: Tensor) -> Tensor:
        if self.config.loss == "vanilla":
            return pad_vanilla(student_NG, teacher_NG, beta=self.config.beta)
        return pad_probabilistic(
            student_NG, teacher_NG, beta=self.config.beta, divergence=self.config.divergence
        )
