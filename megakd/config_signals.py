"""The settings of teachers' signals on disk: what a `score` stage writes, and where a training reads it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megakd.config_base import Section


class PreferencesSignal(Section):
    """The teacher's score of each rollout, beside the others to its prompt (PAD); writes `scores.jsonl`.

    score = likelihood_weight * mean log-likelihood a token + (1 - likelihood_weight) * log of the probability that the
    teacher selects the answer when it is asked to choose between two. The teacher's tokenizer and chat template may be
    others than the student's: it reads the texts.
    """

    kind: Literal["preferences"] = "preferences"
    likelihood_weight: float = Field(0.0, ge=0, le=1)
    """0 is the selection alone, as in PAD's released configuration; 1 the likelihood alone."""
    both_orders: bool = True
    """Asks for each pair of answers in both orders and takes the mean; False: in one order, as the released code."""
    max_length: int = Field(2048, ge=16)
    """Longest sequence of the teacher in tokens; a question that is longer has its answers cut to fit. The other
    signals are of the training's own sequences, which `data.max_length` bounds."""


class HiddenStatesSignal(Section):
    """The last hidden states at the loss positions, in the model's own dtype: exact for every loss, and large."""

    kind: Literal["hidden_states"]


class TokenLogProbsSignal(Section):
    """The log-probability of each token of the answers: all that dpo, ipo and dpkd ask of their other model."""

    kind: Literal["token_log_probs"]


class TopKSignal(Section):
    """Ids and log-probabilities of the likeliest tokens at each loss position; or, with `at`, log-probabilities alone.

    Exactly one of `k` and `at` is set.
    """

    kind: Literal["top_k"]
    k: int | None = Field(None, ge=1)
    """Tokens listed at each position; the released code of ADPA has 50."""
    at: str | None = None
    """Name of another score stage of this kind: the model's log-probabilities of the tokens that that one has listed.
    ADPA's reference needs those of the aligned teacher's list."""


Signal = Annotated[
    PreferencesSignal | HiddenStatesSignal | TokenLogProbsSignal | TopKSignal, Field(discriminator="kind")
]

AnswerKind = Literal["chosen", "rejected", "rollout", "teacher_answer"]
MAKER_OF = {"rollout": "rollouts", "teacher_answer": "teacher_answers"}
"""For the kinds of answers that models have made, the setting that names their `generate` stage."""


class Signals(Section):
    """Where a training stage reads what its roles say of the answers, in place of running them beside the student."""

    teacher: str | None = None
    """Name of a `score` stage."""
    reference: str | None = None
    """Name of a `score` stage."""

    @property
    def stages(self) -> dict[str, str]:
        """Role -> name of its score stage, of the roles that are read from disk."""
        named = {"teacher": self.teacher, "reference": self.reference}
        return {role: name for role, name in named.items() if name is not None}
