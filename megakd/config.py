"""A recipe: what a run does, checked before anything starts. Imports no torch.

This file and config_objectives.py are the only places with defaults.

Precedence: the defaults here < the recipe file < dotted overrides on the command line (`student.parallel.tensor=2`).
Every error is a `ConfigError` with the field's dotted name.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from megakd.config_base import Section
from megakd.config_errors import as_config_error
from megakd.config_objectives import Objective
from megakd.errors import ConfigError
from megakd.layout import Layout

MODEL_OF_RUN = "run:"
"""A model written `run:NAME` is the one that an earlier stage of the same run saved as NAME."""


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
    """Name of the `generate` stage with the student's own answers, where the objective takes them."""
    teacher_answers: str | None = None
    """Name of the `generate` stage with the teacher's answers, where the objective takes them."""
    scores: str | None = None
    """Name of the `score` stage with the teacher's scores of the rollouts, where the objective takes them."""
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
    role: Literal["student", "teacher"] = "student"
    """Whose layout the model has."""
    model: str
    n: int = Field(1, ge=1)
    """Answers drawn for each prompt."""
    keep: int | None = Field(None, ge=2)
    """How many of them are kept: those that differ most from each other (max-min edit distance of the texts). All when
    left out. A prompt without so many different answers is left out, and counted."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_k: int = Field(0, ge=0)
    """0 keeps all tokens."""
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(128, ge=1)
    slots: int = Field(32, ge=1)
    """Sequences that decode together on one copy of the model."""

    @property
    def answers(self) -> int:
        """Answers to each prompt that it writes."""
        return self.keep or self.n


class ScoreStage(Stage):
    """Lets the teacher score the answers of a `generate` stage; writes `stages/<name>/scores.jsonl` (PAD).

    score = likelihood_weight * mean log-likelihood a token + (1 - likelihood_weight) * log of the probability that the
    teacher selects the answer when it is asked to choose between two.
    """

    kind: Literal["score"]
    model: str
    """The teacher. Its tokenizer and chat template may be others than the student's: it reads the texts."""
    rollouts: str
    """Name of the `generate` stage."""
    likelihood_weight: float = Field(0.0, ge=0, le=1)
    """0 is the selection alone, as in PAD's released configuration; 1 the likelihood alone."""
    both_orders: bool = True
    """Asks for each pair of answers in both orders and takes the mean; False: in one order, as the released code."""
    max_length: int = Field(2048, ge=16)
    """Longest sequence of the teacher in tokens; a question that is longer has its answers cut to fit."""
    chunk_tokens: int = Field(256, ge=1)


class EvalStage(Stage):
    """Measures several models on the held-out rows; writes `summary.json`."""

    kind: Literal["eval"]
    models: dict[str, str] = Field(min_length=1)
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
    TrainStage | GenerateStage | ScoreStage | EvalStage | ExportStage | ReportStage, Field(discriminator="kind")
]


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
        raise as_config_error(error, Recipe, raw) from error
    _check_stages(recipe)
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


# ----------------------------------------------------------------------------------------------------- cross-field
def check_world(recipe: Recipe, world: int) -> None:
    """Checks every role's layout against the number of ranks. Raises ConfigError naming the role's field."""
    for name in ("student", "teacher", "reference"):
        parallel = recipe.role(name).parallel
        ranks = parallel.tensor * parallel.pipeline * parallel.context
        if world % ranks != 0:
            raise ConfigError(
                f"{name}.parallel",
                f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}",
                f"{ranks} ranks for one copy do not divide the world of {world} ranks",
                f"Start a multiple of {ranks} ranks (`processes`), or choose sizes whose product divides {world}",
            )
    for stage in recipe.stages:
        if isinstance(stage, TrainStage):
            _check_global_batch(recipe, stage, world)


def _check_global_batch(recipe: Recipe, stage: TrainStage, world: int) -> None:
    """A step has to fill whole micro-batches of every role that takes part, on each of its replicas."""
    multiples: dict[str, int] = {}
    rules: dict[str, str] = {}
    for name in (stage.trains, *stage.objective.roles):
        role = recipe.role(name)
        data = Layout(world, role.parallel.tensor, role.parallel.pipeline, role.parallel.context).data
        multiples[name] = data * role.micro_batch
        rules[name] = f"{name}'s data-parallel size {data} x {name}.micro_batch {role.micro_batch}"
        if role.parallel.virtual_pipeline > 1:
            multiples[name] *= role.parallel.pipeline
            rules[name] += f" x its pipeline size {role.parallel.pipeline} (the interleaved schedule)"
    fitting = math.lcm(*multiples.values())
    for name, multiple in multiples.items():
        if stage.global_batch % multiple != 0:
            raise ConfigError(
                f"stages.{stage.name}.global_batch", stage.global_batch, f"has to be a multiple of {rules[name]}",
                f"Use {-(-stage.global_batch // fitting) * fitting}, or another {name}.micro_batch",
            )


def _check_stages(recipe: Recipe) -> None:
    """Checks that hold without knowing the world: names, the order of stages, precision and device."""
    names: set[str] = set()
    saved: set[str] = set()
    earlier: dict[str, AnyStage] = {}
    for stage in recipe.stages:
        if stage.name in names:
            raise ConfigError(f"stages.{stage.name}.name", stage.name, "two stages have this name", "Rename one")
        names.add(stage.name)
        for field, model in _models_of(recipe, stage):
            _check_is_made(recipe, stage, field, model, saved)
        if isinstance(stage, TrainStage | ExportStage):
            _check_save_as(recipe, stage, saved)
            saved.add(stage.save_as)
        if isinstance(stage, GenerateStage):
            _check_generate_stage(stage)
        if isinstance(stage, ScoreStage):
            _check_names_stage(f"stages.{stage.name}.rollouts", stage.rollouts, "generate", earlier)
        if isinstance(stage, TrainStage):
            _check_train_stage(stage, earlier)
        earlier[stage.name] = stage
    for role in ("student", "teacher", "reference"):
        model = recipe.role(role).model
        if model.startswith(MODEL_OF_RUN) and model.removeprefix(MODEL_OF_RUN) not in saved:
            raise ConfigError(f"{role}.model", model, "no stage saves a model under this name",
                              f"Stages save: {', '.join(sorted(saved)) or 'none'}")
    _check_precision(recipe)


def _models_of(recipe: Recipe, stage: AnyStage) -> list[tuple[str, str]]:
    """The models that a stage reads: (field that names it, model)."""
    field = f"stages.{stage.name}"
    match stage:
        case TrainStage():
            return [(f"{field}.init", stage.init), *((f"{role}.model", recipe.role(role).model)
                                                     for role in stage.objective.roles)]
        case GenerateStage() | ScoreStage() | ExportStage():
            return [(f"{field}.model", stage.model)]
        case EvalStage():
            return [*((f"{field}.models.{label}", model) for label, model in stage.models.items()),
                    ("teacher.model", recipe.teacher.model), ("reference.model", recipe.reference.model)]
        case _:
            return []


def _check_is_made(recipe: Recipe, stage: AnyStage, field: str, model: str, saved: set[str]) -> None:
    """A model of the run exists only after the stage that saves it."""
    name = model.removeprefix(MODEL_OF_RUN)
    if not model.startswith(MODEL_OF_RUN) or name in saved:
        return
    fix = f"Earlier stages save: {', '.join(sorted(saved)) or 'none'}"
    for maker in recipe.stages:
        if isinstance(maker, TrainStage | ExportStage) and maker.save_as == name and maker.name != stage.name:
            fix = f"Move {maker.name!r}, which saves it, before {stage.name!r}"
    rule = f"the stage {stage.name!r} reads it, and no earlier stage saves a model as {name!r}"
    raise ConfigError(field, model, rule, fix)


def _check_save_as(recipe: Recipe, stage: TrainStage | ExportStage, saved: set[str]) -> None:
    """A stage replaces its model's directory when it is made again, so nothing that was given may lie there."""
    field = f"stages.{stage.name}.save_as"
    if stage.save_as in saved:
        raise ConfigError(field, stage.save_as, "an earlier stage saves a model by this name", "Choose another name")
    target = recipe.path_of_model(MODEL_OF_RUN + stage.save_as).resolve()
    read = [recipe.role(role).model for role in ("student", "teacher", "reference")]
    read += [model for other in recipe.stages for _, model in _models_of(recipe, other)]
    for model in read:
        if not model.startswith(MODEL_OF_RUN) and Path(model).resolve().is_relative_to(target):
            fix = f"Choose another name, or write {MODEL_OF_RUN}{stage.save_as} there if this stage's model is meant"
            raise ConfigError(field, stage.save_as, f"it would overwrite {model}, which the run reads", fix)


OBJECTIVES_OF = {"sft": ("sft",), "dpo": ("dpo", "ipo", "cpo", "simpo")}
"""What a training stage of a kind may have as its objective; one of kind `distill` any."""
MAKERS = {"rollouts": "generate", "teacher_answers": "generate", "scores": "score"}
"""Settings of a training stage that name an earlier stage, and that one's kind."""


def _check_train_stage(stage: TrainStage, earlier: dict[str, AnyStage]) -> None:
    field, kind = f"stages.{stage.name}", stage.objective.kind
    if stage.kind in OBJECTIVES_OF and kind not in OBJECTIVES_OF[stage.kind]:
        rule = f"a stage of kind {stage.kind!r} takes {', '.join(OBJECTIVES_OF[stage.kind])}"
        raise ConfigError(f"{field}.objective.kind", kind, rule, "Change the stage's kind or its objective")
    for name, maker in MAKERS.items():
        value = getattr(stage, name)
        if name in stage.objective.inputs:
            _check_names_stage(f"{field}.{name}", value, maker, earlier)
        elif value is not None:
            raise ConfigError(f"{field}.{name}", value, f"the objective {kind!r} takes no {name}, as it is set",
                              "Leave it out")
    if stage.scores is not None and earlier[stage.scores].rollouts != stage.rollouts:
        rule = f"it scores the rollouts of {earlier[stage.scores].rollouts!r}, this stage trains on {stage.rollouts!r}"
        raise ConfigError(f"{field}.scores", stage.scores, rule, "Name the same rollouts in both")
    makers = {name: earlier[getattr(stage, name)] for name in stage.objective.inputs}
    if kind == "pad" and makers["rollouts"].answers < 2:
        raise ConfigError(f"stages.{stage.rollouts}.n", makers["rollouts"].answers,
                          "preferences over a prompt's answers need at least 2", "Write n: 4, temperature: 1.0")
    if kind == "pad" and stage.objective.loss == "probabilistic" and makers["rollouts"].answers > 6:
        raise ConfigError(f"stages.{stage.rollouts}.n", makers["rollouts"].answers, "the probabilistic loss counts all "
                          "rankings: at most 6 answers", "Keep fewer, or write loss: vanilla")
    if kind == "dpkd" and makers["rollouts"].answers != makers["teacher_answers"].answers:
        raise ConfigError(f"stages.{stage.rollouts}.n", makers["rollouts"].answers, "each of the student's answers is "
                          f"paired with one of the teacher's, of which there are {makers['teacher_answers'].answers}",
                          "Give both stages the same n and keep")
    if stage.optimizer.min_lr > stage.optimizer.lr:
        raise ConfigError(f"{field}.optimizer.min_lr", stage.optimizer.min_lr,
                          f"has to be at most lr, {stage.optimizer.lr}", "Lower it or raise lr")
    if stage.trains == "teacher" and "teacher" in stage.objective.roles:
        raise ConfigError(f"{field}.trains", "teacher", "a teacher cannot be distilled from itself",
                          "Write trains: student")


def _check_names_stage(field: str, value: str | None, kind: str, earlier: dict[str, AnyStage]) -> None:
    if value not in earlier or earlier[value].kind != kind:
        known = sorted(name for name, stage in earlier.items() if stage.kind == kind)
        raise ConfigError(field, value, f"has to name an earlier stage of kind {kind!r}",
                          f"There are: {', '.join(known) or 'none'}")


def _check_generate_stage(stage: GenerateStage) -> None:
    field = f"stages.{stage.name}"
    if stage.n > 1 and stage.temperature == 0:
        raise ConfigError(f"{field}.n", stage.n, "greedy decoding (temperature 0) gives n equal answers",
                          "Write n: 1, or a temperature above 0")
    if stage.keep is not None and stage.keep > stage.n:
        raise ConfigError(f"{field}.keep", stage.keep, f"only {stage.n} are drawn", "Raise n or lower keep")


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
