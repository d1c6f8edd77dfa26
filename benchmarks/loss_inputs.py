"""Inputs of the losses in benchmarks/losses.py, megakd's own calls, the bare GEMMs, and the float64 reference.

Legend: T tokens, V local vocabulary columns, H student width, K teacher width, P pairs, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megakd import losses
from megakd.losses import reference

TEACHERS = {"log_probs": 0, "forward_kl": 1, "reverse_kl": 1, "jsd": 1, "akl": 1, "advantage": 2, "dpo": 1}
"""Losses, and how many further models each takes."""
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "akl")
CHUNKS = (64, 128, 256, 512, 1024)
CUDA_CHUNKS = (1024, 2048, 4096, 8192)
"""Beyond 8,192 tokens the logits of a vocabulary of 128,256 take more than 4 GB in float32."""
JSD_BETA, AKL_MU, DPO_BETA = 0.5, 0.5, 0.1


@dataclass(frozen=True)
class Shapes:
    """Sizes of the inputs; `vocab` is that of all ranks. `sequence` is the length of dpo's sequences."""

    tokens: int
    vocab: int
    hidden: int
    teacher_hidden: int
    sequence: int
    logit_std: float
    device: str
    dtype: torch.dtype
    """Of hidden states and heads."""


@dataclass(frozen=True)
class Inputs:
    """A loss's inputs on one rank. Lists of models begin with the student. `group` is None for one rank."""

    loss: str
    hidden: list[Tensor]
    heads: list[Tensor]
    labels_T: Tensor
    sequence: int
    group: dist.ProcessGroup | None

    @property
    def tokens(self) -> int:
        return self.labels_T.shape[0]

    @property
    def pairs(self) -> int:
        """Pairs of sequences of dpo: all the chosen ones, then all the rejected ones."""
        return self.tokens // (2 * self.sequence)

    def first(self, tokens: int) -> Inputs:
        """The inputs of the first tokens alone; for dpo, whole pairs of sequences, shorter ones if none fits."""
        tokens = min(tokens, self.tokens)
        sequence = min(self.sequence, tokens // 2)
        if self.loss == "dpo":
            tokens -= tokens % (2 * sequence)
        hidden = [states[:tokens].clone() for states in self.hidden]
        return replace(self, hidden=hidden, labels_T=self.labels_T[:tokens].clone(), sequence=sequence)

    def student(self) -> tuple[Tensor, Tensor]:
        """Hidden states and head of the student as fresh leaves that ask for gradients."""
        return self.hidden[0].detach().requires_grad_(), self.heads[0].detach().requires_grad_()

    def teachers(self) -> list[Tensor]:
        """hidden, head, hidden, head ... of the teachers."""
        return [tensor for model in zip(self.hidden[1:], self.heads[1:], strict=True) for tensor in model]


class Outcome(NamedTuple):
    """Values of a token or of a pair, or their mean alone, and the gradients of the mean."""

    value: Tensor
    grad_hidden_TH: Tensor
    grad_head_VH: Tensor


@dataclass(frozen=True)
class Contestant:
    """One implementation of one loss.

    `prepare(inputs, setting)` makes the function that is timed. Settings beyond one are tried on fewer tokens, and
    the fastest is taken. `shards` says that it works on a share of the vocabulary.
    """

    name: str
    prepare: Callable[[Inputs, object], Callable[[], Outcome | None]]
    settings: tuple = (None,)
    unit: str = ""
    shards: bool = False
    note: str = ""


def make_inputs(loss: str, shapes: Shapes, rank: int = 0, ranks: int = 1) -> Inputs:
    """Random hidden states ~ N(0, 1), the same on all ranks, and this rank's rows of heads that give `logit_std`."""
    generator = torch.Generator(shapes.device).manual_seed(1234)
    drawn = {"generator": generator, "device": shapes.device}
    hidden, heads = [], []
    for width in [shapes.hidden] + [shapes.teacher_hidden] * TEACHERS[loss]:
        hidden.append(torch.randn(shapes.tokens, width, **drawn).to(shapes.dtype))
        head = torch.randn(shapes.vocab, width, **drawn).mul_(shapes.logit_std / width**0.5)
        heads.append(head.chunk(ranks)[rank].to(shapes.dtype, copy=True))
    labels_T = torch.randint(0, shapes.vocab, (shapes.tokens,), **drawn)
    return Inputs(loss, hidden, heads, labels_T, shapes.sequence, dist.group.WORLD if ranks > 1 else None)


def outcome_of(value: Tensor, student: tuple[Tensor, Tensor]) -> Outcome:
    """Runs the backward pass of the mean: a sum and a quotient, as the trainer has it."""
    return Outcome(value.detach(), *torch.autograd.grad(value.sum() / value.numel(), student))


# ------------------------------------------------------------------------------------------------------------- megakd
def megakd(*chunks: int | None) -> Contestant:
    """megakd's fused form with one or several `chunk_tokens`; None is what a caller gets who sets nothing."""
    return Contestant("megakd", lambda inputs, setting: lambda: _megakd(inputs, setting), chunks, "tokens", True)


def _megakd(inputs: Inputs, chunk: int | None) -> Outcome:
    student, teachers = inputs.student(), inputs.teachers()
    settings = {"tp_group": inputs.group} | ({} if chunk is None else {"chunk_tokens": chunk})
    match inputs.loss:
        case "log_probs":
            value = losses.fused_token_log_probs(*student, inputs.labels_T, **settings)
        case "advantage":
            value = losses.fused_expected_advantage(*student, *teachers, **settings)
        case "dpo":
            logp_T = losses.fused_token_log_probs(*student, inputs.labels_T, recompute=True, **settings)
            with torch.no_grad():
                ref_logp_T = losses.fused_token_log_probs(*teachers, inputs.labels_T, **settings)
            rows_T = torch.arange(2 * inputs.pairs, device=logp_T.device).repeat_interleave(inputs.sequence)
            sums = [losses.sequence_sums(one_T, rows_T, 2 * inputs.pairs) for one_T in (logp_T, ref_logp_T)]
            (chosen_P, rejected_P), (ref_chosen_P, ref_rejected_P) = (sums_N.chunk(2) for sums_N in sums)
            value = losses.dpo(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P, beta=DPO_BETA)
        case kind:
            value = losses.fused_divergence(kind, *student, *teachers, beta=JSD_BETA, mu=AKL_MU, **settings)
    return outcome_of(value, student)


# -------------------------------------------------------------------------------------------------------------- limit
def bare_gemms(chunks: tuple[int, ...] = CHUNKS) -> Contestant:
    """The matrix products that no implementation can do without, and nothing else, into buffers made before.

    The student's logits, d(hidden), d(head) added up in one [V, H], and each teacher's logits; no logits twice. The
    logits themselves stand for their gradient, as its numbers do not change the time of a product. All
    of them are in the inputs' dtype.
    """
    return Contestant("bare GEMMs", _bare_gemms, chunks, "tokens", True)


def _bare_gemms(inputs: Inputs, chunk: object) -> Callable[[], None]:
    hidden_TH, head_VH = inputs.hidden[0], inputs.heads[0]
    rows = [slice(start, min(start + chunk, inputs.tokens)) for start in range(0, inputs.tokens, chunk)]
    logits = [head.new_empty(min(chunk, inputs.tokens), head.shape[0]) for head in inputs.heads]
    grad_hidden_TH, grad_head_VH = torch.empty_like(hidden_TH), torch.empty_like(head_VH)

    def run() -> None:
        for number, part in enumerate(rows):
            tokens = part.stop - part.start
            for hidden, head, logits_CV in zip(inputs.hidden, inputs.heads, logits, strict=True):
                torch.mm(hidden[part], head.t(), out=logits_CV[:tokens])
            torch.mm(logits[0][:tokens], head_VH, out=grad_hidden_TH[part])
            grad_head_VH.addmm_(logits[0][:tokens].t(), hidden_TH[part], beta=1.0 if number else 0.0)

    return run


# ---------------------------------------------------------------------------------------------------------- reference
def reference_outcome(inputs: Inputs) -> Outcome:
    """The same from megakd/losses/reference.py in float64, on inputs of one rank."""
    student = tuple(tensor.double().requires_grad_() for tensor in (inputs.hidden[0], inputs.heads[0]))
    teachers = inputs.teachers()
    models = [student, *zip(teachers[::2], teachers[1::2], strict=True)]
    logits = [hidden.double() @ head.double().t() for hidden, head in models]
    match inputs.loss:
        case "log_probs":
            value = reference.token_log_probs(*logits, inputs.labels_T)
        case "advantage":
            value = reference.expected_advantage(*logits)
        case "dpo":
            sums = [reference.token_log_probs(one, inputs.labels_T).view(-1, inputs.sequence).sum(1) for one in logits]
            (chosen_P, rejected_P), (ref_chosen_P, ref_rejected_P) = (sums_N.chunk(2) for sums_N in sums)
            value = reference.dpo(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P, beta=DPO_BETA)
        case kind:
            value = reference.divergence(kind, *logits, beta=JSD_BETA, mu=AKL_MU)
    return outcome_of(value, student)
