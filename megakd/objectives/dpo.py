"""Direct preference optimization (arXiv 2305.18290).

Legend: T loss positions, B sequences, P pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from megakd.batch import Batch, Kind
from megakd.losses import dpo_from_margins, fused_token_log_probs, reward_margins, sequence_sums
from megakd.objectives.base import LossContext, LossTerms, Metric, Requires, RoleOutput, Term, rows_of_kind
from megakd.objectives.sft import nll_term

if TYPE_CHECKING:
    from megakd.config import DpoObjective


class Dpo:
    """mean over pairs of -log sigmoid(reward margin), and optionally SFT on the chosen answers."""

    requires: ClassVar[Requires] = Requires(
        teachers=("reference",),
        kinds=(Kind.CHOSEN, Kind.REJECTED),
        teacher_kinds={"reference": (Kind.CHOSEN, Kind.REJECTED)},
    )

    def __init__(self, config: DpoObjective):
        self.config = config

    def loss(
        self, student: RoleOutput, teachers: dict[str, RoleOutput], batch: Batch, context: LossContext
    ) -> LossTerms:
        """Terms `dpo` and `nll` (which is reported also at weight 0, as it costs nothing); metrics over pairs."""
        positions, sequences = batch.positions, len(batch.kinds_B)
        reference = teachers["reference"]
        # recompute: the weight of a token depends on its whole pair, and is not known before the scores are.
        log_probs_T = fused_token_log_probs(
            student.hidden_TH, student.head_VH, positions.labels_T, recompute=True, **context.arguments()
        )
        with torch.no_grad():
            ref_log_probs_T = fused_token_log_probs(
                reference.hidden_TH, reference.head_VH, positions.labels_T, **context.arguments()
            )
        score_B = sequence_sums(log_probs_T, positions.rows_T, sequences)
        ref_score_B = sequence_sums(ref_log_probs_T, positions.rows_T, sequences)

        chosen_P, rejected_P = rows_of_kind(batch, Kind.CHOSEN), rows_of_kind(batch, Kind.REJECTED)
        margins_P = reward_margins(
            score_B[chosen_P], score_B[rejected_P], ref_score_B[chosen_P], ref_score_B[rejected_P],
            beta=self.config.beta,
        )
        values_P = dpo_from_margins(margins_P, label_smoothing=self.config.label_smoothing)
        margins_P = margins_P.detach()
        return LossTerms(
            terms=(
                Term("dpo", values_P, 1.0, "groups"),
                nll_term(log_probs_T[positions.kinds_T == Kind.CHOSEN], weight=self.config.sft_weight),
            ),
            metrics=(
                Metric("reward_accuracy", (margins_P > 0).to(margins_P.dtype).sum(), "groups"),
                Metric("reward_margin", margins_P.sum(), "groups"),
            ),
        )
