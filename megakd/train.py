"""The main path: one training stage from its recipe to its model.

For each optimizer step every teacher runs forward-only over the step in its own layout and its hidden states travel to
the student's last pipeline stage; then the student's schedule runs forward and backward; then the optimizer steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megakd import interruption
from megakd.batch import Group, Kind, Step
from megakd.comm import broadcast_json
from megakd.config_stages import TrainStage
from megakd.data.artefacts import read_rollouts
from megakd.data.dataset import Generated, preference_groups
from megakd.data.sampler import StepSampler
from megakd.data.scores import read_scores
from megakd.data.texts import read_stage_texts
from megakd.log import RunLog
from megakd.mcore import checkpoint
from megakd.mcore.model import Model, freeze
from megakd.mcore.optimizer import make_trainer
from megakd.mcore.step import forward_backward
from megakd.objectives import build_objective
from megakd.objectives.base import Requires
from megakd.provenance import ROLLOUTS, SCORES
from megakd.rollout.online import OnlineGroups
from megakd.run import Run
from megakd.teacher.cached import CachedTeacher, load_role
from megakd.teacher.online import OnlineTeacher, by_micro_batch


@dataclass(frozen=True)
class TrainResult:
    """What a training stage leaves besides its model."""

    metrics: dict[str, float]
    """Of the last step."""
    tokens: int
    """Tokens that the student has worked through, prompts included."""
    seconds_before: float
    """Time of the steps that earlier starts of the stage took; on rank 0."""


class Training:
    """A training stage on this rank: everything built, nothing stepped."""

    def __init__(self, run: Run, stage: TrainStage):
        self.run, self.stage = run, stage
        self.objective = build_objective(stage.objective)
        requires, stored = self.objective.requires, generated_before(run, stage)
        groups = training_groups(run, requires, stored) if stage.online is None else ()
        self.model = run.load_model(stage.trains, stage.init, "training")
        self.teachers = {
            role: load_role(run, stage, role, requires.teacher_kinds[role], groups, self.model.grid)
            for role in requires.teachers
        }
        if stage.online is None:
            self.data = StoredGroups(groups, StepSampler(len(groups), stage.global_batch, run.recipe.seed))
        else:
            teacher = drawing_teacher(run, stage, self.teachers)
            self.data = OnlineGroups(run, stage, requires, stored, self.model, teacher)
        self.texts = read_stage_texts(run.recipe, stage, run.tokenizer) if stage.objective.reads_text else None
        self.steps = stage.steps if stage.tokens is None else self._steps_for(stage.tokens)
        self.trainer = make_trainer(self.model, stage.optimizer, self.steps)

    def step_at(self, number: int) -> Step:
        """The groups of step `number` (from 0). Collective where answers are drawn."""
        if self.stage.online is not None:
            # Replicas answer prompts of their own, so not all of them run forward equally often.
            self.trainer.gather_parameters()
        step = self.data.step_at(number)
        return step if self.texts is None else self.texts.beside(step, number)

    def _steps_for(self, tokens: int) -> int:
        """The fewest steps that work through `tokens` tokens."""
        number = 0
        while tokens > 0:
            tokens -= self.step_at(number).all_tokens
            number += 1
        return number

    def forward_backward(self, step: Step) -> dict[str, float]:
        """The teachers' signals, then the student's forward and backward; leaves the step's gradient in the trainer."""
        run, stage, model = self.run, self.stage, self.model
        micro_batch = run.recipe.role(stage.trains).micro_batch
        signals = {
            role: teacher.signals(step, model.grid, micro_batch, pad_id=run.tokenizer.pad_id)
            for role, teacher in self.teachers.items()
        }
        batches = run.batches(step, stage.trains, model, pad_id=run.tokenizer.pad_id)
        context = model.loss_context(stage.chunk_tokens, step.counts)
        self.trainer.zero_grad()
        result = forward_backward(model, batches, by_micro_batch(signals, len(batches)), self.objective, context)
        return dict(result.metrics)


def train(run: Run, stage: TrainStage, fingerprint: str) -> TrainResult:
    """Trains a stage from its start or its newest checkpoint, and writes `models/<save_as>`.

    Args:
        run: this rank's run.
        stage: what to train.
        fingerprint: of the stage's settings and inputs; a checkpoint made with others is refused.

    Raises:
        Interrupted: the run was asked to leave; the newest checkpoint is of the step that was finished last.
    """
    training = Training(run, stage)
    trainer = training.trainer
    checkpoints = run.folder(stage.name) / "checkpoints"
    facts = {"stage": fingerprint}

    start = 0
    # Rank 0 looks, as the others may see an older state of a shared file system.
    found = checkpoint.latest(checkpoints) if run.is_root else None
    name = broadcast_json(None if found is None else found[0].name, 0, dist.group.WORLD, run.world.device)
    if name is not None:
        start = checkpoint.load(checkpoints / name, trainer, facts, dist.group.WORLD)
    else:
        trainer.fill_masters(run.recipe.path_of_model(stage.init))
    metrics: dict[str, float] = {}
    log = RunLog(
        run.folder(stage.name),
        rank=run.world.rank,
        total_steps=training.steps,
        stage=stage.name,
        progress=True,
        first_step=start,
        wandb_project="megakd" if run.recipe.wandb else None,
    )
    with log:
        for number in range(start, training.steps):
            if interruption.asked(dist.group.WORLD, run.world.device) and stage.resumes_after(number):
                if number > start and number % stage.checkpoint_every != 0:
                    checkpoint.save(checkpoints, number, trainer, facts, dist.group.WORLD)
                saved = f"after step {number} of stage {stage.name}, checkpoint saved"
                raise interruption.Interrupted(saved if number > 0 else f"before the first step of stage {stage.name}")
            step = training.step_at(number)
            metrics = training.forward_backward(step)
            learning_rate = trainer.learning_rate
            norm = trainer.step()
            metrics |= {"grad_norm": norm, "lr": learning_rate}
            trainer.tokens += step.all_tokens
            log.step(number, metrics, tokens=step.all_tokens)
            if (number + 1) % stage.checkpoint_every == 0 and number + 1 < training.steps:
                checkpoint.save(checkpoints, number + 1, trainer, facts, dist.group.WORLD)
    trainer.gather_parameters()
    run.export(training.model, trainer.whole_parameters(), stage.init, stage.save_as, "float32")
    return TrainResult(metrics, trainer.tokens, log.seconds_before)


@dataclass(frozen=True)
class StoredGroups:
    """The steps of a stage whose sequences are all there before it starts."""

    groups: Sequence[Group]
    sampler: StepSampler

    def step_at(self, number: int) -> Step:
        """The groups of step `number`."""
        return Step(tuple(self.groups[index] for index in self.sampler.indices(number)))


def generated_before(run: Run, stage: TrainStage) -> Generated:
    """What earlier stages have generated and scored for a training stage."""
    answers = {}
    for kind, maker in ((Kind.ROLLOUT, stage.rollouts), (Kind.TEACHER_ANSWER, stage.teacher_answers)):
        if maker is not None:
            path = run.folder(maker) / ROLLOUTS
            _, answers[kind] = read_rollouts(path, run.tokenizer, keys=[row.key for row in run.train_rows])
    scores = None
    if stage.scores is not None:
        scores = read_scores(run.folder(stage.scores) / SCORES, run.folder(stage.rollouts) / ROLLOUTS)
    return Generated(answers, scores)


def training_groups(run: Run, requires: Requires, generated: Generated) -> Sequence[Group]:
    """The tokenised groups of a stage whose answers are all there."""
    return preference_groups(
        run.train_rows,
        run.tokenizer,
        requires.kinds,
        max_length=run.recipe.data.max_length,
        too_long=run.recipe.data.too_long,
        generated=generated,
        on_policy=requires.on_policy,
    )


def drawing_teacher(
    run: Run, stage: TrainStage, teachers: Mapping[str, OnlineTeacher | CachedTeacher]
) -> Model | None:
    """The teacher's model where it draws answers while the stage trains."""
    if "teacher" not in stage.roles:
        return None
    match teachers:
        case {"teacher": OnlineTeacher(model=model)}:
            return model
    return freeze(run.load_model("teacher", run.recipe.teacher.model))
