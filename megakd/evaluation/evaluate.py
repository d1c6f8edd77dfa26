"""Measures models on the held-out rows, with the run's teachers beside them.

Per model, on the rows' answers: KL(teacher || model), negative log-likelihood and, where rows have a rejected answer,
reward accuracy. On the model's own answers (greedy, or one for every seed): ROUGE-L and exact match against the rows'
answers, length, KL(model || teacher) and the expected advantage of the teachers.

Legend: B sequences, T loss positions, N sequences of the whole evaluation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megakd.batch import Batch, Group, Kind, Sample
from megakd.config_evaluation import EvalStage
from megakd.data.dataset import held_out_groups, sample_id
from megakd.evaluation.answering import held_out_prompts
from megakd.evaluation.responses import named_estimate, response_metrics
from megakd.evaluation.reward_accuracy import relative_reward_accuracy, reward_accuracy
from megakd.evaluation.sequences import filled, sums_by_sequence
from megakd.losses import fused_divergence, fused_expected_advantage, fused_token_log_probs
from megakd.mcore.model import Model, evaluating
from megakd.objectives.base import RoleOutput
from megakd.rollout.engine import Prompt, Rollout
from megakd.rollout.replicas import generate_on_replicas
from megakd.rollout.sampling import Sampling
from megakd.run import Run
from megakd.teacher.online import OnlineTeacher

logger = logging.getLogger("megakd")

Scorer = Callable[[RoleOutput, dict[str, RoleOutput], Batch, dict], dict[str, Tensor]]
"""(student, teachers, micro-batch, arguments of the fused losses) -> values [T] by name; NaN-free, zero where a name
does not apply."""


@dataclass(frozen=True)
class Scores:
    """Per-sequence sums over the loss positions of each value, and the number of those positions; [N] each."""

    sums: dict[str, Tensor]
    lengths_N: Tensor


@dataclass
class Evaluation:
    """One eval stage on this rank; `measure` is called for one model after another."""

    run: Run
    stage: EvalStage
    groups: Sequence[Group] = field(init=False)
    teachers: dict[str, OnlineTeacher] = field(default_factory=dict)
    teacher_signals: dict[str, list[RoleOutput] | None] = field(default_factory=dict)
    start: Scores | None = None
    tokens: int = 0
    """Tokens that the measured models have worked through."""

    def __post_init__(self):
        run, data = self.run, self.run.recipe.data
        self.groups = held_out_groups(run.eval_rows, run.tokenizer, max_length=data.max_length, too_long=data.too_long)
        unpaired = sum(len(group.samples) == 1 for group in self.groups)
        if unpaired:
            what = "is left out" if unpaired == len(self.groups) else "is measured on the others"
            logger.warning("%s: %d of %d held-out rows have no rejected answer: reward accuracy %s", self.stage.name,
                           unpaired, len(self.groups), what)
        if self.stage.teacher:
            for role, kinds in (("teacher", (Kind.CHOSEN, Kind.ROLLOUT)), ("reference", (Kind.ROLLOUT,))):
                model = run.recipe.role(role).model
                self.teachers[role] = run.load_teacher(role, model, kinds, run.grid("student"))
        else:
            logger.info("%s: teacher is false: KL and expected advantage are left out", self.stage.name)
        asked = held_out_prompts(run, self.stage.prompts)
        self.prompt_rows = [row for row, _ in asked]
        self.prompts = [Prompt(sample_id(prompt.key), prompt.tokens) for _, prompt in asked]

    # ------------------------------------------------------------------------------------------------- one model
    def measure(self, model: Model) -> tuple[dict[str, float], list[str]]:
        """The model's metrics and its answers to the held-out prompts (the first seed's), the same on every rank."""
        with evaluating(model):
            given = self._score(model, self.groups, ("teacher",), _given_values, cached=True)
            drawn = [self._answer(model, sampling) for sampling in self._samplings()]
        if self.start is None:
            self.start = given
        metrics = self._given_metrics(given)
        with evaluating(model):
            metrics |= self._own_metrics(model, drawn)
        texts = [[self.run.tokenizer.decode(rollout.tokens) for rollout in rollouts] for rollouts in drawn]
        metrics |= response_metrics(texts, [row.answer for row in self.prompt_rows])
        return metrics, texts[0]

    def _given_metrics(self, scores: Scores) -> dict[str, float]:
        """What is measured on the rows' answers."""
        samples = [sample for group in self.groups for sample in group.samples]
        chosen = [number for number, sample in enumerate(samples) if sample.kind == Kind.CHOSEN]
        rejected = [number for number, sample in enumerate(samples) if sample.kind == Kind.REJECTED]
        log_probs, lengths = scores.sums["log_prob"], scores.lengths_N
        tokens = lengths[chosen].sum()
        metrics = {"nll_chosen": _mean(-log_probs[chosen].sum(), tokens)}
        if self.teachers:
            metrics["kl_to_teacher"] = _mean(scores.sums["kl"][chosen].sum(), tokens)
        if rejected:
            preferred = [number - 1 for number in rejected]  # a pair's chosen answer stands before the rejected one
            columns = [t.tolist() for t in (log_probs[preferred], log_probs[rejected], lengths[preferred],
                                            lengths[rejected])]
            start = [self.start.sums["log_prob"][part].tolist() for part in (preferred, rejected)]
            simpo = reward_accuracy(*columns)
            metrics |= named_estimate("reward_accuracy", simpo)
            metrics["relative_reward_accuracy"] = relative_reward_accuracy(columns[0], columns[1], *start).value
            metrics["pairs"] = simpo.count
        return metrics

    def _own_metrics(self, model: Model, drawn: Sequence[Sequence[Rollout]]) -> dict[str, float]:
        """What is measured on the model's own answers, without looking at the rows' answers."""
        rollouts = [rollout for own in drawn for rollout in own]
        tokens = sum(len(rollout.tokens) for rollout in rollouts)
        metrics = {
            "answer_tokens": tokens / len(rollouts),
            "stopped": sum(rollout.finish_reason == "stop" for rollout in rollouts) / len(rollouts),
        }
        if self.teachers:
            # Seed by seed: the hidden states of all positions of a call are held at a time.
            scores = [self._score(model, self._rollout_groups(own), ("teacher", "reference"), _own_values)
                      for own in drawn]
            for name in ("expected_advantage", "reverse_kl"):
                metrics[name] = _mean(sum(float(each.sums[name].sum()) for each in scores), tokens)
        return metrics

    # --------------------------------------------------------------------------------------------------- scoring
    def _score(
        self, model: Model, groups: Sequence[Group], roles: Sequence[str], values: Scorer, cached: bool = False
    ) -> Scores:
        """Runs model and teachers over `groups` and adds values up by sequence.

        Groups are repeated at the end to fill the roles' micro-batches; the repeated ones count nothing.
        `cached` keeps the teachers' signals for the next model: they depend on the rows alone.
        """
        run = self.run
        step = filled(run, groups, ("student", *self.teachers))
        wanted = sum(len(group.samples) for group in groups)
        micro_batch = run.recipe.student.micro_batch
        signals = {}
        for role in [role for role in roles if role in self.teachers]:
            if not cached or role not in self.teacher_signals:
                teacher = self.teachers[role]
                signals[role] = teacher.signals(step, model.grid, micro_batch, pad_id=run.tokenizer.pad_id)
                if cached:
                    self.teacher_signals[role] = signals[role]
            else:
                signals[role] = self.teacher_signals[role]
        batches = run.batches(step, "student", model, pad_id=run.tokenizer.pad_id)
        self.tokens += step.all_tokens
        arguments = {"tp_group": model.grid.groups.tp, "vocab_size": model.architecture.vocab_size,
                     "chunk_tokens": self.stage.chunk_tokens}

        def with_teachers(number: int, student: RoleOutput, batch: Batch) -> dict[str, Tensor]:
            teachers = {role: outputs[number] for role, outputs in signals.items()}
            return values(student, teachers, batch, arguments)

        everything = sums_by_sequence(run, model, batches, step.samples, with_teachers)
        lengths = [sample.response_length for group in groups for sample in group.samples]
        sums = {name: total_N[:wanted] for name, total_N in everything.items()}
        return Scores(sums, torch.tensor(lengths, dtype=torch.float64))

    # --------------------------------------------------------------------------------------------------- answers
    def _samplings(self) -> list[Sampling]:
        """How the model answers: greedily, or once for every seed."""
        settings = {"n": 1, "max_new_tokens": self.stage.max_new_tokens, "stop_ids": self.run.tokenizer.stop_ids}
        drawn = self.stage.sampling
        if drawn is None:
            return [Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=self.run.recipe.seed, **settings)]
        return [Sampling(temperature=drawn.temperature, top_k=drawn.top_k, top_p=drawn.top_p, seed=seed, **settings)
                for seed in drawn.seeds]

    def _answer(self, model: Model, sampling: Sampling) -> list[Rollout]:
        """The model's answers to the held-out prompts, in their order, on every rank."""
        return generate_on_replicas(self.run, model, self.prompts, sampling, self.stage.slots)

    def _rollout_groups(self, rollouts: Sequence[Rollout]) -> list[Group]:
        return [
            Group(row.key, (Sample((*prompt.tokens, *rollout.tokens), len(prompt.tokens), Kind.ROLLOUT),))
            for row, prompt, rollout in zip(self.prompt_rows, self.prompts, rollouts, strict=True)
        ]


def _given_values(
    student: RoleOutput, teachers: dict[str, RoleOutput], batch: Batch, arguments: dict
) -> dict[str, Tensor]:
    positions = batch.positions
    log_probs_T = fused_token_log_probs(student.hidden_TH, student.head_VH, positions.labels_T, **arguments)
    if not teachers:
        return {"log_prob": log_probs_T}
    places_N = positions.of_kind[Kind.CHOSEN]
    kl_T = torch.zeros_like(log_probs_T)
    kl_T[places_N] = _divergence(
        "forward_kl", RoleOutput(student.hidden_TH[places_N], student.head_VH), teachers["teacher"], arguments
    )
    return {"log_prob": log_probs_T, "kl": kl_T}


def _own_values(
    student: RoleOutput, teachers: dict[str, RoleOutput], batch: Batch, arguments: dict
) -> dict[str, Tensor]:
    teacher, reference = teachers["teacher"], teachers["reference"]
    advantage_T = fused_expected_advantage(
        student.hidden_TH, student.head_VH, teacher.hidden_TH, teacher.head_VH, reference.hidden_TH, reference.head_VH,
        **arguments,
    )
    return {"expected_advantage": advantage_T, "reverse_kl": _divergence("reverse_kl", student, teacher, arguments)}


def _divergence(kind: str, student: RoleOutput, teacher: RoleOutput, arguments: dict) -> Tensor:
    return fused_divergence(
        kind, student.hidden_TH, student.head_VH, teacher.hidden_TH, teacher.head_VH, **arguments
    )


def _mean(total: Tensor | float, count: Tensor | float) -> float:
    return float(total) / max(1.0, float(count))
