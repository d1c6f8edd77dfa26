"""The planner's memory and traffic of generating and scoring, against what real models on real ranks take and send."""

from __future__ import annotations

import pytest

from megakd.batch import Group, Kind, Sample, Step
from megakd.config import Parallel
from megakd.hf.families import Architecture
from megakd.planning.inference import Generation, Scoring, generation_memory, generation_traffic, scoring_memory
from megakd.planning.setup import RoleSetup
from megakd.planning.work import Lengths, MicroBatch
from megakd.rollout import Prompt, Sampling
from tests.mcore.planning_cases import counted, measured_generation, measured_scoring
from tests.mcore.tiny import make_llama, make_qwen3
from tests.ranks import run_ranks

PP2 = Parallel(pipeline=2)
TP2 = Parallel(tensor=2)
GENERATIONS = {
    # name: (layout, answers of a prompt, length of prompts and answers, slots, temperature, top_k, top_p)
    "one process, greedy": (Parallel(), 1, 60, 8, 16, 0.0, 0, 1.0),
    "one process, drawn": (Parallel(), 1, 2, 6, 96, 1.0, 20, 1.0),
    "tp2, greedy, norms of heads": (TP2, 1, 60, 8, 16, 0.0, 0, 1.0),
    "tp2, drawn": (TP2, 2, 2, 6, 96, 1.0, 20, 1.0),
    "tp2, long answers": (TP2, 1, 2, 48, 16, 0.7, 0, 1.0),
    "pp2 vpp2, greedy": (Parallel(pipeline=2, virtual_pipeline=2), 1, 20, 12, 32, 0.0, 0, 1.0),
}
SCORINGS = {
    "one process": Parallel(), "tp2": TP2, "tp2 sp, norms of heads": Parallel(tensor=2, sequence=True), "pp2": PP2,
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[bool, str]:
    """Models whose activations and cache outweigh what the formulas leave out: without norms of heads, and with them,
    its heads together twice as wide as its hidden states."""
    folder, sizes = tmp_path_factory.mktemp("models"), {"hidden": 128, "layers": 7, "heads": 8, "kv_heads": 4}
    return {False: str(make_llama(folder / "llama", seed=1, **sizes)),
            True: str(make_qwen3(folder / "norms", seed=1, head_dim=32, **sizes))}


@pytest.mark.parametrize("name", GENERATIONS)
def test_memory_and_traffic_of_a_generation(directories, name):
    directory = directories["norms of heads" in name]
    parallel, n, prompt, answer, slots, temperature, top_k, top_p = GENERATIONS[name]
    world = parallel.tensor * parallel.pipeline
    # All prompts alike and no stop token, so that every round has all rows.
    prompts = [Prompt(number, tuple(range(3, 3 + prompt))) for number in range(parallel.pipeline * slots // n)]
    sampling = Sampling(temperature, top_k, top_p, n, answer, (), 3)
    lengths = Lengths(prompt, answer)
    task = Generation(RoleSetup(Architecture.read(directory), parallel, world, 1), slots, len(prompts), n, lengths,
                      lengths, temperature > 0, top_k, top_p < 1, "fp32", "cpu")
    assert (task.rows, task.companies, task.rounds) == (slots, parallel.pipeline, answer)
    ranks = run_ranks(world, measured_generation, directory, parallel, prompts, sampling, slots)
    for rank, measured in enumerate(ranks):
        stage = task.role.layout.coordinates(rank).pipeline
        memory = generation_memory(task, stage)
        made = sum(memory.phases[memory.fullest].values())
        cache = memory.kept["keys and values"]
        print(f"{name}, rank {rank}: weights {memory.kept['weights'] / measured['kept']:.4f}, peak "
              f"{memory.total / measured['peak']:.4f} of the measured; fullest: {memory.fullest}, "
              f"{made / (measured['peak'] - measured['kept'] - cache):.3f} of what is there besides the cache")
        assert memory.kept["weights"] == pytest.approx(measured["kept"], rel=0.01)
        assert memory.total == pytest.approx(measured["peak"], rel=0.03)
        for tokens, phase in ((slots // n * prompt, "prefill"), (slots, "round")):
            calls = generation_traffic(task, stage, tokens, slots)
            assert counted(calls * task.companies) == measured[phase]


@pytest.mark.parametrize("name", SCORINGS)
def test_memory_of_scoring(directories, name):
    directory = directories["norms of heads" in name]
    parallel, micro_batch, k, chunk = SCORINGS[name], 4, 50, 64
    world, count = parallel.tensor * parallel.pipeline, 4 * parallel.pipeline
    sample = Sample(tuple(range(3, 99)), 40, Kind.CHOSEN)
    step = Step(tuple(Group(f"row:{number}", (sample,)) for number in range(count * micro_batch)))
    work = MicroBatch(micro_batch * 96, micro_batch * 96 * 97 / 2, {Kind.CHOSEN: micro_batch * 56})
    task = Scoring(RoleSetup(Architecture.read(directory), parallel, world, micro_batch), count, len(step.groups), work,
                   8 * k, True, False, chunk, "fp32", "cpu")
    assert task.steps == 1 and task.disk_bytes == len(step.groups) * 56 * 400
    ranks = run_ranks(world, measured_scoring, directory, parallel, step, micro_batch, k, chunk)
    for rank, measured in enumerate(ranks):
        memory = scoring_memory(task, task.role.layout.coordinates(rank).pipeline)
        print(f"{name}, rank {rank}: kept {sum(memory.kept.values()) / measured['kept']:.4f}, peak "
              f"{memory.total / measured['peak']:.4f} of the measured; fullest: {memory.fullest}")
        assert sum(memory.kept.values()) == pytest.approx(measured["kept"], rel=0.01)
        assert memory.total == pytest.approx(measured["peak"], rel=0.03)
