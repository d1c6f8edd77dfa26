"""Objectives over pairs of answers: DPO, IPO, CPO, SimPO on given pairs, DPKD on the teacher's and the student's.

Legend: T loss positions, B sequences, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megakd import losses
from megakd.batch import Batch, Kind
from megakd.losses import fused_token_log_probs
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
from megakd.objectives.sft import ANSWERS, nll_term

if TYPE_CHECKING:
    from megakd.config_objectives import CpoObjective, DpkdObjective, DpoObjective, IpoObjective, SimpoObjective

GIVEN = (Kind.CHOSEN, Kind.REJECTED)
GENERATED = (Kind.TEACHER_ANSWER, Kind.ROLLOUT)


@dataclass(frozen=True)
class Answers:
    """The answers of pairs, the better one's or the worse one's: log-probabilities, the reference's, and lengths."""

    score_P: Tensor
    reference_P: Tensor | None
    """None where no reference takes part."""
    length_P: Tensor

    def gain(self, *, mean: bool) -> Tensor:
        """Log-ratio to the reference [P], divided by the length or not."""
        gain_P = self.score_P - self.reference_P
        return gain_P / self.length_P if mean else gain_P

    def mean(self) -> Tensor:
        """Log-probability a token [P]."""
        return self.score_P / self.length_P


class Preference:
    """mean over pairs of a preference loss, and optionally SFT on the chosen answers."""

    def __init__(self, config: DpoObjective | IpoObjective | CpoObjective | SimpoObjective | DpkdObjective):
        self.config = config
        generated = config.kind == "dpkd"
        self.form = config.form if generated else config.kind
        self.sft_weight = config.lm_weight if generated else config.sft_weight
        self.better, self.worse = GENERATED if generated else GIVEN
        self.denominator = f"{self.better.name.lower()}_answers"
        # On given pairs the chosen answers are there anyhow, and their likelihood costs nothing to report.
        self.has_nll = not generated or self.sft_weight > 0
        self.lm_kind = ANSWERS[config.lm_on] if generated else Kind.CHOSEN
        kinds = (self.better, self.worse)
        self.requires = Requires(
            teachers=config.roles,
            kinds=(*kinds, Kind.CHOSEN) if generated and self.has_nll and self.lm_kind is Kind.CHOSEN else kinds,
            teacher_kinds={role: kinds for role in config.roles},
        )

    def loss(
        self, student: RoleOutput, teachers: dict[str, TeacherOutput], batch: Batch, context: LossContext
    ) -> LossTerms:
        """Terms by the form's name and `nll` (on given pairs also at weight 0); metrics over pairs."""
        positions = batch.positions
        # recompute: the weight of a token depends on its whole pair, and is not known before the scores are.
        log_probs_T = fused_token_log_probs(
            student.hidden_TH, student.head_VH, positions.labels_T, recompute=True, **context.arguments()
        )
        reference_T = None
        for role in self.requires.teachers:
            # In the order of the positions, as the reference's rows are.
            places_N = torch.cat([positions.of_kind[kind] for kind in (self.better, self.worse)]).sort().values
            reference_T = torch.zeros_like(log_probs_T)
            with torch.no_grad():
                reference_T[places_N] = teachers[role].token_log_probs(positions.labels_T[places_N], context)
        scores = SequenceScores.of(log_probs_T, batch, context)
        references = None if reference_T is None else SequenceScores.of(reference_T, batch, context)
        better, worse = (self._answers(batch.of_kind[kind], scores, references) for kind in (self.better, self.worse))
        values_P, margins_P = self._values(better, worse)
        margins_P = margins_P.detach()
        terms = [Term(self.form, values_P, 1.0, self.denominator)]
        if self.has_nll:
            log_probs_N = log_probs_T[positions.of_kind[self.lm_kind]]
            terms.append(nll_term(log_probs_N, weight=self.sft_weight, kind=self.lm_kind))
        return LossTerms(
            tuple(terms),
            metrics=(
                Metric("reward_accuracy", (margins_P > 0).to(margins_P.dtype).sum(), self.denominator),
                Metric("reward_margin", margins_P.sum(), self.denominator),
            ),
        )

    def _answers(self, rows_P: Tensor, scores: SequenceScores, references: SequenceScores | None) -> Answers:
        own = scores.at(rows_P)
        return Answers(own.sums_N, None if references is None else references.at(rows_P).sums_N, own.lengths_N)

    def _values(self, better: Answers, worse: Answers) -> tuple[Tensor, Tensor]:
        """Losses and reward margins [P]."""
        config = self.config
        match self.form:
            case "dpo":
                margins_P = losses.reward_margins(
                    better.score_P, worse.score_P, better.reference_P, worse.reference_P, beta=config.beta
                )
                return losses.dpo_from_margins(margins_P, label_smoothing=config.label_smoothing), margins_P
            case "dpkd":
                mean = config.length_normalize
                values_P = losses.dpkd(
                    better.score_P, worse.score_P, better.reference_P, worse.reference_P, better.length_P,
                    worse.length_P, beta=config.beta, length_normalize=mean,
                )
                return values_P, config.beta * (better.gain(mean=mean) - worse.gain(mean=mean))
            case "ipo":
                mean = config.length_normalize if config.kind == "dpkd" else config.mean_log_probs
                scores = [
                    score_P / answers.length_P if mean else score_P
                    for answers, score_P in (
                        (better, better.score_P), (worse, worse.score_P),
                        (better, better.reference_P), (worse, worse.reference_P),
                    )
                ]
                return losses.ipo(*scores, tau=config.tau), better.gain(mean=mean) - worse.gain(mean=mean)
            case "cpo":
                nll_weight = 0.0 if config.kind == "dpkd" else config.nll_weight
                values_P = losses.cpo(better.score_P, worse.score_P, beta=config.beta, nll_weight=nll_weight)
                return values_P, config.beta * (better.score_P - worse.score_P)
        values_P = losses.simpo(
            better.score_P, worse.score_P, better.length_P, worse.length_P, beta=config.beta, gamma=config.gamma
        )
        return values_P, config.beta * (better.mean() - worse.mean())
