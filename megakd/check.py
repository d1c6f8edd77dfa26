"""Everything that can be found wrong with a run before it starts: files, models, tokenizers, layouts, room on disk.

`megakd run` calls it in the starting process, before any rank exists; a launcher's ranks call it again before they make
a process group. It reads configurations, tokenizers and data, no weights.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import yaml

from megakd.batch import Kind
from megakd.config import MODEL_OF_RUN, EvalStage, ExportStage, GenerateStage, Recipe, TrainStage, check_world
from megakd.data.dataset import preference_groups, prompts, read_rows
from megakd.data.sampler import StepSampler
from megakd.data.tokenizers import Tokenizer, load_tokenizer, require_same
from megakd.errors import ConfigError, ModelError
from megakd.hf.families import Architecture
from megakd.hf.pieces import check_layout, pieces, stage_shards
from megakd.log import require_loggers
from megakd.manifest import require_room
from megakd.objectives import build_objective

BYTES_PER_PARAMETER = 4
"""Models and checkpoints are written in float32."""
CHECKPOINT_COPIES = 3 * 2
"""Master weights and two moments; the new checkpoint is complete before the old one goes."""


def check_recipe(recipe: Recipe, world: int) -> None:
    """Checks a recipe against its files and the number of ranks.

    Raises:
        ConfigError, DataError, ModelError: the first thing that is wrong, with the field or file and line.
    """
    check_world(recipe, world)
    check_backend(recipe)
    require_loggers(wandb=recipe.wandb, tensorboard=False)
    check_output(recipe)
    architectures = check_models(recipe)
    check_rows(recipe)
    check_room(recipe, architectures)


def check_backend(recipe: Recipe) -> None:
    """Refuses a device or precision that this machine does not have."""
    if recipe.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("device", "cuda", "torch sees no CUDA device here", "Write device: cpu, or see `megakd doctor`")
        if importlib.util.find_spec("transformer_engine") is None:
            raise ConfigError("device", "cuda", "the layers on CUDA are Transformer Engine's, which is not installed",
                              "Install megakd[gpu], or write device: cpu")
    if recipe.precision.dtype == "fp8":
        import torch

        capability = torch.cuda.get_device_capability()
        if capability < (8, 9):
            raise ConfigError("precision.dtype", "fp8", f"this GPU has compute capability {capability[0]}.{capability[1]}; FP8 "
                              "needs 8.9 (Ada) or later", "Write precision: bf16")
        if recipe.precision.fp8_recipe == "mxfp8" and capability < (10, 0):
            raise ConfigError("precision.fp8_recipe", "mxfp8", "needs Blackwell (compute capability 10.0)",
                              "Write tensorwise or blockwise")


def check_output(recipe: Recipe) -> None:
    """Refuses an output folder that another recipe has written."""
    file = recipe.output / "recipe.yaml"
    if recipe.output.exists() and not recipe.output.is_dir():
        raise ConfigError("output", str(recipe.output), "is a file", "Name a folder")
    if not file.exists():
        return
    try:
        name = yaml.safe_load(file.read_text(encoding="utf-8"))["name"]
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise ConfigError("output", str(recipe.output), "its recipe.yaml cannot be read", "Choose another folder") from error
    if name != recipe.name:
        raise ConfigError("output", str(recipe.output), f"holds a run of the recipe {name!r}, this one is {recipe.name!r}",
                          "Choose another output folder")


def directory_behind(recipe: Recipe, model: str) -> Path:
    """The existing directory that a model starts from: itself, or what the stages that make `run:NAME` began with."""
    makers = {stage.save_as: stage.init if isinstance(stage, TrainStage) else stage.model
              for stage in recipe.stages if isinstance(stage, TrainStage | ExportStage)}
    while model.startswith(MODEL_OF_RUN):
        name = model.removeprefix(MODEL_OF_RUN)
        if name not in makers:
            raise ConfigError("model", model, f"no stage saves a model as {name!r}", f"There are: {', '.join(makers)}")
        model = makers[name]
    return Path(model)


def check_models(recipe: Recipe) -> dict[str, Architecture]:
    """Reads every model's configuration and tokenizer; returns the architectures by role and by stage."""
    architectures: dict[str, Architecture] = {}
    for role in ("student", "teacher", "reference"):
        settings = recipe.role(role)
        architectures[role] = _checked(recipe, settings.model, role, f"{role}.model")
    for stage in recipe.stages:
        if isinstance(stage, TrainStage):
            architectures[stage.name] = _checked(recipe, stage.init, stage.trains, f"stages.{stage.name}.init")
        elif isinstance(stage, GenerateStage | ExportStage):
            architectures[stage.name] = _checked(recipe, stage.model, "student", f"stages.{stage.name}.model")
        elif isinstance(stage, EvalStage):
            for label, model in stage.models.items():
                _checked(recipe, model, "student", f"stages.{stage.name}.models.{label}")
    own = tokenizer_of(recipe, recipe.reference.model)
    for model in sorted({recipe.student.model, recipe.teacher.model, *_inits(recipe)}):
        require_same(own, tokenizer_of(recipe, model))
    sizes = {name: architecture.vocab_size for name, architecture in architectures.items()}
    if len(set(sizes.values())) > 1:
        raise ModelError("the models have vocabularies of different sizes: "
                         + ", ".join(f"{name} {size}" for name, size in sizes.items())
                         + ". Losses over the vocabulary need the same one; pad or cut the embeddings of one model")
    if own.vocab_size > sizes["student"]:
        raise ModelError(f"{own.directory}: the tokenizer has {own.vocab_size} tokens, the models' heads {sizes['student']}. "
                         "Use the tokenizer that the models were trained with")
    return architectures


def tokenizer_of(recipe: Recipe, model: str) -> Tokenizer:
    """The tokenizer of a model or of what it will be made from."""
    return load_tokenizer(directory_behind(recipe, model), chat_template=recipe.data.chat_template)


def _inits(recipe: Recipe) -> list[str]:
    return [stage.init for stage in recipe.stages if isinstance(stage, TrainStage)]


def _checked(recipe: Recipe, model: str, role: str, field: str) -> Architecture:
    """The architecture of a model, checked against the layout of the role that it runs in."""
    directory = directory_behind(recipe, model)
    if not directory.is_dir():
        raise ConfigError(field, model, "there is no such directory", "Give a Hugging Face model directory, or run:NAME")
    architecture = Architecture.read(directory)
    parallel = recipe.role(role).parallel
    check_layout(architecture, parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.pad_heads, role)
    if recipe.data.max_length > architecture.max_positions:
        raise ConfigError("data.max_length", recipe.data.max_length,
                          f"{directory} has a context of {architecture.max_positions} tokens", "Lower data.max_length")
    return architecture


def check_rows(recipe: Recipe) -> None:
    """Reads and tokenises the data that the stages need."""
    tokenizer = tokenizer_of(recipe, recipe.reference.model)
    data = recipe.data
    trains = [stage for stage in recipe.stages if isinstance(stage, TrainStage)]
    evals = [stage for stage in recipe.stages if isinstance(stage, EvalStage)]
    generates = [stage for stage in recipe.stages if isinstance(stage, GenerateStage)]
    if (trains or generates) and not data.train:
        raise ConfigError("data.train", [], "a stage reads training rows and no file is named", "Name JSONL or Parquet files")
    if evals and not data.eval:
        raise ConfigError("data.eval", [], "a stage reads held-out rows and no file is named", "Name JSONL or Parquet files")
    if trains or generates:
        rows = read_rows(data.train, data.train_rows, recipe.seed)
        for stage in trains:
            kinds = [kind for kind in build_objective(stage.objective).requires.kinds if kind is not Kind.ROLLOUT]
            groups = preference_groups(rows, tokenizer, kinds, max_length=data.max_length, too_long=data.too_long)
            StepSampler(len(groups), stage.global_batch, recipe.seed)
        for stage in generates:
            prompts(rows, tokenizer, data.max_length - 1, too_long=data.too_long)
    if evals:
        rows = read_rows(data.eval, data.eval_rows, recipe.seed)
        preference_groups(rows, tokenizer, (Kind.CHOSEN, Kind.REJECTED), max_length=data.max_length, too_long=data.too_long)


def check_room(recipe: Recipe, architectures: dict[str, Architecture]) -> None:
    """Refuses to begin when the disk cannot hold the models and the largest checkpoint."""
    saved = [parameter_count(architectures[stage.name]) for stage in recipe.stages if isinstance(stage, TrainStage | ExportStage)]
    trained = [parameter_count(architectures[stage.name]) for stage in recipe.stages if isinstance(stage, TrainStage)]
    copies = sum(saved) + (max(trained) * CHECKPOINT_COPIES if trained else 0)
    require_room(recipe.output, copies * BYTES_PER_PARAMETER, f"{len(saved)} models and 2 checkpoints")


def parameter_count(architecture: Architecture) -> int:
    """Parameters of a model, tied ones once."""
    [whole] = stage_shards(architecture, tensor_rank=0, tensor_size=1, pipeline_rank=0, pipeline_size=1, spec="local")
    return sum(piece.elements for piece in pieces(architecture, whole) if piece.primary)
