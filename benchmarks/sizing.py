"""What common pairs of teacher and student need: the best layout on each kind of GPU, predicted.

    python -m benchmarks.sizing --out benchmarks/results/planner

ADPA's own stage: the student's rollouts, teacher and reference of one size beside it, bf16, prompts and answers of 300
tokens. Nothing here was measured; the clusters' descriptions say what their figures rest on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megakd.chunks import chunk_tokens_on
from megakd.config_objectives import AdpaObjective
from megakd.disk import write_json_atomic
from megakd.objectives import build_objective
from megakd.planning.candidate import Candidate, layout_text
from megakd.planning.cluster import cluster_named
from megakd.planning.recipe import loss_calls
from megakd.planning.search import BEFORE, BESIDE, Limits, Question, search
from megakd.planning.work import Lengths
from tests.planning_cases import LLAMA_1B, LLAMA_8B, LLAMA_70B, LLAMA_405B

PAIRS = {
    "8B to 1B": (LLAMA_8B, LLAMA_1B), "70B to 8B": (LLAMA_70B, LLAMA_8B),
    "70B to 1B": (LLAMA_70B, LLAMA_1B), "405B to 8B": (LLAMA_405B, LLAMA_8B),
}
CLUSTERS = ("a100", "h100", "h200", "b200")
LENGTHS = Lengths(300, 300)
BATCHES = {8: 128, 16: 128, 32: 128, 64: 128, 256: 256, 1024: 1024}
"""GPUs -> groups of a step: the papers' 128 until there are more replicas than it feeds."""
TOLD = (64, 256, 1024)
"""Numbers of GPUs in the table, besides the fewest that it fits on."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--out", type=Path, required=True, help="folder for sizing.json and sizing.md")
    options = top.parse_args(arguments)
    lines = ["| pair | GPUs | groups a step | student | teacher, reference | s a step | tokens/s a GPU | MFU "
             "| GiB, fullest GPU | GPU-hours a 10⁹ student tokens |", "|---|---|---|---|---|---|---|---|---|---|"]
    rows = []
    for pair in PAIRS:
        for name in CLUSTERS:
            told = False
            for gpus in BATCHES:
                found = best(pair, name, gpus)
                if found is None or (told and gpus not in TOLD):
                    continue
                told = True
                rows.append({"pair": pair, "cluster": name, "gpus": gpus, **found.as_dict()})
                lines.append(line_of(pair, name, gpus, found))
                print(lines[-1], flush=True)
    write_json_atomic(options.out / "sizing.json", rows)
    (options.out / "sizing.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def best(pair: str, cluster: str, gpus: int) -> Candidate | None:
    """The best layout of a pair on a number of GPUs, with the teachers beside the student; where they do not fit, with
    hidden states that they have written beforehand; None where they do not fit by themselves."""
    teacher, student = PAIRS[pair]
    objective = AdpaObjective()
    requires = build_objective(objective).requires
    question = Question(
        student, dict.fromkeys(requires.teachers, teacher), requires.kinds, requires.teacher_kinds,
        loss_calls(objective, requires), LENGTHS, BATCHES[gpus], gpus, chunk_tokens_on("cuda", None), "bf16", "cuda",
    )
    for placement in (BESIDE, BEFORE):
        if found := search(question, cluster_named(cluster), Limits(placements=(placement,), best=1)):
            return found[0]
    return None


def line_of(pair: str, cluster: str, gpus: int, found: Candidate) -> str:
    """A row of the table."""
    setup = found.setup
    teachers = dict.fromkeys([
        *map(layout_text, setup.teachers.values()),
        *(f"beforehand, {layout_text(scoring.setup)}" for scoring in found.scoring.values())])
    hours = found.seconds / setup.work.tokens * 1e9 * gpus / 3600
    rate = setup.work.tokens / found.seconds / gpus
    return (f"| {pair} | {gpus} {cluster.upper()} | {BATCHES[gpus]} | {layout_text(setup.trained)} "
            f"| {'; '.join(teachers)} | {found.seconds:.2f} | {rate:,.0f} | {100 * found.mfu:.0f} % "
            f"| {found.memory.total / 2**30:.0f} | {hours:,.0f} |")


if __name__ == "__main__":
    main()
