"""The planner's counts: parameters and operations against published figures, schedules and steps against simulation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megakd.batch import Group, Kind, Padding, Sample, Step
from megakd.config import Parallel, parse
from megakd.hf.families import Architecture
from megakd.layout import Layout
from megakd.planning.memory import training_memory
from megakd.planning.recipe import setup_of_stage
from megakd.planning.setup import LossCall, RoleSetup, TrainingSetup
from megakd.planning.sizes import (
    buffer_numbers,
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


def in_flight(stages: int, stage: int, chunks: int, micro_batches: int) -> int:
    """Most chunk passes under way on a stage: all of the warm-up, then forward before backward, one of each."""
    if chunks == 1:
        warmup = min(stages - stage - 1, micro_batches)
    else:
        warmup = min((stages - stage - 1) * 2 + (chunks - 1) * stages, micro_batches * chunks)
    under_way = most = warmup
    for _ in range(micro_batches * chunks - warmup):
        under_way += 1
        most = max(most, under_way)
        under_way -= 1
    return most


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8, 32])
@pytest.mark.parametrize(("stages", "chunks"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 5)])
def test_micro_batches_under_way(stages, chunks, micro_batches):
    setup = RoleSetup(LLAMA_70B, Parallel(pipeline=stages, virtual_pipeline=chunks), stages, 1)
    for number in range(stages):
        assert setup.warmup(number, micro_batches) == in_flight(stages, number, chunks, micro_batches)


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


def test_offloaded_states_are_on_a_gpu_during_their_step_alone(tmp_path):
    recipe = parse(tiny_recipe(tmp_path))
    stage_of_recipe = next(each for each in recipe.stages if each.name == "dckd")
    setup = replace(setup_of_stage(recipe, stage_of_recipe, 2, Lengths(20, 10)), device="cuda", dtype="bf16")
    usual, offloaded = training_memory(setup, 0), training_memory(replace(setup, offload=True), 0)
    states = usual.kept["optimizer"]
    assert offloaded.kept == {name: size for name, size in usual.kept.items() if name != "optimizer"}
    assert offloaded.phases == usual.phases | {"optimizer's step": {"optimizer": states}}
    assert (usual.host, offloaded.host) == (0, states)
