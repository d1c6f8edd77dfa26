"""Plans of trainings that draw their own answers: what a draw is, what a step pays for it, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import pytest

from megakd.config import parse
from megakd.errors import ConfigError
from megakd.planning.candidate import MARGIN, Candidate
from megakd.planning.inference import Generation, generation_memory, generation_time
from megakd.planning.memory import training_memory
from megakd.planning.nearest import smallest_change
from megakd.planning.online import OTHERS_CACHE, draw_calls, draw_time, memory_with_draws, time_with_draws, turns
from megakd.planning.plan import fewer_slots, plan_recipe
from megakd.planning.recipe import question_of_stage, setup_of_stage
from megakd.planning.search import BESIDE, Limits, layouts, search
from megakd.planning.setup import TrainingSetup
from megakd.planning.text import describe
from megakd.planning.timing import training_time
from megakd.planning.work import Lengths
from tests.planning_cases import small_cluster
from tests.recipes import stage, tiny_recipe

LENGTHS = Lengths(20, 10)
MEAN = Lengths(20, 8)
"""Answers end with max_new_tokens."""
LONGEST = Lengths(88, 8)
ONLINE = {"every": 4, "passes": 2, "max_new_tokens": 8, "slots": 3}
"""Two steps' prompts, gone over twice."""


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory):
    """Recipes of one distillation in tiny_recipe's layouts (student TP2, teacher PP2) that draws its answers."""
    raw = tiny_recipe(tmp_path_factory.mktemp("tiny"))
    raw["teacher"]["model"] = raw["reference"]["model"]

    def made(objective: dict, *, roles: dict | None = None, settings: dict | None = None, **online):
        train = stage(raw, "dckd") | {"objective": objective, "online": ONLINE | online, "checkpoint_every": 40}
        changed = {role: raw[role] | fields for role, fields in (roles or {}).items()}
        return parse(raw | changed | {"stages": [train | (settings or {})]})

    return made


def setup_in(recipe, world: int = 2, lengths: Lengths = LENGTHS) -> TrainingSetup:
    return setup_of_stage(recipe, recipe.stages[0], world, lengths)


@pytest.mark.parametrize(("objective", "online", "rows", "own", "teachers"), [
    ({"kind": "kd", "on_policy": 1.0}, {}, None, 8, 0),
    ({"kind": "kd", "on_policy": 0.3}, {}, None, 3, 0),
    ({"kind": "kd", "on_policy": 0.25, "answers": "teacher"}, {"passes": 1}, None, 4, 12),
    ({"kind": "dpkd"}, {"every": 1, "passes": 1}, None, 4, 4),
    ({"kind": "dpkd", "form": "simpo"}, {"passes": 4}, 3, 3, 3),
    ({"kind": "minillm"}, {"passes": 1, "teacher_mix": 0.3}, None, 16, 0),
])
def test_whom_a_draw_asks_how_much(recipe_of, objective, online, rows, own, teachers):
    recipe = recipe_of(objective, **online)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_rows": rows})})
    draws = setup_in(recipe).draws
    assert (draws.own_prompts, draws.teacher_prompts) == (own, teachers)
    assert (draws.mean, draws.longest) == (MEAN, LONGEST)
    assert draws.mixed == ("teacher_mix" in online) and draws.valued == (objective["kind"] == "minillm")
    # simpo learns without the teacher, which draws all the same.
    assert (draws.teacher is not None) == (objective.get("form") == "simpo")


def test_long_answers_leave_room_for_the_prompts(recipe_of):
    draws = setup_in(recipe_of({"kind": "dpkd"}, max_new_tokens=95)).draws
    assert (draws.mean, draws.longest) == (LENGTHS, Lengths(20, 76))  # 96 in all


def test_a_step_pays_its_share_of_a_draw(recipe_of):
    recipe, cluster = recipe_of({"kind": "kd", "on_policy": 1.0}), small_cluster()
    setup = setup_in(recipe)
    task = Generation(replace(setup.trained), 3, 8, 1, MEAN, LONGEST, True, 0, False, "fp32", "cpu")
    [turn] = turns(setup)
    assert turn.models == {"student": task}
    drawn, step = generation_time(cluster, task).parts, training_time(cluster, setup)
    assert draw_time(cluster, setup).parts == {f"answers: {part}": seconds for part, seconds in drawn.items()}
    paid = time_with_draws(cluster, setup)
    assert paid.parts == step.parts | {f"answers: {part}": seconds / 4 for part, seconds in drawn.items()}
    assert paid.total > 1.3 * step.total
    own, without = Candidate(cluster, setup), Candidate(cluster, replace(setup, draws=None))
    assert own.seconds == paid.total and without.seconds == step.total
    # MFU counts what is learned, over all the seconds.
    assert own.flops == without.flops
    assert own.mfu == pytest.approx(without.mfu * step.total / paid.total)
    numbers = own.as_dict()
    assert numbers["time"]["total"] == paid.total and numbers["draw"]["time"]["total"] == sum(drawn.values())
    assert (numbers["draw"]["every"], numbers["draw"]["prompts"]) == (4, {"own": 8, "teacher": 0})
    assert "draw" not in without.as_dict()
    # Its messages, too.
    extra = sum(each.bytes for each in own.traffic) - sum(each.bytes for each in without.traffic)
    assert extra == pytest.approx(sum(call.link_bytes for _, call in draw_calls(setup, 0)) / 4)


def test_context_ranks_and_sequence_parallelism_are_for_steps_alone(recipe_of):
    recipe = recipe_of({"kind": "kd", "on_policy": 1.0}, roles={
        "student": {"parallel": {"tensor": 2, "context": 2, "sequence": True, "pad_heads": True}}})
    [turn] = turns(setup_in(recipe, world=4))
    cut = turn.models["student"].role.parallel
    assert (cut.tensor, cut.context, cut.sequence) == (2, 1, False)
    assert turn.models["student"].answers == 4  # of 8, on two replicas


def test_what_is_there_while_a_draw_is_made(recipe_of):
    recipe = recipe_of({"kind": "dpkd"}, roles={"student": {"micro_batch": 1, "recompute": "full"}}, n=2, slots=16)
    setup = setup_in(recipe)
    memory, step = memory_with_draws(setup, 0), training_memory(setup, 0)
    assert memory.kept == step.kept and memory.phases.items() >= step.phases.items()
    by_student, by_teacher = (turn.models[who] for turn, who in zip(turns(setup), ("student", "teacher"), strict=True))
    assert by_student.answers == by_teacher.answers == 16
    alone = generation_memory(by_student, 0)
    assert memory.phases["answers: decode"] == alone.phases["decode"] | {"keys and values": alone.kept[
        "keys and values"]}
    # Of the teacher's two stages the fuller one.
    both = [generation_memory(by_teacher, rank) for rank in (0, 1)]
    fuller = max(each.kept["keys and values"] + sum(each.phases["prefill"].values()) for each in both)
    assert sum(memory.phases["teacher draws: prefill"].values()) == fuller
    assert memory.fullest == "answers: prefill"
    # The optimizer's states are there, or with `offload` not.
    offloaded = memory_with_draws(replace(setup, offload=True, device="cuda", dtype="bf16"), 0)
    usual = memory_with_draws(replace(setup, device="cuda", dtype="bf16"), 0)
    assert offloaded.fullest == usual.fullest == "answers: prefill"
    assert usual.total - offloaded.total == usual.kept["optimizer"] == offloaded.host
    # A teacher that only draws is there all the same.
    drawing = memory_with_draws(setup_in(recipe_of({"kind": "dpkd", "form": "simpo"})), 0).kept
    assert drawing["teacher: weights"] == step.kept["teacher: weights"] > 0


def test_two_models_that_answer_together(recipe_of):
    recipe = recipe_of({"kind": "minillm"}, teacher_mix=0.2, n=3, slots=5)
    setup = setup_in(recipe)
    [turn] = turns(setup)
    student, teacher = turn.models["student"], turn.models["teacher"]
    # 24 answers in turns of 5, as there is one copy of the student; the teacher's stages do not take turns.
    assert [(task.turns, task.rows, task.companies, task.rounds) for task in (student, teacher)] == [(5, 5, 1, 40)] * 2
    assert student.prefill_tokens == teacher.prefill_tokens == 5 * 88
    assert (student.prefill.count, student.decoding.count) == (5, 35)
    assert student.prefill.rows * 5 + student.decoding.rows * 35 == pytest.approx(24 * 8)
    both = setup_in(recipe, world=4)
    [turn] = turns(both)
    assert {who: (task.turns, task.rows) for who, task in turn.models.items()} == {"student": (3, 5), "teacher": (3, 5)}
    memory = memory_with_draws(setup, 0)
    caches = {who: max(generation_memory(task, rank).kept["keys and values"]
                       for rank in range(task.role.parallel.pipeline)) for who, task in turn.models.items()}
    for who, name in (("student", "answers: prefill"), ("teacher", "teacher draws: prefill")):
        parts = memory.phases[name]
        assert parts["keys and values"] + parts[OTHERS_CACHE] == sum(caches.values()), who
    assert {"answers: log-probabilities, signals", "teacher draws: log-probabilities, signals"} <= memory.phases.keys()
    parts = draw_time(small_cluster(), setup).parts
    assert {"answers: decode", "teacher's answers: decode", "answers: coins", "answers: log-probabilities",
            "teacher's answers: log-probabilities"} <= parts.keys()


# ------------------------------------------------------------------------------------------------------------- refusals
def test_a_draw_that_does_not_fit_is_told_of_fewer_slots(recipe_of):
    recipe = recipe_of({"kind": "kd", "on_policy": 1.0}, every=40, passes=1, slots=160)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_rows": None})})
    needed = Candidate(small_cluster(), setup_in(recipe))
    assert needed.memory.fullest.startswith("answers: ")
    steps = Candidate(small_cluster(), replace(needed.setup, draws=None)).memory.total
    tight = small_cluster(devices_per_node=2, device={
        "memory_gib": (1 + MARGIN) * (steps + 0.3 * (needed.memory.total - steps)) / 2**30})
    plan = partial(plan_recipe, cluster=tight, nodes={"dckd": 1}, lengths=LENGTHS, best=0)
    with pytest.raises(ConfigError, match="'answers: .*most of it is .*Set stages.dckd.online.slots=") as refused:
        plan(recipe)
    slots = int(refused.value.fix.split("slots=")[1].split()[0])
    own = Candidate(tight, needed.setup)
    assert not own.fits and fewer_slots(own).setup.draws.slots == slots
    twice = replace(own, setup=replace(own.setup, draws=replace(own.setup.draws, slots=2 * slots)))
    assert not twice.fits
    helped = recipe_of({"kind": "kd", "on_policy": 1.0}, every=40, passes=1, slots=slots)
    [planned] = plan(helped)
    assert planned.own.fits
    # Nothing is said of slots where they do not help.
    assert fewer_slots(Candidate(small_cluster(device={"memory_gib": 0.001}), own.setup)) is None


def test_recorded_decoding_asks_for_what_a_replayed_layer_takes(recipe_of):
    recipe = recipe_of({"kind": "kd", "on_policy": 1.0})
    setup = setup_in(recipe)
    replayed = replace(setup, draws=replace(setup.draws, replayed=("student",)))
    with pytest.raises(ConfigError, match="device.layer_replayed_us = None.*decode_graphs"):
        time_with_draws(small_cluster(), replayed)
    quick = small_cluster(device={"layer_replayed_us": 1.0})
    assert time_with_draws(quick, replayed).total < time_with_draws(quick, setup).total
    assert time_with_draws(quick, setup).parts["answers: prefill"] == \
        time_with_draws(quick, replayed).parts["answers: prefill"]


def test_a_teacher_that_only_draws_is_looked_at_too(recipe_of):
    recipe = recipe_of({"kind": "dpkd", "form": "simpo"}, roles={"teacher": {"parallel": {"pipeline": 16}}})
    with pytest.raises(ConfigError, match="teacher.parallel.pipeline"):
        plan_recipe(recipe, small_cluster(devices_per_node=16), {"dckd": 1}, LENGTHS, 0)


# ----------------------------------------------------------------------------------------------------- search and text
@pytest.mark.parametrize(("kind", "online", "share"), [
    ("dpkd", {}, 0.3), ("dpkd", {}, 1.0), ("minillm", {"teacher_mix": 0.3}, 0.3),
    ("minillm", {"teacher_mix": 0.3}, 1.0)])
def test_the_best_layouts_are_the_best_with_their_draws(recipe_of, kind, online, share):
    """A share of all pairs of layouts fits, by what they need while they draw."""
    recipe = recipe_of({"kind": kind}, slots=32, n=8, **online)
    limits = Limits(micro_batch=1, placements=(BESIDE,), recompute=("full",))
    asked = question_of_stage(recipe, recipe.stages[0], 2, LENGTHS)
    made = [asked.setup(student, {"teacher": teacher}, {}) for student, teacher in product(
        *(list(layouts(asked, small_cluster(), limits, role)) for role in ("student", "teacher")))]
    needs = sorted(Candidate(small_cluster(), each).memory.total for each in made)
    room = 1.001 * (1 + MARGIN) * needs[int(share * (len(needs) - 1))]
    cluster = small_cluster(device={"memory_gib": room / 2**30})
    every = [Candidate(cluster, each) for each in made]
    undrawn = [replace(each, setup=replace(each.setup, draws=None)).fits for each in every]
    assert sum(undrawn) > sum(each.fits for each in every) or share == 1
    assert search(asked, cluster, limits)[0].seconds == pytest.approx(
        min(each.seconds for each in every if each.fits), rel=1e-9)
    if share < 1:
        own = max(every, key=lambda each: each.memory.total)
        assert not own.fits and smallest_change(asked, own, {}, limits).fits


def test_a_plan_tells_of_draws(recipe_of):
    cluster = small_cluster(devices_per_node=2, device={"layer_replayed_us": 5.0})
    mixed = recipe_of({"kind": "minillm"}, teacher_mix=0.2)
    [plan] = plans = plan_recipe(mixed, cluster, None, LENGTHS, 1)
    text = describe(mixed, cluster, plans, given_lengths=True, given_nodes=False)
    assert "a draw       every 4 steps, the student's and the teacher's together of 8 prompts, an answer each: " in text
    assert "answers: decode" in text and plan.own.seconds == plan.own.time.total
    assert plan.steps * plan.own.seconds * 2 / 3600 == pytest.approx(plan.own.gpu_hours(plan.steps))
    assert any("the longest of the answers" in note for note in plan.notes)
    assert not any("are not counted" in note and "time and memory" in note for note in plan.notes)
    alone = recipe_of({"kind": "dpkd", "form": "simpo"}, n=2)
    text = describe(alone, cluster, plan_recipe(alone, cluster, None, LENGTHS, 0), given_lengths=True,
                    given_nodes=False)
    assert "    teacher      TP1 x PP2 x DP1, micro-batch 2; draws alone" in text
    assert "the student's of 8 prompts, the teacher's of 8 prompts, 2 answers each: " in text
    assert "note: the teacher takes part by its answers alone" in text


def test_recordings_are_named_as_not_counted(recipe_of):
    recipe = recipe_of({"kind": "kd", "on_policy": 1.0})
    graphs = recipe.model_copy(update={"student": recipe.student.model_copy(update={"decode_graphs": True})})
    cluster = small_cluster(devices_per_node=2, device={"layer_replayed_us": 5.0})
    [plan] = plan_recipe(graphs, cluster, None, LENGTHS, 0)
    assert any("`decode_graphs`" in note for note in plan.notes)
