"""What can be found wrong beforehand with signals on disk: lists longer than the vocabulary, and the room they take."""

from __future__ import annotations

from collections.abc import Callable

from megakd.batch import Kind
from megakd.config import Recipe
from megakd.config_signals import MAKER_OF, HiddenStatesSignal, PreferencesSignal, TokenLogProbsSignal
from megakd.config_stages import AnyStage, ScoreStage, TrainStage
from megakd.data.dataset import preference_groups, read_rows
from megakd.data.tokenizers import Tokenizer
from megakd.errors import ConfigError
from megakd.hf.families import Architecture
from megakd.manifest import MANIFEST

ArchitectureOf = Callable[[str], Architecture]
"""Of a model as a recipe writes it."""


def check_lists(recipe: Recipe, architecture_of: ArchitectureOf) -> None:
    """Refuses lists of more tokens than the models have. Raises ConfigError with the field."""
    for stage in recipe.stages:
        match stage:
            case ScoreStage(signal=signal) if signal.kind == "top_k" and signal.k is not None:
                field, k, model = "signal.k", signal.k, stage.model
            case TrainStage(objective=objective) if "top_k" in type(objective).model_fields and objective.top_k:
                field, k, model = "objective.top_k", objective.top_k, stage.init
            case _:
                continue
        size = architecture_of(model).vocab_size
        if k > size:
            raise ConfigError(f"stages.{stage.name}.{field}", k, f"the vocabulary has {size} tokens", "Lower it")


def signals_bytes(recipe: Recipe, tokenizer: Tokenizer, architecture_of: ArchitectureOf) -> dict[str, int]:
    """Bytes that each score stage is going to write; of generated answers the most that their stage may draw.

    Stages that are done are left out, as are preferences, which are a few numbers an answer. Tokenises the data.

    Raises:
        DataError: the data cannot be used.
    """
    sizes: dict[str, int] = {}
    stages = {stage.name: stage for stage in recipe.stages}
    for stage in recipe.stages:
        if not isinstance(stage, ScoreStage) or isinstance(stage.signal, PreferencesSignal):
            continue
        if not (recipe.output / "stages" / stage.name / MANIFEST).exists():
            positions = sum(_positions(recipe, stage, kind, tokenizer, stages) for kind in stage.answers)
            sizes[stage.name] = positions * _position_bytes(recipe, stage, architecture_of, stages)
    return sizes


def _positions(
    recipe: Recipe, stage: ScoreStage, kind: str, tokenizer: Tokenizer, stages: dict[str, AnyStage]
) -> int:
    """Loss positions of a kind of answers."""
    data = recipe.data
    rows = read_rows(data.train, data.train_rows, recipe.seed, data.answer)
    if kind in MAKER_OF:
        maker = stages[getattr(stage, MAKER_OF[kind])]
        return len(rows) * maker.answers * maker.max_new_tokens
    groups = preference_groups(rows, tokenizer, (Kind[kind.upper()],), max_length=data.max_length,
                               too_long=data.too_long)
    return sum(sample.response_length for group in groups for sample in group.samples)


def _position_bytes(
    recipe: Recipe, stage: ScoreStage, architecture_of: ArchitectureOf, stages: dict[str, AnyStage]
) -> int:
    match stage.signal:
        case HiddenStatesSignal():
            return architecture_of(stage.model).hidden_size * (4 if recipe.precision.dtype == "fp32" else 2)
        case TokenLogProbsSignal():
            return 4
    if stage.signal.at is not None:
        return 4 * stages[stage.signal.at].signal.k
    return 8 * stage.signal.k
