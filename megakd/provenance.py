"""What a stage's result depends on: its settings, and the content of the models and data that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megakd.config import Recipe
from megakd.config_evaluation import AnsweringStage, AnswersStage, CommandJudge, EvalStage, LmEvalStage, WinRateStage
from megakd.config_stages import AnyStage, ExportStage, GenerateStage, ScoreStage, TrainStage
from megakd.errors import ConfigError
from megakd.manifest import hash_path

ROLLOUTS = "rollouts.jsonl"
"""Name of a generate stage's file in its folder."""
SCORES = "scores.jsonl"
"""Name of a score stage's file in its folder, where it scores preferences."""
SIGNALS = "signals"
"""Name of a score stage's folder of signals in its folder, where it writes another signal."""
HOW_NOT_WHAT = {
    **dict.fromkeys(("name", "kind", "role", "checkpoint_every", "chunk_tokens", "slots", "batch_size"), True),
    "judge": {"timeout"}, "online": {"slots"}, "optimizer": {"overlap", "offload"},
}
"""Settings of a stage that its result does not depend on."""


def stage_config(recipe: Recipe, stage: AnyStage) -> dict[str, Any]:
    """The settings that the stage's result depends on, as plain values."""
    config = stage.model_dump(mode="json", exclude=HOW_NOT_WHAT)
    if isinstance(stage, TrainStage | GenerateStage | ScoreStage | EvalStage | AnsweringStage):
        data = recipe.data.model_dump(mode="json", exclude={"train", "eval", "text"})
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
            for role in stage.roles:
                paths[role] = recipe.path_of_model(recipe.teacher_model(stage, role))
            paths |= _numbered("train", recipe.data.train)
            if stage.objective.reads_text:
                paths |= _numbered("text", recipe.data.text)
            for name in stage.objective.inputs:
                if name in stage.drawn_online:
                    continue
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
            paths |= _labelled(recipe, stage)
            if stage.teacher:
                paths |= {role: recipe.path_of_model(recipe.role(role).model) for role in ("teacher", "reference")}
            paths |= _numbered("eval", recipe.data.eval)
        case WinRateStage():
            paths |= _labelled(recipe, stage)
            paths |= _numbered("eval", recipe.data.eval)
            if isinstance(stage.judge, CommandJudge):
                words = {f"judge.command.{number}": Path(word) for number, word in enumerate(stage.judge.command)}
                paths |= {name: path for name, path in words.items() if path.is_file()}
            else:
                paths["judge.model"] = Path(stage.judge.model)
        case AnswersStage():
            paths |= _labelled(recipe, stage)
            paths["questions"] = stage.questions
        case LmEvalStage():
            paths |= _labelled(recipe, stage)
            if stage.include_path is not None:
                paths["include_path"] = stage.include_path
        case ExportStage():
            paths["model"] = recipe.path_of_model(stage.model)
    for name, path in paths.items():
        if not path.exists():
            raise ConfigError(f"stages.{stage.name}", str(path), f"this, which it reads as {name}, is not there",
                              "Run the stage that makes it, or correct the path")
    return {name: hash_path(path) for name, path in paths.items()}


def _labelled(recipe: Recipe, stage: EvalStage | AnsweringStage | LmEvalStage) -> dict[str, Path]:
    return {f"models.{label}": recipe.path_of_model(model) for label, model in stage.models.items()}


def _numbered(name: str, paths: Sequence[Path]) -> dict[str, Path]:
    return {f"{name}.{number}": path for number, path in enumerate(paths)}
