"""Answers a second of the rollout engine in several layouts, beside what the planner says.

    OMP_NUM_THREADS=1 python -m benchmarks.rollouts --out benchmarks/results/rollouts

Random models, real ranks, all prompts alike and no stop token, so that every row has as many tokens as planned. The
machine should have nothing else to do. All is done in rounds, as in `benchmarks/planner.py`: a round calibrates and
then runs every case. Compared are the medians of the rounds; those of layouts of one model, within rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.measure import paired_ratio, timed_steps
from benchmarks.planner import MODELS, TIMED_WORLDS, calibrated, write_model
from benchmarks.record_run import machine
from megakd.config import Parallel
from megakd.disk import write_json_atomic
from megakd.hf.families import Architecture
from megakd.mcore.decoder import PipelineDecoder
from megakd.mcore.model import freeze
from megakd.planning.inference import Generation, generation_time
from megakd.planning.setup import RoleSetup
from megakd.planning.work import Lengths
from megakd.rollout import Prompt, Sampling, generate
from tests.mcore.cases import build
from tests.ranks import close_pools, run_ranks

LAYOUTS = {
    "1 rank": Parallel(),
    "tp2": Parallel(tensor=2),
    "pp2": Parallel(pipeline=2),
    "pp2 vpp2": Parallel(pipeline=2, virtual_pipeline=2),
}


@dataclass(frozen=True)
class Case:
    """A model by name, and what it answers."""

    model: str
    temperature: float
    prompts: int
    slots: int
    prompt: int
    answer: int


CASES = {
    "70M, greedy": Case("70M", 0.0, 64, 16, 60, 40),
    "60M, drawn": Case("60M", 1.0, 32, 32, 100, 40),
    "28M, few rows": Case("28M", 0.0, 16, 4, 40, 60),
}
WARM_UP, TIMED = 1, 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--out", type=Path, required=True, help="folder for rollouts.json and rollouts.md")
    top.add_argument("--rounds", type=int, default=3, help="times that all is calibrated and timed (default: 3)")
    options = top.parse_args(arguments)
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as `megakd run` does; the ranks inherit it
    rows = [{"case": case, "layout": layout, "planned": [], "measured": []} for case in CASES for layout in LAYOUTS]
    described = []
    with TemporaryDirectory() as folder:
        directories = {each.model: write_model(Path(folder) / each.model, *MODELS[each.model])
                       for each in CASES.values()}
        for _ in range(options.rounds):
            clusters = {world: calibrated(Path(folder) / f"{world}.yaml", world) for world in TIMED_WORLDS}
            described.append({world: cluster.model_dump(mode="json") for world, cluster in clusters.items()})
            for row in rows:
                case, parallel = CASES[row["case"]], LAYOUTS[row["layout"]]
                directory, world = directories[case.model], parallel.tensor * parallel.pipeline
                row["planned"].append(generation_time(clusters[world], task_of(case, parallel, directory)).parts)
                row["measured"].append(run_ranks(world, seconds_of_a_rank, case, parallel, directory, timeout=900)[0])
                print(line_of(row, rows), flush=True)
            save(options.out, rows, described)
    close_pools()


def task_of(case: Case, parallel: Parallel, directory: str) -> Generation:
    """The case as the planner takes it."""
    role = RoleSetup(Architecture.read(directory), parallel, parallel.tensor * parallel.pipeline, 1)
    lengths = Lengths(case.prompt, case.answer)
    return Generation(role, case.slots, case.prompts, 1, lengths, lengths, case.temperature > 0, 0, False, "fp32",
                      "cpu")


def seconds_of_a_rank(case: Case, parallel: Parallel, directory: str) -> float:
    """On a rank: seconds in which all prompts are answered."""
    torch.set_num_threads(1)
    model = freeze(build(directory, parallel))
    decoder = PipelineDecoder(model, case.prompt + case.answer)
    prompts = [Prompt(number, tuple(range(3, 3 + case.prompt))) for number in range(case.prompts)]
    sampling = Sampling(case.temperature, 0, 1.0, 1, case.answer, (), 3)

    def answer(_: int) -> None:
        generate(decoder, prompts, sampling, slots=case.slots, pad_id=0)

    return timed_steps(answer, WARM_UP, TIMED)[0].wall


# ----------------------------------------------------------------------------------------------------------- the result
def line_of(row: dict, rows: Sequence[dict]) -> str:
    """A case in one layout: its times, and how many times as fast it is as on one rank."""
    case, rounds = CASES[row["case"]], len(row["measured"])
    alone = next(each for each in rows if each["case"] == row["case"])
    measured = statistics.median(row["measured"])
    planned = statistics.median(sum(parts.values()) for parts in row["planned"])
    faster = paired_ratio(alone["measured"][:rounds], row["measured"])
    return (f"| {row['case']} | {row['layout']} | {measured:.2f} | {case.prompts * case.answer / measured:.0f} "
            f"| {faster:.2f} | {planned:.2f} | {100 * (planned / measured - 1):+.0f} % |")


def save(folder: Path, rows: Sequence[dict], described: Sequence[dict]) -> None:
    """rollouts.json, and rollouts.md with the table."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = {name: vars(case) for name, case in CASES.items()}
    facts = {"machine": machine(), "torch": torch.__version__, "clusters": list(described), "cases": cases,
             "rows": list(rows)}
    write_json_atomic(folder / "rollouts.json", facts)
    head = ["| model | layout | s, median | tokens a second | times one rank's speed | planned, s | error |",
            "|---|---|---|---|---|---|---|"]
    lines = [line_of(row, rows) for row in rows]
    (folder / "rollouts.md").write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
