"""The planner against this machine: seconds of a step, memory and messages of a rank, planned and measured.

    megakd plan --calibrate one.yaml --processes 1 && megakd plan --calibrate two.yaml --processes 2
    OMP_NUM_THREADS=1 python -m benchmarks.planner --one one.yaml --two two.yaml --out benchmarks/results/planner

Random models, real ranks, the project's own training step. None of the configurations takes part in a calibration. The
machine should have nothing else to do: a step's processor time is noted beside its seconds, so that a disturbed
measurement can be told (the processor does not count while a rank waits for a message).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.record_run import machine
from megakd.batch import Group, Sample
from megakd.config import Parallel
from megakd.config_objectives import AdpaObjective, DckdObjective, DpoObjective, KdObjective, Objective, SftObjective
from megakd.disk import write_json_atomic
from megakd.objectives import build_objective
from megakd.planning.cluster import Cluster, load_cluster
from megakd.planning.memory import training_memory
from megakd.planning.timing import training_time
from megakd.planning.traffic import training_traffic
from tests.mcore.cases import Distillation, Job
from tests.mcore.planning_cases import STEPS, measured_step, setup_of
from tests.ranks import close_pools, run_ranks

# hidden, layers, query heads, key heads, MLP, vocabulary
MODELS = {
    "3M": (192, 6, 3, 3, 512, 3000),
    "9M": (320, 6, 5, 5, 864, 6016),
    "20M": (448, 8, 7, 7, 1216, 5000),
    "28M": (512, 8, 8, 2, 1376, 9000),
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
    "dckd, 9M of 38M": Case(1, DckdObjective(), "9M", "38M", (P, P), (2, 4), (50, 110), 6),
    "adpa, 20M of 28M, full": Case(1, AdpaObjective(), "20M", "28M", (P, P), (4, 2), (100, 60), 4, "full"),
    "dpo, 38M, mlp": Case(1, DpoObjective(), "38M", "38M", (P, P), (2, 4), (80, 60), 4, "mlp"),
    "kd, 3M of 70M": Case(1, KdObjective(), "3M", "70M", (P, P), (8, 4), (40, 90), 8),
    "sft, 38M, tp2": Case(2, SftObjective(), "38M", "38M", (TP2, P), (4, 4), (70, 90), 12),
    "sft, 28M, dp2": Case(2, SftObjective(), "28M", "28M", (P, P), (4, 4), (70, 90), 16),
    "sft, 60M, pp2": Case(2, SftObjective(), "60M", "60M", (PP2, P), (2, 2), (70, 90), 12),
    "sft, 28M, tp2 sp": Case(2, SftObjective(), "28M", "28M", (SP2, P), (4, 4), (110, 90), 12),
    "dckd, 9M of 70M, dp2 | tp2": Case(2, DckdObjective(), "9M", "70M", (P, TP2), (2, 4), (60, 110), 6),
    "dckd, 20M of 38M, tp2 | dp2": Case(2, DckdObjective(), "20M", "38M", (TP2, P), (4, 2), (60, 90), 6),
    "adpa, 28M of 38M, pp2 | tp2": Case(2, AdpaObjective(), "28M", "38M", (PP2, TP2), (2, 4), (60, 90), 8),
    "adpa, 9M of 28M, tp2 sp | pp2": Case(2, AdpaObjective(), "9M", "28M", (SP2, PP2), (4, 4), (80, 80), 8),
    "dpo, 28M, dp2 | tp2 sp, mlp": Case(2, DpoObjective(), "28M", "28M", (P, SP2), (2, 4), (70, 70), 8, "mlp"),
    "kd, 20M of 70M, pp2 | pp2": Case(2, KdObjective(), "20M", "70M", (PP2, PP2), (2, 4), (60, 90), 8),
    "dpo, 38M, tp2 | dp2, full": Case(2, DpoObjective(), "38M", "38M", (TP2, P), (2, 2), (60, 80), 6, "full"),
    "sft, 38M, pp2 dp2": Case(4, SftObjective(), "38M", "38M", (PP2, P), (2, 2), (70, 90), 12),
    "dckd, 28M of 38M, tp2 dp2 | tp2 pp2": Case(
        4, DckdObjective(), "28M", "38M", (TP2, Parallel(tensor=2, pipeline=2)), (2, 2), (60, 80), 8),
}
TIMED_WORLDS = (1, 2)
"""Ranks with a core of their own; more share two cores, which no description says anything about."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--one", required=True, help="description measured with one process")
    top.add_argument("--two", required=True, help="description measured with two")
    top.add_argument("--out", type=Path, required=True, help="folder for planner.json and planner.md")
    top.add_argument("--repeats", type=int, default=7, help="timed steps (default: 7)")
    top.add_argument("--only", nargs="*", metavar="NAME", help="these configurations alone")
    options = top.parse_args(arguments)
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as `megakd run` does; the ranks inherit it
    clusters = {1: load_cluster(options.one), 2: load_cluster(options.two)}
    rows = []
    with TemporaryDirectory() as folder:
        directories = {name: write_model(Path(folder) / name, *sizes) for name, sizes in MODELS.items()}
        for name, case in CASES.items():
            if not options.only or name in options.only:
                row = compared(case, directories, clusters, options.repeats)
                rows.append({"name": name, "world": case.world, **row})
                print(line_of(rows[-1]), flush=True)
                save(options.out, rows, clusters)
    close_pools()


def write_model(folder: Path, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocabulary: int) -> str:
    """A random Llama directory with tied embeddings."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=hidden // heads, intermediate_size=ffn, vocab_size=vocabulary, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )).save_pretrained(folder)
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


def compared(case: Case, directories: dict[str, str], clusters: dict[int, Cluster], repeats: int) -> dict:
    """Planned and measured numbers of a case."""
    job = distillation(case, directories)
    setup = setup_of(job, case.world)
    row: dict = {}
    if case.world in TIMED_WORLDS:
        planned = training_time(clusters[case.world], setup)
        ranks = run_ranks(case.world, timed_steps, job, repeats, timeout=900)
        seconds = [max(rank[number][0] for rank in ranks) for number in range(repeats)]
        row["seconds"] = {
            "planned": planned.total, "measured": statistics.median(seconds), "all": seconds, "parts": planned.parts,
            "processor": [[rank[number][1] for rank in ranks] for number in range(repeats)],
        }
    row["ranks"] = []
    for rank, measured in enumerate(run_ranks(case.world, measured_step, job, timeout=900)):
        memory = training_memory(setup, setup.trained.layout.coordinates(rank).pipeline)
        planned_bytes: Counter = Counter()
        for call in training_traffic(setup, rank):
            size = 2 if call.operation in ("send", "receive") else call.size
            planned_bytes[call.operation, size] += round(call.bytes)
        row["ranks"].append({
            "memory": {"planned": memory.total, "measured": measured["peak"], "parts": memory.parts},
            "messages": {"planned": named(planned_bytes), "measured": named(measured["calls"])},
        })
    return row


def timed_steps(case: Distillation, repeats: int) -> list[tuple[float, float]]:
    """On a rank: seconds and processor seconds of each step, after one that warms up."""
    job = Job(case)
    job.step(0)
    found = []
    for number in range(repeats):
        dist.barrier()
        start, used = time.perf_counter(), time.process_time()
        job.step(number + 1)
        found.append((time.perf_counter() - start, time.process_time() - used))
    return found


def named(calls: dict[tuple[str, int], int]) -> dict[str, int]:
    """Bytes by operation and number of ranks, in words."""
    return {f"{operation}, {size} ranks": count for (operation, size), count in sorted(calls.items())}


# ----------------------------------------------------------------------------------------------------------- the result
def line_of(row: dict) -> str:
    """A case in one line of the table."""
    memory = [rank["memory"]["planned"] / rank["memory"]["measured"] for rank in row["ranks"]]
    furthest = max(memory, key=lambda ratio: abs(ratio - 1))
    equal = all(rank["messages"]["planned"] == rank["messages"]["measured"] for rank in row["ranks"])
    largest = max(rank["memory"]["measured"] for rank in row["ranks"]) / 2**20
    seconds = "- | - | -"
    if "seconds" in row:
        planned, measured = row["seconds"]["planned"], row["seconds"]["measured"]
        seconds = f"{measured:.2f} | {planned:.2f} | {100 * (planned / measured - 1):+.0f} %"
    return (f"| {row['name']} | {row['world']} | {seconds} | {largest:.0f} | {100 * (furthest - 1):+.1f} % | "
            f"{'equal' if equal else 'differ'} |")


def save(folder: Path, rows: Sequence[dict], clusters: dict[int, Cluster]) -> None:
    """planner.json, and planner.md with the table."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {str(number): cluster.model_dump(mode="json") for number, cluster in clusters.items()}
    write_json_atomic(folder / "planner.json", {
        "machine": machine(), "torch": torch.__version__, "steps_of_memory": STEPS, "clusters": described,
        "cases": list(rows),
    })
    head = ["| configuration (student of teacher, layouts) | ranks | s a step, median | planned | error "
            "| MiB, fullest rank | error of memory, furthest rank | bytes of messages |",
            "|---|---|---|---|---|---|---|---|"]
    (folder / "planner.md").write_text("\n".join([*head, *map(line_of, rows)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
