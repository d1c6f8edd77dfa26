"""What a training draws between its steps (`online`), and the training with it: memory, messages and time.

Follows rollout/online.py. A draw comes before a step, when the step before has let go of its activations and signals;
weights, gradients, optimizer states (on the device, or with `offload` on the host) and the teachers stay where they
are. The trained model answers, or with `teacher_mix` both models token by token; then the teacher answers; then, for a
policy gradient, both models are asked how likely each token was.

Left out: the answers' way to other replicas, and tokens from a pipeline's last stage to the others (a few numbers an
answer and token).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from megakd.batch import Kind
from megakd.planning.cluster import Cluster
from megakd.planning.inference import (
    Generation,
    MixedGeneration,
    Scoring,
    answering,
    as_training,
    generation_calls,
    generation_memory,
    generation_time,
    scoring_memory,
    scoring_time,
)
from megakd.planning.memory import Memory, forward_weights, training_memory
from megakd.planning.setup import RoleSetup, TrainingSetup
from megakd.planning.timing import StepTime, call_seconds, link_of, training_time
from megakd.planning.traffic import Call, loss_calls, model_calls
from megakd.planning.work import RoleWork, work_of_lengths

STUDENT, TEACHER = "student", "teacher"
CACHE = "keys and values"
OTHERS_CACHE = "the other model's keys and values"
"""The part of a phase in which two models that answer together wait for each other."""
TEACHER_DRAWS = "teacher draws: "
"""How the phases begin that are a teacher's own."""
VALUE_BYTES = 8
"""Of a token's log-probability, which all ranks hold of all answers, in float64."""
COINS = 4
"""Numbers of an answer that two models tell the world of each token."""


@dataclass(frozen=True)
class Turn:
    """Answers that are drawn at a time."""

    name: str
    models: Mapping[str, Generation]
    """By who draws: `student` (the trained model), `teacher`, or both together."""


def turns(setup: TrainingSetup) -> list[Turn]:
    """What a draw consists of, one after the other."""
    draws, found = setup.draws, []
    if draws.own_prompts > 0:
        together = (STUDENT, TEACHER) if draws.mixed else (STUDENT,)
        found.append(Turn("answers", {who: _generation(setup, who, draws.own_prompts) for who in together}))
    if draws.teacher_prompts > 0:
        teacher = _generation(replace(setup, draws=replace(draws, mixed=False)), TEACHER, draws.teacher_prompts)
        found.append(Turn("teacher's answers", {TEACHER: teacher}))
    return found


def drawing_role(setup: TrainingSetup, who: str) -> RoleSetup:
    """The layout of a model that draws, while it does anything else."""
    if who == STUDENT:
        return setup.trained
    return setup.teachers[TEACHER] if setup.draws.teacher is None else setup.draws.teacher


def _generation(setup: TrainingSetup, who: str, prompts: int) -> Generation:
    draws, role = setup.draws, answering(drawing_role(setup, who))
    task = Generation(role, draws.slots, prompts, draws.n, draws.mean, draws.longest, draws.sampled, draws.top_k,
                      draws.top_p, setup.dtype, setup.device, who in draws.replayed)
    if not draws.mixed:
        return task
    at_a_time = draws.slots * setup.trained.layout.copies
    own_slots = {**vars(task), "slots": math.ceil(at_a_time / role.layout.data)}
    return MixedGeneration(**own_slots, turns=math.ceil(prompts * draws.n / at_a_time))


def _valued(setup: TrainingSetup) -> dict[str, Scoring]:
    """The passes over a draw's answers that say how likely their tokens were, all micro-batches at a time."""
    draws = setup.draws
    if not draws.valued:
        return {}
    roles = {who: drawing_role(setup, who) for who in (STUDENT, TEACHER)}
    multiple = (math.lcm(*(role.layout.copies * role.micro_batch for role in roles.values()))
                * math.lcm(*(role.parallel.pipeline for role in roles.values())))
    groups = multiple * math.ceil(draws.own_prompts * draws.n / multiple)  # as `filled` makes it
    work = work_of_lengths(draws.mean, (Kind.ROLLOUT,), groups, {who: role.layout for who, role in roles.items()},
                           {who: role.micro_batch for who, role in roles.items()}, {})
    return {who: Scoring(role, len(work.roles[who].micro_batches), groups, work.roles[who].micro_batches[0], 0, True,
                         True, setup.chunk_tokens, setup.dtype, setup.device) for who, role in roles.items()}


# -------------------------------------------------------------------------------------------------------------- memory
def memory_with_draws(setup: TrainingSetup, pipeline_rank: int) -> Memory:
    """Memory of a rank that holds `pipeline_rank` of the trained model, in the steps and between them.

    A teacher is counted as on its own stage with most, as in `training_memory`.
    """
    memory = training_memory(setup, pipeline_rank)
    if setup.draws is None:
        return memory
    kept = dict(memory.kept)
    if (teacher := setup.draws.teacher) is not None:
        kept[f"{TEACHER}: weights"] = max(forward_weights(setup, teacher, stage) for stage in set(teacher.alike))
    phases = dict(memory.phases)
    for name, parts in (*_answering_phases(setup, pipeline_rank), *_valuing_phases(setup, pipeline_rank)):
        # A teacher's stages, and its turns, have the same phases: the fullest is told.
        phases[name] = max(phases.get(name, {}), parts, key=lambda each: sum(each.values()))
    return replace(memory, kept=kept, phases=phases)


def own_phases(phases: Mapping[str, Mapping[str, float]], teachers: Mapping[str, object]) -> dict[str, float]:
    """Bytes of a training's phases that are the trained model's own, whatever layouts the `teachers` have."""
    return {name: _without_other(parts) for name, parts in phases.items()
            if not any(_is_of(role, name) for role in teachers)}


def teacher_phases(phases: Mapping[str, Mapping[str, float]], role: str) -> dict[str, float]:
    """Bytes of those that are a teacher's own, whatever layout the trained model has."""
    return {name: _without_other(parts) for name, parts in phases.items() if _is_of(role, name)}


def _is_of(role: str, phase: str) -> bool:
    return phase == f"{role} runs" or (role == TEACHER and phase.startswith(TEACHER_DRAWS))


def _without_other(parts: Mapping[str, float]) -> float:
    return sum(size for part, size in parts.items() if part != OTHERS_CACHE)


def _stages(role: RoleSetup, who: str, pipeline_rank: int) -> list[int]:
    """The stages on which a rank may be: the trained model's is known."""
    return [pipeline_rank] if who == STUDENT else sorted(set(role.alike))


def _named(who: str, phase: str) -> str:
    return f"{TEACHER_DRAWS}{phase}" if who == TEACHER else f"answers: {phase}"


def _answering_phases(setup: TrainingSetup, pipeline_rank: int) -> Iterator[tuple[str, dict[str, float]]]:
    for turn in turns(setup):
        memories = {who: [generation_memory(task, stage) for stage in _stages(task.role, who, pipeline_rank)]
                    for who, task in turn.models.items()}
        for who, some in memories.items():
            others = [memory for other, several in memories.items() if other != who for memory in several]
            for memory, phase in ((each, phase) for each in some for phase in each.phases):
                read = phase in ("decode", "next tokens")  # the other model has decoded these rows, too
                beside = max((each.kept[CACHE] + read * each.phases["decode"]["mask"] for each in others), default=0.0)
                yield _named(who, phase), {CACHE: memory.kept[CACHE]} | memory.phases[phase] | (
                    {OTHERS_CACHE: beside} if others else {})


def _valuing_phases(setup: TrainingSetup, pipeline_rank: int) -> Iterator[tuple[str, dict[str, float]]]:
    for who, task in _valued(setup).items():
        told = {"log-probabilities": task.groups * setup.draws.mean.answer * VALUE_BYTES}
        for stage in _stages(task.role, who, pipeline_rank):
            for phase, parts in scoring_memory(task, stage).phases.items():
                yield _named(who, f"log-probabilities, {phase}"), parts | (told if phase == "signals" else {})


# ---------------------------------------------------------------------------------------------------- messages and time
def draw_calls(setup: TrainingSetup, rank: int) -> list[tuple[RoleSetup, Call]]:
    """The calls of a rank of the world in a draw, each with the role in whose layout it is."""
    found: list[tuple[RoleSetup, Call]] = []

    def add(role: RoleSetup, who: str, calls: list[Call]) -> None:
        name = "answers" if who == STUDENT else "teacher's answers"
        found.extend((role, replace(call, purpose=f"{name}: {call.purpose.removeprefix('model: ')}")) for call in calls
                     if call.size > 1 and call.calls > 0)

    for turn in turns(setup):
        for who, task in turn.models.items():
            add(task.role, who, generation_calls(task, task.role.layout.coordinates(rank).pipeline))
    if setup.draws.mixed:
        add(setup.trained, STUDENT, [_coins(setup)])
    for who, task in _valued(setup).items():
        add(task.role, who, _valued_calls(setup, task, task.role.layout.coordinates(rank).pipeline))
    return found


def _coins(setup: TrainingSetup) -> Call:
    """The sums over the world that tell what both models would draw."""
    [turn] = (each for each in turns(setup) if each.name == "answers")
    task = turn.models[STUDENT]
    rows = setup.draws.own_prompts * setup.draws.n / task.turns
    return Call("all_reduce", "world", setup.trained.world, COINS * VALUE_BYTES * rows, task.rounds, "coins")


def _valued_calls(setup: TrainingSetup, task: Scoring, stage: int) -> list[Call]:
    passes = as_training(task, task.work)
    work = RoleWork((task.work,) * task.micro_batches)
    calls = model_calls(task.role, passes, work, stage, "model")
    if stage == task.role.parallel.pipeline - 1:
        told = task.groups * setup.draws.mean.answer * VALUE_BYTES
        calls += [*loss_calls(passes, work),
                  Call("all_reduce", "data", task.role.layout.copies, told, 1, "log-probabilities")]
    return calls


def draw_time(cluster: Cluster, setup: TrainingSetup) -> StepTime:
    """Seconds of a draw.

    Raises:
        ConfigError: as `generation_time`.
    """
    parts: dict[str, float] = {}
    for turn in turns(setup):
        for who, task in turn.models.items():
            name = "teacher's answers" if who == TEACHER else "answers"
            for part, seconds in generation_time(cluster, task).parts.items():
                parts[f"{name}: {part}"] = parts.get(f"{name}: {part}", 0.0) + seconds
    if setup.draws.mixed and setup.trained.world > 1:
        parts["answers: coins"] = call_seconds(cluster, _coins(setup), link_of(cluster, setup.trained, "world"))
    for who, task in _valued(setup).items():
        name = "teacher's answers" if who == TEACHER else "answers"
        parts[f"{name}: log-probabilities"] = scoring_time(cluster, task).total
    return StepTime(parts)


def time_with_draws(cluster: Cluster, setup: TrainingSetup) -> StepTime:
    """Seconds of a step of the training, with its share of a draw.

    Raises:
        ConfigError: as `draw_time`.
    """
    step = training_time(cluster, setup)
    if setup.draws is None:
        return step
    share = {part: seconds / setup.draws.every for part, seconds in draw_time(cluster, setup).parts.items()}
    return StepTime(step.parts | share)

