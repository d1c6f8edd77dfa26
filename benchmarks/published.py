"""The planner against published pre-training throughputs on H100.

    python -m benchmarks.published --out benchmarks/results/planner

NVIDIA's runs (Megatron, FP8) hide the tensor group's messages behind products (userbuffers), which megakd does not
do; so each is planned twice: as megakd would run it, and with 80 % of these messages hidden (an assumption). Llama
3.1 405B's 126 layers are in 64 parts, of which the first and the last have one layer and the others two, as
published.

Meta's runs of 405B (bf16, 16 stages, one layer less on the first and the last; "The Llama 3 Herd of Models", Table 4)
are told in TFLOPs a GPU, which are made tokens by the planner's own count of a token's operations. How many parts a
stage had is not told there; planned are four, the most in which only the first and the last part differ. With all
activations kept, as they are here, the plan needs more memory than an H100 has; how those runs made room is not
modelled.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megakd.batch import Kind
from megakd.chunks import chunk_tokens_on
from megakd.config import Parallel
from megakd.disk import write_json_atomic
from megakd.hf.families import Architecture
from megakd.planning.cluster import Overlap, cluster_named
from megakd.planning.setup import LossCall, RoleSetup, TrainingSetup
from megakd.planning.sizes import model_flops
from megakd.planning.timing import BACKWARD, training_time
from megakd.planning.work import Lengths, work_of_lengths
from tests.planning_cases import LLAMA_8B, LLAMA_70B, LLAMA_405B

SEQUENCE = 8192
PP16 = Parallel(tensor=8, pipeline=16, virtual_pipeline=4, sequence=True)


def tokens_of(architecture: Architecture, tflops: float) -> float:
    """Tokens a second of so many TFLOPs a second: forward and two backward passes, attention to earlier positions."""
    pairs = SEQUENCE * (SEQUENCE + 1) / 2
    return tflops * 1e12 * SEQUENCE / ((1 + BACKWARD) * model_flops(architecture, SEQUENCE, pairs, SEQUENCE))


PUBLISHED = {
    # name: (architecture, GPUs, layout, sequences a step, arithmetic, published tokens a second and GPU)
    "Llama 3 8B, 8 GPUs": (LLAMA_8B, 8, Parallel(), 128, "fp8", 14450),
    "Llama 3 70B, 64 GPUs, TP4 PP8 VPP5": (
        LLAMA_70B, 64, Parallel(tensor=4, pipeline=8, virtual_pipeline=5, sequence=True), 128, "fp8", 1660),
    "Llama 3.1 405B, 1,024 GPUs, TP8 PP8 VPP8 CP2": (
        LLAMA_405B, 1024, Parallel(tensor=8, pipeline=8, virtual_pipeline=8, context=2, sequence=True), 512, "fp8",
        330),
    "Llama 3.1 405B, 8,192 GPUs, TP8 PP16, bf16": (LLAMA_405B, 8192, PP16, 2048, "bf16", tokens_of(LLAMA_405B, 430)),
    "Llama 3.1 405B, 16,384 GPUs, TP8 PP16, bf16": (LLAMA_405B, 16384, PP16, 2048, "bf16", tokens_of(LLAMA_405B, 400)),
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
        lines.append(f"| {row['name']} | {row['published']:,.0f} | {' | '.join(errors)} |")
    (options.out / "published.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def planned(name: str) -> dict:
    """A published run's throughput, planned with the tensor group's messages in the open and hidden."""
    architecture, world, parallel, batch, dtype, published = PUBLISHED[name]
    cluster = cluster_named("h100")
    role = RoleSetup(architecture, parallel, world, 1)
    work = work_of_lengths(Lengths(0, SEQUENCE), (Kind.CHOSEN,), batch, {"student": role.layout}, {"student": 1}, {})
    setup = TrainingSetup(role, {}, (LossCall(1, 2, (Kind.CHOSEN,), "forward"),), work,
                          chunk_tokens_on("cuda", None), dtype, "cuda")
    row = {"name": name, "published": published}
    hidden = cluster.model_copy(update={"overlap": Overlap(**cluster.overlap.model_dump() | {"tensor": 0.8})})
    for key, described in (("megakd", cluster), ("hidden", hidden)):
        time = training_time(described, setup)
        row[key] = {"rate": work.tokens / time.total / world, "seconds": time.total, "parts": time.parts}
    return row


if __name__ == "__main__":
    main()
