"""Plans of generating and scoring: against numbers worked out by hand, and the draining of slots against simulation."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from megakd.batch import Kind
from megakd.config import Parallel, parse
from megakd.errors import ConfigError
from megakd.planning.cluster import Cluster
from megakd.planning.inference import (
    Generation,
    Scoring,
    generation_memory,
    generation_time,
    scoring_memory,
    scoring_time,
)
from megakd.planning.recipe_inference import (
    evaluation_memory,
    evaluation_of_stage,
    evaluation_time,
    generation_of_stage,
    scoring_of_stage,
)
from megakd.planning.setup import RoleSetup
from megakd.planning.work import Lengths, MicroBatch
from tests.recipes import tiny_recipe
from tests.unit.test_planning import LLAMA_8B

LAYER = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
VOCABULARY = 128256
NORMS = (2 * 32 + 1) * 4096


def cluster(tflops: float = 1e6, memory_gb_s: float = 1e9, latency_us: float = 0.0) -> Cluster:
    """One whose other figures cost nothing."""
    rates = {"peak_tflops": tflops, "efficiency": 0.5, "half_side": 0.0}
    link = {"gb_s": 1e9, "latency_us": latency_us}
    device = {"kind": "made up", "memory_gib": 80, "reserved_gib": 2, "memory_gb_s": memory_gb_s,
              "passes_gb_s": memory_gb_s,
              "rates": {"fp32": rates, "bf16": rates}, "attention": rates, "layer_forward_us": 0.0,
              "layer_backward_us": 0.0, "step_ms": 0.0}
    return Cluster.model_validate({
        "name": "made up", "device_type": "cuda", "devices_per_node": 8, "device": device, "node_link": link,
        "network_link": link, "overlap": dict.fromkeys(("tensor", "data", "pipeline"), 0.0), "sources": {}})


ALIKE = Lengths(1000, 24)


def generation(parallel: Parallel, *, slots: int = 32, prompts: int = 320, mean: Lengths = ALIKE,
               longest: Lengths = ALIKE) -> Generation:
    world = parallel.tensor * parallel.pipeline
    return Generation(RoleSetup(LLAMA_8B, parallel, world, 1), slots, prompts, 1, mean, longest, False, 0, False,
                      "bf16", "cuda")


def test_weights_and_cache_of_llama_8b():
    for tensor in (1, 2):
        memory = generation_memory(generation(Parallel(tensor=tensor)), 0)
        parameters = (32 * LAYER + 2 * VOCABULARY * 4096) // tensor + NORMS
        assert memory.kept["weights"] == 2 * parameters
        # Keys and values of 8 heads of 128 in 32 layers for 32 rows of 1024 positions, 2 bytes each: 4 GiB.
        assert memory.kept["keys and values"] == 4 * 2**30 / tensor
        # As many prompt tokens as are taken at a time.
        widths = 5 * 14336 // tensor + 4 * 4096
        assert memory.phases["prefill"]["forward"] == 4096 * (widths * 2 + 128 * 4)
        # The logits alone; on a CPU with their copy without padding, too.
        assert memory.phases["next tokens"]["logits"] == 32 * VOCABULARY // tensor * 4
    first, last = (generation_memory(generation(Parallel(pipeline=2)), stage) for stage in range(2))
    assert "next tokens" in last.phases and "next tokens" not in first.phases
    # Half of the layers, of twice as many rows.
    assert first.kept["keys and values"] == last.kept["keys and values"] == 4 * 2**30


def simulated_rounds(lengths: list[int], slots: int) -> int:
    """Rounds in which a list of answers ends, when a free slot is given to the next one at once."""
    queue, live, rounds = list(reversed(lengths)), [], 0
    while queue or live:
        while queue and len(live) < slots:
            live.append(queue.pop())
        rounds += 1
        live = [left - 1 for left in live if left > 1]
    return rounds


def test_rounds_against_simulation():
    def planned(lengths: list[int], slots: int) -> float:
        mean = Lengths(10, sum(lengths) / len(lengths))
        return generation(Parallel(), slots=slots, prompts=len(lengths), mean=mean,
                          longest=Lengths(10, max(lengths))).rounds

    # Exact for equal lengths, and where every answer has a slot.
    assert planned([24] * 96, 32) == simulated_rounds([24] * 96, 32) == 72
    assert planned([5, 20, 11], 8) == simulated_rounds([5, 20, 11], 8) == 20
    draw = random.Random(3)
    for count, slots in ((200, 32), (2000, 32), (2000, 128)):
        # Answers that stop by chance, and are cut at 128 tokens.
        lengths = [min(128, 1 + int(draw.expovariate(1 / 60))) for _ in range(count)]
        assert planned(lengths, slots) == pytest.approx(simulated_rounds(lengths, slots), rel=0.1)


def test_time_of_decoding_is_that_of_reading_weights_and_cache():
    # 320 answers of 24 tokens in 32 slots: 240 rounds with 32 rows; 1 of 24 tokens comes from the prefill.
    task, rate = generation(Parallel()), 2000.0
    assert task.rounds == 240
    longest = 1000 + 24 * (1 - 24 / 480)
    weights = 2 * (32 * LAYER + VOCABULARY * 4096)
    cache = 2 * 32 * 1024 * 2 * 32 * longest
    draws = 2 * 32 * VOCABULARY * 8
    expected = 240 * 23 / 24 * (weights + cache + draws) / (rate * 1e9)
    # Norms and activations are what is left: below 1 %.
    assert generation_time(cluster(memory_gb_s=rate), task).parts["decode"] == pytest.approx(expected, rel=0.01)


def test_recorded_passes_do_not_wait_for_the_host():
    launched, fields = generation(Parallel()), cluster(memory_gb_s=2000.0).model_dump()
    free = generation_time(Cluster.model_validate(fields), launched)
    fields["device"]["layer_forward_us"] = 1e6
    slow, replayed = Cluster.model_validate(fields), replace(launched, replayed=True)
    with pytest.raises(ConfigError, match="device.layer_replayed_us = None.*decode_graphs"):
        generation_time(slow, replayed)
    # A second a layer, for a layer's 0.2 ms: 240 rounds, of whose tokens 1 of 24 comes from the prefill.
    waiting = generation_time(slow, launched).parts
    assert waiting["decode"] == pytest.approx(240 * 23 / 24 * 32, rel=0.01)
    fields["device"]["layer_replayed_us"] = 0.0
    recorded = generation_time(Cluster.model_validate(fields), replayed).parts
    assert recorded == {"prefill": waiting["prefill"], "decode": free.parts["decode"]}


def test_stages_of_a_pipeline_decode_beside_each_other():
    # Two passes of 32 rows are under way: each tick is one of the last stage, which has the head and draws as well.
    task, rate = generation(Parallel(pipeline=2)), 2000.0
    assert (task.rows, task.companies, task.rounds) == (32, 2, 120)
    longest = 1000 + 24 * (1 - 24 / 240)
    weights = 2 * (16 * LAYER + VOCABULARY * 4096)
    cache = 2 * 16 * 1024 * 2 * 32 * longest
    draws = 2 * 32 * VOCABULARY * 8
    expected = 120 * 23 / 24 * 2 * (weights + cache + draws) / (rate * 1e9)
    assert generation_time(cluster(memory_gb_s=rate), task).parts["decode"] == pytest.approx(expected, rel=0.01)
    # A single answer is with one stage at a time.
    alone = generation(Parallel(pipeline=2), prompts=1)
    assert (alone.rows, alone.companies, alone.rounds) == (1, 1, 24)
    whole = generation(Parallel(), prompts=1)
    seconds = [generation_time(cluster(memory_gb_s=rate), each).parts["decode"] for each in (alone, whole)]
    assert seconds[0] == pytest.approx(seconds[1])


def test_time_of_prefill_is_that_of_its_products():
    task, rate = generation(Parallel(), slots=4, prompts=4), 100.0
    # One pass over four prompts: two operations a parameter and token, four a query number and pair; four heads' rows.
    pairs = 4 * 1000 * 1001 / 2
    operations = 2 * 4000 * 32 * LAYER + 4 * 4096 * pairs * 32 + 2 * 4 * VOCABULARY * 4096
    seconds = generation_time(cluster(tflops=rate), task).parts["prefill"]
    assert seconds == pytest.approx(operations / (rate * 1e12 * 0.5), rel=1e-3)


def test_each_collective_of_a_decoding_round_waits_for_its_link():
    task = generation(Parallel(tensor=2))
    slow, fast = (generation_time(cluster(latency_us=each), task).parts["decode"] for each in (10.0, 0.0))
    # Two reductions a layer and the embedding's, two messages each; what each rank's columns say gathered.
    assert slow - fast == pytest.approx(240 * 23 / 24 * ((2 * 32 + 1) * 2 + 1) * 10e-6)


def test_scoring_of_llama_8b():
    work = MicroBatch(4 * 1024, 4 * 1024 * 1025 / 2, {Kind.CHOSEN: 4 * 24})
    role = RoleSetup(LLAMA_8B, Parallel(tensor=2), 8, 4)
    task = Scoring(role, 4, 1000, work, 400, True, True, 64, "bf16", "cuda")
    # Four replicas with four micro-batches of four answers: 64 at a time.
    assert task.steps == 16 and task.disk_bytes == 1000 * 24 * 400
    memory = scoring_memory(task, 0)
    assert memory.phases["signals"]["hidden states"] == 4 * 96 * 4096 * 2
    logits = 64 * VOCABULARY // 2 * 4
    assert memory.phases["signals"]["logits"] == logits
    # The likeliest tokens have no kernel, and a chunk is one block; a CPU's blocks are small.
    for changed, scratch in (({"kernels": False}, 1.0), ({"kernels": False, "device": "cpu"}, 0.125)):
        changed_memory = scoring_memory(replace(task, **changed), 0)
        assert changed_memory.phases["signals"]["logits"] == (1 + scratch) * logits
    operations = (2 * 4096 * 32 * LAYER + 4 * 4096 * work.pairs * 32) / 2
    seconds = scoring_time(cluster(tflops=100.0), task)
    assert seconds.parts["forward"] == pytest.approx(16 * 4 * operations / (100e12 * 0.5), rel=1e-3)
    head = 2 * 96 * VOCABULARY // 2 * 4096
    assert seconds.parts["signals"] == pytest.approx(16 * 4 * head / (100e12 * 0.5), rel=1e-3)


def test_stages_of_a_recipe(tmp_path):
    raw = tiny_recipe(tmp_path)
    for stage in raw["stages"]:
        if stage["name"] == "generate":
            stage |= {"model": raw["student"]["model"], "n": 2, "max_new_tokens": 90, "temperature": 1.0, "top_k": 7}
        if stage["name"] == "eval":
            stage |= {"models": {"start": raw["student"]["model"]}, "sampling": {"seeds": [1, 2, 3]}}
    raw["teacher"]["model"] = raw["reference"]["model"]
    score = {"kind": "score", "model": raw["teacher"]["model"], "answers": ["chosen", "rollout"],
             "rollouts": "generate"}
    signals = {"hidden": ({"kind": "hidden_states"}, 48 * 4), "tokens": ({"kind": "token_log_probs"}, 4),
               "listed": ({"kind": "top_k", "k": 20}, 20 * 8), "others": ({"kind": "top_k", "at": "listed"}, 20 * 4)}
    place = 1 + next(number for number, each in enumerate(raw["stages"]) if each["name"] == "generate")
    raw["stages"][place:place] = [score | {"name": name, "signal": signal} for name, (signal, _) in signals.items()]
    recipe = parse(raw)
    stages = {each.name: each for each in recipe.stages}
    made = generation_of_stage(recipe, stages["generate"], 2, 10, Lengths(20, 30), 40)
    # Two ranks are one replica; data.max_length 96 leaves the longest prompt 56 tokens.
    assert (made.answers, made.slots, made.rows, made.longest, made.sampled, made.top_k) == (
        20, 8, 8, Lengths(40, 56), True, 7)
    # No answer is longer than the stage lets it be.
    assert generation_of_stage(recipe, stages["generate"], 2, 10, Lengths(20, 500), 40).mean == Lengths(20, 56)
    # While a model answers, no token is cut along the sequence, and context ranks are replicas.
    cut = made.role.parallel.model_copy(update={"sequence": True, "context": 2})
    wide = recipe.model_copy(update={"student": recipe.student.model_copy(update={"parallel": cut})})
    answering = generation_of_stage(wide, stages["generate"], 4, 10, Lengths(20, 30), 40)
    assert (answering.role.parallel, answering.answers) == (made.role.parallel, 10)
    drawn, held, _ = evaluation_of_stage(wide, stages["eval"], 4, 4, Lengths(20, 8), 40).models["start"]
    assert (drawn.role.parallel, held.role.parallel) == (made.role.parallel, cut.forward)
    graphs = recipe.model_copy(update={"student": recipe.student.model_copy(update={"decode_graphs": True})})
    for each, replayed in ((recipe, False), (graphs, True)):
        drawn, *_ = evaluation_of_stage(each, stages["eval"], 2, 4, Lengths(20, 8), 40).models["start"]
        assert generation_of_stage(each, stages["generate"], 2, 10, Lengths(20, 30), 40).replayed == replayed
        assert drawn.replayed == replayed
    for name, (_, row_bytes) in signals.items():
        scored = scoring_of_stage(recipe, stages[name], 2, 10, Lengths(20, 30))
        # Of each row one chosen answer and two rollouts; four micro-batches for each of two pipeline stages.
        assert scored.disk_bytes == 10 * 3 * 30 * row_bytes and scored.micro_batches == 8
        assert (scored.heads, scored.kernels) == (name != "hidden", name in ("hidden", "tokens"))
    measured = evaluation_of_stage(recipe, stages["eval"], 2, 4, Lengths(20, 8), 40)
    drawn, held, answered = measured.models["start"]
    assert (drawn.prompts, drawn.rows, held.groups, answered.groups, measured.seeds) == (4, 4, 4, 4, 3)
    assert set(measured.own) == {"teacher", "reference"} and set(measured.given) == {"teacher"}
    memory = evaluation_memory(measured, "start", 0)
    assert {"weights", "teacher: weights", "reference: weights"} <= set(memory.kept)
    seconds = evaluation_time(cluster(), measured)
    assert set(seconds.parts) == {"teacher: held out", "start: answers", "start: scores"}
    own = sum(scoring_time(cluster(), each).total for each in (answered, *measured.own.values()))
    assert seconds.parts["start: scores"] == pytest.approx(scoring_time(cluster(), held).total + 3 * own)
    assert all(each > 0 and math.isfinite(each) for each in seconds.parts.values())


def test_preferences_are_not_planned(tmp_path):
    raw = tiny_recipe(tmp_path)
    raw["teacher"]["model"] = raw["reference"]["model"]
    raw["stages"] = [{"name": "generate", "kind": "generate", "model": raw["student"]["model"], "n": 2,
                      "temperature": 1.0},
                     {"name": "score", "kind": "score", "model": raw["teacher"]["model"], "rollouts": "generate"}]
    recipe = parse(raw)
    with pytest.raises(ConfigError, match=r"stages.score.signal.kind"):
        scoring_of_stage(recipe, recipe.stages[1], 2, 10, Lengths(20, 30))
