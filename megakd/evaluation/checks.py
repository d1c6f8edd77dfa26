"""What the stages that measure models need and can be looked up before a run starts. No weights are read."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from megakd.config import Recipe
from megakd.config_evaluation import AnswersStage, CommandJudge, EvalStage, LmEvalStage, WinRateStage
from megakd.data.tokenizers import Tokenizer
from megakd.errors import ConfigError
from megakd.evaluation.questions import check_questions
from megakd.evaluation.reward_model import check_reward_model


def check_evaluation(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Checks packages, judges and files of the stages that measure models.

    Raises:
        ConfigError, DataError, ModelError: the first thing that is wrong.
    """
    for stage in recipe.stages:
        field = f"stages.{stage.name}"
        match stage:
            case EvalStage():
                _require_package(f"{field}.kind", stage.kind, "rouge_score", "eval")
            case WinRateStage(judge=CommandJudge()):
                _check_command(f"{field}.judge.command", stage.judge.command)
            case WinRateStage():
                _require_package(f"{field}.judge.kind", stage.judge.kind, "transformers", "hf")
                check_reward_model(f"{field}.judge.model", stage.judge.model)
            case AnswersStage():
                check_questions(stage, tokenizer, recipe.data.max_length)
            case LmEvalStage():
                _require_package(f"{field}.kind", stage.kind, "lm_eval", "lm-eval")
                _require_package(f"{field}.kind", stage.kind, "transformers", "hf")
                if stage.include_path is not None and not stage.include_path.is_dir():
                    raise ConfigError(f"{field}.include_path", str(stage.include_path), "there is no such folder",
                                      "Give a folder with tasks' YAML files, or leave it out")


def _require_package(field: str, value: str, module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(field, value, f"needs the package {module.replace('_', '-')}, which is not installed",
                          f"pip install 'megakd[{extra}]'")


def _check_command(field: str, command: tuple[str, ...]) -> None:
    if shutil.which(command[0]) is None:
        what = "is a file that cannot be executed" if Path(command[0]).is_file() else "there is no such program"
        raise ConfigError(field, command[0], what, "Write the program first, then its arguments: [python, judge.py]")
