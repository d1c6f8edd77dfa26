"""Everything that can be found wrong with a run before it starts: files, models, tokenizers, layouts, room on disk.

`megakd run` calls it in the starting process, before any rank exists; a launcher's ranks call it again before they make
a process group. It reads configurations, tokenizers and data, no weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import yaml

from megakd.batch import Kind
from megakd.check_precision import check_backend, check_sizes
from megakd.check_signals import check_lists, signals_bytes
from megakd.config import Recipe
from megakd.config_base import MODEL_OF_RUN
from megakd.config_checks import check_world
from megakd.config_evaluation import AnsweringStage, EvalStage, LmEvalStage, WinRateStage
from megakd.config_stages import AnyStage, ExportStage, GenerateStage, ScoreStage, TrainStage
from megakd.data.dataset import held_out_groups, preference_groups, prompts, read_rows
from megakd.data.texts import read_stage_texts
from megakd.data.tokenizers import Tokenizer, load_tokenizer, require_same
from megakd.errors import ConfigError, ModelError
from megakd.evaluation.checks import check_evaluation
from megakd.hf.directory import tensor_files
from megakd.hf.families import Architecture
from megakd.hf.importer import check_tied_head
from megakd.hf.pieces import Piece, check_layout, pieces, stage_shards
from megakd.log import require_loggers
from megakd.manifest import MANIFEST, Manifest, differences, made_otherwise, require_room
from megakd.objectives import build_objective
from megakd.provenance import stage_config

BYTES_PER_PARAMETER = 4
"""Models and checkpoints are written in float32."""
CHECKPOINT_COPIES = 3 * 2
"""Master weights and two moments; the new checkpoint is complete before the old one goes."""


def check_recipe(recipe: Recipe, world: int, redo: Sequence[str] = (), only: Sequence[str] = ()) -> None:
    """Checks a recipe against its files and the number of ranks, on which all its stages run or just those in `only`.

    Raises:
        ConfigError, DataError, ModelError: the first thing that is wrong, with the field or file and line.
    """
    check_world(recipe, world, only)
    check_backend(recipe, world)
    require_loggers(wandb=recipe.wandb, tensorboard=False)
    check_output(recipe)
    check_finished_stages(recipe, redo)
    check_models(recipe)
    check_lists(recipe, partial(architecture_of, recipe))
    tokenizer = tokenizer_of(recipe)
    check_rows(recipe, tokenizer)
    check_evaluation(recipe, tokenizer)
    check_room(recipe, tokenizer)


def check_output(recipe: Recipe) -> None:
    """Refuses an output folder that another recipe has written, or that cannot be made."""
    place = recipe.output.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        what = "is" if place == recipe.output.absolute() else f"lies below {place}, which is"
        raise ConfigError("output", str(recipe.output), f"{what} a file", "Name a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError("output", str(recipe.output), f"{place} cannot be written to", "Choose another folder")
    file = recipe.output / "recipe.yaml"
    if not file.exists():
        return
    try:
        name = yaml.safe_load(file.read_text(encoding="utf-8"))["name"]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
        rule = "its recipe.yaml cannot be read"
        raise ConfigError("output", str(recipe.output), rule, "Choose another folder") from error
    if name != recipe.name:
        rule = f"holds a run of the recipe {name!r}, this one is {recipe.name!r}"
        raise ConfigError("output", str(recipe.output), rule, "Choose another folder")


def check_finished_stages(recipe: Recipe, redo: Sequence[str]) -> None:
    """Refuses a folder whose finished stages were made with other settings (inputs are compared when they run)."""
    for stage in recipe.stages:
        folder = recipe.output / "stages" / stage.name
        manifest = None if stage.name in redo or stage.kind == "report" else Manifest.read(folder)
        if manifest is None:
            continue
        changes = differences(
            {"kind": manifest.kind, "config": manifest.config},
            {"kind": stage.kind, "config": stage_config(recipe, stage)},
        )
        if changes:
            raise made_otherwise(folder, stage.name, changes)


def directory_behind(recipe: Recipe, model: str) -> Path:
    """The existing directory that a model starts from: itself, or what the stages that make `run:NAME` began with."""
    makers = {
        stage.save_as: stage.init if isinstance(stage, TrainStage) else stage.model
        for stage in recipe.stages
        if isinstance(stage, TrainStage | ExportStage)
    }
    while model.startswith(MODEL_OF_RUN):
        model = makers[model.removeprefix(MODEL_OF_RUN)]  # `config.parse` has seen that each is made
    return Path(model)


def architecture_of(recipe: Recipe, model: str) -> Architecture:
    """A model's architecture."""
    return Architecture.read(directory_behind(recipe, model))


def models_of(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Every model that a recipe names: the field that names it -> (model, role in whose layout it runs)."""
    models = {f"{role}.model": (recipe.role(role).model, role) for role in ("reference", "student", "teacher")}
    for stage in recipe.stages:
        field = f"stages.{stage.name}"
        match stage:
            case TrainStage():
                models[f"{field}.init"] = (stage.init, stage.trains)
                if stage.reference is not None:
                    models[f"{field}.reference"] = (stage.reference, "reference")
            case GenerateStage() | ScoreStage():
                models[f"{field}.model"] = (stage.model, stage.role)
            case ExportStage():
                models[f"{field}.model"] = (stage.model, "student")
            case EvalStage() | AnsweringStage() | LmEvalStage():
                models |= {f"{field}.models.{label}": (model, "student") for label, model in stage.models.items()}
    return models


def check_models(recipe: Recipe) -> None:
    """Reads every model's configuration, list of tensors and tokenizer.

    Raises:
        ConfigError: a directory is missing, or does not fit its role's layout or `data.max_length`.
        ModelError: a directory is not whole, or two models have different vocabularies or tokenizers.
    """
    architectures: dict[Path, Architecture] = {}
    for field, (model, role) in models_of(recipe).items():
        directory = directory_behind(recipe, model)
        if not directory.is_dir():
            fix = "Give a Hugging Face model directory, or run:NAME"
            raise ConfigError(field, model, "there is no such directory", fix)
        if directory not in architectures:
            architectures[directory] = Architecture.read(directory)
            check_weights(directory, architectures[directory])
        architecture, cut = architectures[directory], recipe.role(role).parallel
        check_layout(architecture, cut.tensor, cut.pipeline, cut.virtual_pipeline, cut.pad_heads, role)
        check_sizes(architecture, cut, recipe.precision, role)
        name, length = longest_of(recipe, field)
        if length > architecture.max_positions:
            raise ConfigError(
                name,
                length,
                f"{directory} has a context of {architecture.max_positions} tokens",
                f"Use at most {architecture.max_positions}",
            )
    check_vocabularies(recipe, architectures)


def longest_of(recipe: Recipe, field: str) -> tuple[str, int]:
    """The setting with the longest sequence that the model of a field is given, and its value."""
    for stage in recipe.stages:
        if judges_texts(stage) and field == f"stages.{stage.name}.model":
            return f"stages.{stage.name}.signal.max_length", stage.signal.max_length
    return "data.max_length", recipe.data.max_length


def judges_texts(stage: AnyStage) -> bool:
    """Whether a stage scores texts, by the model's own tokenizer, rather than the run's tokens."""
    return isinstance(stage, ScoreStage) and stage.signal.kind == "preferences"


def reads_texts(recipe: Recipe, field: str) -> bool:
    """Whether the model of a field only ever reads texts, and may so have another tokenizer than the run's."""
    if field != "teacher.model":
        return any(judges_texts(stage) and field == f"stages.{stage.name}.model" for stage in recipe.stages)
    return not any(
        isinstance(stage, EvalStage) and stage.teacher
        or isinstance(stage, TrainStage) and "teacher" in stage.roles
        for stage in recipe.stages
    )


def check_weights(directory: Path, architecture: Architecture) -> None:
    """Refuses a model directory whose files lack a tensor, or hold another head than its config.json says. Reads their
    headers alone, and of a tied model that has a head besides the two."""
    missing = {piece.hf_name for piece in whole_model(architecture)} - tensor_files(directory).keys()
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise ModelError(f"{directory}: its files lack {min(missing)}{more}. Give a directory with the whole model")
    if architecture.tied_embeddings:
        check_tied_head(directory)


def check_vocabularies(recipe: Recipe, architectures: dict[Path, Architecture]) -> None:
    """Refuses models that do not read and write the same ids, unless they only read texts."""
    # The reference's is the first, which gives the run its tokenizer.
    directories = [directory_behind(recipe, model) for field, (model, _) in models_of(recipe).items()
                   if not reads_texts(recipe, field)]
    first, *others = dict.fromkeys(directories)
    own = load_tokenizer(first, chat_template=recipe.data.chat_template)
    for directory in others:
        try:
            require_same(own, load_tokenizer(directory, chat_template=recipe.data.chat_template))
        except ModelError as error:
            raise ModelError(f"{error}{_without_teacher(recipe, directory)}") from error
    size = architectures[first].vocab_size
    for directory in others:
        other = architectures[directory].vocab_size
        if other != size:
            raise ModelError(
                f"{first} and {directory} have vocabularies of {size} and {other} tokens (vocab_size in "
                "config.json). Losses over the vocabulary need the same: pad or cut the embeddings of one"
            )
    if own.vocab_size > size:
        raise ModelError(
            f"{first}: the tokenizer has {own.vocab_size} tokens, the models' heads {size}. Use the "
            "tokenizer that the models were trained with"
        )


def _without_teacher(recipe: Recipe, directory: Path) -> str:
    """What else helps against a directory with another tokenizer: evaluation without the teacher, if that is all."""
    if directory != directory_behind(recipe, recipe.teacher.model):
        return ""
    comparing = [stage for stage in recipe.stages if isinstance(stage, EvalStage) and stage.teacher]
    others = recipe.model_copy(update={"stages": tuple(stage for stage in recipe.stages if stage not in comparing)})
    if not comparing or not reads_texts(others, "teacher.model"):
        return ""
    settings = " and ".join(f"stages.{stage.name}.teacher: false" for stage in comparing)
    return f". Or write {settings}, which leaves out KL and expected advantage"


def tokenizer_of(recipe: Recipe) -> Tokenizer:
    """The run's one tokenizer: the reference's, or of what that will be made from."""
    return load_tokenizer(directory_behind(recipe, recipe.reference.model), chat_template=recipe.data.chat_template)


def check_rows(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Reads and tokenises the data that the stages need."""
    data = recipe.data
    limits = {"max_length": data.max_length, "too_long": data.too_long}
    trains = [stage for stage in recipe.stages if isinstance(stage, TrainStage)]
    generates = any(isinstance(stage, GenerateStage) for stage in recipe.stages)
    reads = trains or generates or any(isinstance(stage, ScoreStage) for stage in recipe.stages)
    evals = any(isinstance(stage, EvalStage | WinRateStage) for stage in recipe.stages)
    for wanted, files, field in ((reads, data.train, "data.train"), (evals, data.eval, "data.eval")):
        if wanted and not files:
            rule = "a stage reads these rows and no file is named"
            raise ConfigError(field, [], rule, "Name JSONL or Parquet files, or folders of them")
    if trains or generates:
        rows = read_rows(data.train, data.train_rows, recipe.seed, data.answer)
        for stage in trains:
            if stage.objective.reads_text:
                read_stage_texts(recipe, stage, tokenizer)
            given = (Kind.CHOSEN, Kind.REJECTED)
            kinds = [kind for kind in build_objective(stage.objective).requires.kinds if kind in given]
            groups = preference_groups(rows, tokenizer, kinds, **limits)
            if stage.global_batch > len(groups):
                rule = f"the data give {len(groups)} groups, fewer than one step takes"
                raise ConfigError(
                    f"stages.{stage.name}.global_batch", stage.global_batch, rule, "Lower it, or give more rows"
                )
        if generates:
            prompts(rows, tokenizer, data.max_length - 1, too_long=data.too_long)
    if evals:
        rows = read_rows(data.eval, data.eval_rows, recipe.seed, data.answer)
        if any(isinstance(stage, EvalStage) for stage in recipe.stages):
            held_out_groups(rows, tokenizer, **limits)
        prompts(rows, tokenizer, data.max_length - 1, too_long=data.too_long)


def check_room(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Refuses to begin when the disk cannot hold the models and signals that are still to be made and the largest
    checkpoint."""
    saved: list[int] = []
    trained: list[int] = []
    for stage in recipe.stages:
        done = (recipe.output / "stages" / stage.name / MANIFEST).exists()
        if isinstance(stage, TrainStage | ExportStage) and not done:
            source = stage.init if isinstance(stage, TrainStage) else stage.model
            saved.append(parameter_count(architecture_of(recipe, source)))
            if isinstance(stage, TrainStage):
                trained.append(saved[-1])
    copies = sum(saved) + max(trained, default=0) * CHECKPOINT_COPIES
    signals = signals_bytes(recipe, tokenizer, partial(architecture_of, recipe))
    what = f"{len(saved)} models and 2 checkpoints" + (f" and {len(signals)} stages of signals" if signals else "")
    require_room(recipe.output, copies * BYTES_PER_PARAMETER + sum(signals.values()), what)


def parameter_count(architecture: Architecture) -> int:
    """Parameters of a model, tied ones once."""
    return sum(piece.elements for piece in whole_model(architecture) if piece.primary)


def whole_model(architecture: Architecture) -> list[Piece]:
    """The pieces of a model that is not cut."""
    [whole] = stage_shards(architecture, tensor_rank=0, tensor_size=1, pipeline_rank=0, pipeline_size=1, spec="local")
    return pieces(architecture, whole)
