"""The main path: one training stage from its recipe to its model.

For each optimizer step every teacher runs forward-only over the step in its own layout and its hidden states travel to
the student's last pipeline stage; then the student's schedule runs forward and backward; then the optimizer steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megakd.batch import Group, Step
from megakd.config import TrainStage
from megakd.data.artefacts import read_rollouts
from megakd.data.dataset import preference_groups
from megakd.data.sampler import StepSampler
from megakd.log import RunLog
from megakd.mcore import checkpoint
from megakd.mcore.optimizer import Trainer, make_trainer
from megakd.mcore.step import forward_backward
from megakd.objectives import build_objective
from megakd.objectives.base import LossContext, Objective
from megakd.run import ROLLOUTS, Run
from megakd.teacher.online import OnlineTeacher, by_micro_batch


@dataclass(frozen=True)
class TrainResult:
    """What a training stage leaves besides its model."""

    metrics: dict[str, float]
    """Of the last step."""
    tokens: int
    """Tokens that the student has worked through, prompts included."""


def train(run: Run, stage: TrainStage, fingerprint: str) -> TrainResult:
    """Trains a stage from its start or its newest checkpoint, and writes `models/<save_as>`.

    Args:
        run: this rank's run.
        stage: what to train.
        fingerprint: of the stage's settings and inputs; a checkpoint made with others is refused.
    """
    objective = build_objective(stage.objective)
    groups = training_groups(run, stage, objective)
    model = run.load_model(stage.trains, stage.init)
    teachers = {
        role: run.load_teacher(role, objective.requires.teacher_kinds[role], model.grid)
        for role in objective.requires.teachers
    }
    trainer = make_trainer(model, stage.optimizer, stage.steps)
    sampler = StepSampler(len(groups), stage.global_batch, run.recipe.seed)
    checkpoints = run.folder(stage.name) / "checkpoints"
    facts = {"stage": fingerprint}

    start = 0
    if (found := checkpoint.latest(checkpoints)) is not None:
        start = checkpoint.load(found[0], trainer, facts, dist.group.WORLD)
    tokens = sum(Step(tuple(groups[i] for i in sampler.indices(step))).all_tokens for step in range(start))
    metrics: dict[str, float] = {}
    log = RunLog(run.folder(stage.name), rank=run.world.rank, total_steps=stage.steps, stage=stage.name, progress=True,
                 first_step=start, wandb_project="megakd" if run.recipe.wandb else None)
    with log:
        for number in range(start, stage.steps):
            step = Step(tuple(groups[index] for index in sampler.indices(number)))
            metrics = train_step(run, stage, step, trainer, teachers, objective)
            tokens += step.all_tokens
            log.step(number, metrics, tokens=step.all_tokens)
            if (number + 1) % stage.checkpoint_every == 0 and number + 1 < stage.steps:
                checkpoint.save(checkpoints, number + 1, trainer, facts, dist.group.WORLD)
    run.export(model, stage.init, stage.save_as, "float32")
    return TrainResult(metrics, tokens)


def train_step(run: Run, stage: TrainStage, step: Step, trainer: Trainer, teachers: dict[str, OnlineTeacher],
               objective: Objective) -> dict[str, float]:
    """One optimizer step; returns its metrics, the same on every rank."""
    model = trainer.model
    micro_batch = run.recipe.role(stage.trains).micro_batch
    pad_id = run.tokenizer.pad_id

    signals = {role: teacher.signals(step, model.grid, micro_batch, pad_id=pad_id) for role, teacher in teachers.items()}
    batches = run.batches(step, stage.trains, model)
    context = LossContext(model.grid.groups.tp, model.architecture.vocab_size, stage.chunk_tokens)

    trainer.zero_grad()
    result = forward_backward(model, batches, by_micro_batch(signals, len(batches)), objective, context, step.counts)
    learning_rate = trainer.learning_rate
    norm = trainer.step()
    return {**result.metrics, "grad_norm": norm, "lr": learning_rate}


def training_groups(run: Run, stage: TrainStage, objective: Objective) -> Sequence[Group]:
    """The stage's tokenised groups: its rows, with the rollouts of an earlier stage where the objective takes them."""
    rollouts = None
    if stage.rollouts is not None:
        path = run.folder(stage.rollouts) / ROLLOUTS
        _, rollouts = read_rollouts(path, run.tokenizer, keys=[row.key for row in run.train_rows])
    return preference_groups(
        run.train_rows, run.tokenizer, objective.requires.kinds, max_length=run.recipe.data.max_length,
        too_long=run.recipe.data.too_long, rollouts=rollouts,
    )
