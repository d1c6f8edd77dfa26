"""What has to fit together between the sections of a recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megakd.config_base import MODEL_OF_RUN
from megakd.config_evaluation import AnsweringStage, EvalStage, LmEvalStage
from megakd.config_precision import check_graphs, check_precision
from megakd.config_signal_checks import check_names_stage, check_score_stage, check_signals
from megakd.config_stages import AnyStage, ExportStage, GenerateStage, OnlineAnswers, ScoreStage, TrainStage
from megakd.errors import ConfigError

if TYPE_CHECKING:
    from megakd.config import Parallel, Recipe


def roles_of(stage: AnyStage) -> tuple[str, ...]:
    """Roles whose layouts a stage runs in. The student's is always one: megatron-core is set up for its sizes."""
    match stage:
        case TrainStage():
            # A role that is read from disk runs in no layout, unless it also draws answers.
            roles = (stage.trains, *(role for role in stage.roles
                                     if role not in stage.signals.stages or stage.online is not None))
        case GenerateStage() | ScoreStage():
            roles = (stage.role,)
        case EvalStage(teacher=True):
            roles = ("teacher", "reference")
        case _:
            roles = ()
    return tuple(role for role in ("student", "teacher", "reference") if role == "student" or role in roles)


def trains(stage: AnyStage, role: str) -> bool:
    """Whether a stage trains a model in a role's layout."""
    return isinstance(stage, TrainStage) and stage.trains == role


def check_world(recipe: Recipe, world: int, only: Sequence[str] = ()) -> None:
    """Checks the layouts of all stages, or of those in `only`, against the number of ranks and what they do in them.

    Raises:
        ConfigError: naming the role's or stage's field.
    """
    stages = [stage for stage in recipe.stages if not only or stage.name in only]
    for name in ("student", "teacher", "reference"):
        parallel = recipe.role(name).cut(trained=any(trains(stage, name) for stage in stages))
        if any(name in roles_of(stage) for stage in stages) and world % parallel.ranks != 0:
            raise ConfigError(
                f"{name}.parallel",
                f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}",
                f"{parallel.ranks} ranks for one copy do not divide the world of {world} ranks",
                f"Start a multiple of {parallel.ranks} ranks (`processes`), or choose sizes whose product divides "
                f"{world}",
            )
    for stage in stages:
        if isinstance(stage, TrainStage):
            _check_global_batch(recipe, stage, world)


def batch_multiple(parallel: Parallel, micro_batch: int, world: int) -> int:
    """Groups that a step of a role has to be a multiple of: whole micro-batches on each replica; and as many as there
    are stages, where the schedule is interleaved."""
    rounds = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
    return world // parallel.ranks * micro_batch * rounds


def _check_global_batch(recipe: Recipe, stage: TrainStage, world: int) -> None:
    """A step has to fill whole micro-batches of every role that takes part, on each of its replicas."""
    multiples: dict[str, int] = {}
    rules: dict[str, str] = {}
    # A role that is read from disk fills no micro-batches.
    online = [role for role in stage.objective.roles if role not in stage.signals.stages]
    for name in (stage.trains, *online):
        role = recipe.role(name)
        parallel = role.cut(trained=trains(stage, name))
        multiples[name] = batch_multiple(parallel, role.micro_batch, world)
        data = world // parallel.ranks
        rules[name] = f"{name}'s data-parallel size {data} x {name}.micro_batch {role.micro_batch}"
        if parallel.virtual_pipeline > 1:
            rules[name] += f" x its pipeline size {parallel.pipeline} (the interleaved schedule)"
    fitting = math.lcm(*multiples.values())
    for name, multiple in multiples.items():
        if stage.global_batch % multiple != 0:
            raise ConfigError(
                f"stages.{stage.name}.global_batch", stage.global_batch, f"has to be a multiple of {rules[name]}",
                f"Use {-(-stage.global_batch // fitting) * fitting}, or another {name}.micro_batch",
            )


def check_stages(recipe: Recipe) -> None:
    """Checks that hold without knowing the world: names, the order of stages, precision and device."""
    names: set[str] = set()
    saved: set[str] = set()
    earlier: dict[str, AnyStage] = {}
    for stage in recipe.stages:
        if stage.name in names:
            raise ConfigError(f"stages.{stage.name}.name", stage.name, "two stages have this name", "Rename one")
        names.add(stage.name)
        for field, model in _models_of(recipe, stage):
            _check_is_made(recipe, stage, field, model, saved)
        if isinstance(stage, TrainStage | ExportStage):
            _check_save_as(recipe, stage, saved)
            saved.add(stage.save_as)
        if isinstance(stage, GenerateStage):
            _check_generate_stage(stage.name, stage)
            if stage.keep is not None and stage.keep > stage.n:
                raise ConfigError(f"stages.{stage.name}.keep", stage.keep, f"only {stage.n} are drawn",
                                  "Raise n or lower keep")
        if isinstance(stage, EvalStage):
            _check_eval_stage(stage)
        if isinstance(stage, ScoreStage):
            check_score_stage(stage, earlier)
        if isinstance(stage, TrainStage):
            _check_train_stage(recipe, stage, earlier)
            check_signals(recipe, stage, earlier)
        earlier[stage.name] = stage
    for role in ("student", "teacher", "reference"):
        model = recipe.role(role).model
        if model.startswith(MODEL_OF_RUN) and model.removeprefix(MODEL_OF_RUN) not in saved:
            raise ConfigError(f"{role}.model", model, "no stage saves a model under this name",
                              f"Stages save: {', '.join(sorted(saved)) or 'none'}")
    check_precision(recipe)
    check_graphs(recipe)
    for role in ("student", "teacher", "reference"):
        check_parallel(role, recipe.role(role).parallel)


def _models_of(recipe: Recipe, stage: AnyStage) -> list[tuple[str, str]]:
    """The models that a stage reads: (field that names it, model)."""
    field = f"stages.{stage.name}"
    match stage:
        case TrainStage():
            return [(f"{field}.init", stage.init),
                    *((f"{field}.reference" if role == "reference" and stage.reference is not None else f"{role}.model",
                       recipe.teacher_model(stage, role)) for role in stage.roles)]
        case GenerateStage() | ScoreStage() | ExportStage():
            return [(f"{field}.model", stage.model)]
        case EvalStage() | AnsweringStage() | LmEvalStage():
            roles = ("teacher", "reference") if isinstance(stage, EvalStage) and stage.teacher else ()
            return [*((f"{field}.models.{label}", model) for label, model in stage.models.items()),
                    *((f"{role}.model", recipe.role(role).model) for role in roles)]
        case _:
            return []


def _check_is_made(recipe: Recipe, stage: AnyStage, field: str, model: str, saved: set[str]) -> None:
    """A model of the run exists only after the stage that saves it."""
    name = model.removeprefix(MODEL_OF_RUN)
    if not model.startswith(MODEL_OF_RUN) or name in saved:
        return
    fix = f"Earlier stages save: {', '.join(sorted(saved)) or 'none'}"
    for maker in recipe.stages:
        if isinstance(maker, TrainStage | ExportStage) and maker.save_as == name and maker.name != stage.name:
            fix = f"Move {maker.name!r}, which saves it, before {stage.name!r}"
    rule = f"the stage {stage.name!r} reads it, and no earlier stage saves a model as {name!r}"
    raise ConfigError(field, model, rule, fix)


def _check_save_as(recipe: Recipe, stage: TrainStage | ExportStage, saved: set[str]) -> None:
    """A stage replaces its model's directory when it is made again, so nothing that was given may lie there."""
    field = f"stages.{stage.name}.save_as"
    if stage.save_as in saved:
        raise ConfigError(field, stage.save_as, "an earlier stage saves a model by this name", "Choose another name")
    target = recipe.path_of_model(MODEL_OF_RUN + stage.save_as).resolve()
    read = [recipe.role(role).model for role in ("student", "teacher", "reference")]
    read += [model for other in recipe.stages for _, model in _models_of(recipe, other)]
    for model in read:
        if not model.startswith(MODEL_OF_RUN) and Path(model).resolve().is_relative_to(target):
            fix = f"Choose another name, or write {MODEL_OF_RUN}{stage.save_as} there if this stage's model is meant"
            raise ConfigError(field, stage.save_as, f"it would overwrite {model}, which the run reads", fix)


OBJECTIVES_OF = {"sft": ("sft",), "dpo": ("dpo", "ipo", "cpo", "simpo")}
"""What a training stage of a kind may have as its objective; one of kind `distill` any."""
MAKERS = {"rollouts": "generate", "teacher_answers": "generate", "scores": "score"}
"""Settings of a training stage that name an earlier stage, and that one's kind."""


def _check_train_stage(recipe: Recipe, stage: TrainStage, earlier: dict[str, AnyStage]) -> None:
    field, kind = f"stages.{stage.name}", stage.objective.kind
    if stage.kind in OBJECTIVES_OF and kind not in OBJECTIVES_OF[stage.kind]:
        rule = f"a stage of kind {stage.kind!r} takes {', '.join(OBJECTIVES_OF[stage.kind])}"
        raise ConfigError(f"{field}.objective.kind", kind, rule, "Change the stage's kind or its objective")
    if (stage.steps is None) == (stage.tokens is None):
        found = "both are" if stage.tokens is not None else "neither is"
        raise ConfigError(f"{field}.steps", stage.steps, f"a training stage takes either steps or tokens, and {found} "
                          f"given (tokens = {stage.tokens})", f"Write {field}.steps or {field}.tokens, not both")
    if stage.reference is not None and "reference" not in stage.objective.roles:
        raise ConfigError(f"{field}.reference", stage.reference,
                          f"the objective {kind!r} takes no reference, as it is set", "Leave it out")
    for name, maker in MAKERS.items():
        value = getattr(stage, name)
        if name in stage.drawn_online:
            continue
        if name in stage.objective.inputs:
            check_names_stage(f"{field}.{name}", value, maker, earlier)
        elif value is not None:
            raise ConfigError(f"{field}.{name}", value, f"the objective {kind!r} takes no {name}, as it is set",
                              "Leave it out")
    if stage.scores is not None and earlier[stage.scores].signal.kind != "preferences":
        raise ConfigError(f"{field}.scores", stage.scores, f"that stage writes {earlier[stage.scores].signal.kind}",
                          "Name a score stage with signal: {kind: preferences}")
    if stage.scores is not None and earlier[stage.scores].rollouts != stage.rollouts:
        rule = f"it scores the rollouts of {earlier[stage.scores].rollouts!r}, this stage trains on {stage.rollouts!r}"
        raise ConfigError(f"{field}.scores", stage.scores, rule, "Name the same rollouts in both")
    if stage.online is not None:
        _check_online(stage)
    makers = {name: stage.online if name in stage.drawn_online else earlier[getattr(stage, name)]
              for name in stage.objective.inputs}
    if kind == "pad" and makers["rollouts"].answers < 2:
        raise ConfigError(f"stages.{stage.rollouts}.n", makers["rollouts"].answers,
                          "preferences over a prompt's answers need at least 2", "Write n: 4, temperature: 1.0")
    if kind == "pad" and stage.objective.loss == "probabilistic" and makers["rollouts"].answers > 6:
        raise ConfigError(f"stages.{stage.rollouts}.n", makers["rollouts"].answers, "the probabilistic loss counts all "
                          "rankings: at most 6 answers", "Keep fewer, or write loss: vanilla")
    if kind == "dpkd" and makers["rollouts"].answers != makers["teacher_answers"].answers:
        rule = ("each of the student's answers is paired with one of the teacher's, of which there are "
                f"{makers['teacher_answers'].answers}")
        raise ConfigError(_field_of_n(stage, "rollouts"), makers["rollouts"].answers, rule, "Give both the same n")
    if stage.objective.reads_text and not recipe.data.text:
        raise ConfigError("data.text", [], f"the objective of {stage.name!r} takes pre-training text, and no file is "
                          "named", "Name files of rows with a field text, or write lm_on: chosen")
    if stage.optimizer.min_lr > stage.optimizer.lr:
        raise ConfigError(f"{field}.optimizer.min_lr", stage.optimizer.min_lr,
                          f"has to be at most lr, {stage.optimizer.lr}", "Lower it or raise lr")
    if kind == "minillm" and "rollouts" not in stage.drawn_online:
        raise ConfigError(f"{field}.online", stage.online, "a policy gradient needs answers of the student as it is",
                          "Write online: {every: 4, passes: 4, teacher_mix: 0.2} in place of rollouts")
    if stage.trains == "teacher" and "teacher" in stage.roles:
        raise ConfigError(f"{field}.trains", "teacher", "a teacher cannot be distilled from itself",
                          "Write trains: student")


def _field_of_n(stage: TrainStage, name: str) -> str:
    """The setting that says how many answers there are to a prompt."""
    maker = f"{stage.name}.online" if name in stage.drawn_online else getattr(stage, name)
    return f"stages.{maker}.n"


def _check_online(stage: TrainStage) -> None:
    field, online = f"stages.{stage.name}.online", stage.online
    if not stage.drawn_online:
        rule = f"the objective {stage.objective.kind!r} takes no answers that are still to be drawn"
        raise ConfigError(field, "set", rule, "Leave it out, or leave out the stage that already draws them")
    if stage.objective.kind == "pad":
        raise ConfigError(field, "set", "the teacher's scores come from a stage, and so must the answers",
                          "Name a generate stage in rollouts")
    if online.every % online.passes != 0:
        rule = f"has to divide every, {online.every}: a draw is gone over a whole number of times"
        raise ConfigError(f"{field}.passes", online.passes, rule,
                          f"Write every: {-(-online.every // online.passes) * online.passes}")
    if stage.checkpoint_every % online.every != 0:
        fitting = -(-stage.checkpoint_every // online.every) * online.every
        raise ConfigError(f"stages.{stage.name}.checkpoint_every", stage.checkpoint_every, "has to be a multiple of "
                          f"online.every, {online.every}: answers cannot be drawn again from weights that have moved",
                          f"Write {fitting}")
    if stage.tokens is not None:
        raise ConfigError(f"stages.{stage.name}.tokens", stage.tokens, "how many steps that takes is not known before "
                          "the answers are drawn", f"Write stages.{stage.name}.steps")
    _check_generate_stage(f"{stage.name}.online", online)
    if online.teacher_mix > 0 and "rollouts" not in stage.drawn_online:
        raise ConfigError(f"{field}.teacher_mix", online.teacher_mix, "the student draws no answers here",
                          "Leave it out")
    if stage.objective.kind == "minillm" and (online.temperature, online.top_k, online.top_p) != (1.0, 0, 1.0):
        found = f"temperature {online.temperature}, top_k {online.top_k}, top_p {online.top_p}"
        raise ConfigError(field, found, "a policy gradient needs draws from the models' own distributions",
                          "Write temperature: 1.0, top_k: 0, top_p: 1.0")


def _check_generate_stage(name: str, settings: GenerateStage | OnlineAnswers) -> None:
    if settings.n > 1 and settings.temperature == 0:
        raise ConfigError(f"stages.{name}.n", settings.n, "greedy decoding (temperature 0) gives n equal answers",
                          "Write n: 1, or a temperature above 0")


def _check_eval_stage(stage: EvalStage) -> None:
    seeds = () if stage.sampling is None else stage.sampling.seeds
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"stages.{stage.name}.sampling.seeds", list(seeds), "the same seed gives the same answers",
                          "Name each seed once")


def check_parallel(name: str, parallel: Parallel) -> None:
    """Checks the sizes of a role's layout against one another. Raises ConfigError."""
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError(f"{name}.parallel.sequence", True, "sequence parallelism needs tensor > 1",
                          f"Raise {name}.parallel.tensor or leave it out")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise ConfigError(f"{name}.parallel.virtual_pipeline", parallel.virtual_pipeline,
                          "interleaving needs pipeline > 1", f"Raise {name}.parallel.pipeline or leave it out")
