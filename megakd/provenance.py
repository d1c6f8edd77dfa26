"""What a stage's result depends on: its settings, and the content of the models and data that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megakd.config import Recipe
from megakd.config_stages import AnyStage, EvalStage, ExportStage, GenerateStage, ScoreStage, TrainStage
from megakd.errors import ConfigError
from megakd.manifest import hash_path
from megakd.objectives import build_objective

ROLLOUTS = "rollouts.jsonl"
"""Name of a generate stage's file in its folder."""
SCORES = "scores.jsonl"
"""Name of a score stage's file in its folder, where it scores preferences."""
SIGNALS = "signals"
"""Name of a score stage's folder of signals in its folder, where it writes another signal."""
HOW_NOT_WHAT = {"name", "kind", "checkpoint_every", "chunk_tokens", "slots"}
"""Settings of a stage that its result does not depend on."""


def stage_config(recipe: Recipe, stage: AnyStage) -> dict[str, Any]:
    """The settings that the stage's result depends on, as plain values."""
    config = stage.model_dump(mode="json", exclude=HOW_NOT_WHAT)
    if isinstance(stage, TrainStage | GenerateStage | ScoreStage | EvalStage):
        data = recipe.data.model_dump(mode="json", exclude={"train", "eval"})
        config |= {"seed": recipe.seed, "precision": recipe.precision.model_dump(mode="json"), "data": data}
    return config


def stage_inputs(recipe: Recipe, stage: AnyStage) -> dict[str, str]:
    """What the stage reads: name -> hash of the content. Reads the files.

    Raises:
        ConfigError: one of them is not there, as when a stage is to run alone before those that it needs.
    """
    paths: dict[str, Path] = {}
    match stage:
        case TrainStage():
            paths["init"] = recipe.path_of_model(stage.init)
            for role in build_objective(stage.objective).requires.teachers:
                paths[role] = recipe.path_of_model(recipe.role(role).model)
            paths |= _numbered("train", recipe.data.train)
            for name in stage.objective.inputs:
                file = SCORES if name == "scores" else ROLLOUTS
                paths[name] = recipe.output / "stages" / getattr(stage, name) / file
            for role, name in stage.signals.stages.items():
                paths[f"signals.{role}"] = recipe.output / "stages" / name / SIGNALS
        case GenerateStage():
            paths["model"] = recipe.path_of_model(stage.model)
            paths |= _numbered("train", recipe.data.train)
        case ScoreStage():
            paths["model"] = recipe.path_of_model(stage.model)
            for name in stage.inputs:
                paths[name] = recipe.output / "stages" / getattr(stage, name) / ROLLOUTS
            if stage.signal.kind == "top_k" and stage.signal.at is not None:
                paths["at"] = recipe.output / "stages" / stage.signal.at / SIGNALS
            paths |= _numbered("train", recipe.data.train)
        case EvalStage():
            paths |= {f"models.{label}": recipe.path_of_model(model) for label, model in stage.models.items()}
            paths |= {role: recipe.path_of_model(recipe.role(role).model) for role in ("teacher", "reference")}
            paths |= _numbered("eval", recipe.data.eval)
        case ExportStage():
            paths["model"] = recipe.path_of_model(stage.model)
    for name, path in paths.items():
        if not path.exists():
            raise ConfigError(f"stages.{stage.name}", str(path), f"this, which it reads as {name}, is not there",
                              "Run the stage that makes it, or correct the path")
    return {name: hash_path(path) for name, path in paths.items()}


def _numbered(name: str, paths: Sequence[Path]) -> dict[str, Path]:
    return {f"{name}.{number}": path for number, path in enumerate(paths)}
