"""What an objective needs, is given and gives back. An objective names terms; `megakd.losses` has the maths of them.

Legend: B sequences, T loss positions, H a model's hidden width, V local vocabulary columns, K listed tokens of a
position, N values of a term.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from megakd.batch import Batch, Kind
from megakd.losses import TopK, fused_log_probs_at, fused_token_log_probs, fused_top_k, sequence_sums


@dataclass(frozen=True)
class Requires:
    """What has to be brought to an objective."""

    teachers: tuple[str, ...]
    """Roles that it takes besides the student."""
    kinds: tuple[Kind, ...]
    """Kinds of the sequences that each group holds, in this order. Of a generated kind it holds all answers."""
    teacher_kinds: dict[str, tuple[Kind, ...]]
    """For each teacher role the kinds of sequences whose positions it scores."""
    on_policy: float = 0.0
    """Share of the groups that hold the student's rollouts alone, in place of `kinds`."""
    draws: bool = False
    """Whether the rollouts' samples come with their `Draw`."""


@dataclass(frozen=True)
class RoleOutput:
    """One model's last hidden states at a micro-batch's loss positions, and the local rows of its LM head.

    A teacher's states are those of the positions of its kinds alone, in the micro-batch's order. The heads of all roles
    are cut alike over `LossContext.tp_group`. It answers whatever a loss may ask of a teacher.
    """

    hidden_TH: Tensor
    head_VH: Tensor

    def token_log_probs(self, labels_T: Tensor, context: LossContext) -> Tensor:
        """Log-probabilities [T] of the labels."""
        return fused_token_log_probs(self.hidden_TH, self.head_VH, labels_T, **context.arguments())

    def top_k(self, k: int, context: LossContext) -> TopK:
        """The k likeliest tokens of each position; no gradient."""
        return fused_top_k(self.hidden_TH, self.head_VH, k, **context.arguments())

    def log_probs_at(self, ids_TK: Tensor, context: LossContext) -> Tensor:
        """Log-probabilities [T, K] of given tokens; no gradient."""
        return fused_log_probs_at(self.hidden_TH, self.head_VH, ids_TK, **context.arguments())


@dataclass(frozen=True)
class StoredLogProbs:
    """A role of which only the log-probabilities of the answers' own tokens were written."""

    log_probs_T: Tensor

    def token_log_probs(self, labels_T: Tensor, context: LossContext) -> Tensor:
        """As `RoleOutput` has it; the labels are those that were scored."""
        return self.log_probs_T


@dataclass(frozen=True)
class StoredTopK:
    """A role of which only its likeliest tokens were written."""

    listed: TopK

    def top_k(self, k: int, context: LossContext) -> TopK:
        """As `RoleOutput` has it; `k` is at most the length of the list."""
        return self.listed.first(k)


@dataclass(frozen=True)
class StoredListedLogProbs:
    """A role of which only the log-probabilities of another role's likeliest tokens were written."""

    log_probs_TK: Tensor

    def log_probs_at(self, ids_TK: Tensor, context: LossContext) -> Tensor:
        """As `RoleOutput` has it; the tokens are the first of the other role's stored list."""
        return self.log_probs_TK[:, : ids_TK.shape[1]]


TeacherOutput = RoleOutput | StoredLogProbs | StoredTopK | StoredListedLogProbs
"""What a teacher role brings to a micro-batch. A recipe's checks see to it that it answers what the objective asks."""


@dataclass(frozen=True)
class LossContext:
    """What is the same for every micro-batch of a run."""

    tp_group: dist.ProcessGroup | None
    """Ranks over which the heads are cut; None means not cut."""
    vocab_size: int
    """Real vocabulary, common to all roles."""
    chunk_tokens: int | None
    """Tokens whose logits are held at a time; None takes what suits the device."""
    counts: Mapping[str, int]
    """The denominators of the whole step (`Step.counts`), over all micro-batches and replicas."""
    cp_group: dist.ProcessGroup | None = None
    """Ranks that share the tokens of each sequence (context parallelism); None means that each has whole sequences."""

    def arguments(self) -> dict[str, Any]:
        """Group, vocabulary and chunk by the names that the fused losses give them."""
        return {"tp_group": self.tp_group, "vocab_size": self.vocab_size, "chunk_tokens": self.chunk_tokens}

    def factor(self, weight: float, denominator: str) -> float:
        """What one value of a term counts in the loss, times the step's tokens: megatron-core divides by those.

        The one place where a loss meets its denominator.
        """
        # max(1): a step without a single thing of this kind has a sum of zero, with its graph.
        return weight * self.counts["tokens"] / max(1, self.counts[denominator])

    def divisor(self, denominator: str) -> int:
        """What a reported sum is divided by, so that the quotients of all ranks and micro-batches add up to the mean.

        Each context rank has tokens of its own, but all have the same sequences and groups: the counts of tokens, and
        no others, have names that end so (`Batch.counts`).
        """
        alike = self.cp_group is not None and not denominator.endswith("tokens")
        return max(1, self.counts[denominator]) * (dist.get_world_size(self.cp_group) if alike else 1)


@dataclass(frozen=True)
class Term:
    """A part of the loss: `weight * sum(values) / denominator`, where the denominator is a count of the whole step."""

    name: str
    values_N: Tensor
    weight: float
    denominator: str
    """A key of `Batch.counts()`."""


@dataclass(frozen=True)
class Metric:
    """A number to report that is not part of the loss: `total / denominator`."""

    name: str
    total: Tensor
    """0-d and detached."""
    denominator: str
    """A key of `Batch.counts()`."""


@dataclass(frozen=True)
class LossTerms:
    """What an objective makes of one micro-batch. Terms are reported by their names too (without their weights)."""

    terms: tuple[Term, ...]
    metrics: tuple[Metric, ...] = ()
    loss: Tensor | None = None
    """The sum of all terms by `LossContext.factor`, 0-d, where the losses have added it up themselves; the terms'
    values have no gradient then. None where the terms are yet to be added up."""


class Objective(Protocol):
    """A way to train a student."""

    requires: Requires

    def loss(
        self, student: RoleOutput, teachers: dict[str, TeacherOutput], batch: Batch, context: LossContext
    ) -> LossTerms:
        """The terms of one micro-batch. A term with nothing in it still hangs on the student's tensors."""
        ...


@dataclass(frozen=True)
class SequenceScores:
    """Sums of log-probabilities over some sequences [N], and their lengths in tokens [N]."""

    sums_N: Tensor
    lengths_N: Tensor

    @staticmethod
    def of(log_probs_T: Tensor, batch: Batch, context: LossContext) -> SequenceScores:
        """Of all sequences of a micro-batch, from the log-probabilities at all its loss positions.

        Collectives: under context parallelism one SUM over the context group.
        """
        rows_T, sequences = batch.positions.rows_T, len(batch.kinds_B)
        sums_B = sequence_sums(log_probs_T, rows_T, sequences, cp_group=context.cp_group)
        return SequenceScores(sums_B, batch.lengths_B.to(sums_B.dtype))

    def at(self, rows_N: Tensor) -> SequenceScores:
        """Those of some of the sequences."""
        return SequenceScores(self.sums_N[rows_N], self.lengths_N[rows_N])

    @property
    def means_N(self) -> Tensor:
        """Log-probability a token."""
        return self.sums_N / self.lengths_N
