"""The stages' settings and their defaults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megakd.config_base import Section
from megakd.config_objectives import Objective
from megakd.config_signals import MAKER_OF, AnswerKind, PreferencesSignal, Signal, Signals


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
    signals: Signals = Signals()
    """Roles that are read from `score` stages; the others run beside the student."""
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
    """Lets a model score answers to the training prompts and writes what it says of them into the stage's folder."""

    kind: Literal["score"]
    model: str
    role: Literal["teacher", "reference"] = "teacher"
    """Whose layout the model has."""
    signal: Signal = PreferencesSignal()
    """What is written of each answer."""
    answers: tuple[AnswerKind, ...] = ("chosen", "rejected")
    """Which answers are scored; `preferences` are always those between rollouts."""
    rollouts: str | None = None
    """Name of the `generate` stage with the student's own answers, where these are scored."""
    teacher_answers: str | None = None
    """Name of the `generate` stage with the teacher's answers, where these are scored."""
    chunk_tokens: int = Field(256, ge=1)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Settings that have to name an earlier stage: `rollouts`, `teacher_answers`."""
        if self.signal.kind == "preferences":
            return ("rollouts",)
        return tuple(MAKER_OF[kind] for kind in self.answers if kind in MAKER_OF)


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
