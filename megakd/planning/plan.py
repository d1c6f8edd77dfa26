"""What each stage of a recipe needs and takes on a cluster, as it is and at its best: the command `megakd plan`.

Needs the models' config.json; of data and tokenizer only where lengths are to be measured; no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megakd.check_precision import check_sizes
from megakd.config import Recipe
from megakd.config_checks import roles_of
from megakd.config_stages import ScoreStage, TrainStage
from megakd.errors import ConfigError
from megakd.hf.pieces import check_layout
from megakd.objectives import build_objective
from megakd.planning.candidate import GIB, Candidate, lack_of_room, layout_text
from megakd.planning.cluster import Cluster
from megakd.planning.lengths import lengths_of, longest_of
from megakd.planning.nearest import changes_between, smallest_change
from megakd.planning.nodes import check_nodes, fewest_nodes
from megakd.planning.plan_inference import InferencePlan, can_be_planned, plan_inference
from megakd.planning.recipe import question_of_stage, setup_of_stage
from megakd.planning.search import Limits, Question, check_arithmetic, search
from megakd.planning.setup import Draws
from megakd.planning.timing import uneven_within
from megakd.planning.work import Lengths

MOST_NODES = 2048
"""Up to where the fewest nodes are looked for."""


@dataclass(frozen=True)
class TrainingPlan:
    """A training stage on a number of nodes."""

    stage: TrainStage
    nodes: int
    question: Question
    own: Candidate
    """The recipe's layout."""
    longest: float
    """Bytes of its fullest rank where all sequences are as long as `data.max_length` allows."""
    best: tuple[Candidate, ...]
    """The best layouts found, best first."""
    notes: tuple[str, ...]
    """What the numbers leave out, and what to heed."""

    @property
    def steps(self) -> int:
        """Of the whole stage."""
        if self.stage.steps is not None:
            return self.stage.steps
        return math.ceil(self.stage.tokens / self.own.setup.work.tokens)

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "stage": self.stage.name, "kind": self.stage.kind, "objective": self.stage.objective.kind,
            "nodes": self.nodes, "gpus": self.question.world, "steps": self.steps,
            "global_batch": self.stage.global_batch, "tokens_per_step": self.own.setup.work.tokens,
            "lengths": vars(self.question.lengths), "notes": list(self.notes),
            "longest_sequences_bytes": self.longest,
            "own": self._numbers(self.own), "best": [self._numbers(each) for each in self.best],
        }

    def _numbers(self, candidate: Candidate) -> dict[str, Any]:
        return candidate.as_dict() | {
            "gpu_hours": candidate.gpu_hours(self.steps), "hours": self.steps * candidate.seconds / 3600,
            "changes": changes_between(self.own, candidate, self.question.trains)}


def plan_recipe(recipe: Recipe, cluster: Cluster, nodes: Mapping[str, int] | None, lengths: Lengths | None,
                best: int) -> list[TrainingPlan | InferencePlan]:
    """Plans of a recipe's stages: of those that train, generate, score or evaluate.

    Args:
        recipe: the recipe.
        cluster: where it would run.
        nodes: nodes of each stage that is to be planned; each stage's fewest when None.
        lengths: of prompts and answers; measured in the data when None.
        best: how many layouts to look for besides the recipe's own, of trainings.

    Raises:
        ConfigError: a stage cannot run on these nodes or does not fit into their memory, with the smallest change that
            helps; lengths are neither given nor can be measured.
        ModelError: a model's config.json is missing or not supported.
    """
    if recipe.precision.emulate:
        raise ConfigError("precision.emulate", True, "an emulation is float32 arithmetic, of which a plan in FP8 says "
                          "nothing", "Write false and device: cuda to plan for FP8 hardware")
    plans: list[TrainingPlan | InferencePlan] = []
    for stage in recipe.stages:
        if nodes is not None and stage.name not in nodes:
            continue
        where = (cluster, None if nodes is None else nodes[stage.name], cluster.devices_per_node, lengths)
        if isinstance(stage, TrainStage):
            plans.append(plan_training(recipe, stage, *where, best))
        elif can_be_planned(stage):
            plans.append(plan_inference(recipe, stage, *where))
    return plans


def plan_training(recipe: Recipe, stage: TrainStage, cluster: Cluster, nodes: int | None, ranks_per_node: int,
                  lengths: Lengths | None, best: int) -> TrainingPlan:
    """The plan of a training stage; the arguments and errors are those of `plan_recipe`."""
    check_models(recipe, stage)
    mean = lengths_of(recipe, build_objective(stage.objective).requires.kinds, lengths)
    if nodes is None:
        nodes = fewest_nodes(
            recipe, stage, ranks_per_node, MOST_NODES,
            lambda count: Candidate(cluster, setup_of_stage(recipe, stage, count * ranks_per_node, mean)).fits,
        )
    check_nodes(recipe, [stage], nodes, ranks_per_node)
    question = question_of_stage(recipe, stage, nodes * ranks_per_node, mean)
    check_arithmetic(question, cluster)
    own = Candidate(cluster, setup_of_stage(recipe, stage, question.world, mean))
    if not own.fits:
        raise does_not_fit(recipe, stage, question, own)
    found = tuple(search(question, cluster, Limits(best=best)) if best > 0 else ())
    longest = Candidate(cluster, setup_of_stage(recipe, stage, question.world, longest_of(recipe, mean)))
    return TrainingPlan(stage, nodes, question, own, longest.memory.total, found,
                        notes_on(recipe, stage, own, longest))


def check_models(recipe: Recipe, stage: TrainStage) -> None:
    """Refuses layouts that the models of a stage cannot be cut into. Raises ConfigError and ModelError."""
    question = question_of_stage(recipe, stage, 1, Lengths(0, 0))
    named = {stage.trains: question.trained} | {
        role: architecture for role, architecture in question.teachers.items() if role in roles_of(stage)}
    if question.draws is not None and question.draws.teacher is not None:
        named["teacher"] = question.draws.teacher.architecture
    for name, architecture in named.items():
        cut = recipe.role(name).parallel
        check_layout(architecture, cut.tensor, cut.pipeline, cut.virtual_pipeline, cut.pad_heads, name)
        check_sizes(architecture, cut, recipe.precision, name)


def does_not_fit(recipe: Recipe, stage: TrainStage, question: Question, own: Candidate) -> ConfigError:
    """The refusal of a layout that needs more memory than there is: which part is the largest, and what helps."""
    rule = lack_of_room(own.cluster, own.memory, f"pipeline rank {own.pipeline_rank}, ")
    scored = {each.name: each.signal.kind for each in recipe.stages if isinstance(each, ScoreStage)}
    stored = {role: scored[name] for role, name in stage.signals.stages.items()}
    change = smallest_change(question, own, stored, Limits())
    ways = []
    if (fewer := fewer_slots(own)) is not None:
        ways.append(f"stages.{stage.name}.online.slots={fewer.setup.draws.slots} ({fewer.memory.total / GIB:.1f} GiB, "
                    f"{fewer.seconds:.3g} s a step)")
    if change is not None:
        settings = " ".join(changes_between(own, change, question.trains))
        ways.append(f"{settings} ({change.memory.total / GIB:.1f} GiB, {change.seconds:.3g} s a step)")
    offloading = Candidate(own.cluster, replace(own.setup, offload=True))
    if offloading.fits:
        ways.append(f"stages.{stage.name}.optimizer.offload=true ({offloading.memory.total / GIB:.1f} GiB, "
                    f"{offloading.memory.host / GIB:.1f} GiB of the host's memory a GPU)")
    fix = f"Set {', or '.join(ways)}" if ways else _other_ways(question, own)
    roles = "; ".join(f"{stage.trains if name == 'student' else name} {layout_text(role)}"
                      for name, role in own.roles.items())
    return ConfigError(f"stages.{stage.name}", f"{roles}; {question.world} GPUs", rule, fix)


def fewer_slots(own: Candidate) -> Candidate | None:
    """The layout with half the rows that decode at a time, a quarter, ...: the first that fits."""
    slots = 1 if own.setup.draws is None else own.setup.draws.slots
    while slots > 1:
        slots //= 2
        tried = replace(own, setup=replace(own.setup, draws=replace(own.setup.draws, slots=slots)))
        if tried.fits:
            return tried
    return None


def _other_ways(question: Question, own: Candidate) -> str:
    """What helps where no few changes do."""
    found = search(question, own.cluster, Limits(best=1))
    if not found:
        return f"No layout of these models fits on {question.world} GPUs: give it more nodes"
    quickest = found[0]
    return f"Set {' '.join(changes_between(own, quickest, question.trains))}" + (
        ", with the teachers scored beforehand" if quickest.scoring else "")


def notes_on(recipe: Recipe, stage: TrainStage, own: Candidate, longest: Candidate) -> tuple[str, ...]:
    """What a reader of a plan has to know besides; `own` is the recipe's layout, `longest` the same with the longest
    sequences."""
    notes = []
    for name, role in longest.roles.items():
        layers, cut = role.architecture.layers, role.parallel
        if uneven_within(layers, cut.pipeline, cut.virtual_pipeline):
            notes.append(f"{stage.trains if name == 'student' else name}: {layers} layers make {cut.pipeline} x "
                         f"{cut.virtual_pipeline} parts of unequal sizes, which wait for each other; that time is not "
                         "counted")
    if not longest.fits:
        notes.append(f"memory is that of mean lengths; a micro-batch whose sequences all have data.max_length = "
                     f"{recipe.data.max_length} tokens would take {longest.memory.total / GIB:.1f} GiB, which does not "
                     "fit")
    if stage.optimizer.offload:
        notes.append("the optimizer's states travel to the host's memory and back each step (`offload`): the time of "
                     "that is not counted")
    if own.setup.draws is not None:
        notes += _notes_on_draws(own.setup.draws)
    return tuple(notes)


def _notes_on_draws(draws: Draws) -> list[str]:
    """What the numbers of drawing leave out or take for granted."""
    notes = [f"drawn answers count as having {draws.mean.answer:.0f} tokens, the data's length cut at max_new_tokens; "
             "their way to other replicas and through the tokenizer is not counted, and other `slots` are not looked "
             "for"]
    if draws.mixed:
        notes.append("with `teacher_mix` both models wait for the longest of the answers that are under way, which "
                     f"counts as one of max_new_tokens = {draws.longest.answer:g}")
    if draws.replayed:
        notes.append("recordings of decoding passes (`decode_graphs`) are made anew by each draw: neither the time nor "
                     "the memory of that is counted")
    if draws.teacher is not None:
        notes.append("the teacher takes part by its answers alone, in the recipe's layout: no other is looked for")
    return notes

