"""A recipe's training stages as the planner sees them."""

from __future__ import annotations

import math
from dataclasses import replace

from megakd.batch import Kind, Padding, Step
from megakd.check import architecture_of
from megakd.check_precision import rows_multiple
from megakd.chunks import chunk_tokens_on
from megakd.config import Recipe
from megakd.config_objectives import (
    AdpaObjective,
    DckdObjective,
    KdObjective,
    MiniLlmObjective,
    Objective,
    SftObjective,
)
from megakd.config_signals import MAKER_OF
from megakd.config_stages import ScoreStage, TrainStage
from megakd.hf.families import Architecture
from megakd.objectives import build_objective
from megakd.objectives.base import Requires
from megakd.planning.lengths import cut_off, longest_answered, longest_prompt
from megakd.planning.search import Question
from megakd.planning.setup import Draws, LossCall, RoleSetup, TrainingSetup
from megakd.planning.work import Lengths, work_of_step


def setup_of_stage(recipe: Recipe, stage: TrainStage, world: int, lengths: Lengths | None = None,
                   step: Step | None = None) -> TrainingSetup:
    """The set-up of a stage on `world` ranks, in the recipe's own layouts, for a real step or for mean lengths.

    Raises:
        ModelError: a model's config.json is missing or not supported.
    """
    assert (lengths is None) != (step is None), "one of the two says what a step holds"
    question = question_of_stage(recipe, stage, world, Lengths(0, 0) if lengths is None else lengths)
    trained = role_setup(recipe, stage.trains, question.trained, world, trained=True)
    teachers = {role: role_setup(recipe, role, architecture, world)
                for role, architecture in question.teachers.items() if role not in stage.signals.stages}
    scored = {each.name: each.signal.kind for each in recipe.stages if isinstance(each, ScoreStage)}
    setup = question.setup(trained, teachers, {role: scored[name] for role, name in stage.signals.stages.items()})
    if step is None:
        return setup
    roles = {"student": trained, **teachers}
    work = work_of_step(
        step, {role: each.layout for role, each in roles.items()},
        {role: each.micro_batch for role, each in roles.items()},
        {role: padding_of(recipe, role, each) for role, each in roles.items()}, question.teacher_kinds)
    return replace(setup, work=work)


def question_of_stage(recipe: Recipe, stage: TrainStage, world: int, lengths: Lengths) -> Question:
    """What a training stage asks of a cluster, whatever its layouts.

    Raises:
        ModelError: a model's config.json is missing or not supported.
    """
    objective = stage.objective
    requires = build_objective(objective).requires
    # What is drawn while the stage trains cannot be scored before.
    drawn = [kind for kind in objective.scored if kind in MAKER_OF and MAKER_OF[kind] in stage.drawn_online]
    listed = objective.top_k if "top_k" in objective.signal_kinds else None
    signals = [] if drawn or stage.teacher_draws else [
        kind for kind in ("token_log_probs", "top_k", "hidden_states") if kind in objective.signal_kinds]
    return Question(
        trained=architecture_of(recipe, stage.init),
        teachers={role: architecture_of(recipe, recipe.teacher_model(stage, role)) for role in requires.teachers},
        kinds=_answers(recipe, stage, requires),
        teacher_kinds={role: tuple(requires.teacher_kinds[role]) for role in requires.teachers},
        losses=loss_calls(objective, requires), lengths=lengths, global_batch=stage.global_batch, world=world,
        chunk_tokens=chunk_tokens_on(recipe.device, stage.chunk_tokens), dtype=recipe.precision.dtype,
        device=recipe.device, signal=signals[0] if signals else None, listed=listed or 0, trains=stage.trains,
        precision=recipe.precision, overlap=stage.optimizer.overlap is not False, offload=stage.optimizer.offload,
        draws=draws_of_stage(recipe, stage, world, lengths),
    )


def draws_of_stage(recipe: Recipe, stage: TrainStage, world: int, lengths: Lengths) -> Draws | None:
    """What a training stage draws between its steps; None where all its answers are there before.

    Raises:
        ModelError: a model's config.json is missing or not supported.
    """
    online = stage.online
    if online is None:
        return None
    requires = build_objective(stage.objective).requires
    prompts = stage.global_batch * (online.every // online.passes)
    if recipe.data.train_rows is not None:
        prompts = min(prompts, recipe.data.train_rows)  # none is asked twice
    # With `on_policy` a row has the student's answers or the others.
    shares = {"rollouts": requires.on_policy or 1.0, "teacher_answers": 1.0 - requires.on_policy}
    asked = {name: math.ceil(share * prompts) if name in stage.drawn_online else 0 for name, share in shares.items()}
    teacher = None
    if stage.teacher_draws and ("teacher" not in requires.teachers or "teacher" in stage.signals.stages):
        teacher = role_setup(recipe, "teacher", architecture_of(recipe, recipe.teacher.model), world)
    longest = longest_answered(recipe, architecture_of(recipe, stage.init),
                               longest_prompt(recipe, online.max_new_tokens, lengths), online.max_new_tokens)
    recorded = {"student": recipe.role(stage.trains).decode_graphs, "teacher": recipe.teacher.decode_graphs}
    replayed = tuple(who for who, is_so in recorded.items() if is_so)
    return Draws(online.every, asked["rollouts"], asked["teacher_answers"], online.n, online.slots,
                 cut_off(lengths, longest), longest, online.temperature > 0, online.top_k, online.top_p < 1,
                 online.teacher_mix > 0, requires.draws, replayed, teacher)


def _answers(recipe: Recipe, stage: TrainStage, requires: Requires) -> tuple[Kind, ...]:
    """Kinds of a group's sequences, a generated kind as often as there are answers of it."""
    stages = {each.name: each for each in recipe.stages}
    kinds: list[Kind] = []
    for kind in requires.kinds:
        name = MAKER_OF.get(kind.name.lower())
        maker = None if name is None else stage.online if name in stage.drawn_online else stages[getattr(stage, name)]
        kinds += [kind] * (1 if maker is None else maker.answers)
    return tuple(kinds)


def role_setup(recipe: Recipe, role: str, architecture: Architecture, world: int, *,
               trained: bool = False) -> RoleSetup:
    """A model in a role's layout, that is trained or only runs forward."""
    settings = recipe.role(role)
    return RoleSetup(architecture, settings.cut(trained=trained), world, settings.micro_batch, settings.recompute,
                     recipe.precision.holds_fp8_weights(trained=trained))


def padding_of(recipe: Recipe, role: str, setup: RoleSetup) -> Padding:
    """As `Model.padding`, without a model; the trained one's role is "student", which has no graphs."""
    rows, settings = rows_multiple(recipe.precision, setup.parallel), recipe.role(role)
    if settings.cuda_graphs:
        return Padding(math.lcm(rows, settings.graph_tokens), few=True)
    return Padding(rows, uniform=setup.parallel.virtual_pipeline > 1)


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
