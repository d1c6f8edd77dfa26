"""Measures models on the held-out rows, with the run's teachers beside them.

Per model: KL(teacher || model) and negative log-likelihood on the chosen answers; reward accuracy over the pairs; the
model's own greedy answers, their ROUGE-L against the chosen ones, and the expected advantage of the teachers on them.

Legend: B sequences, T loss positions, N sequences of the whole evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megakd.batch import Batch, Group, Kind, Sample
from megakd.config_stages import EvalStage
from megakd.data.dataset import preference_groups
from megakd.evaluation.reward_accuracy import relative_reward_accuracy, reward_accuracy
from megakd.evaluation.rouge import rouge_l
from megakd.evaluation.sequences import filled, sums_by_sequence
from megakd.losses import fused_divergence, fused_expected_advantage, fused_token_log_probs
from megakd.mcore.model import Model, evaluating
from megakd.objectives.base import RoleOutput
from megakd.rollout.engine import Prompt, Rollout
from megakd.rollout.replicas import generate_on_replicas
from megakd.rollout.sampling import Sampling
from megakd.run import Run
from megakd.teacher.online import OnlineTeacher

Scorer = Callable[[RoleOutput, dict[str, RoleOutput], Batch], dict[str, Tensor]]
"""(student, teachers, micro-batch) -> values [T] by name; NaN-free, zero where a name does not apply."""


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
    teacher_signals: dict[int, list[RoleOutput] | None] = field(default_factory=dict)
    start: Scores | None = None
    tokens: int = 0
    """Tokens that the measured models have worked through."""

    def __post_init__(self):
        run = self.run
        self.groups = preference_groups(
            run.eval_rows,
            run.tokenizer,
            (Kind.CHOSEN, Kind.REJECTED),
            max_length=run.recipe.data.max_length,
            too_long=run.recipe.data.too_long,
        )
        student = run.grid("student")
        recipe = run.recipe
        self.teacher = run.load_teacher("teacher", recipe.teacher.model, (Kind.CHOSEN, Kind.ROLLOUT), student)
        self.reference = run.load_teacher("reference", recipe.reference.model, (Kind.ROLLOUT,), student)
        # A prompt that leaves no room for an answer has been refused already, or is dropped like a long pair.
        fitting = [
            row
            for row in run.eval_rows
            if len(run.tokenizer.encode(row.prompt, None, close=False)[0]) < run.recipe.data.max_length
        ]
        self.prompt_rows = fitting[: self.stage.prompts]

    # ------------------------------------------------------------------------------------------------- one model
    def measure(self, model: Model) -> tuple[dict[str, float], list[str]]:
        """The model's metrics and its answers to the held-out prompts, the same on every rank."""
        with evaluating(model):
            pairs = self._score(model, self.groups, {"teacher": self.teacher}, self._pair_values, cached=True)
            rollouts = self._answer(model)
            answers = [self.run.tokenizer.decode(rollout.tokens) for rollout in rollouts]
            advantage = self._score(
                model,
                self._rollout_groups(rollouts),
                {"teacher": self.teacher, "reference": self.reference},
                self._advantage_values,
            )
        if self.start is None:
            self.start = pairs
        metrics = self._pair_metrics(pairs)
        metrics["expected_advantage"] = _mean(advantage.sums["advantage"].sum(), advantage.lengths_N.sum())
        metrics["rouge_l"] = rouge_l(answers, [row.chosen for row in self.prompt_rows]).value
        metrics["answer_tokens"] = _mean(advantage.lengths_N.sum(), len(rollouts))
        return metrics, answers

    def _pair_metrics(self, pairs: Scores) -> dict[str, float]:
        chosen, rejected = slice(0, None, 2), slice(1, None, 2)
        log_probs, lengths = pairs.sums["log_prob"], pairs.lengths_N
        arrays = [
            tensor.tolist() for tensor in (log_probs[chosen], log_probs[rejected], lengths[chosen], lengths[rejected])
        ]
        start = [self.start.sums["log_prob"][part].tolist() for part in (chosen, rejected)]
        simpo = reward_accuracy(*arrays)
        dpo = relative_reward_accuracy(arrays[0], arrays[1], *start)
        tokens = lengths[chosen].sum()
        return {
            "kl_to_teacher": _mean(pairs.sums["kl"][chosen].sum(), tokens),
            "nll_chosen": _mean(-log_probs[chosen].sum(), tokens),
            "reward_accuracy": simpo.value,
            "reward_accuracy_error": simpo.standard_error,
            "relative_reward_accuracy": dpo.value,
            "pairs": simpo.count,
        }

    # --------------------------------------------------------------------------------------------------- scoring
    def _pair_values(self, student: RoleOutput, teachers: dict[str, RoleOutput], batch: Batch) -> dict[str, Tensor]:
        positions = batch.positions
        context = self._loss_arguments()
        log_probs_T = fused_token_log_probs(student.hidden_TH, student.head_VH, positions.labels_T, **context)
        chosen_T = positions.kinds_T == Kind.CHOSEN
        kl_T = torch.zeros_like(log_probs_T)
        kl_T[chosen_T] = fused_divergence(
            "forward_kl",
            student.hidden_TH[chosen_T],
            student.head_VH,
            teachers["teacher"].hidden_TH,
            teachers["teacher"].head_VH,
            **context,
        )
        return {"log_prob": log_probs_T, "kl": kl_T}

    def _advantage_values(
        self, student: RoleOutput, teachers: dict[str, RoleOutput], batch: Batch
    ) -> dict[str, Tensor]:
        teacher, reference = teachers["teacher"], teachers["reference"]
        return {
            "advantage": fused_expected_advantage(
                student.hidden_TH,
                student.head_VH,
                teacher.hidden_TH,
                teacher.head_VH,
                reference.hidden_TH,
                reference.head_VH,
                **self._loss_arguments(),
            )
        }

    def _loss_arguments(self) -> dict:
        grid = self.run.grid("student")
        vocab_size = self.teacher.model.architecture.vocab_size
        return {"tp_group": grid.groups.tp, "vocab_size": vocab_size, "chunk_tokens": self.stage.chunk_tokens}

    def _score(
        self,
        model: Model,
        groups: Sequence[Group],
        teachers: dict[str, OnlineTeacher],
        values: Scorer,
        cached: bool = False,
    ) -> Scores:
        """Runs model and teachers over `groups` and adds values up by sequence.

        Groups are repeated at the end to fill the roles' micro-batches; the repeated ones count nothing.
        `cached` keeps the teachers' signals for the next model: they depend on the rows alone.
        """
        run = self.run
        step = filled(run, groups, ("student", "teacher", "reference"))
        wanted = sum(len(group.samples) for group in groups)
        micro_batch = run.recipe.student.micro_batch
        signals = {}
        for role, teacher in teachers.items():
            if not cached or role not in self.teacher_signals:
                signals[role] = teacher.signals(step, model.grid, micro_batch, pad_id=run.tokenizer.pad_id)
                if cached:
                    self.teacher_signals[role] = signals[role]
            else:
                signals[role] = self.teacher_signals[role]
        batches = run.batches(step, "student", model, pad_id=run.tokenizer.pad_id)
        self.tokens += step.all_tokens

        def with_teachers(number: int, student: RoleOutput, batch: Batch) -> dict[str, Tensor]:
            return values(student, {role: outputs[number] for role, outputs in signals.items()}, batch)

        everything = sums_by_sequence(run, model, batches, step.samples, with_teachers)
        lengths = [sample.response_length for group in groups for sample in group.samples]
        sums = {name: total_N[:wanted] for name, total_N in everything.items()}
        return Scores(sums, torch.tensor(lengths, dtype=torch.float64))

    # --------------------------------------------------------------------------------------------------- answers
    def _answer(self, model: Model) -> list[Rollout]:
        """The model's greedy answers to the held-out prompts, in their order, on every rank."""
        run = self.run
        prompts = [
            Prompt(number, tuple(run.tokenizer.encode(row.prompt, None, close=False)[0]))
            for number, row in enumerate(self.prompt_rows)
        ]
        sampling = Sampling(
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            n=1,
            max_new_tokens=self.stage.max_new_tokens,
            stop_ids=run.tokenizer.stop_ids,
            seed=run.recipe.seed,
        )
        return generate_on_replicas(run, model, prompts, sampling, self.stage.slots)

    def _rollout_groups(self, rollouts: Sequence[Rollout]) -> list[Group]:
        groups = []
        for row, rollout in zip(self.prompt_rows, rollouts, strict=True):
            prompt = self.run.tokenizer.encode(row.prompt, None, close=False)[0]
            groups.append(Group(row.key, (Sample((*prompt, *rollout.tokens), len(prompt), Kind.ROLLOUT),)))
        return groups


def _mean(total: Tensor | float, count: Tensor | float) -> float:
    return float(total) / max(1.0, float(count))
