"""Compares the first step of a training stage in two layouts: loss, and the gradient of every Hugging Face tensor.

    python tools/compare_layouts.py examples/quickstart/recipe.yaml --stage adpa \\
        --other student.parallel.tensor=1 teacher.parallel.tensor=2 teacher.parallel.pipeline=1

The stages before have to be done: the stage's own start, teachers and rollouts are read from the run's folder. Nothing
is written there. Prints the relative error (norm of the difference over norm) of the whole gradient and of the tensor
where it is largest, and exits with 1 when the whole gradient's is above --limit.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from megakd.config import Recipe, load
from megakd.config_stages import TrainStage
from megakd.errors import ConfigError, MegakdError
from megakd.launch import on_ranks

if TYPE_CHECKING:
    from megakd.mcore.runtime import World


def main() -> int:
    """Runs both layouts on ranks of this machine and compares them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--stage", required=True, help="name of a training stage")
    parser.add_argument("--overrides", nargs="*", default=[], help="laid over the recipe in both layouts")
    parser.add_argument("--other", nargs="+", required=True, help="overrides that make the other layout")
    parser.add_argument("--limit", type=float, default=1e-5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    overrides = {"recipe": options.overrides, "other": [*options.overrides, *options.other]}
    try:
        layouts = {name: load_stage(options.recipe, own, options.stage) for name, own in overrides.items()}
        if "RANK" in os.environ:
            worker(layouts, options.out)
            return 0
    except MegakdError as error:
        print(f"compare_layouts: error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        processes = layouts["recipe"][0].processes
        command, environment = on_ranks(processes, __file__, *sys.argv[1:], "--out", folder)
        subprocess.run(command, check=True, env=environment)
        return report([gather(Path(folder, name)) for name in layouts], options)


def load_stage(path: str, overrides: list[str], name: str) -> tuple[Recipe, TrainStage]:
    """The recipe in one layout, and its stage of this name."""
    recipe = load(path, tuple(overrides))
    for stage in recipe.stages:
        if stage.name == name and isinstance(stage, TrainStage):
            return recipe, stage
    raise ConfigError("--stage", name, "is no training stage of the recipe", "Name a stage that trains")


def worker(layouts: dict[str, tuple[Recipe, TrainStage]], out: Path) -> None:
    """One rank: forward and backward of the first step in each layout; writes this rank's boxes of the gradients."""
    from megakd.mcore import runtime

    world = runtime.start(layouts["recipe"][0].device)
    try:
        for name, (recipe, stage) in layouts.items():
            (out / name).mkdir(exist_ok=True)
            write_gradient(recipe, stage, world, out / name)
            gc.collect()  # models refer to themselves, and the next layout needs the memory
    finally:
        runtime.stop()


def write_gradient(recipe: Recipe, stage: TrainStage, world: World, out: Path) -> None:
    """One layout on this rank: its boxes of the gradient, where they lie, and the metrics."""
    from megakd.mcore import runtime
    from megakd.run import Run
    from megakd.train import Training

    run = Run(recipe, world)
    runtime.seed(recipe.seed, run.grid("student", trained=True))
    training = Training(run, stage)
    metrics = training.forward_backward(training.step_at(0))
    boxes = training.trainer.gradient_boxes()
    tensors = {str(number): values.contiguous() for number, (_, values) in enumerate(boxes)}
    save_file(tensors, out / f"{world.rank}.safetensors")
    where = [[piece.hf_name, piece.hf_shape, piece.hf_offset] for piece, _ in boxes]
    (out / f"{world.rank}.json").write_text(json.dumps({"boxes": where, "metrics": metrics}))


def gather(folder: Path) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The metrics, and the whole gradients from all ranks' boxes (replicas hold the same ones)."""
    whole: dict[str, torch.Tensor] = {}
    metrics: dict[str, float] = {}
    for listing in sorted(folder.glob("*.json")):
        told = json.loads(listing.read_text())
        metrics = told["metrics"]
        tensors = load_file(listing.with_suffix(".safetensors"))
        for number, (name, shape, offset) in enumerate(told["boxes"]):
            values = tensors[str(number)]
            target = whole.setdefault(name, torch.full(shape, float("nan")))
            target[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))] = values
    return metrics, whole


def report(sides: list[tuple[dict[str, float], dict[str, torch.Tensor]]], options: argparse.Namespace) -> int:
    """Prints the comparison; returns the exit status."""
    (metrics, one), (other_metrics, two) = sides
    if one.keys() != two.keys():
        print("the layouts have gradients of different tensors:", sorted(one.keys() ^ two.keys()))
        return 1
    apart = {name: float((one[name] - two[name]).double().norm()) for name in one}
    norms = {name: float(one[name].double().norm()) for name in one}
    errors = {name: apart[name] / norms[name] for name in one}
    worst = max(errors, key=errors.get)
    whole = math.hypot(*apart.values()) / math.hypot(*norms.values())
    figures = {
        "stage": options.stage,
        "other": options.other,
        "tensors": len(errors),
        "loss": metrics["loss"],
        "loss_other": other_metrics["loss"],
        "relative_error": whole,
        "worst_relative_error": errors[worst],
        "worst_tensor": worst,
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    # A NaN is above any limit.
    return 0 if whole <= options.limit else 1


if __name__ == "__main__":
    sys.exit(main())
