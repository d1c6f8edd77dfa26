"""What a training takes to draw its own answers (`online`), and its steps, beside what the planner says.

    OMP_NUM_THREADS=1 python -m benchmarks.draws --out benchmarks/results/planner

Random models, real ranks, `megakd run`'s own training; all prompts alike and no stop token, so that every answer has as
many tokens as planned. The machine should have nothing else to do. All is done in rounds, as in
`benchmarks/planner.py`: a round calibrates and then takes some steps of every case, each with a draw before it.
Compared are the medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.measure import seconds_of
from benchmarks.planner import MODELS, TIMED_WORLDS, calibrated
from benchmarks.record_run import machine
from megakd.config import load
from megakd.disk import write_json_atomic
from megakd.planning.cluster import Cluster
from megakd.planning.online import draw_time
from megakd.planning.recipe import setup_of_stage
from megakd.planning.timing import training_time
from megakd.planning.work import Lengths
from tests.mcore.planning_cases import drawing_training
from tests.ranks import close_pools, run_ranks
from tests.recipes import write_recipe, write_rows, write_tiny_model

STUDENT, TEACHER = "20M", "28M"
"""Of benchmarks/planner.py's models, with the tests' vocabulary."""
GKD = {"kind": "kd", "on_policy": 1.0}
MINILLM = {"kind": "minillm", "lm_weight": 0}
DPKD = {"kind": "dpkd", "lm_weight": 0}
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A training: ranks, prompts of a step, and how they are answered."""

    world: int
    objective: dict
    prompts: int
    slots: int
    answer: int
    student: dict = field(default_factory=dict)
    teacher: dict = field(default_factory=dict)
    """Layouts."""
    teacher_mix: float = 0.0


CASES = {
    "gkd": Case(1, GKD, 32, 32, 48),
    "gkd, slots filled again": Case(1, GKD, 24, 8, 48),
    "minillm, teacher_mix 0.3": Case(1, MINILLM, 16, 16, 48, teacher_mix=0.3),
    "gkd, tp2 of dp2": Case(2, GKD, 24, 24, 32, {"tensor": 2, "pad_heads": True}),
    "dpkd, pp2 of tp2, both draw": Case(2, DPKD, 12, 12, 32, {"pipeline": 2}, {"tensor": 2}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--out", type=Path, required=True, help="folder for draws.json and draws.md")
    top.add_argument("--rounds", type=int, default=3, help="times that all is calibrated and timed (default: 3)")
    options = top.parse_args(arguments)
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as `megakd run` does; the ranks inherit it
    rows = [{"case": name, "planned": [], "measured": []} for name in CASES]
    described = []
    with TemporaryDirectory() as made:
        folder = Path(made)
        for seed, name in enumerate((STUDENT, TEACHER)):
            hidden, layers, heads, kv_heads, ffn, _ = MODELS[name]
            write_tiny_model(folder / name, seed=seed, hidden_size=hidden, layers=layers, heads=heads,
                             kv_heads=kv_heads, head_dim=64, ffn_size=ffn, max_positions=256)
        question = "How many apples are seven and two and a third of eight?"
        write_rows(folder / "train.jsonl", [{"prompt": question, "chosen": "There are nine.", "rejected": "No."}] * 96)
        for _ in range(options.rounds):
            clusters = {world: calibrated(folder / f"{world}.yaml", world) for world in TIMED_WORLDS}
            described.append({world: cluster.model_dump(mode="json") for world, cluster in clusters.items()})
            for row in rows:
                case = CASES[row["case"]]
                file = written(folder, case)
                seconds, prompt = run_ranks(case.world, seconds_of_a_rank, str(file), timeout=900)[0]
                row["measured"].append(seconds)
                row["planned"].append(planned(clusters[case.world], case, file, prompt))
                print(line_of(row), flush=True)
            save(options.out, rows, described)
    close_pools()


def written(folder: Path, case: Case) -> Path:
    """The case's recipe."""
    online = {"slots": case.slots, "max_new_tokens": case.answer, "teacher_mix": case.teacher_mix}
    return write_recipe(folder, {
        "name": "draws", "output": str(folder / "run"), "processes": case.world,
        "student": {"model": str(folder / STUDENT), "parallel": case.student, "micro_batch": 4},
        "teacher": {"model": str(folder / TEACHER), "parallel": case.teacher, "micro_batch": 4},
        "reference": {"model": str(folder / TEACHER)},
        "data": {"train": [str(folder / "train.jsonl")], "max_length": 200},
        "stages": [{"name": "train", "kind": "distill", "init": str(folder / STUDENT), "save_as": "trained",
                    "steps": 99, "checkpoint_every": 1, "objective": case.objective, "global_batch": case.prompts,
                    "online": online}]})


def seconds_of_a_rank(file: str) -> tuple[list[tuple[float, float]], int]:
    """On a rank: seconds of each draw and of the step after it, the first ones left out; a prompt's tokens."""
    torch.set_num_threads(1)
    training, found = drawing_training(file), []
    for number in range(1 + STEPS):
        steps: list = []
        drawn = seconds_of(lambda number=number, steps=steps: steps.append(training.step_at(number))).wall

        def step(steps: list = steps) -> None:
            training.forward_backward(steps[0])
            training.trainer.step()

        found.append((drawn, seconds_of(step).wall))
    answer = steps[0].groups[0].samples[-1]
    return found[1:], len(answer.tokens) - answer.response_length


def planned(cluster: Cluster, case: Case, file: Path, prompt: int) -> dict[str, dict[str, float]]:
    """Seconds of a draw and of the step besides, by part."""
    recipe, lengths = load(file), Lengths(prompt, case.answer)
    setup = setup_of_stage(recipe, recipe.stages[0], case.world, lengths)
    setup = replace(setup, draws=replace(setup.draws, mean=lengths, longest=lengths))
    return {"draw": draw_time(cluster, setup).parts, "step": training_time(cluster, setup).parts}


# ----------------------------------------------------------------------------------------------------------- the result
def line_of(row: dict) -> str:
    """A case: its draws and its steps besides, each beside the plan."""
    case, cells = CASES[row["case"]], []
    for place, name in enumerate(("draw", "step")):
        seconds = [each[place] for one_round in row["measured"] for each in one_round]
        measured = statistics.median(seconds)
        by_plan = statistics.median(sum(each[name].values()) for each in row["planned"])
        cells.append(f"{measured:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {by_plan:.2f} "
                     f"| {100 * (by_plan / measured - 1):+.0f} %")
    return f"| {row['case']} | {case.prompts}, {case.slots}, {case.answer} | {' | '.join(cells)} |"


def save(folder: Path, rows: Sequence[dict], described: Sequence[dict]) -> None:
    """draws.json, and draws.md with the table."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"machine": machine(), "torch": torch.__version__, "student": STUDENT, "teacher": TEACHER,
             "clusters": list(described), "cases": {name: vars(case) for name, case in CASES.items()},
             "rows": list(rows)}
    write_json_atomic(folder / "draws.json", facts)
    head = ["| training | prompts, slots, tokens | a draw, s | planned | error | the step, s | planned | error |",
            "|---|---|---|---|---|---|---|---|"]
    (folder / "draws.md").write_text("\n".join([*head, *map(line_of, rows)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
