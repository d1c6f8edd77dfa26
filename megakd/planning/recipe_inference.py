"""A recipe's stages that train nothing, as the planner sees them.

Not here: `score` stages of preferences, which read texts by the teacher's own template, and the stages that answer
benchmarks or call lm-eval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megakd.batch import Kind
from megakd.check import architecture_of
from megakd.chunks import chunk_tokens_on
from megakd.config import Recipe
from megakd.config_evaluation import EvalStage
from megakd.config_signals import MAKER_OF, HiddenStatesSignal, TokenLogProbsSignal, TopKSignal
from megakd.config_stages import GenerateStage, ScoreStage
from megakd.data.signals import MICRO_BATCHES
from megakd.errors import ConfigError
from megakd.hf.families import Architecture
from megakd.planning.cluster import Cluster
from megakd.planning.inference import (
    Generation,
    Scoring,
    answering,
    generation_memory,
    generation_time,
    scoring_memory,
    scoring_time,
)
from megakd.planning.lengths import cut_off, longest_answered
from megakd.planning.memory import Memory
from megakd.planning.recipe import role_setup
from megakd.planning.setup import STATISTICS_BYTES, RoleSetup
from megakd.planning.sizes import head_columns
from megakd.planning.timing import StepTime
from megakd.planning.work import Lengths, MicroBatch

ID_BYTES = 4
"""Of a listed token's id on disk."""


def generation_of_stage(recipe: Recipe, stage: GenerateStage, world: int, prompts: int, mean: Lengths,
                        longest_prompt: int) -> Generation:
    """A `generate` stage on `world` ranks.

    Args:
        recipe: the run.
        stage: one of its stages.
        world: number of ranks.
        prompts: that are answered.
        mean: lengths of prompts and answers.
        longest_prompt: in tokens. An answer may have what the stage and the model's context leave it.

    Raises:
        ModelError: the model's config.json is missing or not supported.
    """
    role = answering(role_setup(recipe, stage.role, architecture_of(recipe, stage.model), world))
    longest = longest_answered(recipe, role.architecture, longest_prompt, stage.max_new_tokens)
    return Generation(role, stage.slots, prompts, stage.n, cut_off(mean, longest), longest, stage.temperature > 0,
                      stage.top_k, stage.top_p < 1, recipe.precision.dtype, recipe.device,
                      recipe.role(stage.role).decode_graphs)


def scoring_of_stage(recipe: Recipe, stage: ScoreStage, world: int, rows: int, mean: Lengths) -> Scoring:
    """A `score` stage on `world` ranks; each row has one answer of a kind, or as many as their stage has written.

    Raises:
        ConfigError: a stage of preferences.
        ModelError: the model's config.json is missing or not supported.
    """
    role = role_setup(recipe, stage.role, architecture_of(recipe, stage.model), world)
    names = [getattr(stage, MAKER_OF[kind]) if kind in MAKER_OF else None for kind in stage.answers]
    written = {each.name: each.answers for each in recipe.stages if isinstance(each, GenerateStage)}
    # One group a kind, with all of a row's answers of it.
    answers = sum(1 if name is None else written[name] for name in names) / len(names)
    work = _micro_batch(role, mean, answers)
    return Scoring(role, MICRO_BATCHES * role.parallel.pipeline, rows * len(names), work,
                   _row_bytes(recipe, stage, role.architecture), not isinstance(stage.signal, HiddenStatesSignal),
                   not isinstance(stage.signal, TopKSignal), chunk_tokens_on(recipe.device, stage.chunk_tokens),
                   recipe.precision.dtype, recipe.device)


def _micro_batch(role: RoleSetup, mean: Lengths, answers: float) -> MicroBatch:
    """Of the mean lengths, with some answers in each group."""
    count, length = role.micro_batch * answers, mean.prompt + mean.answer
    return MicroBatch(count * length, count * length * (length + 1) / 2, {Kind.CHOSEN: count * mean.answer})


def _row_bytes(recipe: Recipe, stage: ScoreStage, architecture: Architecture) -> int:
    """What a stage writes of a loss position: the columns of `teacher/scoring.py`."""
    match stage.signal:
        case HiddenStatesSignal():
            return architecture.hidden_size * (4 if recipe.precision.dtype == "fp32" else 2)
        case TokenLogProbsSignal():
            return STATISTICS_BYTES
        case TopKSignal(k=k, at=None):
            return k * (ID_BYTES + STATISTICS_BYTES)
        case TopKSignal(at=name):
            (lister,) = (each for each in recipe.stages if each.name == name)
            return lister.signal.k * STATISTICS_BYTES
    raise ConfigError(f"stages.{stage.name}.signal.kind", stage.signal.kind, "the planner does not know its cost",
                      "Plan the other stages")


# ---------------------------------------------------------------------------------------------------------- evaluating
@dataclass(frozen=True)
class EvaluationSetup:
    """An `eval` stage: every model is loaded in its turn, teacher and reference stay."""

    models: dict[str, tuple[Generation, Scoring, Scoring]]
    """Label -> the model's own answers, its pass over the held-out rows, its pass over its answers."""
    teachers: dict[str, RoleSetup]
    given: dict[str, Scoring]
    """Role -> its pass over the held-out rows, once for all models."""
    own: dict[str, Scoring]
    """Role -> its pass over the answers of one model."""
    seeds: int
    """Times that each model answers, one after the other, and that its answers are passed over."""


def evaluation_of_stage(recipe: Recipe, stage: EvalStage, world: int, rows: int, mean: Lengths,
                        longest_prompt: int) -> EvaluationSetup:
    """An `eval` stage on `world` ranks.

    Args:
        recipe: the run.
        stage: one of its stages.
        world: number of ranks.
        rows: held out, with two answers each.
        mean: lengths of prompts and answers, the models' own among them.
        longest_prompt: in tokens.

    Raises:
        ModelError: a model's config.json is missing or not supported.
    """
    seeds, sampling = (1, None) if stage.sampling is None else (len(stage.sampling.seeds), stage.sampling)
    prompts = min(stage.prompts, rows)
    models = {}
    for label, model in stage.models.items():
        role = role_setup(recipe, "student", architecture_of(recipe, model), world)
        longest = longest_answered(recipe, role.architecture, longest_prompt, stage.max_new_tokens)
        drawn = Generation(answering(role), stage.slots, prompts, 1, cut_off(mean, longest), longest,
                           sampling is not None, sampling.top_k if sampling else 0,
                           sampling is not None and sampling.top_p < 1, recipe.precision.dtype, recipe.device,
                           recipe.student.decode_graphs)
        models[label] = (drawn, _pass(recipe, stage, role, rows, mean, 2), _pass(recipe, stage, role, prompts, mean, 1))
    teachers = {name: role_setup(recipe, name, architecture_of(recipe, recipe.role(name).model), world)
                for name in ("teacher", "reference") if stage.teacher}
    given = {name: _pass(recipe, stage, role, rows, mean, 1) for name, role in teachers.items() if name == "teacher"}
    own = {name: _pass(recipe, stage, role, prompts, mean, 1) for name, role in teachers.items()}
    return EvaluationSetup(models, teachers, given, own, seeds)


def _pass(recipe: Recipe, stage: EvalStage, role: RoleSetup, groups: int, mean: Lengths, answers: int) -> Scoring:
    """A forward pass over groups: all in one step, whose hidden states are held together."""
    micro_batches = math.ceil(groups / (role.layout.data * role.micro_batch))
    return Scoring(role, micro_batches, groups, _micro_batch(role, mean, answers), 0, True, True,
                   chunk_tokens_on(recipe.device, stage.chunk_tokens), recipe.precision.dtype, recipe.device)


def evaluation_memory(setup: EvaluationSetup, label: str, pipeline_rank: int) -> Memory:
    """Memory of a rank that holds `pipeline_rank` of the model under `label`, with teacher and reference beside it.

    Those are counted as on their own stage with most, as in `training_memory`, and their passes at their fullest.
    """
    drawn, held, answered = setup.models[label]
    generating = generation_memory(drawn, pipeline_rank)
    cache = {"keys and values": generating.kept["keys and values"]}
    kept = {"weights": generating.kept["weights"]}
    phases = {f"answers: {name}": cache | parts for name, parts in generating.phases.items()}
    for name, task in (("held out", held), ("own answers", answered)):
        phases |= {f"{name}: {phase}": parts for phase, parts in scoring_memory(task, pipeline_rank).phases.items()}
    last = pipeline_rank == drawn.role.parallel.pipeline - 1
    number = 4 if drawn.dtype == "fp32" else 2
    for name, role in setup.teachers.items():
        stages = [scoring_memory(setup.own[name], stage) for stage in set(role.alike)]
        kept[f"{name}: weights"] = max(memory.kept["weights"] for memory in stages)
        phases |= {f"{name}: {phase}": parts for memory in stages for phase, parts in memory.phases.items()}
        if last:
            columns = head_columns(role.architecture, drawn.role.parallel.tensor)
            kept[f"{name}: head for the loss"] = columns * role.architecture.hidden_size * number
    if last and "teacher" in setup.given:
        task = setup.given["teacher"]
        rows = task.micro_batches * task.work.all_rows * task.role.layout.data / drawn.role.layout.data
        kept["teacher: hidden states"] = rows * task.role.architecture.hidden_size * number
    return Memory(kept, phases)


def evaluation_time(cluster: Cluster, setup: EvaluationSetup) -> StepTime:
    """Seconds of the whole stage, without loading models and without the way of the teachers' hidden states."""
    parts = {f"{role}: held out": scoring_time(cluster, task).total for role, task in setup.given.items()}
    for label, (drawn, held, answered) in setup.models.items():
        parts[f"{label}: answers"] = setup.seeds * generation_time(cluster, drawn).total
        own = sum(scoring_time(cluster, task).total for task in (answered, *setup.own.values()))
        parts[f"{label}: scores"] = scoring_time(cluster, held).total + setup.seeds * own
    return StepTime(parts)
