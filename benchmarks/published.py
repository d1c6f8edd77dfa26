"""The planner against published pre-training throughputs of Megatron on H100 with FP8.

    python -m benchmarks.published --out benchmarks/results/planner

The published runs hide the tensor group's messages behind products (userbuffers), which megakd does not do; so each is
planned twice: as megakd would run it, and with 80 % of these messages hidden (an assumption). Llama 3.1 405B has 126
layers in a schedule with place for 128, where the embedding and the loss stand for a layer each; planned is the
slowest stage's load, 15 layers and the loss (120 layers in all), with as many chunks a stage as divide it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megakd.batch import Kind
from megakd.config import Parallel
from megakd.disk import write_json_atomic
from megakd.planning.cluster import Overlap, cluster_named
from megakd.planning.setup import LossCall, RoleSetup, TrainingSetup
from megakd.planning.timing import training_time
from megakd.planning.work import Lengths, work_of_lengths
from tests.planning_cases import LLAMA_8B, LLAMA_70B, LLAMA_405B

SEQUENCE = 8192
PUBLISHED = {
    # name: (architecture, GPUs, layout, sequences a step, published tokens a second and GPU)
    "Llama 3 8B, 8 GPUs": (LLAMA_8B, 8, Parallel(), 128, 14450),
    "Llama 3 70B, 64 GPUs, TP4 PP8 VPP5": (
        LLAMA_70B, 64, Parallel(tensor=4, pipeline=8, virtual_pipeline=5, sequence=True), 128, 1660),
    "Llama 3.1 405B, 1,024 GPUs, TP8 PP8 CP2": (
        replace(LLAMA_405B, layers=120), 1024,
        Parallel(tensor=8, pipeline=8, virtual_pipeline=5, context=2, sequence=True), 512, 330),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--out", type=Path, required=True, help="folder for published.json and published.md")
    options = top.parse_args(arguments)
    rows = [planned(name) for name in PUBLISHED]
    write_json_atomic(options.out / "published.json", rows)
    lines = ["| published run | tokens/s a GPU | planned for megakd | error | with hidden messages | error |",
             "|---|---|---|---|---|---|"]
    for row in rows:
        errors = [f"{row[key]['rate']:,.0f} | {100 * (row[key]['rate'] / row['published'] - 1):+.0f} %"
                  for key in ("megakd", "hidden")]
        lines.append(f"| {row['name']} | {row['published']:,} | {' | '.join(errors)} |")
    (options.out / "published.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def planned(name: str) -> dict:
    """A published run's throughput, planned with the tensor group's messages in the open and hidden."""
    architecture, world, parallel, batch, published = PUBLISHED[name]
    cluster = cluster_named("h100")
    role = RoleSetup(architecture, parallel, world, 1)
    work = work_of_lengths(Lengths(0, SEQUENCE), (Kind.CHOSEN,), batch, {"student": role.layout}, {"student": 1}, {})
    setup = TrainingSetup(role, {}, (LossCall(1, 2, (Kind.CHOSEN,), "forward"),), work, 1024, "fp8", "cuda")
    row = {"name": name, "published": published}
    hidden = cluster.model_copy(update={"overlap": Overlap(**cluster.overlap.model_dump() | {"tensor": 0.8})})
    for key, described in (("megakd", cluster), ("hidden", hidden)):
        time = training_time(described, setup)
        row[key] = {"rate": work.tokens / time.total / world, "seconds": time.total, "parts": time.parts}
    return row


if __name__ == "__main__":
    main()
