"""A recipe: what a run does, checked before anything starts. The only place with defaults; imports no torch.

Precedence: the defaults here < the recipe file < dotted overrides on the command line (`student.parallel.tensor=2`).
Every error is a `ConfigError` with the field's dotted name.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from megakd.errors import ConfigError
from megakd.layout import Layout

MODEL_OF_RUN = "run:"
"""A model written `run:NAME` is the one that an earlier stage of the same run saved as NAME."""


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


# ---------------------------------------------------------------------------------------------------------- roles
class Parallel(Section):
    """How one role's model is cut. Data parallelism is what is left of the world."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel size."""
    pipeline: int = Field(1, ge=1)
    """Pipeline-parallel size."""
    virtual_pipeline: int = Field(1, ge=1)
    """Model chunks a pipeline rank holds (interleaved schedule); 1 is the plain 1F1B schedule."""
    context: int = Field(1, ge=1)
    """Context-parallel size; more than 1 needs Transformer Engine."""
    sequence: bool = False
    """Sequence parallelism: activations between the tensor-parallel regions are cut along the sequence."""
    pad_heads: bool = False
    """Adds inert zero heads where the number of key/value heads does not divide by `tensor`."""


class Role(Section):
    """A model that takes part in the run."""

    model: str
    """Hugging Face directory, or `run:NAME`."""
    parallel: Parallel = Parallel()
    micro_batch: int = Field(4, ge=1)
    """Groups (prompts with their answers) in one micro-batch of this role."""


class Precision(Section):
    """Arithmetic of the model's layers; losses and optimizer states are float32."""

    dtype: Literal["fp32", "bf16", "fp8"] = "fp32"
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"


# ----------------------------------------------------------------------------------------------------------- data
class Data(Section):
    """Preference rows: JSONL (also .gz), JSON or Parquet files, or folders of them."""

    train: tuple[Path, ...] = ()
    """Training files."""
    eval: tuple[Path, ...] = ()
    """Held-out files."""
    train_rows: int | None = Field(None, ge=1)
    """How many training rows to use, drawn once by the seed; all when left out."""
    eval_rows: int | None = Field(None, ge=1)
    """How many held-out rows to use, drawn once by the seed; all when left out."""
    chat_template: Path | None = None
    """File of a chat template in place of the models' own (base models and SentencePiece models have none)."""
    max_length: int = Field(512, ge=2)
    """Longest sequence in tokens, prompt and answer together."""
    too_long: Literal["error", "drop"] = "error"
    """What happens to a longer one: the run is refused, or it is dropped and counted."""


# ----------------------------------------------------------------------------------------------------- objectives
class SftObjective(Section):
    """Negative log-likelihood of the chosen answer."""

    kind: Literal["sft"] = "sft"


class DpoObjective(Section):
    """Direct preference optimization against the reference role."""

    kind: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the chosen answer's negative log-likelihood added to the loss."""


class DckdObjective(Section):
    """Dual-constrained distillation: SFT on the chosen answer + alpha * KL(teacher || student) on both answers."""

    kind: Literal["dckd"] = "dckd"
    alpha: float = Field(0.2, ge=0)
    sft_weight: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0)


class AdpaObjective(Section):
    """Advantage-based distillation: SFT on the chosen answer - gamma * E[advantage] on the student's own rollouts."""

    kind: Literal["adpa"] = "adpa"
    gamma: float = Field(1.5, ge=0)
    beta: float = Field(1.0, gt=0)
    sft_weight: float = Field(1.0, ge=0)


Objective = Annotated[SftObjective | DpoObjective | DckdObjective | AdpaObjective, Field(discriminator="kind")]


# --------------------------------------------------------------------------------------------------------- stages
class Optimizer(Section):
    """AdamW with a cosine schedule."""

    lr: float = Field(5e-7, gt=0)
    min_lr: float = Field(0.0, ge=0)
    warmup: float = Field(0.1, ge=0, le=1)
    """Share of the steps that the learning rate rises over."""
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    clip: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0 clips nothing."""


class Stage(Section):
    """What every stage has."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")


class TrainStage(Stage):
    """Trains one role's model by one objective and saves it as `models/<save_as>`."""

    kind: Literal["sft", "dpo", "distill"]
    trains: Literal["student", "teacher"] = "student"
    """Whose layout the trained model has."""
    init: str
    """Where the trained model starts: a Hugging Face directory or `run:NAME`."""
    save_as: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    objective: Objective
    rollouts: str | None = None
    """Name of the `generate` stage whose rollouts the objective takes."""
    optimizer: Optimizer = Optimizer()
    steps: int = Field(ge=1)
    global_batch: int = Field(ge=1)
    """Groups in one optimizer step, over all data-parallel ranks."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints."""
    chunk_tokens: int = Field(256, ge=1)
    """Tokens whose logits exist at one time inside the fused losses."""


class GenerateStage(Stage):
    """Lets a model answer the training prompts; writes `stages/<name>/rollouts.jsonl`."""

    kind: Literal["generate"]
    model: str
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_k: int = Field(0, ge=0)
    """0 keeps all tokens."""
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(128, ge=1)
    slots: int = Field(32, ge=1)
    """Sequences that decode together on one copy of the model."""


class EvalStage(Stage):
    """Measures several models on the held-out rows; writes `summary.json`."""

    kind: Literal["eval"]
    models: dict[str, str]
    """Label -> model. The first is the start that reward accuracy is also measured against."""
    prompts: int = Field(16, ge=1)
    """Held-out prompts that each model answers (greedy) for ROUGE-L, the expected advantage and the samples."""
    max_new_tokens: int = Field(48, ge=1)
    slots: int = Field(32, ge=1)
    chunk_tokens: int = Field(256, ge=1)


class ExportStage(Stage):
    """Writes a trained model as a Hugging Face directory of the wanted dtype, with its tokenizer."""

    kind: Literal["export"]
    model: str
    save_as: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    dtype: Literal["float32", "bfloat16"] = "float32"


class ReportStage(Stage):
    """Writes `report.html`."""

    kind: Literal["report"]


AnyStage = Annotated[
    TrainStage | GenerateStage | EvalStage | ExportStage | ReportStage, Field(discriminator="kind")
]


class Recipe(Section):
    """A whole run: roles, data and the chain of stages."""

    name: str
    output: Path
    """Folder of the run."""
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Annotated[Precision, BeforeValidator(lambda v: {"dtype": v} if isinstance(v, str) else v)] = Precision()
    """Written `precision: bf16` for short."""
    seed: int = Field(1234, ge=0)
    processes: int = Field(1, ge=1)
    """Ranks that `megakd run` starts on this machine when no launcher (torchrun, srun) has started it."""
    student: Role
    teacher: Role
    reference: Role
    data: Data
    stages: tuple[AnyStage, ...] = Field(min_length=1)
    wandb: bool = False
    """Also logs to Weights & Biases (the package wandb must be installed)."""

    def role(self, name: str) -> Role:
        """The role called `student`, `teacher` or `reference`."""
        return {"student": self.student, "teacher": self.teacher, "reference": self.reference}[name]

    def path_of_model(self, model: str) -> Path:
        """Directory of a model written as a path or as `run:NAME`."""
        if model.startswith(MODEL_OF_RUN):
            return self.output / "models" / model.removeprefix(MODEL_OF_RUN)
        return Path(model)


# -------------------------------------------------------------------------------------------------------- loading
def load(path: Path | str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe file and lays dotted overrides (`key.key=value`, value in YAML) over it.

    A stage is addressed by its name: `stages.adpa.steps=20`.

    Raises:
        ConfigError: the file is missing or no YAML mapping, a key is unknown (the nearest known one is named), a
            value has the wrong type or range, or two fields do not fit together.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError("recipe", str(path), "there is no such file", "Give the path of a recipe.yaml")
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("recipe", str(path), f"is not YAML: {' '.join(str(error).split())}", "Mend the file") from error
    if not isinstance(raw, dict):
        raise ConfigError("recipe", str(path), "holds no mapping of keys", "Start from an example's recipe.yaml")
    for override in overrides:
        _apply_override(raw, override)
    return parse(raw)


def parse(raw: dict[str, Any]) -> Recipe:
    """Builds and checks a recipe from plain values. Raises ConfigError for the first thing that is wrong."""
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise _as_config_error(error, raw) from error
    _check_stages(recipe)
    return recipe


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load` of it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError("override", override, "is not of the form key.key=value", "Write e.g. student.parallel.tensor=2")
    node: Any = raw
    *parents, leaf = dotted.split(".")
    for key in parents:
        if isinstance(node, list):
            node = _stage_named(node, key, dotted)
        else:
            if key in node and isinstance(node[key], str) and key == "precision":
                node[key] = {"dtype": node[key]}
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        if not isinstance(node, dict | list):
            raise ConfigError(dotted, text, f"{key!r} is a value, not a section", "Give the name of a setting")
    if isinstance(node, list):
        raise ConfigError(dotted, text, "names a stage, not a setting of it", f"Write {dotted}.<setting>={text}")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(dotted, text, "the value is not YAML", "Quote it") from error


def _stage_named(stages: list[Any], name: str, dotted: str) -> dict[str, Any]:
    found = [stage for stage in stages if isinstance(stage, dict) and stage.get("name") == name]
    if not found:
        names = [stage["name"] for stage in stages if isinstance(stage, dict) and "name" in stage]
        raise ConfigError(dotted, name, f"no stage has this name; there are {', '.join(names)}", "Name one of them")
    return found[0]


def _as_config_error(error: ValidationError, raw: dict[str, Any]) -> ConfigError:
    """The first finding of pydantic as field, value, rule, fix."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    known = _known_keys(first["loc"], raw)
    field = ".".join(parts) or "recipe"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(parts[-1], known, n=1)
        fix = f"Did you mean {near[0]!r}?" if near else f"Known keys here: {', '.join(sorted(known))}"
        return ConfigError(field, first["input"], "there is no such setting", fix)
    if first["type"] == "missing":
        return ConfigError(field, None, "has to be set and is not", f"Add {parts[-1]!r} to the recipe")
    return ConfigError(field, first["input"], first["msg"][0].lower() + first["msg"][1:], "Correct the value")


_UNION_TAGS = {"stages", "objective"}


def _known_keys(location: tuple[int | str, ...], raw: Any) -> list[str]:
    """The settings that the section at `location` (its last part is the key in question) may have."""
    model: type[BaseModel] = Recipe
    sections = {
        "student": Role, "teacher": Role, "reference": Role, "parallel": Parallel, "precision": Precision, "data": Data,
        "optimizer": Optimizer, "sft": TrainStage, "dpo": TrainStage, "distill": TrainStage, "generate": GenerateStage,
        "eval": EvalStage, "export": ExportStage, "report": ReportStage,
    }
    objectives = {"sft": SftObjective, "dpo": DpoObjective, "dckd": DckdObjective, "adpa": AdpaObjective}
    inside_objective = False
    for part in location[:-1]:
        if part == "objective":
            inside_objective = True
        elif inside_objective and part in objectives:
            model = objectives[part]
        elif part in sections:
            model = sections[part]
    return list(model.model_fields)


# ----------------------------------------------------------------------------------------------------- cross-field
def check_world(recipe: Recipe, world: int) -> None:
    """Checks every role's layout against the number of ranks. Raises ConfigError naming the role's field."""
    for name in ("student", "teacher", "reference"):
        role = recipe.role(name)
        parallel = role.parallel
        ranks = parallel.tensor * parallel.pipeline * parallel.context
        if world % ranks != 0:
            raise ConfigError(
                f"{name}.parallel", f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}",
                f"{ranks} ranks for one copy do not divide the world of {world} ranks",
                f"Start a multiple of {ranks} ranks or choose sizes whose product divides {world}",
            )
        data = Layout(world, parallel.tensor, parallel.pipeline, parallel.context).data
        for stage in recipe.stages:
            if isinstance(stage, TrainStage) and stage.global_batch % (data * role.micro_batch) != 0:
                raise ConfigError(
                    f"stages.{stage.name}.global_batch", stage.global_batch,
                    f"has to be a multiple of the data-parallel size {data} x {name}.micro_batch {role.micro_batch}",
                    f"Use {_next_multiple(stage.global_batch, data * role.micro_batch)}, or another {name}.micro_batch",
                )
            if isinstance(stage, TrainStage) and parallel.virtual_pipeline > 1:
                micro_batches = stage.global_batch // (data * role.micro_batch)
                if micro_batches % parallel.pipeline != 0:
                    raise ConfigError(
                        f"stages.{stage.name}.global_batch", stage.global_batch,
                        f"gives {name} {micro_batches} micro-batches; the interleaved schedule needs a multiple of its "
                        f"pipeline size {parallel.pipeline}", f"Choose another {name}.micro_batch",
                    )


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of


def _check_stages(recipe: Recipe) -> None:
    """Checks that hold without knowing the world: names, the order of stages, precision and device."""
    names: set[str] = set()
    saved: set[str] = set()
    generated: set[str] = set()
    for stage in recipe.stages:
        if stage.name in names:
            raise ConfigError(f"stages.{stage.name}.name", stage.name, "two stages have this name", "Rename one")
        names.add(stage.name)
        for field, model in _models_of(stage):
            name = model.removeprefix(MODEL_OF_RUN)
            if model.startswith(MODEL_OF_RUN) and name not in saved:
                raise ConfigError(
                    f"stages.{stage.name}.{field}", model, f"no earlier stage saves a model as {name!r}",
                    f"Earlier stages save: {', '.join(sorted(saved)) or 'none'}",
                )
        if isinstance(stage, TrainStage | ExportStage):
            if stage.save_as in saved:
                raise ConfigError(f"stages.{stage.name}.save_as", stage.save_as, "an earlier stage saves it", "Rename it")
            saved.add(stage.save_as)
        if isinstance(stage, GenerateStage):
            generated.add(stage.name)
        if isinstance(stage, TrainStage):
            _check_train_stage(stage, generated)
    _check_precision(recipe)


def _models_of(stage: AnyStage) -> list[tuple[str, str]]:
    match stage:
        case TrainStage():
            return [("init", stage.init)]
        case GenerateStage() | ExportStage():
            return [("model", stage.model)]
        case EvalStage():
            return [(f"models.{label}", model) for label, model in stage.models.items()]
        case _:
            return []


def _check_train_stage(stage: TrainStage, generated: set[str]) -> None:
    needed = {"sft": ("sft",), "dpo": ("dpo",), "distill": ("dckd", "adpa")}[stage.kind]
    if stage.objective.kind not in needed:
        raise ConfigError(
            f"stages.{stage.name}.objective.kind", stage.objective.kind,
            f"a stage of kind {stage.kind!r} takes {' or '.join(needed)}", "Change the stage's kind or its objective",
        )
    wants_rollouts = stage.objective.kind == "adpa"
    if wants_rollouts and stage.rollouts not in generated:
        raise ConfigError(
            f"stages.{stage.name}.rollouts", stage.rollouts, "has to name an earlier stage of kind 'generate'",
            f"There are: {', '.join(sorted(generated)) or 'none'}",
        )
    if stage.rollouts is not None and not wants_rollouts:
        raise ConfigError(f"stages.{stage.name}.rollouts", stage.rollouts, f"the objective {stage.objective.kind!r} "
                          "takes no rollouts", "Leave it out")
    if stage.trains == "teacher" and stage.objective.kind in ("dckd", "adpa"):
        raise ConfigError(f"stages.{stage.name}.trains", "teacher", "a teacher cannot be distilled from itself",
                          "Write trains: student")


def _check_precision(recipe: Recipe) -> None:
    if recipe.precision.dtype == "fp8" and recipe.device != "cuda":
        raise ConfigError(
            "precision.dtype", "fp8", "FP8 layers need Transformer Engine and a CUDA device (device is "
            f"{recipe.device!r})", "Write precision: bf16 or fp32, or device: cuda on a machine that has both",
        )
    for name in ("student", "teacher", "reference"):
        parallel = recipe.role(name).parallel
        if parallel.context > 1:
            raise ConfigError(f"{name}.parallel.context", parallel.context, "context parallelism is not available yet",
                              "Write 1")
        if parallel.sequence and parallel.tensor == 1:
            raise ConfigError(f"{name}.parallel.sequence", True, "sequence parallelism needs tensor > 1",
                              f"Raise {name}.parallel.tensor or leave it out")
        if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
            raise ConfigError(f"{name}.parallel.virtual_pipeline", parallel.virtual_pipeline,
                              "interleaving needs pipeline > 1", f"Raise {name}.parallel.pipeline or leave it out")
