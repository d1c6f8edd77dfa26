"""The layout search, against trying everything and against the rules of the engine."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from megakd.batch import Kind
from megakd.check import check_models
from megakd.config import Parallel, load, parse
from megakd.config_checks import check_world
from megakd.config_signals import Signals
from megakd.errors import ConfigError
from megakd.hf.pieces import check_layout
from megakd.planning.candidate import MARGIN, Candidate
from megakd.planning.cluster import cluster_named
from megakd.planning.memory import training_memory
from megakd.planning.nearest import changes_between, smallest_change
from megakd.planning.recipe import question_of_stage, setup_of_stage
from megakd.planning.search import BEFORE, BESIDE, Limits, Question, layouts, search
from megakd.planning.setup import LossCall, RoleSetup
from megakd.planning.sizes import parameter_count
from megakd.planning.timing import training_time
from megakd.planning.work import Lengths
from tests.planning_cases import LLAMA_8B, LLAMA_70B, LLAMA_405B, architecture, small_cluster
from tests.recipes import stage, tiny_recipe, write_recipe

BOTH = (Kind.CHOSEN, Kind.REJECTED)
STUDENT = architecture(256, 4, 4, 2, 64, 1024, 2000)
TEACHER = architecture(512, 8, 8, 4, 64, 2048, 2000)
REFERENCE = architecture(384, 4, 6, 6, 64, 1536, 2000)


def question(roles: tuple[str, ...] = ("teacher",), **changes) -> Question:
    models = {"teacher": TEACHER, "reference": REFERENCE}
    asked = Question(
        trained=STUDENT, teachers={role: models[role] for role in roles}, kinds=BOTH,
        teacher_kinds=dict.fromkeys(roles, BOTH), losses=(LossCall(1 + len(roles), 5, BOTH, "forward"),),
        lengths=Lengths(60, 40), global_batch=8, world=4, chunk_tokens=256, dtype="fp32", device="cpu")
    return replace(asked, **changes)


def naive_layouts(model, asked: Question, recompute, micro_batches, virtual, pipelines,
                  contexts=(1,)) -> list[RoleSetup]:
    """Every combination of sizes that the rules of the project take, by the rules' own words."""
    found = []
    for tensor, pipeline, chunks, sequence, context in product((1, 2, 3, 4), pipelines, virtual, (False, True),
                                                               contexts):
        if asked.world % (tensor * pipeline * context) or 4 % tensor or (sequence and tensor == 1) \
                or (chunks > 1 and (pipeline == 1 or -model.layers % (pipeline * chunks) > 2)):
            continue
        padded = model.kv_heads % tensor != 0
        try:
            check_layout(model, tensor, pipeline, chunks, padded, "role")
        except ConfigError:
            continue
        for micro, again in product(micro_batches, recompute):
            groups = asked.world // (tensor * pipeline * context) * micro * (pipeline if chunks > 1 else 1)
            if asked.global_batch % groups == 0:
                cut = Parallel(tensor=tensor, pipeline=pipeline, virtual_pipeline=chunks, context=context,
                               sequence=sequence, pad_heads=padded)
                found.append(RoleSetup(model, cut, asked.world, micro, again))
    return found


def naive_best(asked: Question, cluster, limits: Limits, contexts=(1,)) -> float:
    """The least seconds of a step with the teachers beside the student, by timing all that fits; the student with all
    of `contexts`."""
    room = (cluster.device.memory_gib - cluster.device.reserved_gib) * 2**30
    sizes = (range(1, limits.micro_batch + 1), range(1, limits.virtual_pipeline + 1), range(1, limits.pipeline + 1))
    students = naive_layouts(asked.trained, asked, limits.recompute, *sizes, contexts)
    teachers = [naive_layouts(model, asked, ("none",), *sizes) for model in asked.teachers.values()]
    times = []
    for student, *others in product(students, *teachers):
        setup = asked.setup(student, dict(zip(asked.teachers, others, strict=True)), {})
        needed = max(training_memory(setup, rank).total for rank in range(student.parallel.pipeline))
        if needed * (1 + MARGIN) <= room:
            times.append(training_time(cluster, setup).total)
    assert times
    return min(times)


@pytest.mark.parametrize("memory", [0.1, 0.18, 2.0])
def test_the_best_is_that_of_trying_everything(memory):
    asked, cluster = question(), small_cluster(device={"memory_gib": memory})
    limits = Limits(micro_batch=4, placements=(BESIDE,))
    assert search(asked, cluster, limits)[0].seconds == naive_best(asked, cluster, limits)


@pytest.mark.parametrize("memory", [0.1, 2.0])
def test_the_best_of_two_teachers_is_that_of_trying_everything(memory):
    asked, cluster = question(("teacher", "reference"), global_batch=4), small_cluster(device={"memory_gib": memory})
    limits = Limits(micro_batch=2, virtual_pipeline=1, pipeline=2, recompute=("none", "full"), placements=(BESIDE,))
    assert search(asked, cluster, limits)[0].seconds == naive_best(asked, cluster, limits)


@pytest.mark.parametrize(("groups", "found"), [(1, True), (4, False)])
def test_long_sequences_are_cut_over_ranks_where_groups_are_few(groups, found):
    # With fewer groups than ranks there is nothing else for all of them to do; with more, whole sequences are quicker.
    asked, cluster = question(global_batch=groups, lengths=Lengths(600, 400)), small_cluster()
    limits = Limits(micro_batch=4, virtual_pipeline=1, pipeline=2, placements=(BESIDE,))
    best = search(asked, cluster, limits)[0]
    assert best.seconds == naive_best(asked, cluster, limits, contexts=(1, 2, 4))
    assert (best.setup.trained.parallel.context > 1) == found
    assert all(role.parallel.context == 1 for role in best.setup.teachers.values())


def test_memory_decides_what_is_best():
    tight, wide = (search(question(), small_cluster(device={"memory_gib": memory}), Limits())
                   for memory in (0.1, 2.0))
    assert tight[0].seconds > wide[0].seconds
    for candidate in (*tight, *wide):
        room = candidate.cluster.device.memory_gib * 2**30
        stages = range(candidate.setup.trained.parallel.pipeline)
        assert max(training_memory(candidate.setup, rank).total for rank in stages) * (1 + MARGIN) <= room
    assert search(question(), small_cluster(device={"memory_gib": 0.02}), Limits()) == []


def test_the_order_and_the_places_of_the_teachers():
    found = search(question(), small_cluster(), Limits(best=2))
    assert [each.seconds for each in found] == sorted(each.seconds for each in found)
    assert sorted(bool(each.scoring) for each in found) == [False, False, True, True]
    for placement, scored in ((BESIDE, False), (BEFORE, True)):
        alone = search(question(), small_cluster(), Limits(best=2, placements=(placement,)))
        assert [each.seconds for each in alone] == [each.seconds for each in found if bool(each.scoring) == scored]
    sizes = [(bool(each.scoring), each.setup.trained.parallel.tensor, each.setup.trained.parallel.pipeline)
             for each in found]
    assert len(set(sizes)) == len(sizes)
    assert not any(each.scoring for each in search(question(signal=None), small_cluster(), Limits()))


def test_scoring_beforehand_is_the_quickest_forward_pass_and_files():
    asked = question()
    [found] = search(asked, small_cluster(), Limits(best=1, placements=(BEFORE,), micro_batch=4))
    students = [each for each in layouts(asked, small_cluster(), Limits(), "student") if each.parallel.ranks == 1]
    forwards = [training_time(small_cluster(), asked.setup(students[0], {"teacher": teacher}, {})).parts[
        "teacher: forward"] for teacher in layouts(asked, small_cluster(), Limits(micro_batch=4), "teacher")]
    assert found.scoring["teacher"].seconds == min(forwards)
    assert found.scoring["teacher"].file_bytes == 8 * 2 * 40 * 512 * 4  # groups, answers, tokens, width, float32
    assert found.seconds == found.time.total + found.scoring["teacher"].seconds
    # The teacher's hidden states and head are still what the loss is given; its weights are not there.
    assert "teacher: head for the loss" in found.memory.kept and "teacher: weights" not in found.memory.kept
    assert not found.setup.teachers and found.setup.heads == {"teacher": TEACHER}


def test_log_probabilities_on_disk_leave_the_loss_with_the_student_alone():
    losses = (LossCall(1, 2, BOTH, "backward"), LossCall(1, 2, BOTH, "none"))
    asked = question(("reference",), losses=losses, signal="token_log_probs")
    [found] = search(asked, small_cluster(), Limits(best=1, placements=(BEFORE,)))
    assert found.setup.losses == losses[:1] and not found.setup.heads
    assert found.scoring["reference"].file_bytes == 8 * 2 * 40 * 4


def test_tensor_groups_stay_in_a_node_and_context_is_what_the_engine_takes():
    found = list(layouts(question(world=16, global_batch=16), small_cluster(), Limits(), "teacher"))
    assert {each.parallel.tensor for each in found} == {1, 2, 4}
    assert {each.parallel.context for each in found} == {1}  # it only runs forward
    students = layouts(question(world=16, global_batch=16), small_cluster(), Limits(), "student")
    assert {each.parallel.context for each in students} == {1, 2, 4, 8}
    narrow = layouts(question(), small_cluster(), Limits(tensor=2), "teacher")
    assert {each.parallel.tensor for each in narrow} == {1, 2}


@pytest.mark.parametrize(("name", "world"), [("dpo", 2), ("dckd", 4), ("adpa", 4)])
def test_what_is_found_is_what_the_engine_takes(tmp_path, name, world):
    """The settings that a plan offers, laid over the recipe, pass the checks of a run."""
    raw = tiny_recipe(tmp_path)
    file = write_recipe(tmp_path, raw)
    recipe = load(file)
    [train] = [each for each in recipe.stages if each.name == name]
    own = Candidate(small_cluster(), setup_of_stage(recipe, train, world, Lengths(20, 10)))
    found = search(question_of_stage(recipe, train, world, Lengths(20, 10)), small_cluster(), Limits(best=20))
    assert len(found) >= 4
    for candidate in found:
        changed = load(file, tuple(changes_between(own, candidate, train.trains)))
        check_models(changed)
        if candidate.scoring:  # a role that is read from disk has no layout in this stage
            signals = Signals(**dict.fromkeys(candidate.scoring, "scored"))
            changed = changed.model_copy(update={"stages": tuple(
                each.model_copy(update={"signals": signals}) if each.name == name else each
                for each in changed.stages)})
        check_world(changed, world, [name])
        for role, setup in candidate.roles.items():
            settings = changed.role(train.trains if role == "student" else role)
            assert (settings.parallel, settings.micro_batch, settings.recompute) == (
                setup.parallel, setup.micro_batch, setup.recompute)


def test_numbers_of_a_candidate():
    cluster = cluster_named("h100")
    asked = question(trained=LLAMA_8B, teachers={"teacher": LLAMA_70B}, dtype="bf16", device="cuda", world=32,
                     global_batch=64, lengths=Lengths(300, 300))
    student = RoleSetup(LLAMA_8B, Parallel(tensor=4, pipeline=2), 32, 2)
    teacher = RoleSetup(LLAMA_70B, Parallel(tensor=8), 32, 2)
    found = Candidate(cluster, asked.setup(student, {"teacher": teacher}, {}))
    tokens = 64 * 2 * 600
    assert found.tokens_per_second == tokens / found.seconds == tokens / training_time(cluster, found.setup).total
    # 6 and 2 operations a parameter and token, but for embeddings (looked up), heads (answers alone) and attention.
    for role, model, passes in (("student", LLAMA_8B, 3), ("teacher", LLAMA_70B, 1)):
        layers = parameter_count(model) - 2 * model.vocab_size * model.hidden_size - (2 * model.layers + 1) * \
            model.hidden_size
        plain = 2 * layers * tokens + 2 * model.vocab_size * model.hidden_size * tokens / 2
        plain += 4 * model.layers * model.heads * model.head_dim * 128 * (600 * 601 / 2)
        assert found.flops[role] == pytest.approx(passes * plain, rel=1e-12)
    assert found.mfu == pytest.approx(sum(found.flops.values()) / (found.seconds * 32 * 989e12))
    assert found.gpu_hours(10) == pytest.approx(10 * found.seconds * 32 / 3600)
    assert found.gpu_hours_of_tokens(10 * tokens) == pytest.approx(found.gpu_hours(10))
    assert 0 < found.bubble == found.time.parts["pipeline's wait"] / found.time.total < 1
    links = {(each.axis, each.link) for each in found.traffic}
    assert {("tensor", "node"), ("data", "network"), ("pipeline", "network"), ("world", "network")} >= links
    assert ("tensor", "node") in links and ("data", "network") in links
    assert found.memory.total == max(training_memory(found.setup, rank).total for rank in (0, 1)) and found.fits


def test_the_reason_names_what_differs_and_what_it_saves():
    found = search(question(), small_cluster(), Limits(best=3, placements=(BESIDE,)))
    for one, other in zip(found, found[1:], strict=False):
        gain = 100 * (other.seconds - one.seconds) / other.seconds
        assert one.reason.startswith(f"{gain:.1f} % less time than the next: student ")
        mine, theirs = one.setup.trained.parallel, other.setup.trained.parallel
        for size in ("tensor", "pipeline"):
            named = f"student {size} {getattr(mine, size)} (not {getattr(theirs, size)})" in one.reason
            assert named == (getattr(mine, size) != getattr(theirs, size))
        part = max(other.time.parts, key=lambda name, a=one, b=other: b.time.parts[name] - a.time.parts[name])
        assert f"that saves most in {part!r}" in one.reason


def test_the_smallest_change_is_one_setting_where_one_is_enough():
    asked, cluster = question(), small_cluster(device={"memory_gib": 0.2})
    own = Candidate(cluster, asked.setup(
        RoleSetup(STUDENT, Parallel(), 4, 2), {"teacher": RoleSetup(TEACHER, Parallel(), 4, 1)}, {}))
    assert not own.fits
    changed = smallest_change(asked, own, {}, Limits())
    assert changed.fits and len(changes_between(own, changed, "student")) == 1
    # All others with one change that fit take at least as long.
    for name in own.roles:
        for other in layouts(asked, cluster, Limits(), name):
            roles = own.roles | {name: other}
            each = Candidate(cluster, asked.setup(roles["student"], {"teacher": roles["teacher"]}, {}))
            if len(changes_between(own, each, "student")) == 1 and each.fits:
                assert each.seconds >= changed.seconds
    assert smallest_change(asked, own, {}, Limits(tensor=1, pipeline=1, micro_batch=2, recompute=("none",))) is None


def test_16384_gpus_and_layers_that_do_not_divide():
    asked = question(("teacher", "reference"), trained=LLAMA_8B, dtype="bf16", device="cuda", world=16384,
                     global_batch=16384, lengths=Lengths(300, 300),
                     teachers={"teacher": LLAMA_405B, "reference": LLAMA_405B})
    cuts = {(each.parallel.pipeline, each.parallel.virtual_pipeline)
            for each in layouts(asked, cluster_named("h100"), Limits(pipeline=16, micro_batch=1), "teacher")}
    assert cuts >= {(stages, chunks) for stages in (4, 8, 16) for chunks in (1, 2, 4)} | {(8, 8)}
    assert not cuts & {(8, 3), (8, 7), (16, 7)}  # unequal parts within a stage
    found = search(asked, cluster_named("h100"), Limits(best=2))
    # Two such teachers beside a student have room in 8 stages or more.
    assert min(role.parallel.pipeline for each in found for role in each.setup.teachers.values()) >= 8
    assert len(found) == 4 and all(each.world == 16384 and each.fits for each in found)
    for candidate in found:
        for role in candidate.roles.values():
            assert 16384 % (role.layout.data * role.micro_batch) == 0 and role.parallel.tensor <= 8


def test_arithmetic_that_the_devices_do_not_have():
    with pytest.raises(ConfigError, match="precision.dtype = 'fp8': A100 x 8 has no rate of fp8"):
        search(question(dtype="fp8", device="cuda"), cluster_named("a100"), Limits())


def test_answers_of_a_generated_kind_are_counted(tmp_path):
    raw = tiny_recipe(tmp_path)
    stage(raw, "generate").update(n=3, temperature=1.0)
    recipe = parse(raw)
    [adpa] = [each for each in recipe.stages if each.name == "adpa"]
    asked = question_of_stage(recipe, adpa, 2, Lengths(20, 10))
    assert asked.kinds.count(Kind.ROLLOUT) == 3 and asked.kinds.count(Kind.CHOSEN) == 1
    setup = setup_of_stage(recipe, adpa, 2, Lengths(20, 10))
    assert setup.work.tokens == 4 * 4 * 30 and setup.work.received("teacher") == 4 * 3 * 10
