"""Answers drawn while a stage trains: every few steps the models, as they are then, answer the coming steps' prompts.

A draw is a function of the weights, the seed and its number, so a run that goes on from a checkpoint draws the same: a
checkpoint lies between two draws (`config_checks`).

Legend: T loss positions, N those of all answers of a draw, one answer after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.batch import Batch, Draw, Group, Kind, Sample, Step
from megakd.config_objectives import MiniLlmObjective
from megakd.config_stages import TrainStage
from megakd.data.artefacts import Rollout
from megakd.data.dataset import (
    GENERATED,
    Generated,
    KeyedPrompt,
    group_of,
    kinds_of,
    preference_groups,
    prompts,
    sample_id,
)
from megakd.data.sampler import StepSampler
from megakd.errors import ConfigError
from megakd.evaluation.sequences import filled, values_by_token
from megakd.losses import behaviour_log_probs, fused_token_log_probs, returns, reverse_kl_rewards
from megakd.mcore.model import Model
from megakd.objectives.base import Requires, RoleOutput
from megakd.rollout.engine import Prompt
from megakd.rollout.engine import Rollout as Answer
from megakd.rollout.mixed import generate_mixed
from megakd.rollout.replicas import generate_on_replicas
from megakd.rollout.sampling import Sampling
from megakd.run import Run

logger = logging.getLogger("megakd")

KIND_OF = {"rollouts": Kind.ROLLOUT, "teacher_answers": Kind.TEACHER_ANSWER}
"""The kinds of sequences that a stage's settings bring."""


class OnlineGroups:
    """The steps of a stage whose answers are drawn while it trains.

    Draw number d is for steps d * every to (d + 1) * every - 1, which go `passes` times over the same groups.
    """

    def __init__(
        self, run: Run, stage: TrainStage, requires: Requires, stored: Generated, student: Model, teacher: Model | None
    ):
        """
        Args:
            stored: answers of earlier stages, for the kinds that are not drawn.
            student: the model in training.
            teacher: where one draws.

        Raises:
            ConfigError: fewer rows are left than a step takes.
        """
        self.run, self.stage, self.online, self.requires = run, stage, stage.online, requires
        self.stored, self.student, self.teacher = stored, student, teacher
        self.drawn = [KIND_OF[name] for name in stage.drawn_online]
        self.rows, self.prompts = self._usable()
        if len(self.rows) < stage.global_batch:
            rule = f"only {len(self.rows)} rows can be trained on"
            raise ConfigError(f"stages.{stage.name}.global_batch", stage.global_batch, rule,
                              "Lower it, or give more rows")
        self.sampler = StepSampler(len(self.rows), stage.global_batch, run.recipe.seed)
        self.number = -1
        self.groups: dict[str, Group] = {}

    def step_at(self, number: int) -> Step:
        """The groups of step `number`; draws answers where they are not those of the last draw. Collective."""
        draw, place = divmod(number, self.online.every)
        per_pass = self.online.every // self.online.passes
        steps = [self._keys(draw * per_pass + step) for step in range(per_pass)]
        if draw != self.number:
            self.groups = self._draw(draw, list(dict.fromkeys(key for step in steps for key in step)))
            self.number = draw
        return Step(tuple(self.groups[key] for key in steps[place % per_pass]))

    def _keys(self, step: int) -> list[str]:
        keys = list(self.rows)
        return [keys[index] for index in self.sampler.indices(step)]

    def _usable(self) -> tuple[dict, dict[str, KeyedPrompt]]:
        """Rows by key whose given and stored sequences fit and whose prompt leaves room for an answer."""
        run, data = self.run, self.run.recipe.data
        kept, _ = prompts(run.train_rows, run.tokenizer, data.max_length - 1, too_long=data.too_long)
        by_key = {prompt.key: prompt for prompt in kept}
        rows = {row.key: row for row in run.train_rows if row.key in by_key}
        given = [kind for kind in self.requires.kinds if kind not in self.drawn]
        if given:
            limits = {"max_length": data.max_length, "too_long": data.too_long}
            groups = preference_groups(
                list(rows.values()), run.tokenizer, given, **limits, generated=self.stored
            )
            rows = {group.key: rows[group.key] for group in groups}
        return rows, by_key

    # ------------------------------------------------------------------------------------------------------ one draw
    def _draw(self, number: int, keys: Sequence[str]) -> dict[str, Group]:
        """The groups of some rows, with new answers."""
        run = self.run
        kinds = {key: kinds_of(self.rows[key], self.requires.kinds, self.requires.on_policy) for key in keys}
        answers = dict(self.stored.answers)
        for kind in self.drawn:
            asked = [self.prompts[key] for key in keys if kind in kinds[key]]
            answers[kind] = self._answers(number, kind, asked)
        generated = Generated(answers, None)
        groups = {key: group_of(self.rows[key], run.tokenizer, kinds[key], generated) for key in keys}
        self._count_alike(groups)
        if self.requires.draws:
            groups = self._with_draws(groups)
        return groups

    def _answers(self, number: int, kind: Kind, asked: Sequence[KeyedPrompt]) -> Mapping[str, Sequence[Rollout]]:
        run, online, by_teacher = self.run, self.online, kind is Kind.TEACHER_ANSWER
        sampling = Sampling(
            temperature=online.temperature, top_k=online.top_k, top_p=online.top_p, n=online.n,
            max_new_tokens=online.max_new_tokens, stop_ids=run.tokenizer.stop_ids,
            # Each draw and each model has noise of its own.
            seed=run.recipe.seed + ((2 * number + by_teacher) << 32),
        )
        prompts_asked = [Prompt(sample_id(prompt.key), prompt.tokens) for prompt in asked]
        if online.teacher_mix > 0 and not by_teacher:
            drawn = generate_mixed(
                self.student, self.teacher, prompts_asked, sampling, teacher_mix=online.teacher_mix, slots=online.slots,
                longest=run.recipe.data.max_length, pad_id=run.tokenizer.pad_id, world_group=dist.group.WORLD,
            )
        else:
            model = self.teacher if by_teacher else self.student
            drawn = generate_on_replicas(run, model, prompts_asked, sampling, online.slots)
        return {
            prompt.key: [self._rollout(prompt, answer) for answer in drawn[place * online.n : (place + 1) * online.n]]
            for place, prompt in enumerate(asked)
        }

    def _rollout(self, prompt: KeyedPrompt, answer: Answer) -> Rollout:
        text = self.run.tokenizer.decode(answer.tokens)
        return Rollout(prompt.key, answer.index, prompt.hash, answer.tokens, text, answer.finish_reason, None)

    def _count_alike(self, groups: Mapping[str, Group]) -> None:
        """Pairs of one text teach nothing: their gradients cancel. They stay, as every step has equally many groups."""
        if set(GENERATED) <= set(self.requires.kinds) and self.run.is_root:
            texts = [{kind: [s.tokens for s in group.samples if s.kind is kind] for kind in GENERATED}
                     for group in groups.values()]
            alike = sum(answers[Kind.ROLLOUT] == answers[Kind.TEACHER_ANSWER] for answers in texts)
            if alike:
                logger.warning("%d of %d prompts have the same answer of teacher and student: no preference to learn",
                               alike, len(groups))

    # ---------------------------------------------------------------------------------------------- policy gradients
    def _with_draws(self, groups: Mapping[str, Group]) -> dict[str, Group]:
        """The groups with what a policy gradient needs to know of each token of their rollouts."""
        run, objective = self.run, self.stage.objective
        alone = [Group(group.key, (sample,)) for group in groups.values() for sample in group.samples
                 if sample.kind is Kind.ROLLOUT]
        lengths = [group.samples[0].response_length for group in alone]
        step, total = filled(run, alone, (self.stage.trains, "teacher")), sum(lengths)
        student_N, teacher_N = (
            self._token_log_probs(step, role, model)[:total]
            for role, model in ((self.stage.trains, self.student), ("teacher", self.teacher))
        )
        behaviour_N = behaviour_log_probs(student_N, teacher_N, teacher_mix=self.online.teacher_mix)
        returns_N = _returns(objective, student_N, teacher_N, lengths)
        pieces = zip(behaviour_N.split(lengths), returns_N.split(lengths), strict=True)
        draws = iter([Draw(tuple(behaviour.tolist()), tuple(worth.tolist())) for behaviour, worth in pieces])

        def with_draw(sample: Sample) -> Sample:
            return replace(sample, draw=next(draws)) if sample.kind is Kind.ROLLOUT else sample

        return {key: Group(key, tuple(with_draw(sample) for sample in group.samples)) for key, group in groups.items()}

    def _token_log_probs(self, step: Step, role: str, model: Model) -> Tensor:
        """Log-probabilities [N] of all answers' tokens under a model in its own layout, on every rank."""
        def values(_: int, output: RoleOutput, batch: Batch) -> dict[str, Tensor]:
            return {"log_prob": fused_token_log_probs(
                output.hidden_TH, output.head_VH, batch.positions.labels_T, tp_group=model.grid.groups.tp,
                vocab_size=model.architecture.vocab_size, chunk_tokens=self.stage.chunk_tokens,
            )}

        batches = self.run.batches(step, role, model, pad_id=self.run.tokenizer.pad_id)
        with torch.no_grad():
            return values_by_token(self.run, model, batches, step, values)["log_prob"]


def _returns(objective: MiniLlmObjective, student_N: Tensor, teacher_N: Tensor, lengths: Sequence[int]) -> Tensor:
    rewards_N = reverse_kl_rewards(student_N, teacher_N, scale=objective.reward_scale, limit=objective.reward_limit)
    return returns(rewards_N, lengths, discount=objective.discount, length_normalize=objective.length_normalize,
                   whiten=objective.whiten)
