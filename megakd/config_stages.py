"""The stages' settings and their defaults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megakd.config_base import Section, Stage
from megakd.config_evaluation import AnswersStage, EvalStage, LmEvalStage, WinRateStage
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
    overlap: bool | None = None
    """Replicas exchange gradients during the backward pass and new parameters during the next forward pass. When left
    out: on a GPU. Changes time, not results."""
    offload: bool = False
    """Between steps the optimizer's states (master weights of 16-bit and FP8 parameters, both moments) lie in the
    host's memory, and the GPU's is free for forward and backward passes. Changes time and memory, not results."""


class OnlineAnswers(Section):
    """Answers that are drawn while a stage trains, from the weights as they are then.

    Drawn are those that the objective takes and no stage is named for: the student's own, and the teacher's.
    """

    every: int = Field(1, ge=1)
    """Steps between two draws."""
    passes: int = Field(1, ge=1)
    """How often the answers of a draw are gone over; divides `every`."""
    n: int = Field(1, ge=1)
    """Answers drawn for each prompt, of each model."""
    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    teacher_mix: float = Field(0.0, ge=0, lt=1)
    """Chance of each token of the student's answers to be drawn by the teacher."""
    max_new_tokens: int = Field(128, ge=1)
    slots: int = Field(32, ge=1)

    @property
    def answers(self) -> int:
        """Answers to each prompt, of each model."""
        return self.n


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
    online: OnlineAnswers | None = None
    """Draws answers while it trains, in place of `rollouts` or `teacher_answers`."""
    reference: str | None = None
    """Model that takes part as the reference in this stage, in the reference role's layout; that role's own when left
    out. DPO of a student compares with the student's own start."""
    signals: Signals = Signals()
    """Roles that are read from `score` stages; the others run beside the student."""
    optimizer: Optimizer = Optimizer()
    steps: int | None = Field(None, ge=1)
    """Optimizer steps; or `tokens` in its place."""
    tokens: int | None = Field(None, ge=1)
    """Trains the fewest steps after which the trained model has worked through this many tokens, prompts included."""
    global_batch: int = Field(ge=1)
    """Groups in one optimizer step, over all data-parallel ranks."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints."""
    chunk_tokens: int | None = Field(None, ge=1)
    """Tokens whose logits exist at one time inside the fused losses; left out, what suits the device (chunks.py)."""

    def resumes_after(self, steps: int) -> bool:
        """Whether a checkpoint after so many steps can be gone on from: answers cannot be drawn again from weights that
        have moved, so with `online` it lies between two draws."""
        return self.online is None or steps % self.online.every == 0

    @property
    def drawn_online(self) -> tuple[str, ...]:
        """Those of the objective's `rollouts` and `teacher_answers` that are drawn while the stage trains."""
        if self.online is None:
            return ()
        return tuple(name for name in ("rollouts", "teacher_answers")
                     if name in self.objective.inputs and getattr(self, name) is None)

    @property
    def teacher_draws(self) -> bool:
        """Whether the teacher draws answers, or tokens of them, while the stage trains."""
        return "teacher_answers" in self.drawn_online or (self.online is not None and self.online.teacher_mix > 0)

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles whose models take part besides the trained one: the objective's, and those that draw answers."""
        return tuple(dict.fromkeys((*self.objective.roles, *(("teacher",) if self.teacher_draws else ()))))


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
    """Rows of a decoding pass on one copy of the model; as many passes are under way as it has pipeline stages."""

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
    chunk_tokens: int | None = Field(None, ge=1)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Settings that have to name an earlier stage: `rollouts`, `teacher_answers`."""
        if self.signal.kind == "preferences":
            return ("rollouts",)
        return tuple(MAKER_OF[kind] for kind in self.answers if kind in MAKER_OF)


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
    TrainStage
    | GenerateStage
    | ScoreStage
    | EvalStage
    | WinRateStage
    | AnswersStage
    | LmEvalStage
    | ExportStage
    | ReportStage,
    Field(discriminator="kind"),
]
