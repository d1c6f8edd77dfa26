"""The planner against this machine: seconds of a step, memory and messages of a rank, planned and measured.

    OMP_NUM_THREADS=1 python -m benchmarks.planner --out benchmarks/results/planner
    OMP_NUM_THREADS=1 python -m benchmarks.planner --out /tmp/memory --rounds 0 --memory

Random models, real ranks, the project's own training step. None of the configurations takes part in a calibration. The
machine should have nothing else to do, and even then its own speed drifts; so everything is done in rounds: a round
calibrates (`megakd plan --calibrate`) and takes some steps of each configuration. Compared are the median of the
rounds' plans and the median of all steps. A step's processor time is noted beside its seconds: it does not count while
a rank waits for a message.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.measure import Seconds, timed_steps
from benchmarks.record_run import machine
from megakd.batch import Group, Sample
from megakd.config import Parallel
from megakd.config_objectives import AdpaObjective, DckdObjective, DpoObjective, KdObjective, Objective, SftObjective
from megakd.disk import write_json_atomic
from megakd.hf.families import Architecture
from megakd.hf.random_model import write_random_model
from megakd.objectives import build_objective
from megakd.planning.cluster import Cluster, load_cluster
from megakd.planning.memory import training_memory
from megakd.planning.timing import training_time
from megakd.planning.traffic import training_traffic
from tests.mcore.cases import Distillation, Job
from tests.mcore.planning_cases import measured_step, setup_of
from tests.ranks import close_pools, run_ranks

# hidden, layers, query heads, key heads, MLP, vocabulary
MODELS = {
    "3M": (192, 6, 3, 3, 512, 12000),
    "9M": (320, 6, 5, 5, 864, 12000),
    "20M": (448, 8, 7, 7, 1216, 12000),
    "28M": (512, 8, 8, 2, 1376, 12000),
    "38M": (640, 6, 10, 5, 1728, 12000),
    "60M": (576, 10, 9, 3, 1536, 32768),
    "70M": (768, 8, 12, 4, 2048, 12000),
}
P, TP2, SP2, PP2 = Parallel(), Parallel(tensor=2), Parallel(tensor=2, sequence=True), Parallel(pipeline=2)


@dataclass(frozen=True)
class Case:
    """A configuration: models by name, layouts, micro-batches, and what the sequences look like."""

    world: int
    objective: Objective
    student: str
    teacher: str
    layouts: tuple[Parallel, Parallel]
    """Of the student and of its teachers."""
    micro_batches: tuple[int, int]
    lengths: tuple[int, int]
    """Tokens of a prompt and of an answer."""
    batch: int
    recompute: str = "none"
    chunk_tokens: int = 256


CASES = {
    "sft, 28M": Case(1, SftObjective(), "28M", "28M", (P, P), (4, 4), (70, 90), 8),
    "sft, 60M, long": Case(1, SftObjective(), "60M", "60M", (P, P), (1, 1), (300, 200), 3),
    "dckd, 9M of 38M": Case(1, DckdObjective(), "9M", "38M", (P, P), (2, 4), (50, 110), 8),
    "adpa, 20M of 28M, full": Case(1, AdpaObjective(), "20M", "28M", (P, P), (4, 2), (100, 60), 4, "full"),
    "dpo, 38M, mlp": Case(1, DpoObjective(), "38M", "38M", (P, P), (2, 4), (80, 60), 4, "mlp"),
    "kd, 3M of 70M": Case(1, KdObjective(), "3M", "70M", (P, P), (8, 4), (40, 90), 8),
    "sft, 38M, tp2": Case(2, SftObjective(), "38M", "38M", (TP2, P), (4, 4), (70, 90), 12),
    "sft, 28M, dp2": Case(2, SftObjective(), "28M", "28M", (P, P), (4, 4), (70, 90), 16),
    "sft, 60M, pp2": Case(2, SftObjective(), "60M", "60M", (PP2, P), (2, 2), (70, 90), 12),
    "sft, 28M, tp2 sp": Case(2, SftObjective(), "28M", "28M", (SP2, P), (4, 4), (110, 90), 12),
    "dckd, 9M of 70M, dp2 | tp2": Case(2, DckdObjective(), "9M", "70M", (P, TP2), (2, 4), (60, 110), 8),
    "dckd, 20M of 38M, tp2 | dp2": Case(2, DckdObjective(), "20M", "38M", (TP2, P), (4, 2), (60, 90), 8),
    "adpa, 28M of 38M, pp2 | tp2": Case(2, AdpaObjective(), "28M", "38M", (PP2, TP2), (2, 4), (60, 90), 8),
    "adpa, 9M of 28M, tp2 sp | pp2": Case(2, AdpaObjective(), "9M", "28M", (SP2, PP2), (4, 4), (80, 80), 8),
    "dpo, 28M, dp2 | tp2 sp, mlp": Case(2, DpoObjective(), "28M", "28M", (P, SP2), (2, 4), (70, 70), 8, "mlp"),
    "kd, 20M of 70M, pp2 | pp2": Case(2, KdObjective(), "20M", "70M", (PP2, PP2), (2, 4), (60, 90), 8),
    "dpo, 38M, tp2 | dp2, full": Case(2, DpoObjective(), "38M", "38M", (TP2, P), (2, 2), (60, 80), 8, "full"),
    "sft, 38M, pp2 dp2": Case(4, SftObjective(), "38M", "38M", (PP2, P), (2, 2), (70, 90), 12),
    "dckd, 28M of 38M, tp2 dp2 | tp2 pp2": Case(
        4, DckdObjective(), "28M", "38M", (TP2, Parallel(tensor=2, pipeline=2)), (2, 2), (60, 80), 8),
}
TIMED_WORLDS = (1, 2)
"""Ranks with a core of their own; more share two cores, which no description says anything about."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--out", type=Path, required=True, help="folder for planner.json and planner.md")
    top.add_argument("--rounds", type=int, default=3, help="times that all is calibrated and timed (default: 3)")
    top.add_argument("--steps", type=int, default=2, help="timed steps of a configuration in a round (default: 2)")
    top.add_argument("--memory", action="store_true", help="also measure memory and count messages, once")
    top.add_argument("--only", nargs="*", metavar="NAME", help="these configurations alone")
    options = top.parse_args(arguments)
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as `megakd run` does; the ranks inherit it
    rows = {name: {"name": name, "world": case.world, "rounds": [], "ranks": []} for name, case in CASES.items()
            if not options.only or name in options.only}
    described = []
    with TemporaryDirectory() as folder:
        directories = {name: write_model(Path(folder) / name, *sizes) for name, sizes in MODELS.items()}
        cases = {name: distillation(CASES[name], directories) for name in rows}
        for _ in range(options.rounds):
            clusters = {world: calibrated(Path(folder) / f"{world}.yaml", world) for world in TIMED_WORLDS}
            described.append({world: cluster.model_dump(mode="json") for world, cluster in clusters.items()})
            for name, row in rows.items():
                if row["world"] in clusters:
                    row["rounds"].append(timed(cases[name], row["world"], clusters[row["world"]], options.steps))
                    print(line_of(row), flush=True)
            save(options.out, list(rows.values()), described)
        if options.memory:
            for name, row in rows.items():
                row["ranks"] = counted(cases[name], row["world"])
                print(line_of(row), flush=True)
                save(options.out, list(rows.values()), described)
    close_pools()


def calibrated(file: Path, processes: int) -> Cluster:
    """This machine's description, measured now."""
    close_pools()  # threads of idle ranks wake up a hundred times a second
    subprocess.run([sys.executable, "-m", "megakd.cli", "plan", "--calibrate", str(file), "--device", "cpu",
                    "--processes", str(processes)], check=True, stdout=subprocess.DEVNULL)
    return load_cluster(file)


def write_model(folder: Path, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocabulary: int) -> str:
    """A random Llama directory with tied embeddings."""
    write_random_model(folder, Architecture("llama", hidden, layers, heads, kv_heads, hidden // heads, ffn, vocabulary,
                                            1e-5, 1e4, None, True, False, 1024), seed=0)
    return str(folder)


def distillation(case: Case, directories: dict[str, str]) -> Distillation:
    """The case as the ranks take it: all rows alike, so that every replica has the same to do."""
    prompt, answer = case.lengths
    samples = tuple(Sample(tuple(3 + (5 * place + kind) % 990 for place in range(prompt + answer)), prompt, kind)
                    for kind in build_objective(case.objective).requires.kinds)
    roles = {"student": 0, "teacher": 1, "reference": 1}
    names = {"student": case.student, "teacher": case.teacher, "reference": case.teacher}
    return Distillation(
        {role: directories[name] for role, name in names.items()},
        {role: case.layouts[place] for role, place in roles.items()},
        {role: case.micro_batches[place] for role, place in roles.items()},
        case.objective, (Group("row:0", samples),) * case.batch, case.batch, 100, learning_rate=1e-5,
        recompute=case.recompute, chunk_tokens=case.chunk_tokens,
    )


def timed(case: Distillation, world: int, cluster: Cluster, steps: int) -> dict:
    """Planned and measured seconds of some steps."""
    planned = training_time(cluster, setup_of(case, world))
    ranks = run_ranks(world, steps_of_a_rank, case, 1, steps, 1, timeout=900)
    return {
        "planned": planned.total, "parts": planned.parts,
        "measured": [ranks[0][number].wall for number in range(steps)],
        "processor": [[rank[number].processor for rank in ranks] for number in range(steps)],
    }


def counted(case: Distillation, world: int) -> list[dict]:
    """Planned and measured memory and messages of each rank."""
    setup, ranks = setup_of(case, world), []
    for rank, measured in enumerate(run_ranks(world, measured_step, case, timeout=900)):
        memory = training_memory(setup, setup.trained.layout.coordinates(rank).pipeline)
        messages: Counter = Counter()
        for call in training_traffic(setup, rank):
            messages[call.operation, 2 if call.operation in ("send", "receive") else call.size] += round(call.bytes)
        ranks.append({
            "memory": {"planned": memory.total, "measured": measured["peak"], "parts": memory.parts},
            "messages": {"planned": named(messages), "measured": named(measured["calls"])},
        })
    return ranks


def steps_of_a_rank(case: Distillation, warm_up: int, steps: int, threads: int) -> list[Seconds]:
    """On a rank: seconds of each step, after those that warm up."""
    torch.set_num_threads(threads)
    return timed_steps(Job(case).step, warm_up, steps)


def named(calls: dict[tuple[str, int], int]) -> dict[str, int]:
    """Bytes by operation and number of ranks, in words."""
    return {f"{operation}, {size} ranks": count for (operation, size), count in sorted(calls.items())}


# ----------------------------------------------------------------------------------------------------------- the result
def line_of(row: dict) -> str:
    """A case in one line of the table."""
    seconds, memory = "- | - | -", "- | - | -"
    if row["rounds"]:
        planned = statistics.median(each["planned"] for each in row["rounds"])
        measured = statistics.median(second for each in row["rounds"] for second in each["measured"])
        seconds = f"{measured:.2f} | {planned:.2f} | {100 * (planned / measured - 1):+.0f} %"
    if row["ranks"]:
        ratios = [rank["memory"]["planned"] / rank["memory"]["measured"] for rank in row["ranks"]]
        furthest = max(ratios, key=lambda ratio: abs(ratio - 1))
        equal = all(rank["messages"]["planned"] == rank["messages"]["measured"] for rank in row["ranks"])
        largest = max(rank["memory"]["measured"] for rank in row["ranks"]) / 2**20
        memory = f"{largest:.0f} | {100 * (furthest - 1):+.1f} % | {'equal' if equal else 'differ'}"
    name = row["name"].replace("|", "of")
    return f"| {name} | {row['world']} | {seconds} | {memory} |"


def save(folder: Path, rows: Sequence[dict], described: Sequence[dict]) -> None:
    """planner.json, and planner.md with the table."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"machine": machine(), "torch": torch.__version__, "clusters": list(described), "cases": list(rows)}
    write_json_atomic(folder / "planner.json", facts)
    head = ["| configuration (student of teacher, layouts) | ranks | s a step, median | planned | error "
            "| MiB, fullest rank | error of memory, furthest rank | bytes of messages |",
            "|---|---|---|---|---|---|---|---|"]
    (folder / "planner.md").write_text("\n".join([*head, *map(line_of, rows)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
