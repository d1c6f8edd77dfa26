"""The planner's memory and traffic of a training step, against what real models on real ranks take and send."""

from __future__ import annotations

import pytest

from megakd.batch import Group, Sample
from megakd.config import Parallel
from megakd.config_objectives import AdpaObjective, DckdObjective, DpoObjective, SftObjective
from megakd.objectives import build_objective
from megakd.planning.memory import GATHERED, training_memory
from megakd.planning.traffic import training_traffic
from tests.mcore.cases import Distillation
from tests.mcore.planning_cases import TRIES, counted, measured_step, setup_of
from tests.mcore.tiny import make_llama, make_qwen3
from tests.ranks import run_ranks

TP2 = Parallel(tensor=2)
SP2 = Parallel(tensor=2, sequence=True)
CASES = {
    # name: (world, objective, student, teachers, micro-batches of student and teachers, recompute)
    "one process": (1, SftObjective(), Parallel(), Parallel(), (4, 4), "none"),
    "one process, again": (1, DckdObjective(), Parallel(), Parallel(), (2, 4), "full"),
    "tp2": (2, DckdObjective(), TP2, Parallel(), (4, 2), "none"),
    "tp2 sp | tp2": (2, AdpaObjective(), SP2, TP2, (4, 4), "none"),
    "tp2 sp": (2, DpoObjective(), SP2, SP2, (4, 4), "none"),
    "tp2 sp, norms of heads, mlp again": (2, DpoObjective(), SP2, SP2, (4, 4), "mlp"),
    "pp2 | tp2 sp": (2, DpoObjective(), Parallel(pipeline=2), SP2, (2, 4), "none"),
    "dp2 | pp2": (2, AdpaObjective(), Parallel(), Parallel(pipeline=2), (2, 4), "full"),
    "cp2 | dp2": (2, DpoObjective(), Parallel(context=2), Parallel(context=2), (4, 4), "none"),
    "tp2 pp2 | dp4": (4, SftObjective(), Parallel(tensor=2, pipeline=2), Parallel(), (2, 1), "mlp"),
    "dp2, offloaded": (2, SftObjective(), Parallel(), Parallel(), (1, 4), "full"),
    "pp2 vpp2 dp2": (4, SftObjective(), Parallel(pipeline=2, virtual_pipeline=2), Parallel(), (1, 2), "none"),
    "tp2, norms of heads": (2, SftObjective(), TP2, Parallel(), (4, 4), "none"),
    "cp2, norms of heads": (2, SftObjective(), Parallel(context=2), Parallel(), (4, 4), "none"),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, str]:
    """Models whose activations outweigh what the formulas leave out, and whose sizes need no padding. The
    student's layers divide by no pipeline: the chunks of an interleaved one have 2, 2, 2 and 1."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden": 128, "heads": 8, "kv_heads": 4}
    made = {role: str(make_llama(folder / role, seed=seed, layers=layers, tied=role == "student", **sizes))
            for seed, (role, layers) in enumerate({"student": 7, "teacher": 4, "reference": 4}.items())}
    # Heads of 32, which together are twice as wide as the hidden states.
    return made | {"norms of heads": str(make_qwen3(folder / "norms", seed=4, layers=7, head_dim=32, **sizes))}


@pytest.mark.parametrize("name", CASES)
def test_memory_and_traffic_are_those_of_real_ranks(directories, name):
    world, objective, student, teachers, (student_micro, teacher_micro), recompute = CASES[name]
    kinds = build_objective(objective).requires.kinds
    # All rows alike, so that every replica has the same to do; long, so that activations outweigh single numbers.
    samples = tuple(Sample(tuple(range(3, 99)), 40 + kind, kind) for kind in kinds)
    group = Group("row:0", samples)
    case = Distillation(
        directories | {"student": directories["norms of heads" if "norms of heads" in name else "student"]},
        {"student": student, "teacher": teachers, "reference": teachers},
        {"student": student_micro, "teacher": teacher_micro, "reference": teacher_micro}, objective, (group,) * 8, 8,
        TRIES + 2, recompute=recompute, offload="offloaded" in name,
    )
    setup = setup_of(case, world)
    for rank, measured in enumerate(run_ranks(world, measured_step, case)):
        memory = training_memory(setup, setup.trained.layout.coordinates(rank).pipeline)
        kept = sum(memory.kept.values()) - memory.kept.get(GATHERED, 0)  # which the first step makes
        print(f"{name}, rank {rank}: kept {kept / measured['kept']:.4f}, "
              f"peak {memory.total / measured['peak']:.4f} of the measured")
        assert kept == pytest.approx(measured["kept"], rel=0.01)
        assert memory.total == pytest.approx(measured["peak"], rel=0.03)
        assert (memory.fullest == "optimizer's step") == case.offload
        assert counted(training_traffic(setup, rank)) == measured["calls"]
