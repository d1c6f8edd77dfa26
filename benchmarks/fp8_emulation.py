"""What each FP8 recipe does to a training: SFT of a model in float32, bf16 and every emulated recipe, at TP 1 and 2.

    python benchmarks/fp8_emulation.py --model DIR --data FILE.jsonl --out benchmarks/results/fp8_emulation

Each run is a recipe of its own that `megakd run` trains; OUT.json and OUT.md are written anew after each, so that the
command can be ended at any time and given again: runs that OUT.json has are left out, one that was cut off starts over.
Says nothing about speed: FP8 is arithmetic here, done in float32 (docs/precision.md).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.record_run import machine  # noqa: E402
from megakd.disk import write_json_atomic, write_text_atomic  # noqa: E402
from megakd.log import METRICS, read_metrics  # noqa: E402

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16"},
    **{recipe: {"dtype": "fp8", "fp8_recipe": recipe, "emulate": True}
       for recipe in ("tensorwise", "delayed", "blockwise", "mxfp8")},
}
LAST = 5
"""Steps whose mean loss is compared."""
STAGE = "train"


@dataclass(frozen=True)
class Case:
    """One run."""

    precision: str
    tensor: int

    @property
    def name(self) -> str:
        """In results and folders."""
        return f"{self.precision}-tp{self.tensor}"


def recipe_of(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The case's recipe: the chosen answers are learned by SFT, all cases from the same rows in the same order."""
    role = {"model": str(options.model.resolve()), "micro_batch": options.micro_batch}
    student = role | {"parallel": {"tensor": case.tensor, "pad_heads": True}}
    data = {"train": [str(options.data.resolve())], "answer": options.answer, "max_length": options.max_length,
            "too_long": "drop"}
    train = {"name": STAGE, "kind": "sft", "init": role["model"], "save_as": "student", "objective": {"kind": "sft"},
             "optimizer": {"lr": options.lr, "warmup": 0.1}, "steps": options.steps,
             "global_batch": options.global_batch, "checkpoint_every": options.steps}
    return {"name": case.name, "output": str(folder_of(case, options).resolve()), "device": "cpu", "seed": 1234,
            "precision": PRECISIONS[case.precision], "processes": case.tensor, "student": student, "teacher": role,
            "reference": role, "data": data, "stages": [train]}


def folder_of(case: Case, options: argparse.Namespace) -> Path:
    """Where the case runs; removed when its figures are written."""
    return options.out.with_name(options.out.name + ".runs") / case.name


def run(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Trains a case from its start and returns its figures. Raises CalledProcessError where the training fails."""
    folder = folder_of(case, options)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(recipe_of(case, options), sort_keys=False), encoding="utf-8")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run([sys.executable, "-m", "megakd.cli", "run", str(recipe)], check=True,
                   env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    lines = read_metrics(folder / "stages" / STAGE / METRICS)
    shutil.rmtree(folder)
    return asdict(case) | {"loss": [line["loss"] for line in lines], "grad_norm": [line["grad_norm"] for line in lines],
                           "tokens": [line["tokens"] for line in lines], "seconds": [line["seconds"] for line in lines]}


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What all runs of a file of results have in common."""
    return {"model": options.model.resolve().name, "data": options.data.name,
            **{name: getattr(options, name) for name in ("steps", "lr", "global_batch", "micro_batch", "max_length",
                                                         "answer")}}


def table(record: dict[str, Any]) -> str:
    """The results as Markdown: means beside bf16's and float32's, standard errors, the loss of every step."""
    runs, last = record["runs"], min(LAST, record["settings"]["steps"])
    settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items())
    lines = [f"# Emulated FP8: SFT losses\n\n{settings}. {record['machine']['cpu']}.\n",
             f"| run | mean loss of the last {last} steps | against bf16, same TP | all steps | "
             "against fp32, same TP | all steps | tokens a step |", "|---|---|---|---|---|---|---|"]
    for name, each in runs.items():
        cells = []
        for exact in (runs.get(f"{precision}-tp{each['tensor']}") for precision in ("bf16", "fp32")):
            for steps in (last, len(each["loss"])):
                cells.append("" if exact is None else _off(each["loss"][-steps:], exact["loss"][-steps:]))
        lines.append(f"| {name} | {statistics.mean(each['loss'][-last:]):.5f} | {' | '.join(cells)} | "
                     f"{statistics.mean(each['tokens']):.0f} |")
    lines += ["", "| step | " + " | ".join(runs) + " |", "|---|" + "---|" * len(runs)]
    for step in range(record["settings"]["steps"]):
        lines.append(f"| {step} | " + " | ".join(f"{each['loss'][step]:.5f}" for each in runs.values()) + " |")
    return "\n".join(lines) + "\n"


def _off(losses: list[float], exact: list[float]) -> str:
    """By how much a mean of losses is off, and its standard error from the steps' own differences: each step has other
    rows, and what rounding does differs more between them than between recipes."""
    steps = [one / other for one, other in zip(losses, exact, strict=True)]
    error = statistics.stdev(steps) / math.sqrt(len(steps)) if len(steps) > 1 else math.nan
    return f"{100 * (statistics.mean(losses) / statistics.mean(exact) - 1):+.2f} ± {100 * error:.2f} %"


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--model", type=Path, required=True, help="Hugging Face directory with a tokenizer")
    made.add_argument("--data", type=Path, required=True, help="JSONL of prompts with answers")
    made.add_argument("--out", type=Path, required=True, help="results: OUT.json, OUT.md, runs under OUT.runs/")
    made.add_argument("--answer", default="chosen", choices=("chosen", "reference"), help="field that is learned")
    made.add_argument("--steps", type=int, default=30)
    made.add_argument("--lr", type=float, default=2e-5)
    made.add_argument("--global-batch", type=int, default=3, help="rows a step: about 250 tokens of "
                      "examples/data/instructions.jsonl")
    made.add_argument("--micro-batch", type=int, default=3, help="weights are rounded for "
                      "each micro-batch, which is most of the time")
    made.add_argument("--max-length", type=int, default=192)
    made.add_argument("--tensor", type=int, nargs="+", default=[1, 2])
    made.add_argument("--only", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    return made


def main(arguments: list[str]) -> int:
    """Runs what is missing; returns the exit status."""
    options = parser().parse_args(arguments)
    file = options.out.with_name(options.out.name + ".json")
    record = {"settings": settings_of(options), "machine": machine(), "runs": {}}
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["settings"] != record["settings"]:
            print(f"{file}: was made with {found['settings']}. Choose another --out", file=sys.stderr)
            return 2
        record["runs"] = found["runs"]
    for tensor in options.tensor:
        for precision in options.only:
            case = Case(precision, tensor)
            if case.name in record["runs"]:
                print(f"{case.name}: already done", flush=True)
                continue
            record["runs"][case.name] = run(case, options)
            write_json_atomic(file, record)
            write_text_atomic(options.out.with_name(options.out.name + ".md"), table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
