"""Plans of the stages that train nothing: generating, scoring and evaluating."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megakd.config import Recipe
from megakd.config_evaluation import EvalStage
from megakd.config_stages import GenerateStage, ScoreStage, TrainStage
from megakd.data.dataset import read_rows
from megakd.errors import ConfigError
from megakd.hf.pieces import check_layout
from megakd.planning.candidate import GIB, lack_of_room, layout_text, room
from megakd.planning.cluster import Cluster
from megakd.planning.inference import generation_memory, generation_time, scoring_memory, scoring_time
from megakd.planning.lengths import lengths_of, longest_prompt
from megakd.planning.memory import Memory
from megakd.planning.nodes import check_nodes, fewest_nodes
from megakd.planning.recipe_inference import (
    evaluation_memory,
    evaluation_of_stage,
    evaluation_time,
    generation_of_stage,
    scoring_of_stage,
)
from megakd.planning.setup import RoleSetup
from megakd.planning.timing import StepTime
from megakd.planning.work import Lengths

InferenceStage = GenerateStage | ScoreStage | EvalStage
MOST_NODES = 64
"""Up to where the fewest nodes are looked for: beyond a model's own size more replicas need no less memory."""


@dataclass(frozen=True)
class InferencePlan:
    """A generating, scoring or evaluating stage on a number of nodes."""

    stage: InferenceStage
    nodes: int
    world: int
    roles: Mapping[str, RoleSetup]
    """Label or role -> layout."""
    rows: int
    """Prompts or rows that it works through."""
    rows_from: str
    """Where their number comes from."""
    lengths: Lengths
    memory: Memory
    """Of the fullest rank."""
    time: StepTime
    """Of the whole stage."""
    written: float
    """Bytes of its files, where they are large."""

    @property
    def gpu_hours(self) -> float:
        """Of the whole stage."""
        return self.time.total * self.world / 3600

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "stage": self.stage.name, "kind": self.stage.kind, "nodes": self.nodes, "gpus": self.world,
            "rows": self.rows, "rows_from": self.rows_from, "lengths": vars(self.lengths),
            "layouts": {name: layout_text(role) for name, role in self.roles.items()},
            "memory": {"fullest": self.memory.fullest, "parts": self.memory.parts, "total": self.memory.total},
            "seconds": {"parts": self.time.parts, "total": self.time.total}, "gpu_hours": self.gpu_hours,
            "written_bytes": self.written,
        }


def can_be_planned(stage: object) -> bool:
    """Whether a stage is one of these: `score` stages of preferences are not (the teacher's own template lengthens
    their texts by what nobody knows beforehand)."""
    return isinstance(stage, GenerateStage | EvalStage) or (
        isinstance(stage, ScoreStage) and stage.signal.kind != "preferences")


def plan_inference(recipe: Recipe, stage: InferenceStage, cluster: Cluster, nodes: int | None, ranks_per_node: int,
                   lengths: Lengths | None) -> InferencePlan:
    """The plan of a stage that trains nothing.

    Args:
        recipe: the recipe.
        stage: one of its stages, of which `can_be_planned` is true.
        cluster: where it would run.
        nodes: that it gets; the fewest that it fits on when None.
        ranks_per_node: GPUs of a node.
        lengths: of prompts and answers; measured in the data when None. Generated answers count as long as these.

    Raises:
        ConfigError: it cannot run on these nodes or does not fit into their memory; lengths are not known.
        ModelError: a model's config.json is missing or not supported.
    """
    mean = lengths_of(recipe, (), lengths)

    def planned(count: int) -> InferencePlan:
        return _planned(recipe, stage, cluster, count, ranks_per_node, mean)

    if nodes is None:
        nodes = fewest_nodes(recipe, stage, ranks_per_node, MOST_NODES,
                             lambda count: planned(count).memory.total <= room(cluster))
    check_nodes(recipe, [stage], nodes, ranks_per_node)
    plan = planned(nodes)
    if plan.memory.total > room(cluster):
        raise _does_not_fit(recipe, stage, cluster, plan, ranks_per_node, mean)
    return plan


def _planned(recipe: Recipe, stage: InferenceStage, cluster: Cluster, nodes: int, ranks_per_node: int,
             mean: Lengths) -> InferencePlan:
    world, written = nodes * ranks_per_node, 0.0
    rows, rows_from = rows_of(recipe, held_out=isinstance(stage, EvalStage))
    longest = longest_prompt(recipe, getattr(stage, "max_new_tokens", 0), mean)
    if isinstance(stage, EvalStage):
        setup = evaluation_of_stage(recipe, stage, world, rows, mean, longest)
        roles = {label: drawn.role for label, (drawn, *_) in setup.models.items()} | setup.teachers
        memories = [evaluation_memory(setup, label, rank) for label, (drawn, *_) in setup.models.items()
                    for rank in range(drawn.role.parallel.pipeline)]
        time = evaluation_time(cluster, setup)
    elif isinstance(stage, GenerateStage):
        task = generation_of_stage(recipe, stage, world, rows, mean, longest)
        roles, time = {stage.role: task.role}, generation_time(cluster, task)
        memories = [generation_memory(task, rank) for rank in range(task.role.parallel.pipeline)]
    else:
        task = scoring_of_stage(recipe, stage, world, rows, mean)
        roles, time, written = {stage.role: task.role}, scoring_time(cluster, task), task.disk_bytes
        memories = [scoring_memory(task, rank) for rank in range(task.role.parallel.pipeline)]
    for name, role in roles.items():
        cut = role.parallel
        check_layout(role.architecture, cut.tensor, cut.pipeline, cut.virtual_pipeline, cut.pad_heads, name)
    fullest = max(memories, key=lambda memory: memory.total)
    return InferencePlan(stage, nodes, world, roles, rows, rows_from, mean, fullest, time, written)


def rows_of(recipe: Recipe, *, held_out: bool) -> tuple[int, str]:
    """The rows that a recipe's stages work through, and where their number is from: its data, or, where the files are
    not there, the steps of its trainings."""
    data = recipe.data
    files, count = (data.eval, data.eval_rows) if held_out else (data.train, data.train_rows)
    if files and all(file.exists() for file in files):
        return len(read_rows(files, count, recipe.seed, data.answer)), "the data"
    if count is not None:
        return count, "data.eval_rows" if held_out else "data.train_rows"
    if held_out:
        return max(stage.prompts for stage in recipe.stages if isinstance(stage, EvalStage)), "its prompts"
    seen = [stage.steps * stage.global_batch for stage in recipe.stages
            if isinstance(stage, TrainStage) and stage.steps is not None]
    if not seen:
        raise ConfigError("data.train_rows", None, "the files of data.train are not there, and no training says how "
                          "many rows it takes", "Give data.train_rows")
    return max(seen), "the steps of its trainings, each row seen once"


def _does_not_fit(recipe: Recipe, stage: InferenceStage, cluster: Cluster, plan: InferencePlan, ranks_per_node: int,
                  mean: Lengths) -> ConfigError:
    layouts = "; ".join(f"{name} {layout_text(role)}" for name, role in plan.roles.items())
    return ConfigError(f"stages.{stage.name}", f"{layouts}; {plan.world} GPUs",
                       lack_of_room(cluster, plan.memory, ""),
                       _fix(recipe, stage, cluster, plan, ranks_per_node, mean))


def _fix(recipe: Recipe, stage: InferenceStage, cluster: Cluster, plan: InferencePlan, ranks_per_node: int,
         mean: Lengths) -> str:
    """The fewest slots less, or a smaller micro-batch, that make it fit; else a finer cut is asked for."""
    for words, smaller, changed in _smaller(recipe, stage):
        tried = _planned(smaller, changed, cluster, plan.nodes, ranks_per_node, mean)
        if tried.memory.total <= room(cluster):
            return f"Set {words} ({tried.memory.total / GIB:.1f} GiB)"
    return "Raise parallel.tensor or parallel.pipeline of its models"


def _smaller(recipe: Recipe, stage: InferenceStage) -> Iterator[tuple[str, Recipe, InferenceStage]]:
    """The stage with half the slots, a quarter, ...; then with half the micro-batch, ...: setting, recipe, stage."""
    slots = 1 if isinstance(stage, ScoreStage) else stage.slots
    while slots > 1:
        slots //= 2
        yield f"stages.{stage.name}.slots={slots}", recipe, stage.model_copy(update={"slots": slots})
    role = "student" if isinstance(stage, EvalStage) else stage.role
    size = recipe.role(role).micro_batch
    while size > 1:
        size //= 2
        settings = recipe.role(role).model_copy(update={"micro_batch": size})
        yield f"{role}.micro_batch={size}", recipe.model_copy(update={role: settings}), stage
