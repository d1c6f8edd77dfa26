"""A recipe: what a run does, checked before anything starts. Imports no torch.

The files config*.py are the only places with defaults.

Precedence: the defaults here < the recipe file < dotted overrides on the command line (`student.parallel.tensor=2`).
Every error is a `ConfigError` with the field's dotted name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from megakd.config_base import MODEL_OF_RUN, Section
from megakd.config_checks import check_stages
from megakd.config_errors import as_config_error
from megakd.config_stages import AnyStage, TrainStage
from megakd.errors import ConfigError


# ---------------------------------------------------------------------------------------------------------- roles
class Parallel(Section):
    """How one role's model is cut. Data parallelism is what is left of the world."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel size."""
    pipeline: int = Field(1, ge=1)
    """Pipeline-parallel size. The layers need not divide by it (`chunk_layers`)."""
    virtual_pipeline: int = Field(1, ge=1)
    """Model chunks a pipeline rank holds (interleaved schedule); 1 is the plain 1F1B schedule."""
    context: int = Field(1, ge=1)
    """Context-parallel size: ranks that share the tokens of each sequence where the role is trained. Elsewhere they are
    replicas: without a backward pass nothing is kept that a long sequence would have too much of."""
    sequence: bool = False
    """Sequence parallelism: activations between the tensor-parallel regions are cut along the sequence."""
    pad_heads: bool = False
    """Adds inert zero heads where the number of key/value heads does not divide by `tensor`."""

    @property
    def ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def forward(self) -> Parallel:
        """How the model is cut where it is not trained."""
        return self.model_copy(update={"context": 1})


class Role(Section):
    """A model that takes part in the run."""

    model: str
    """Hugging Face directory, or `run:NAME`."""
    parallel: Parallel = Parallel()
    micro_batch: int = Field(4, ge=1)
    """Groups (prompts with their answers) in one micro-batch of this role."""
    recompute: Literal["none", "mlp", "full"] = "none"
    """What the backward pass of a training makes again instead of keeping it: nothing, the inside of every MLP, or
    whole layers (only each layer's input is kept). Changes time and memory, not results."""
    cuda_graphs: bool = False
    """Records the forward pass of this role's models where they only run forward, once for each size of a packed row,
    and replays it: for models whose kernels a GPU finishes faster than they are launched. What it takes:
    docs/cluster.md. A stage that trains a model in this role's layout runs it without."""
    graph_tokens: int = Field(256, ge=1)
    """With `cuda_graphs`, what rows are filled up to a multiple of; beyond 16 multiples to fewer sizes, an eighth apart
    at most. Smaller: less filling, more recordings."""
    decode_graphs: bool = False
    """Records the forward passes of this role's models that decode answers, one token of each row, once for each number
    of rows and positions (docs/cluster.md), and replays them."""

    def cut(self, *, trained: bool) -> Parallel:
        """How its model is cut where it is trained, or where it only runs forward."""
        return self.parallel if trained else self.parallel.forward


class Precision(Section):
    """Arithmetic of the model's layers; losses and optimizer states are float32. What the settings mean and what they
    need: docs/precision.md."""

    dtype: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Of activations and parameters; with fp8 they are bf16, and the layers' products take FP8 operands."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 operands are scaled. `delayed` is for the model that trains: its history comes from training steps, so
    models that only run forward are scaled tensorwise."""
    amax_history: int = Field(1024, ge=1)
    """Micro-batches whose largest number scales an operand (`delayed`)."""
    emulate: bool = False
    """FP8 arithmetic by rounding the operands, with the local layers on any device: to study recipes, not for speed."""
    first_last_bf16: int = Field(0, ge=0)
    """Layers at each end of the model that stay in bf16."""
    fp8_weights: Literal["none", "teachers", "all"] = "none"
    """Whose layers' weights are held in FP8 alone: no model's; those of models that only run forward; the trained
    model's too, whose masters stay in float32."""

    def holds_fp8_weights(self, *, trained: bool) -> bool:
        """Whether a model that is trained, or one that only runs forward, has its layers' weights in FP8."""
        return self.fp8_weights == "all" or self.fp8_weights == "teachers" and not trained

    def scaling_of(self, *, trained: bool) -> str:
        """The `fp8_recipe` of a model that is trained, or of one that only runs forward."""
        return self.fp8_recipe if trained or self.fp8_recipe != "delayed" else "tensorwise"


# ----------------------------------------------------------------------------------------------------------- data
class Data(Section):
    """Rows with a prompt and what belongs to it: JSONL (also .gz), JSON or Parquet files, or folders of them."""

    train: tuple[Path, ...] = ()
    """Training files."""
    eval: tuple[Path, ...] = ()
    """Held-out files."""
    text: tuple[Path, ...] = ()
    """Pre-training text, rows with a field `text`, for objectives with `lm_on: text`."""
    train_rows: int | None = Field(None, ge=1)
    """How many training rows to use, drawn once by the seed; all when left out."""
    eval_rows: int | None = Field(None, ge=1)
    """How many held-out rows to use, drawn once by the seed; all when left out."""
    answer: Literal["chosen", "reference"] = "chosen"
    """Field of the rows that is the answer to learn and to compare with; instruction data have it as `reference`."""
    chat_template: Path | None = None
    """File of a chat template in place of the models' own (base models and SentencePiece models have none)."""
    max_length: int = Field(512, ge=2)
    """Longest sequence in tokens, prompt and answer together."""
    too_long: Literal["error", "drop"] = "error"
    """What happens to a longer one: the run is refused, or it is dropped and counted."""


# ---------------------------------------------------------------------------------------------------------- recipe
class Recipe(Section):
    """A whole run: roles, data and the chain of stages."""

    name: str = Field(min_length=1)
    output: Path
    """Folder of the run."""
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Annotated[Precision, BeforeValidator(lambda v: {"dtype": v} if isinstance(v, str) else v)] = Precision()
    """Written `precision: bf16` for short."""
    seed: int = Field(1234, ge=0, lt=2**32)
    processes: int = Field(1, ge=1)
    """Ranks that `megakd run` starts on this machine when no launcher (torchrun, srun) has started it."""
    timeout_minutes: float = Field(30.0, gt=0)
    """How long a rank waits for the others in a collective before the run fails. Longer than anything that some ranks
    do alone: reading a large model from a slow file system, writing one, judging answers."""
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

    def teacher_model(self, stage: TrainStage, role: str) -> str:
        """The model that takes part in a training stage as `role`, teacher or reference."""
        return stage.reference if role == "reference" and stage.reference is not None else self.role(role).model

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
        raw = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("recipe", str(path), f"cannot be read: {_yaml_problem(error)}", "Mend the file") from error
    if not isinstance(raw, dict):
        raise ConfigError("recipe", str(path), "holds no mapping of keys", "Start from an example's recipe.yaml")
    for override in overrides:
        _apply_override(raw, override)
    return parse(raw)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that comes twice in one mapping: YAML's own reader silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value!r} comes twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _yaml_problem(error: Exception) -> str:
    """What is wrong with a YAML text, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def parse(raw: dict[str, Any]) -> Recipe:
    """Builds and checks a recipe from plain values. Raises ConfigError for the first thing that is wrong."""
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise as_config_error(error, Recipe, raw, "the recipe") from error
    check_stages(recipe)
    return recipe


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load` of it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError("override", override, "is not of the form key.key=value",
                          "Write e.g. student.parallel.tensor=2")
    node: Any = raw
    *parents, leaf = dotted.split(".")
    for key in parents:
        if isinstance(node, list):
            node = _stage_named(node, key, dotted)
        else:
            if key in node and isinstance(node[key], str) and key == "precision":
                node[key] = {"dtype": node[key]}
            if key not in node or node[key] is None:
                node[key] = {}
            node = node[key]
        if not isinstance(node, dict | list):
            raise ConfigError(dotted, text, f"{key!r} is a value, not a section", "Give the name of a setting")
        if isinstance(node, list) and key != "stages":
            raise ConfigError(dotted, text, "one item of a list cannot be set", f"Write the whole list: {key}=[...]")
    if isinstance(node, list):
        raise ConfigError(dotted, text, "names a stage, not a setting of it", f"Write {dotted}.<setting>={text}")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(dotted, text, "the value is not YAML", "Quote it") from error


def _stage_named(stages: list[Any], name: str, dotted: str) -> dict[str, Any]:
    named = {str(stage["name"]): stage for stage in stages if isinstance(stage, dict) and "name" in stage}
    if name not in named:
        raise ConfigError(dotted, name, "no stage has this name", f"There are: {', '.join(named) or 'none'}")
    return named[name]
