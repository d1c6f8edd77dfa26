"""Several methods from one start, with equal student tokens, over several seeds: the runs that this takes, and what
they came to. Imports no torch.

Every run is an ordinary recipe in a folder of its own; whether it is done, its stages' manifests say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from megakd.config import Recipe, load
from megakd.config_base import Section
from megakd.config_errors import as_config_error
from megakd.config_stages import EvalStage, ReportStage, TrainStage
from megakd.errors import ConfigError, DataError
from megakd.evaluation.summary import SUMMARY
from megakd.manifest import Manifest
from megakd.report import METRIC_TEXTS

SECONDS, TOKENS = "seconds", "student_tokens"
"""Figures of a run that its manifests say: the time of all its stages before the evaluation, and the tokens that the
student has been trained on."""
START = "start"
"""The row of what all methods began with."""
CONFIDENCE = 0.95


# ----------------------------------------------------------------------------------------------------------- settings
class Method(Section):
    """One method of a comparison."""

    recipe: Path | None = None
    """Its recipe; `examples/<name>/recipe.yaml` when left out."""
    lr: float | None = Field(None, gt=0)
    """Learning rate of every stage that trains the student; the recipe's own when left out."""
    overrides: tuple[str, ...] = ()
    """Settings laid over its recipe, as on the command line."""


def _methods(value: Any) -> Any:
    """A list of names, or a mapping from names to settings, which may be empty."""
    if isinstance(value, list):
        return {name: {} for name in value}
    return {name: given or {} for name, given in value.items()} if isinstance(value, dict) else value


class Comparison(Section):
    """The settings of a comparison."""

    output: Path
    """Folder of all its runs: `<output>/<method>/seed-<seed>`."""
    methods: Annotated[dict[str, Method], BeforeValidator(_methods)] = Field(min_length=1)
    """Name -> settings; a list of names where none are needed."""
    seeds: tuple[int, ...] = Field(min_length=1)
    tokens: int = Field(ge=1)
    """Tokens that each run's student is trained on, over all its training stages, which get equal parts."""
    start: str
    """The student's start: takes the place of the recipes' `student.model`, wherever a stage names that."""
    teacher: str
    """Likewise."""
    reference: str
    """Likewise."""
    train: tuple[Path, ...] = Field(min_length=1)
    """Training files."""
    eval: tuple[Path, ...] = Field(min_length=1)
    """Held-out files."""
    overrides: tuple[str, ...] = ()
    """Settings laid over every recipe: layouts, data.max_length, stages.eval.prompts ..."""


def load_comparison(path: Path | str) -> Comparison:
    """Reads a comparison's settings. Raises ConfigError."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError("settings", str(path), "there is no such file", "Give the path of a settings.yaml")
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("settings", str(path), f"cannot be read: {' '.join(str(error).split())}", "Mend the file") \
            from error
    if not isinstance(raw, dict):
        raise ConfigError("settings", str(path), "holds no mapping of keys",
                          "Start from examples/compare/settings.yaml")
    try:
        comparison = Comparison.model_validate(raw)
    except ValidationError as error:
        raise as_config_error(error, Comparison, raw, "the file") from error
    if len(set(comparison.seeds)) < len(comparison.seeds):
        raise ConfigError("seeds", list(comparison.seeds), "a seed comes twice", "Give each once")
    for name in comparison.methods:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == START:
            raise ConfigError("methods", name, f"it becomes a folder and a row of the table, where {START!r} is taken",
                              "Use letters, digits, _ and -, and another name")
    return comparison


# --------------------------------------------------------------------------------------------------------------- runs
@dataclass(frozen=True)
class ComparedRun:
    """One method with one seed."""

    method: str
    seed: int
    recipe: Recipe

    @property
    def file(self) -> Path:
        """Where its recipe is written for `megakd run`."""
        return self.recipe.output.with_suffix(".yaml")

    @property
    def log(self) -> Path:
        """Where its output is written."""
        return self.recipe.output.with_suffix(".log")

    def unfinished(self) -> list[str]:
        """Its stages that have not finished, the report aside; empty when the run is done.

        Raises:
            ConfigError: it was made with other settings.
        """
        left = [stage.name for stage in self.recipe.stages
                if not isinstance(stage, ReportStage) and Manifest.read(self._folder(stage.name)) is None]
        # A run that has begun refuses other settings by itself, field by field; a finished one is not started again.
        if not left and load(self.recipe.output / "recipe.yaml") != self.recipe:
            raise ConfigError("output", str(self.recipe.output), "holds a finished run with other settings",
                              "Name another output, or remove that folder")
        return left

    def figures(self) -> tuple[dict[str, float], dict[str, float]]:
        """The numbers of a finished run, those of its last model and those of the first that it evaluated.

        Raises:
            DataError: its summary cannot be read.
        """
        summary = _read_summary(self.recipe.output / SUMMARY)
        evaluations = [stage for stage in self.recipe.stages if isinstance(stage, EvalStage)]
        labels = list(evaluations[-1].models)
        stages = [stage for stage in self.recipe.stages if not isinstance(stage, EvalStage | ReportStage)]
        manifests = [Manifest.read(self._folder(stage.name)) for stage in stages]
        trained = sum(manifest.tokens for stage, manifest in zip(stages, manifests, strict=True)
                      if isinstance(stage, TrainStage) and stage.trains == "student")
        cost = {SECONDS: sum(manifest.seconds for manifest in manifests), TOKENS: float(trained)}
        return _numbers(summary[labels[-1]]) | cost, _numbers(summary[labels[0]])

    def _folder(self, stage: str) -> Path:
        return self.recipe.output / "stages" / stage


def compared_runs(comparison: Comparison, examples: Path, only: Sequence[str] = ()) -> list[ComparedRun]:
    """The runs of a comparison, seed by seed, so that a first seed of all methods is there early.

    Args:
        comparison: its settings.
        examples: folder with the methods' recipes.
        only: methods to run; all when empty.

    Raises:
        ConfigError: a method is not known, or its recipe cannot be used.
    """
    for name in only:
        if name not in comparison.methods:
            raise ConfigError("--only", name, "the comparison has no such method",
                              f"There are: {', '.join(comparison.methods)}")
    chosen = {name: method for name, method in comparison.methods.items() if not only or name in only}
    return [ComparedRun(name, seed, _recipe(comparison, name, method, seed, examples))
            for seed in comparison.seeds for name, method in chosen.items()]


def _recipe(comparison: Comparison, name: str, method: Method, seed: int, examples: Path) -> Recipe:
    """The method's recipe with the comparison's models, data, seed and share of tokens."""
    file = method.recipe if method.recipe is not None else examples / name / "recipe.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.parent.name for path in examples.glob("*/recipe.yaml")))
        raise ConfigError(f"methods.{name}.recipe", str(file), "there is no such file",
                          f"Give a recipe's path, or one of the examples' names: {known}")
    own = load(file)
    if not any(isinstance(stage, EvalStage) for stage in own.stages):
        raise ConfigError(f"methods.{name}.recipe", str(file), "has no stage of kind 'eval': nothing to compare",
                          "Add one")
    trained = [stage for stage in own.stages if isinstance(stage, TrainStage) and stage.trains == "student"]
    if not trained:
        raise ConfigError(f"methods.{name}.recipe", str(file), "has no stage that trains the student", "Add one")
    settings: dict[str, Any] = {
        "name": f"{name}-seed-{seed}", "output": str(comparison.output / name / f"seed-{seed}"), "seed": seed,
        "data.train": [str(path) for path in comparison.train], "data.eval": [str(path) for path in comparison.eval],
    }
    given = {"student": comparison.start, "teacher": comparison.teacher, "reference": comparison.reference}
    places = {own.role(role).model: model for role, model in given.items()}
    settings |= {f"{role}.model": model for role, model in given.items()}
    for stage in own.stages:
        for field, value in stage.model_dump(mode="json").items():
            new = {label: places.get(model, model) for label, model in value.items()} if field == "models" else \
                places.get(value, value) if isinstance(value, str) else value
            if new != value:
                settings[f"stages.{stage.name}.{field}"] = new
    for number, stage in enumerate(trained):
        share = comparison.tokens * (number + 1) // len(trained) - comparison.tokens * number // len(trained)
        settings |= {f"stages.{stage.name}.steps": None, f"stages.{stage.name}.tokens": share}
        if method.lr is not None:
            settings[f"stages.{stage.name}.optimizer.lr"] = method.lr
    overrides = [f"{field}={json.dumps(value)}" for field, value in settings.items()]
    return load(file, (*overrides, *comparison.overrides, *method.overrides))


def _read_summary(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(path, None, None, f"cannot be read ({error})", "Make the eval stage again") from error


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a summary. The standard errors over held-out rows are not an interval over seeds."""
    return {name: float(value) for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            and not name.endswith("_error")}


# ---------------------------------------------------------------------------------------------------------- statistics
@dataclass(frozen=True)
class Figure:
    """A number over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return math.fsum(self.values) / len(self.values)

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % interval of the mean by Student's t; None for one seed, which has no interval."""
        count = len(self.values)
        if count < 2:
            return None
        variance = math.fsum((value - self.mean) ** 2 for value in self.values) / (count - 1)
        return t_quantile(0.5 + CONFIDENCE / 2, count - 1) * math.sqrt(variance / count)


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution for a probability in [0.5, 1).

    With t = sqrt(f) tan(angle) the density is proportional to cos(angle)^(f - 1), which Simpson's rule sums.
    """
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    intervals = 400

    def below(angle: float) -> float:
        heights = [math.cos(angle * number / intervals) ** (freedom - 1) for number in range(intervals + 1)]
        inner = 4 * math.fsum(heights[1:-1:2]) + 2 * math.fsum(heights[2:-1:2])
        return 0.5 + scale * (heights[0] + inner + heights[-1]) * angle / intervals / 3

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < probability else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


# ------------------------------------------------------------------------------------------------------------- results
@dataclass(frozen=True)
class Results:
    """What the finished runs of a comparison came to."""

    figures: dict[str, dict[str, Figure]]
    """Method -> number -> its values over the finished seeds. The first is `start`, what all began with."""
    seeds: dict[str, tuple[int, ...]]
    """Method -> its finished seeds."""
    missing: tuple[str, ...]
    """What is not there: a line for each unfinished run."""

    @property
    def names(self) -> list[str]:
        """The numbers to show: those of the report in its order but for details, any other, and the costs."""
        given = dict.fromkeys(name for numbers in self.figures.values() for name in numbers)
        known = [name for name, text in METRIC_TEXTS.items() if name in given and not text.detail]
        costs = [name for name in (SECONDS, TOKENS) if name in given]
        return [*known, *(name for name in given if name not in METRIC_TEXTS and name not in costs), *costs]


def collect(runs: Sequence[ComparedRun]) -> Results:
    """Reads what the finished runs have left.

    Raises:
        ConfigError, DataError: a run was made with other settings, or one of its files cannot be read.
    """
    values: dict[str, dict[str, list[float]]] = {START: {}}
    seeds: dict[str, list[int]] = {START: []}
    missing: list[str] = []
    for run in runs:
        left = run.unfinished()
        if left:
            missing.append(f"{run.method}, seed {run.seed}: {', '.join(left)}")
            continue
        final, start = run.figures()
        seeds.setdefault(run.method, []).append(run.seed)
        if run.seed not in seeds[START]:  # all methods of a seed have the same
            seeds[START].append(run.seed)
            _append(values[START], start)
        _append(values.setdefault(run.method, {}), final)
    figures = {method: {name: Figure(tuple(numbers)) for name, numbers in each.items()}
               for method, each in values.items() if each}
    return Results(figures, {method: tuple(found) for method, found in seeds.items() if found}, tuple(missing))


def _append(values: dict[str, list[float]], new: Mapping[str, float]) -> None:
    for name, value in new.items():
        values.setdefault(name, []).append(value)


def label_of(name: str) -> str:
    """How a number is called in table and figure."""
    labels = {SECONDS: "Seconds before the evaluation", TOKENS: "Student tokens"}
    return METRIC_TEXTS[name].label if name in METRIC_TEXTS else labels.get(name, name.replace("_", " "))


def as_json(results: Results) -> dict[str, Any]:
    """Means, intervals and the values behind them."""
    methods = {
        method: {"seeds": list(results.seeds[method]),
                 "figures": {name: {"mean": figure.mean, "half_width": figure.half_width, "values": list(figure.values)}
                             for name, figure in figures.items()}}
        for method, figures in results.figures.items()
    }
    return {"confidence": CONFIDENCE, "methods": methods, "missing": list(results.missing)}


def as_markdown(results: Results) -> str:
    """One table: a row a method, a column a number, each a mean with its interval; then what is missing."""
    names = results.names
    marks = {1: " ↑", -1: " ↓", 0: ""}
    head = [label_of(name) + marks[METRIC_TEXTS[name].better if name in METRIC_TEXTS else 0] for name in names]
    lines = [["method", "seeds", *head], ["---"] * (len(head) + 2)]
    for method, figures in results.figures.items():
        cells = [_cell(name, figures.get(name)) for name in names]
        lines.append([method, str(len(results.seeds[method])), *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text = f"{table}\n\nMean over seeds ± half of its 95 % interval (Student's t); one seed has none.\n"
    if results.missing:
        text += "\nNot finished:\n\n" + "".join(f"- {line}\n" for line in results.missing)
    return text


def _cell(name: str, figure: Figure | None) -> str:
    if figure is None:
        return "-"
    digits = 0 if name in (SECONDS, TOKENS) else 1 if name == "answer_tokens" else 3
    half = figure.half_width
    return f"{figure.mean:,.{digits}f}" + (f" ± {half:,.{digits}f}" if half is not None else "")
