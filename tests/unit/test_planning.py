"""The planner's counts: parameters and operations against published figures, schedules and steps against simulation."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from megakd.batch import Group, Kind, Padding, Sample, Step
from megakd.chunks import chunk_tokens_on
from megakd.config import Parallel, parse
from megakd.errors import ConfigError
from megakd.hf.families import Architecture
from megakd.hf.pieces import chunk_layers
from megakd.layout import Layout
from megakd.planning.memory import saved_of_layer, training_memory
from megakd.planning.nodes import check_nodes
from megakd.planning.recipe import setup_of_stage
from megakd.planning.search import MOST_FULLEST
from megakd.planning.setup import LossCall, RoleSetup, TrainingSetup
from megakd.planning.sizes import (
    buffer_numbers,
    head_columns,
    layer_flops,
    layer_widths,
    model_flops,
    parameter_count,
    shard_parameters,
)
from megakd.planning.traffic import training_traffic
from megakd.planning.work import Lengths, work_of_lengths, work_of_step
from tests.planning_cases import LLAMA_8B, LLAMA_70B, LLAMA_405B, architecture
from tests.recipes import stage, tiny_recipe

PUBLISHED = {  # sizes, norms a layer, and parameters as the models' safetensors files have them
    "Llama 3.2 1B": (architecture(2048, 16, 32, 8, 64, 8192, 128256, tied=True), 2, 1_235_814_400),
    "Llama 3.2 3B": (architecture(3072, 28, 24, 8, 128, 8192, 128256, tied=True), 2, 3_212_749_824),
    "Llama 3 8B": (LLAMA_8B, 2, 8_030_261_248),
    "Llama 3 70B": (LLAMA_70B, 2, 70_553_706_496),
    "Llama 3.1 405B": (LLAMA_405B, 2, 405_853_388_800),
    "Mistral 7B": (architecture(4096, 32, 32, 8, 128, 14336, 32000), 2, 7_241_732_096),
    # Its files hold the tied head, too.
    "Qwen3 0.6B": (architecture(1024, 28, 16, 8, 128, 3072, 151936, family="qwen3"), 2, 751_632_384),
    "Qwen3 4B": (architecture(2560, 36, 32, 8, 128, 9728, 151936, tied=True, family="qwen3"), 2, 4_022_468_096),
    "Qwen3 32B": (architecture(5120, 64, 64, 8, 128, 25600, 151936, family="qwen3"), 2, 32_762_123_264),
    "Gemma 2 2B": (architecture(2304, 26, 8, 4, 256, 9216, 256000, tied=True), 4, 2_614_341_888),
    "Gemma 2 9B": (architecture(3584, 42, 16, 8, 256, 14336, 256000, tied=True), 4, 9_241_705_984),
    "Gemma 2 27B": (architecture(4608, 46, 32, 16, 128, 36864, 256000, tied=True), 4, 27_227_128_320),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name):
    sizes, norms, published = PUBLISHED[name]
    assert parameter_count(sizes, norms) == published


@pytest.mark.parametrize(("tensor", "pipeline", "virtual"), [(1, 1, 1), (8, 1, 1), (4, 5, 1), (2, 4, 5)])
def test_the_ranks_hold_all_parameters_of_a_model(tensor, pipeline, virtual):
    # 8 x 128 rows of the vocabulary divide, and so do heads: nothing is padding; the norms are on every tensor rank.
    setup = RoleSetup(LLAMA_70B, Parallel(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual), 160, 1)
    held = [sum(shard_parameters(LLAMA_70B, shard) for shard in setup.shards(stage, "te")) for stage in range(pipeline)]
    padded = -128256 % (128 * tensor)
    norms = (2 * 80 + 1) * 8192
    assert sum(held) * tensor == parameter_count(LLAMA_70B) + (tensor - 1) * norms + 2 * padded * 8192


def test_fp8_weights_take_a_byte_each():
    # A layer of 8B: 4096 x (4096 + 2 x 1024 + 4096 + 3 x 14336) in its matrices, and two norms.
    matrices = 32 * 4096 * (6144 + 4096 + 3 * 14336)
    others = parameter_count(LLAMA_8B) - matrices
    student, teacher = RoleSetup(LLAMA_8B, Parallel(), 4, 1), RoleSetup(LLAMA_8B, Parallel(), 4, 1)
    work = work_of_lengths(Lengths(60, 40), (Kind.CHOSEN,), 8, {"student": student.layout, "teacher": teacher.layout},
                           {"student": 1, "teacher": 1}, {"teacher": (Kind.CHOSEN,)})
    losses = (LossCall(2, 5, (Kind.CHOSEN,), "forward"),)

    def kept(dtype: str, own: bool, teachers: bool) -> tuple[dict[str, float], float]:
        setup = TrainingSetup(replace(student, fp8_weights=own), {"teacher": replace(teacher, fp8_weights=teachers)},
                              losses, work, 64, dtype, "cuda")
        (published,) = (call.size_bytes for call in training_traffic(setup, 0) if call.purpose == "parameters")
        return training_memory(setup, 0).kept, published

    bf16, bf16_published = kept("bf16", False, False)
    copied, copied_published = kept("fp8", False, False)
    held, held_published = kept("fp8", True, True)
    assert bf16["teacher: weights"] == bf16["weights"] == 2 * (matrices + others)
    assert copied["teacher: weights"] == 3 * matrices + 2 * others
    assert held["teacher: weights"] == kept("fp8", False, True)[0]["teacher: weights"] == matrices + 2 * others
    assert (copied["weights"], copied["weights in fp8"]) == (2 * (matrices + others), 2 * matrices)
    assert (held["weights"], held["weights in fp8"]) == (2 * others, 2 * matrices)
    assert held["optimizer"] == copied["optimizer"] == bf16["optimizer"]
    # One for each shape of weights, whatever the number of layers.
    assert bf16["gradients' stand-ins"] == held["gradients' stand-ins"] == 2 * matrices / 32
    assert bf16_published == copied_published == held_published + matrices


def test_gradients_are_reduced_in_a_buffer_with_gaps():
    # hidden 40, 1 head of 8, MLP 24, 256 rows: 10,240 numbers of the embedding; a layer's norms have 40 each and begin
    # at multiples of 64; qkv 960 = 15 x 64, projection 320 = 5 x 64, MLP 1,920 and 960, which are multiples, too.
    model = architecture(40, 2, 1, 1, 8, 24, 256, tied=True)
    shard, = RoleSetup(model, Parallel(), 6, 1).shards(0, "local")
    layer = 64 + 64 + 960 + 320 + 1920 + 960
    assert shard_parameters(model, shard) == 10240 + 2 * (layer - 48) + 40
    exact = 10240 + 2 * layer + 64
    assert buffer_numbers(model, shard, 1) == -(-exact // 128) * 128
    assert buffer_numbers(model, shard, 3) == -(-exact // 384) * 384


def test_operations_of_the_405b_training_run():
    # The Llama 3 paper (arXiv 2407.21783) trains 405B on 15.6T tokens with 3.8e25 operations; it counts 6 for each
    # parameter and token. The head's are among them, the embedding's rows are looked up: 0.5 % less.
    forward = model_flops(LLAMA_405B, 1, 0, 1)
    assert 3 * forward * 15.6e12 == pytest.approx(3.8e25, rel=0.01)
    assert forward == 2 * (parameter_count(LLAMA_405B) - 128256 * 16384 - (2 * 126 + 1) * 16384)


def test_operations_of_a_layer_against_a_plain_count():
    widths = layer_widths(LLAMA_8B, 2)
    tokens, lengths = 300, (100, 200)
    products = [(4096, 2048 + 2 * 512), (2048, 4096), (4096, 2 * 7168), (7168, 4096)]
    plain = sum(2 * tokens * rows * columns for rows, columns in products)
    # Scores and weighted values: each position of each of 16 heads of 128 attends to itself and those before.
    plain += sum(2 * 2 * 16 * 128 * (position + 1) for length in lengths for position in range(length))
    assert layer_flops(widths, tokens, sum(n * (n + 1) / 2 for n in lengths)) == plain


def in_flight(stages: int, stage: int, cut: tuple[int, ...], micro_batches: int) -> tuple[int, int]:
    """Most chunk passes under way on a stage with chunks of `cut` layers, and most layer passes: the warm-up, then
    forward before backward, one of each; as many micro-batches as stages through a chunk, then through the next."""
    chunks = len(cut)
    group = stages if chunks > 1 else 1
    forward = [chunk for start in range(0, micro_batches, group) for chunk in range(chunks)
               for _ in range(start, min(start + group, micro_batches))]
    backward = [chunks - 1 - chunk for chunk in forward]
    behind = stages - stage - 1
    warmup = min(behind if chunks == 1 else behind * 2 + (chunks - 1) * stages, len(forward))
    under_way = [*forward[:warmup]]
    most = len(under_way), sum(cut[chunk] for chunk in under_way)
    for one, other in zip(forward[warmup:], backward, strict=False):
        under_way.append(one)
        most = max(most[0], len(under_way)), max(most[1], sum(cut[chunk] for chunk in under_way))
        under_way.remove(other)
    return most


@pytest.mark.parametrize("rounds", [1, 2, 8])
@pytest.mark.parametrize("model", [LLAMA_70B, LLAMA_405B])
@pytest.mark.parametrize(("stages", "chunks"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 5), (8, 8), (16, 3)])
def test_micro_batches_and_layers_under_way(stages, chunks, model, rounds):
    setup = RoleSetup(model, Parallel(pipeline=stages, virtual_pipeline=chunks), stages, 1)
    parts = chunk_layers(model.layers, stages, chunks)
    for number in range(stages):
        micro_batches = rounds * (stages if chunks > 1 else 1)
        assert (setup.warmup(number, micro_batches), setup.layers_under_way(number, micro_batches)) == in_flight(
            stages, number, parts[number::stages], micro_batches)


def test_stages_that_need_a_look():
    setup = RoleSetup(LLAMA_405B, Parallel(pipeline=12), 12, 1)  # 10 layers on stages 0 to 4 and 11, elsewhere 11
    assert setup.alike == (0, 1, 1, 1, 1, 5, 5, 5, 5, 5, 5, 11) and setup.fullest == (0, 5, 11)
    even = RoleSetup(LLAMA_405B, Parallel(pipeline=9, virtual_pipeline=7), 9, 1)
    assert even.alike == (0, *[1] * 7, 8) and even.fullest == (0, 8)
    for layers, stages, chunks in product(range(1, 60), range(1, 9), range(1, 6)):
        if layers >= stages * chunks:
            role = RoleSetup(replace(LLAMA_8B, layers=layers), Parallel(pipeline=stages, virtual_pipeline=chunks),
                             stages, 1)
            assert len(role.fullest) <= MOST_FULLEST


def step_of(groups: int, prompt: int, answer: int) -> Step:
    kinds = (Kind.CHOSEN, Kind.REJECTED)
    return Step(tuple(Group(f"row:{number}", tuple(Sample((5,) * (prompt + answer), prompt, kind) for kind in kinds))
                      for number in range(groups)))


def test_the_work_of_a_step_of_equal_rows_is_that_of_its_lengths():
    layouts = {"student": Layout(8, 2, 2), "teacher": Layout(8, 4)}
    kinds = {"teacher": (Kind.REJECTED,)}
    micro_batches = {"student": 2, "teacher": 4}
    real = work_of_step(step_of(16, 30, 12), layouts, micro_batches, dict.fromkeys(layouts, Padding()), kinds)
    mean = work_of_lengths(Lengths(30, 12), (Kind.CHOSEN, Kind.REJECTED), 16, layouts, micro_batches, kinds)
    for role in layouts:
        for number in ("tokens", "pairs", "all_rows"):
            assert real.roles[role].sum(number) == mean.roles[role].sum(number)
            assert real.roles[role].most(number) == mean.roles[role].most(number)
    assert (real.tokens, real.received("teacher")) == (mean.tokens, mean.received("teacher"))
    # What arrives is what was sent, and both tensor ranks of a replica's last stage get half of its rows.
    moved = real.moved["teacher"]
    assert sum(moved.sent) == sum(moved.received) and moved.gathered == (96, 96)


def test_filling_counts_as_work():
    layouts = {"student": Layout(1)}
    plain = work_of_step(step_of(2, 3, 2), layouts, {"student": 2}, {"student": Padding()}, {})
    filled = work_of_step(step_of(2, 3, 2), layouts, {"student": 2}, {"student": Padding(16)}, {})
    assert plain.roles["student"].sum("tokens") == 20 and filled.roles["student"].sum("tokens") == 32
    assert filled.roles["student"].sum("pairs") == plain.roles["student"].sum("pairs") + 12 * 13 / 2
    assert plain.roles["student"].sum("all_rows") == filled.roles["student"].sum("all_rows") == 8


def position_by_position(sequences: list[tuple[int, int]], multiple: int, context: int) -> list[list[int]]:
    """(positions, pairs, loss positions) of each context rank: sequences of (prompt, length) filled up one by one and
    the row by one more, then dealt out part by part."""
    parts = 2 * context
    filled = [(prompt, length, length + -length % parts) for prompt, length in sequences]
    step = next(number for number in range(1, 10**6) if number % parts == 0 and number % (multiple * context) == 0)
    left = -sum(whole for *_, whole in filled) % step
    ranks = [[0, 0, 0] for _ in range(context)]
    for prompt, length, whole in [*filled, *([(left, left, left)] if left else [])]:
        for position in range(whole):
            part = position // (whole // parts)
            own = ranks[min(part, parts - 1 - part)]
            own[0], own[1] = own[0] + 1, own[1] + position + 1
            own[2] += prompt - 1 <= position < length - 1
    return ranks


@pytest.mark.parametrize(("context", "multiple"), [(2, 1), (2, 3), (4, 16), (3, 2)])
def test_context_ranks_share_a_row_position_by_position(context, multiple):
    sequences = [(3, 40), (21, 22), (30, 61), (1, 7)]
    group = Group("row:0", tuple(Sample((5,) * length, prompt, Kind.CHOSEN) for prompt, length in sequences))
    work = work_of_step(Step((group,)), {"student": Layout(context, context=context)}, {"student": 1},
                        {"student": Padding(multiple)}, {})
    ranks = position_by_position(sequences, multiple, context)
    [(tokens, pairs)] = {(tokens, pairs) for tokens, pairs, _ in ranks}  # all have equally much
    student = work.roles["student"]
    assert (student.sum("tokens"), student.sum("pairs")) == (tokens, pairs)
    assert student.sum("all_rows") == max(rows for *_, rows in ranks)
    assert work.rows(Kind) == sum(rows for *_, rows in ranks) == 37 + 1 + 31 + 6


def test_equal_micro_batches_have_the_longest_ones_row_on_context_ranks():
    groups = tuple(Group(f"row:{length}", (Sample((5,) * length, 4, Kind.CHOSEN),)) for length in (18, 29))
    works = {uniform: work_of_step(Step(groups), {"student": Layout(2, context=2)}, {"student": 1},
                                   {"student": Padding(3, uniform)}, {}).roles["student"] for uniform in (False, True)}
    # 18 and 29 are filled up to 20 and 32 (4 parts), their rows to 24 and 36 (3 rows on each of 2 ranks, 4 parts).
    assert sorted(micro.tokens for micro in works[False].micro_batches) == [12, 18]
    assert [micro.tokens for micro in works[True].micro_batches] == [18, 18]
    assert max(micro.pairs for micro in works[False].micro_batches) == (32 * 33 / 2 + 4 * 5 / 2) / 2


def test_the_mean_work_of_context_ranks_is_that_of_equal_rows():
    layouts, kinds = {"student": Layout(8, 2, 1, 2), "teacher": Layout(8, 4)}, {"teacher": (Kind.REJECTED,)}
    step, micro_batches = step_of(16, 35, 7), {"student": 2, "teacher": 1}
    works = (work_of_step(step, layouts, micro_batches, dict.fromkeys(layouts, Padding()), kinds),
             work_of_lengths(Lengths(35, 7), (Kind.CHOSEN, Kind.REJECTED), 16, layouts, micro_batches, kinds))
    real, mean = (work.roles["student"] for work in works)
    # 42 positions are filled up to 44; all 7 answers' positions stand in the last of 4 parts, on one rank.
    assert real.sum("tokens") == mean.sum("tokens") == 4 * 4 * 44 / 2
    assert real.sum("pairs") == mean.sum("pairs") == 4 * 4 * 44 * 45 / 2 / 2
    assert real.sum("all_rows") == mean.sum("all_rows") == 4 * 4 * 7
    assert len(real.micro_batches) == len(mean.micro_batches) == 4
    # That rank gets all of the teacher's rows, half of them on each of its tensor ranks, which gather the whole.
    assert works[0].received("teacher") == works[1].received("teacher") == 8 * 7
    assert works[0].moved["teacher"].gathered == (56, 0, 56, 0)
    assert sum(works[0].moved["teacher"].sent) == sum(works[0].moved["teacher"].received) <= 16 * 7


def context_setup(context: int, device: str, recompute: str = "none", teacher: bool = False) -> TrainingSetup:
    """Llama 8B on 8 ranks, tensor 2, two sequences of 61 + 35 tokens a micro-batch, 8 of them a step."""
    student = RoleSetup(LLAMA_8B, Parallel(tensor=2, context=context), 8, 2, recompute)
    teachers = {"teacher": RoleSetup(LLAMA_8B, Parallel(tensor=2), 8, 2)} if teacher else {}
    layouts = {"student": student.layout} | {name: role.layout for name, role in teachers.items()}
    work = work_of_lengths(Lengths(61, 35), (Kind.CHOSEN,), 8, layouts, dict.fromkeys(layouts, 2),
                           dict.fromkeys(teachers, (Kind.CHOSEN,)))
    return TrainingSetup(student, teachers, (LossCall(1 + teacher, 2, (Kind.CHOSEN,), "forward"),), work, 64, "bf16",
                         device)


OWN = 2 * 512 * 2
"""Bytes of a position's keys and values on a tensor rank: 4 of 8 heads of 128, bf16."""


def context_bytes(setup: TrainingSetup) -> dict[str, tuple[float, float]]:
    """Operation -> (calls, bytes) of the first rank over its context ranks."""
    found: dict[str, tuple[float, float]] = {}
    for call in training_traffic(setup, 0):
        if call.axis == "context":
            calls, size = found.get(call.operation, (0, 0))
            found[call.operation] = calls + call.calls, size + call.bytes
    return found


@pytest.mark.parametrize(("recompute", "forwards"), [("none", 1), ("mlp", 1), ("full", 2)])
def test_keys_and_values_go_to_the_context_ranks(recompute, forwards):
    # Tensor 2 x context 2 leaves 2 replicas with 2 micro-batches of 2 sequences of 96 positions, context 4 one with 4;
    # 32 layers.
    layers = 32 * 2
    assert context_bytes(context_setup(1, "cpu", recompute)) == {}
    whole = 2 * 96 * OWN
    assert context_bytes(context_setup(2, "cpu", recompute)) == {
        "all_gather": (layers * forwards, layers * forwards * whole), "reduce_scatter": (layers, layers * whole)}
    own, layers = 2 * 96 / 4 * OWN, 32 * 4
    # A ring of 4: forward 3 messages; backward 4, of keys and values in the first 3, of their gradients in the last 3.
    calls, size = layers * (3 * forwards + 4), layers * (3 * forwards + 6) * own
    assert context_bytes(context_setup(4, "cuda", recompute)) == {"send": (calls, size), "receive": (calls, size)}


def test_gradients_and_states_are_shared_by_context_ranks_too():
    setups = [context_setup(context, "cuda") for context in (1, 2, 4)]
    kept = [training_memory(setup, 0).kept for setup in setups]
    assert kept[0] == kept[1] == kept[2]  # 4 replicas, 2 x 2, 1 x 4
    gradients = [[call for call in training_traffic(setup, 0) if call.axis == "data"] for setup in setups]
    assert gradients[0] == gradients[1] == gradients[2] and [call.size for call in gradients[0]] == [4, 4]


def test_a_teachers_rows_go_to_the_context_rank_that_has_their_positions():
    # Loss positions 60 to 94 of 96. Context 2, parts of 24: the first rank has 72 to 94, the second 60 to 71. Context
    # 4, parts of 12: the first rank has 84 to 94, the second 72 to 83, the third 60 to 71.
    for context, rows, micro_batches in ((1, 35, 1), (2, 23, 2), (4, 12, 4)):
        setup = context_setup(context, "cuda", teacher=True)
        assert len(setup.work.roles["student"].micro_batches) == micro_batches
        assert setup.work.received("teacher") == 2 * micro_batches * rows
        # The teacher has no context ranks: 4 replicas with one micro-batch.
        assert setup.work.roles["teacher"].sum("all_rows") == 2 * 35 and setup.work.rows(Kind) == 8 * 35
        memory = training_memory(setup, 0)
        assert memory.parts["teacher: hidden states"] == 2 * micro_batches * rows * 4096 * 2
        arrived = [call for call in training_traffic(setup, 0) if call.purpose == "teacher: hidden states"]
        assert {call.operation: call.bytes for call in arrived} == {
            "send": 2 * 35 / 2 * 8192, "receive": micro_batches * rows * 8192,
            "all_gather": 2 * micro_batches * rows * 8192}


def test_attention_keeps_all_keys_and_values_on_the_cpu_and_its_own_in_a_ring():
    # Of a position on a tensor rank: 16 query heads and 4 key heads of 128.
    query, key = 2048, 512
    widths = layer_widths(LLAMA_8B, 2)
    local = [saved_of_layer(context_setup(context, "cpu"), widths, "none") for context in (1, 2, 4)]
    # Without context ranks: rotated query and key, the projection, two results. With: the query, all keys and values,
    # two results, and masks of 24 x 24 (12 x 12) for each part up to the own ones: 5 (9) of them for a rank's 48 (24).
    assert local[1] - local[0] == pytest.approx(2 * (3 * query + 2 * 2 * key - 4 * query - 3 * key + 5 * 24**2 / 48),
                                                rel=1e-3)
    assert local[2] - local[1] == pytest.approx(2 * (2 * 2 * key + 9 * 12**2 / 24 - 5 * 24**2 / 48), rel=1e-3)
    ring = [saved_of_layer(context_setup(context, "cuda"), widths, "none") for context in (1, 2, 4)]
    assert ring[1] == ring[2] == ring[0]
    travelling = training_memory(context_setup(4, "cuda"), 0).phases["keys and values travel"]["keys and values"]
    assert travelling == 2 * 96 / 4 * 2 * (3 * 2 * key + 4 * query)


def test_norms_of_heads_keep_their_inputs():
    # Of a position on a tensor rank: 16 query heads and 4 key heads of 128, and as many numbers to divide by.
    query, key, normed = 2048, 512, 4 * (16 + 4)
    without, widths = layer_widths(LLAMA_8B, 2), layer_widths(replace(LLAMA_8B, family="qwen3"), 2)
    assert (without.by_head, widths.by_head) == (0, query + key)
    more = {device: [saved_of_layer(context_setup(context, device), widths, "none")
                     - saved_of_layer(context_setup(context, device), without, "none") for context in (1, 2)]
            for device in ("cpu", "cuda")}
    # On the CPU the queries as they are taken out of the projection, and both normalised; the projection itself is
    # there already, but not across context ranks. Transformer Engine's norms copy both out of it, and keep no output.
    assert more["cpu"] == [2 * (2 * query + key) + normed, 2 * (2 * query + key + query + 2 * key) + normed]
    assert more["cuda"] == [2 * (query + key) + normed] * 2


def test_a_stage_of_a_recipe(tmp_path):
    raw = tiny_recipe(tmp_path)
    raw["student"]["recompute"] = "full"
    stage(raw, "adpa")["optimizer"] = {"offload": True}
    recipe = parse(raw)
    made = {each.name: setup_of_stage(recipe, each, 2, Lengths(20, 10)) for each in recipe.stages
            if each.name in ("dckd", "adpa")}
    trained = made["dckd"].trained
    assert (trained.parallel, trained.micro_batch, trained.recompute) == (
        recipe.student.parallel, recipe.student.micro_batch, "full")
    assert trained.architecture == Architecture.read(recipe.student.model) and trained.world == 2
    assert list(made["dckd"].teachers) == ["teacher"] and set(made["adpa"].teachers) == {"teacher", "reference"}
    assert made["adpa"].teachers["reference"].parallel == recipe.reference.parallel
    both = (Kind.CHOSEN, Kind.REJECTED)
    assert made["dckd"].losses == (LossCall(2, 5, both, "forward"),)
    assert made["dckd"].work.tokens == stage(raw, "dckd")["global_batch"] * 2 * 30
    assert (made["dckd"].device, made["dckd"].dtype, made["dckd"].spec) == ("cpu", "fp32", "local")
    assert made["adpa"].offload and not made["dckd"].offload


def test_the_logits_of_a_chunk_follow_the_device(tmp_path):
    """What nobody sets is the device's own. 16-bit gradients by the logits are held of four chunks on a GPU, or of as
    many tokens as there are, and one message sums d(hidden) of all of them."""
    raw, setups = tiny_recipe(tmp_path), []
    for chunk in (16, None):
        stage(raw, "dckd")["chunk_tokens"] = chunk
        recipe = parse(raw)
        dckd = next(each for each in recipe.stages if each.name == "dckd")
        setups.append(setup_of_stage(recipe, dckd, 2, Lengths(3000, 3000)))
    assert [(each.chunk_tokens, each.gradient_tokens) for each in setups] == [(16, 16), (256, 256)]
    assert chunk_tokens_on("cuda", None) == 2048 and chunk_tokens_on("cuda", 16) == 16
    columns = head_columns(setups[0].trained.architecture, setups[0].trained.parallel.tensor)
    [(each, times)] = setups[0].work.roles["student"].repeated
    rows = each.rows(setups[0].losses[0].kinds)
    assert rows > 4 * 1024

    def found(chunk: int, dtype: str) -> tuple[float, float]:
        setup = replace(setups[0], chunk_tokens=chunk, device="cuda", dtype=dtype)
        [calls] = [call.calls for call in training_traffic(setup, 0) if call.purpose == "loss: d(hidden)"]
        return training_memory(setup, 0).phases["loss"]["loss"], calls / times

    (small, often), (large, seldom), (_, of_all) = found(256, "bf16"), found(1024, "bf16"), found(1024, "fp32")
    # Two models' logits of 4 bytes, and the gradients of 2 bytes of four chunks.
    assert large - small == columns * (1024 - 256) * (2 * 4 + 4 * 2)
    assert (often, seldom, of_all) == (-(-rows // 1024), -(-rows // 4096), -(-rows // 1024))


def test_offloaded_states_are_on_a_gpu_during_their_step_alone(tmp_path):
    recipe = parse(tiny_recipe(tmp_path))
    stage_of_recipe = next(each for each in recipe.stages if each.name == "dckd")
    setup = replace(setup_of_stage(recipe, stage_of_recipe, 2, Lengths(20, 10)), device="cuda", dtype="bf16")
    usual, offloaded = training_memory(setup, 0), training_memory(replace(setup, offload=True), 0)
    states = usual.kept["optimizer"]
    assert offloaded.kept == {name: size for name, size in usual.kept.items() if name != "optimizer"}
    assert offloaded.phases == usual.phases | {"optimizer's step": {"optimizer": states}}
    assert (usual.host, offloaded.host) == (0, states)


def test_only_the_trained_model_of_a_stage_has_context_ranks(tmp_path):
    recipe = parse(tiny_recipe(tmp_path))
    cut = {role: recipe.role(role).model_copy(update={"parallel": Parallel(context=2)})
           for role in ("student", "teacher", "reference")}
    recipe = recipe.model_copy(update=cut)
    [adpa] = [each for each in recipe.stages if each.name == "adpa"]
    setup = setup_of_stage(recipe, adpa, 4, Lengths(20, 10))
    assert (setup.trained.layout.context, setup.trained.layout.data) == (2, 2)
    assert {role.layout for role in setup.teachers.values()} == {Layout(4)}
    assert len(setup.teachers) == 2
    # Two ranks hold one copy, of which a training takes one more for its other half of each sequence.
    wide = recipe.model_copy(update={"teacher": cut["teacher"].model_copy(
        update={"parallel": Parallel(tensor=2, context=2)})})
    check_nodes(wide, [adpa], 2, 1)
    assert setup_of_stage(wide, adpa, 2, Lengths(20, 10)).teachers["teacher"].layout == Layout(2, 2)
    with pytest.raises(ConfigError, match="student takes in stage adpa: tensor 1 x pipeline 1 x context 4"):
        check_nodes(wide.model_copy(update={"student": cut["student"].model_copy(
            update={"parallel": Parallel(context=4)})}), [adpa], 2, 1)
