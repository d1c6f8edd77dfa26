"""The settings of the stages that measure models, and their defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megakd.config_base import Section, Stage

Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
"""A model's name in results; files are named after it."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class EvalSampling(Section):
    """How answers are drawn that are measured: once for every seed."""

    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0)
    """0 keeps all tokens."""
    top_p: float = Field(1.0, gt=0, le=1)
    seeds: tuple[Seed, ...] = Field((10, 20, 30, 40, 50), min_length=1)
    """Of the noise, which depends on the seed and the row alone. The default is that of MiniLLM and DPKD."""


class EvalStage(Stage):
    """Measures several models on the held-out rows; its figures go into `summary.json`."""

    kind: Literal["eval"]
    models: dict[str, str] = Field(min_length=1)
    """Label -> model. The first is the start that reward accuracy is also measured against."""
    teacher: bool = True
    """False leaves out what compares with the run's teacher and reference: KL and expected advantage. Neither model is
    read then, and the teacher may have another tokenizer."""
    prompts: int = Field(16, ge=1)
    """Held-out prompts that each model answers, for what is measured on its own answers."""
    sampling: EvalSampling | None = None
    """Left out, the answers are greedy."""
    max_new_tokens: int = Field(48, ge=1)
    slots: int = Field(32, ge=1)
    chunk_tokens: int | None = Field(None, ge=1)


class AnsweringStage(Stage):
    """What the stages have that let several models answer prompts."""

    models: dict[Label, str] = Field(min_length=1)
    """Label -> model."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_k: int = Field(0, ge=0)
    """0 keeps all tokens."""
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(512, ge=1)
    slots: int = Field(32, ge=1)
    """Rows of a decoding pass on one copy of the model; as many passes are under way as it has pipeline stages."""


class CommandJudge(Section):
    """An external program. It is called with two more arguments: a JSONL file to read, of {"id", "prompt" (messages),
    "a", "b"}, and the name of the one to write, of {"id", "winner": "a" | "b" | "tie"}."""

    kind: Literal["command"]
    command: tuple[str, ...] = Field(min_length=1)
    """Program and arguments; no shell."""
    both_orders: bool = True
    """Asks about each pair of answers in both orders and takes the mean; False: in one, by the row's name."""
    timeout: float = Field(3600.0, gt=0)
    """Seconds that the program may take."""


class RewardModelJudge(Section):
    """A reward model: the answer with the higher score wins."""

    kind: Literal["reward_model"]
    model: str
    """Hugging Face directory of a sequence classifier with one label, in safetensors. It reads texts, by its own
    tokenizer and chat template."""


class WinRateStage(AnsweringStage):
    """Lets a judge compare the answers of models to the held-out prompts; writes `stages/<name>/judgements.jsonl`."""

    kind: Literal["win_rate"]
    models: dict[Label, str] = Field(min_length=2)
    """Label -> model. Each is compared with the first."""
    prompts: int | None = Field(None, ge=1)
    """Held-out prompts; all when left out."""
    judge: Annotated[CommandJudge | RewardModelJudge, Field(discriminator="kind")]


class AnswersStage(AnsweringStage):
    """Lets models answer the questions of a benchmark; writes the files that the benchmark's own tools judge."""

    kind: Literal["answers"]
    questions: Path
    """JSONL or JSON file: `turns`, `prompt` or `instruction`, with `question_id` or `uid`."""
    format: Literal["mt_bench", "arena_hard", "alpaca_eval"]
    """Whose form the answers are written in."""
    category_temperatures: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Temperatures of the questions of a category, in place of `temperature`."""


class LmEvalStage(Stage):
    """Runs tasks of the package lm-eval on models; writes `stages/<name>/<label>.json`."""

    kind: Literal["lm_eval"]
    models: dict[Label, str] = Field(min_length=1)
    """Label -> model."""
    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks, groups or tags."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples before each question; the tasks' own number when left out."""
    limit: int | None = Field(None, ge=1)
    """Questions of each task; all when left out."""
    include_path: Path | None = None
    """Folder of further tasks."""
    chat_template: bool = False
    """Puts questions into the model's chat template."""
    batch_size: int = Field(1, ge=1)
