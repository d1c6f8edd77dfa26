"""A recipe's training stages as the planner sees them."""

from __future__ import annotations

from megakd.batch import Kind, Padding, Step
from megakd.check import architecture_of
from megakd.config import Recipe
from megakd.config_objectives import (
    AdpaObjective,
    DckdObjective,
    KdObjective,
    MiniLlmObjective,
    Objective,
    SftObjective,
)
from megakd.config_stages import TrainStage
from megakd.objectives import build_objective
from megakd.objectives.base import Requires
from megakd.planning.setup import LossCall, RoleSetup, TrainingSetup
from megakd.planning.work import Lengths, work_of_lengths, work_of_step


def setup_of_stage(recipe: Recipe, stage: TrainStage, world: int, lengths: Lengths | None = None,
                   step: Step | None = None) -> TrainingSetup:
    """The set-up of a stage on `world` ranks, for a real step or for mean lengths.

    Raises:
        ModelError: a model's config.json is missing or not supported.
    """
    assert (lengths is None) != (step is None), "one of the two says what a step holds"
    requires = build_objective(stage.objective).requires
    trained = role_setup(recipe, stage.trains, stage.init, world)
    teachers = {role: role_setup(recipe, role, recipe.teacher_model(stage, role), world)
                for role in requires.teachers if role not in stage.signals.stages}
    roles = {"student": trained, **teachers}
    teacher_kinds = {role: requires.teacher_kinds[role] for role in teachers}
    layouts = {role: setup.layout for role, setup in roles.items()}
    micro_batches = {role: setup.micro_batch for role, setup in roles.items()}
    if step is not None:
        paddings = {role: padding_of(recipe, setup) for role, setup in roles.items()}
        work = work_of_step(step, layouts, micro_batches, paddings, teacher_kinds)
    else:
        work = work_of_lengths(lengths, requires.kinds, stage.global_batch, layouts, micro_batches, teacher_kinds)
    return TrainingSetup(trained, teachers, loss_calls(stage.objective, requires), work, stage.chunk_tokens,
                         recipe.precision.dtype, recipe.device)


def role_setup(recipe: Recipe, role: str, model: str, world: int) -> RoleSetup:
    """A model in a role's layout. Raises ModelError where its config.json is missing or not supported."""
    settings = recipe.role(role)
    return RoleSetup(architecture_of(recipe, model), settings.parallel, world, settings.micro_batch, settings.recompute)


FP8_ROWS = {"tensorwise": 16, "delayed": 16, "blockwise": 16, "mxfp8": 32}
"""Rows that FP8 products come in, as megatron-core's `get_fp8_align_size` has them."""


def padding_of(recipe: Recipe, setup: RoleSetup) -> Padding:
    """As `Model.padding`, without a model."""
    multiple = setup.parallel.tensor if setup.parallel.sequence else 1
    if recipe.precision.dtype == "fp8":
        multiple *= FP8_ROWS[recipe.precision.fp8_recipe]
    return Padding(multiple, uniform=setup.parallel.virtual_pipeline > 1)


def loss_calls(objective: Objective, requires: Requires) -> tuple[LossCall, ...]:
    """The calls of losses that an objective makes of a micro-batch: follows `megakd/objectives`.

    The numbers of sums are those of the row losses: log-probabilities have 2, a KL divergence 3, the advantage 4. JSD
    and AKL are counted like KL: they add up a few numbers more, in a second pass.
    """
    kinds = requires.kinds
    match objective:
        case SftObjective():
            return (LossCall(1, 2, kinds, "forward"),)
        case KdObjective() | DckdObjective():
            return (LossCall(2, 5, kinds, "forward"),)
        case AdpaObjective():
            gain = LossCall(3, 4, (Kind.ROLLOUT,), "forward")
            return (gain, LossCall(1, 2, (Kind.CHOSEN,), "forward")) if objective.sft_weight > 0 else (gain,)
        case MiniLlmObjective():
            own = (LossCall(1, 2, (Kind.ROLLOUT,), "backward"), LossCall(2, 3, (Kind.ROLLOUT,), "forward"))
            given = tuple(kind for kind in kinds if kind != Kind.ROLLOUT)
            return (*own, LossCall(1, 2, given, "forward")) if objective.lm_weight > 0 else own
    references = [LossCall(1, 2, tuple(requires.teacher_kinds[role]), "none") for role in requires.teachers]
    return (LossCall(1, 2, kinds, "backward"), *references)  # preference and ranking losses
