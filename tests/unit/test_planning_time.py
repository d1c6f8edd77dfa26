"""A step's planned seconds: against a sum by hand, the pipeline's schedule, links, overlap, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megakd.batch import Kind
from megakd.config import Parallel
from megakd.errors import ConfigError
from megakd.hf.pieces import chunk_layers
from megakd.planning.cluster import Cluster, load_cluster
from megakd.planning.setup import LossCall, RoleSetup, TrainingSetup
from megakd.planning.timing import StageTime, link_of, pipeline_seconds, training_time, uneven_within
from megakd.planning.work import Lengths, work_of_lengths
from tests.planning_cases import architecture, cluster_fields, small_cluster, write_cluster

MODEL = architecture(64, 4, 4, 2, 16, 160, 1000)
CHOSEN = (Kind.CHOSEN,)


ONE = Parallel()


def setup(parallel: Parallel = ONE, world: int = 1, batch: int = 2, recompute: str = "none",
          teacher: Parallel | None = None) -> TrainingSetup:
    """SFT of a small model, or KD from one of its size, on prompts of 30 and answers of 20 tokens."""
    role = RoleSetup(MODEL, parallel, world, 1, recompute)
    teachers = {} if teacher is None else {"teacher": RoleSetup(MODEL, teacher, world, 1)}
    kinds = {name: CHOSEN for name in teachers}
    layouts = {"student": role.layout, **{name: each.layout for name, each in teachers.items()}}
    work = work_of_lengths(Lengths(30, 20), CHOSEN, batch, layouts, dict.fromkeys(layouts, 1), kinds)
    losses = (LossCall(1, 2, CHOSEN, "forward"),) if teacher is None else (LossCall(2, 5, CHOSEN, "forward"),)
    return TrainingSetup(role, teachers, losses, work, 8, "fp32", "cpu")


def test_one_process_is_the_sum_of_its_parts_by_hand():
    cluster = small_cluster()
    parts = training_time(cluster, setup()).parts
    rate = lambda side: 0.1e12 * 0.5 * side / (side + 20)  # noqa: E731 - the description's products
    tokens, pairs = 50, 50 * 51 / 2
    # qkv 64 x (64 + 2 x 32), projection 64 x 64, MLP 64 x 320 and 160 x 64; the shortest side is that of the tokens.
    products = sum(2 * tokens * i * o / rate(min(tokens, i, o)) for i, o in ((64, 128), (64, 64), (64, 320), (160, 64)))
    assert parts["student: products"] == pytest.approx(2 * 4 * 3 * products)
    assert parts["student: attention"] == pytest.approx(2 * 4 * 3.5 * 4 * 64 * pairs / (0.1e12 * 0.2))
    numbers = 20 * 64 + 12 * 64 + 10 * 32 + 7 * 160
    weights = 64 * 128 + 64 * 64 + 64 * 320 + 160 * 64
    assert parts["student: other kernels"] == pytest.approx(2 * 4 * (3 * numbers * tokens * 4 + 12 * weights) / 10e9)
    assert parts["student: calls"] == pytest.approx(2 * 4 * 1.5e-3)
    # 20 loss positions in chunks of 8; the head has 1,024 rows with its padding.
    loss = 3 * 2 * 20 * 64 * 1024 / rate(8) + (5 * 20 + 2 * 20 + 2 * 3 * 64) * 1024 * 4 / 10e9
    assert parts["loss"] == pytest.approx(2 * loss)
    parameters = 4 * (weights + 2 * 64) + 64 + 1024 * 64 * (1 if MODEL.tied_embeddings else 2)
    assert parts["optimizer"] == pytest.approx(parameters * (3 + 13) * 4 / 10e9)
    assert parts["every step's own"] == 5e-3
    assert parts["pipeline's wait"] == 0
    assert training_time(cluster, setup()).total == sum(parts.values())


MLP = 3 * 160 * 64


@pytest.mark.parametrize(("recompute", "more"), [("full", 1.0), ("mlp", MLP / (64 * 128 + 64 * 64 + MLP))])
def test_what_is_made_again_costs_its_forward_pass(recompute, more):
    cluster = small_cluster()
    plain, again = (training_time(cluster, setup(recompute=how)).parts for how in ("none", recompute))
    assert again["student: products"] == pytest.approx(plain["student: products"] * (3 + more) / 3)
    assert again["student: attention"] == pytest.approx(plain["student: attention"] * (3.5 + more) / 3.5)


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), [(1, 5, 1), (4, 8, 1), (4, 8, 2), (2, 1, 1)])
def test_equal_stages_wait_as_long_as_the_schedule_makes_them(stages, micro_batches, chunks):
    each = StageTime({"a": 1.0}, {"b": 2.0})
    # 1F1B: M + P - 1 turns of forward and backward; interleaved, the P - 1 are of a chunk's size.
    expected = 3.0 * (micro_batches + (stages - 1) / chunks)
    assert pipeline_seconds([each] * stages, micro_batches, chunks) == pytest.approx(expected)


def schedule(parts: tuple[int, ...], stages: int, micro_batches: int, head: float) -> float:
    """Seconds until the last stage of megatron-core's 1F1B, interleaved where a stage has several parts, has done its
    last pass: a layer takes 1 forward and 2 backward, the head `head` in all, messages nothing."""
    chunks = len(parts) // stages
    passes = [(chunk, turn * stages + number) for turn in range(micro_batches // stages)
              for chunk in range(chunks) for number in range(stages)]
    if chunks == 1:
        passes = [(0, number) for number in range(micro_batches)]
    orders = []
    for stage in range(stages):
        behind = stages - stage - 1
        warmup = min(len(passes), behind if chunks == 1 else 2 * behind + (chunks - 1) * stages)
        forward = [("F", chunk * stages + stage, number) for chunk, number in passes]
        backward = [("B", (chunks - 1 - chunk) * stages + stage, number) for chunk, number in passes]
        turns = [step for pair in zip(forward[warmup:], backward, strict=False) for step in pair]
        orders.append(forward[:warmup] + turns + backward[len(passes) - warmup :])
    done: dict[tuple[str, int, int], float] = {}
    clocks, next_step = [0.0] * stages, [0] * stages
    while any(at < len(order) for at, order in zip(next_step, orders, strict=True)):
        for stage, order in enumerate(orders):
            while next_step[stage] < len(order):
                way, part, number = order[next_step[stage]]
                before = (way, part - 1 if way == "F" else part + 1, number)
                if way == "B" and part == len(parts) - 1:
                    before = ("F", part, number)
                if before[1] >= 0 and before not in done:
                    break
                seconds = parts[part] * (1 if way == "F" else 2) + (part == len(parts) - 1) * head * (
                    1 / 3 if way == "F" else 2 / 3)
                clocks[stage] = max(clocks[stage], done.get(before, 0.0)) + seconds
                done[way, part, number] = clocks[stage]
                next_step[stage] += 1
    return max(clocks)


@pytest.mark.parametrize(("layers", "stages", "chunks", "least", "most"), [
    (80, 8, 5, 0.0, 1e-9), (126, 4, 1, 0.0, 1e-9), (126, 16, 1, 0.0, 1e-9), (126, 11, 1, 0.0, 0.005),
    (126, 8, 8, 0.0, 0.01), (126, 16, 4, 0.0, 0.01),
    (126, 16, 6, -0.15, -0.1), (80, 8, 7, -0.2, -0.1),  # unequal parts within a stage: `uneven_within`
])
def test_unequal_stages_wait_for_the_slowest(layers, stages, chunks, least, most):
    parts = chunk_layers(layers, stages, chunks)
    each = [StageTime({"a": sum(parts[stage::stages])}, {"b": 2 * sum(parts[stage::stages])})
            for stage in range(stages)]
    each[-1] = StageTime(each[-1].forward | {"loss": 1.0}, each[-1].backward | {"loss": 2.0})
    error = pipeline_seconds(each, 2 * stages, chunks) / schedule(parts, stages, 2 * stages, head=3.0) - 1
    assert least <= error <= most
    assert uneven_within(layers, stages, chunks) == (error < 0)


def test_tensor_messages_are_those_of_a_ring_and_can_be_hidden():
    four = small_cluster()
    time = training_time(four, setup(Parallel(tensor=2), world=2))
    size = 50 * 64 * 4  # activations of a micro-batch
    # A layer reduces twice forward and twice backward, the embedding once; of 2 ranks a ring sends a whole message.
    assert time.parts["student: tensor messages"] == pytest.approx(2 * 17 * (size / 2e9 + 2 * 20e-6))
    hidden = small_cluster(overlap={"tensor": 1.0, "data": 0.0, "pipeline": 0.0})
    assert training_time(hidden, setup(Parallel(tensor=2), world=2)).parts["student: tensor messages"] == 0


def test_context_ranks_share_the_layers_and_send_keys_and_values():
    cluster = small_cluster()
    alone, shared = (training_time(cluster, setup(Parallel(context=context), world=context, batch=2)).parts
                     for context in (1, 2))
    # 50 positions are filled up to 52, of which each rank has 26, and attends to half of the pairs.
    rate = lambda side: 0.1e12 * 0.5 * side / (side + 20)  # noqa: E731
    products = sum(2 * 26 * i * o / rate(26) for i, o in ((64, 128), (64, 64), (64, 320), (160, 64)))
    assert shared["student: products"] == pytest.approx(2 * 4 * 3 * products)
    assert shared["student: attention"] == pytest.approx(2 * 4 * 3.5 * 4 * 64 * 52 * 53 / 2 / 2 / (0.1e12 * 0.2))
    # Keys and values of 2 x 16 numbers gathered in each layer, their gradients scattered; half of it over the link.
    size = 52 * 2 * 32 * 4
    assert shared["student: context messages"] == pytest.approx(2 * 4 * 2 * (size / 2 / 2e9 + 20e-6))
    assert "student: context messages" not in alone
    # Of the loss positions, 29 to 48, the third quarter (26 to 38) and the fourth have 10 each, in two chunks.
    loss = 3 * 2 * 10 * 64 * 1024 / rate(8) + (5 * 10 + 2 * 10 + 2 * 2 * 64) * 1024 * 4 / 10e9
    assert shared["loss"] == pytest.approx(2 * loss)
    again = training_time(cluster, setup(Parallel(context=2), world=2, recompute="full")).parts
    assert again["student: context messages"] == pytest.approx(1.5 * shared["student: context messages"])


def test_a_ring_is_not_hidden():
    fields = cluster_fields(device_type="cuda", overlap={"tensor": 1.0, "data": 1.0, "pipeline": 1.0})
    ring = replace(setup(Parallel(context=4), world=4), device="cuda")
    time = training_time(Cluster.model_validate(fields), ring)
    own = 56 / 4 * 2 * 32 * 4  # 50 positions filled up to 56
    # Forward 3 messages, backward 4, of which the middle two are of keys, values and gradients.
    assert time.parts["student: context messages"] == pytest.approx(2 * 4 * (9 * own / 2e9 + 7 * 20e-6))


def test_gradients_hide_behind_the_last_micro_batch_only():
    apart = training_time(small_cluster(), setup(world=2)).parts["gradients between replicas"]
    assert apart > 0
    beside = small_cluster(overlap={"tensor": 0.0, "data": 1.0, "pipeline": 0.0})
    assert training_time(beside, setup(world=2)).parts["gradients between replicas"] == 0
    turned_off = training_time(beside, replace(setup(world=2), overlap=False)).parts["gradients between replicas"]
    assert turned_off == apart
    slow = cluster_fields(overlap={"tensor": 0.0, "data": 1.0, "pipeline": 0.0})
    slow["node_link"] = {"gb_s": 0.001, "latency_us": 0.0}
    left = training_time(Cluster.model_validate(slow), setup(world=2)).parts["gradients between replicas"]
    parts = training_time(Cluster.model_validate(slow), setup(world=2)).parts
    assert 0 < left < 2 * apart * 2e9 / 1e6 and left > parts["student: products"]


def test_a_teacher_runs_before_the_student_and_its_rows_travel():
    parts = training_time(small_cluster(), setup(world=2, teacher=Parallel(tensor=2))).parts
    assert parts["teacher: forward"] > 0 and parts["teacher: hidden states"] > 0
    alone = training_time(small_cluster(), setup(world=2)).parts
    assert parts["student: products"] == alone["student: products"]
    assert parts["loss"] > alone["loss"]


def test_an_axis_is_as_slow_as_its_slowest_link():
    cluster = small_cluster()
    role = RoleSetup(MODEL, Parallel(tensor=2, pipeline=2), 8, 1)
    assert link_of(cluster, role, "tensor") == cluster.node_link
    assert link_of(cluster, role, "data") == cluster.node_link  # 2 x 2 neighbours of a node of 4
    assert link_of(cluster, role, "pipeline") == cluster.network_link
    assert link_of(cluster, replace(role, world=4), "pipeline") == cluster.node_link
    for context, link in ((2, cluster.node_link), (4, cluster.network_link)):
        assert link_of(cluster, RoleSetup(MODEL, Parallel(tensor=2, context=context), 8, 1), "context") == link


def test_calls_count_where_the_caller_computes_and_where_kernels_are_shorter():
    on_cpu = training_time(small_cluster(), setup())
    fields = cluster_fields(device_type="cuda")
    fields["device"]["layer_forward_us"] = fields["device"]["layer_backward_us"] = 0.0
    on_gpu = training_time(Cluster.model_validate(fields), replace(setup(), device="cuda"))
    assert on_cpu.parts["student: calls"] > 0 and on_gpu.parts["student: calls"] == 0
    fields["device"]["layer_forward_us"] = 1e6
    waiting = training_time(Cluster.model_validate(fields), replace(setup(), device="cuda")).parts
    layers = [waiting[f"student: {part}"] for part in ("products", "attention", "other kernels", "calls")]
    assert math.isclose(sum(layers), 2 * 4 * 1.0 + _backward(on_gpu.parts), rel_tol=1e-9)


def _backward(parts: dict[str, float]) -> float:
    """Seconds of the backward pass among a step's layers."""
    weights = 64 * 128 + 64 * 64 + 64 * 320 + 160 * 64
    added = 2 * 4 * 8 * weights / 10e9  # by the products themselves: read and written
    return (parts["student: products"] * 2 / 3 + parts["student: attention"] * 2.5 / 3.5
            + (parts["student: other kernels"] - added) * 2 / 3 + added)


@pytest.mark.parametrize(("change", "said"), [
    ({"network_link": None}, "network_link = None: 8 neighbouring devices of four, 4 a node, talk over it"),
    ({"node_link": None}, "node_link = None: 4 neighbouring devices of four, 4 a node, talk over it"),
])
def test_a_link_that_is_not_described_is_asked_for(change, said):
    with pytest.raises(ConfigError) as refused:
        training_time(small_cluster(**change), setup(Parallel(tensor=4, pipeline=2), world=8))
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(("change", "said"), [
    ({"sources": {"device.speed": "measured"}}, "sources names 'device.speed', which is no field"),
    ({"fans": 3}, "fans = 3"),
    ({"devices_per_node": 0}, "devices_per_node = 0"),
])
def test_a_description_that_cannot_be_is_refused(tmp_path, change, said):
    with pytest.raises(ConfigError, match=".") as refused:
        load_cluster(write_cluster(tmp_path / "four.yaml", **change))
    assert said in str(refused.value)
