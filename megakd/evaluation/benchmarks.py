"""Answers to the questions of MT-Bench, Arena-Hard and AlpacaEval, in the files that their own tools judge.

A line of MT-Bench's `model_answer/<model>.jsonl` is {"question_id", "answer_id", "model_id", "choices": [{"index",
"turns": [text, ...]}], "tstamp"}; in Arena-Hard's (v0.1) a turn is {"content", "token_len"}; AlpacaEval's outputs are a
list of {"instruction", "output", "generator"}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.config_evaluation import AnswersStage
from megakd.data.dataset import sample_id
from megakd.disk import atomic_writer
from megakd.errors import DataError
from megakd.evaluation.questions import Question, check_questions
from megakd.mcore.model import Model, freeze
from megakd.rollout.engine import Prompt
from megakd.rollout.replicas import generate_on_replicas
from megakd.rollout.sampling import Sampling
from megakd.run import Run

TIMESTAMP = 0.0
"""The field `tstamp` of every answer: the tools do not read it, and with the clock's time no two files were equal."""


@dataclass(frozen=True)
class Turn:
    """One answer."""

    text: str
    tokens: int
    """Without the token that ends it."""
    stopped: bool


# ------------------------------------------------------------------------------------------------------------ answers
def answer_questions(run: Run, stage: AnswersStage) -> tuple[int, dict[str, dict[str, float]]]:
    """Lets each model answer the questions and writes its file. Every rank calls it; rank 0 writes.

    Returns:
        tokens that were generated, and by label: `questions`, `answers` (turns), `answer_tokens` (mean), `stopped`
        (share of the answers that ended by themselves) and `file`, below the stage's folder.
    """
    questions = check_questions(stage, run.tokenizer, run.recipe.data.max_length)
    total, metrics = 0, {}
    for label, name in stage.models.items():
        answers = _conversations(run, stage, freeze(run.load_model("student", name)), questions)
        turns = [turn for own in answers for turn in own]
        tokens = sum(turn.tokens for turn in turns)
        file = Path("model_outputs", f"{label}.json") if stage.format == "alpaca_eval" else Path(
            "model_answer", f"{label}.jsonl")
        if run.is_root:
            with atomic_writer(run.folder(stage.name) / file) as stream:
                stream.write(answer_file(stage.format, label, questions, answers).encode())
        metrics[label] = {"questions": len(questions), "answers": len(turns), "answer_tokens": tokens / len(turns),
                          "stopped": sum(turn.stopped for turn in turns) / len(turns), "file": file.as_posix()}
        total += tokens
    return total, metrics


def _conversations(
    run: Run, stage: AnswersStage, model: Model, questions: Sequence[Question]
) -> list[list[Turn]]:
    """The model's answers to all turns of each question. A later turn is asked with the earlier answers before it."""
    answers: list[list[Turn]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        asked: dict[float, list[int]] = {}
        for number, question in enumerate(questions):
            if turn < len(question.turns):
                temperature = stage.category_temperatures.get(question.category, stage.temperature)
                asked.setdefault(temperature, []).append(number)
        for temperature, numbers in asked.items():
            prompts = [_prompt(run, questions[number], answers[number]) for number in numbers]
            sampling = Sampling(temperature=temperature, top_k=stage.top_k, top_p=stage.top_p, n=1,
                                max_new_tokens=stage.max_new_tokens, stop_ids=run.tokenizer.stop_ids,
                                seed=run.recipe.seed)
            rollouts = generate_on_replicas(run, model, prompts, sampling, stage.slots)
            for number, rollout in zip(numbers, rollouts, strict=True):
                stopped = rollout.finish_reason == "stop"
                answers[number].append(Turn(run.tokenizer.decode(rollout.tokens), len(rollout.tokens) - stopped,
                                            stopped))
    return answers


def _prompt(run: Run, question: Question, earlier: Sequence[Turn]) -> Prompt:
    tokens, _ = run.tokenizer.encode(question.prompt([turn.text for turn in earlier]), None, close=False)
    if len(tokens) >= run.recipe.data.max_length:  # an answer's text may take more tokens than the model wrote it in
        problem = f"turn {len(earlier) + 1} has {len(tokens)} tokens with the answers before it"
        raise DataError(question.place.file, question.place.line, "turns", problem, "Raise data.max_length")
    return Prompt(sample_id(f"{question.name}:{len(earlier)}"), tuple(tokens))


# -------------------------------------------------------------------------------------------------------------- files
def answer_file(style: str, label: str, questions: Sequence[Question], answers: Sequence[Sequence[Turn]]) -> str:
    """The text of a model's file in a benchmark's own form, questions in their order.

    Args:
        style: "mt_bench", "arena_hard" or "alpaca_eval".
        label: the model's name there.
        questions: the questions.
        answers: to each question an answer a turn.
    """
    pairs = list(zip(questions, answers, strict=True))
    if style == "alpaca_eval":
        rows = [{"instruction": question.turns[0], "output": own[0].text, "generator": label}
                for question, own in pairs]
        return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    lines = []
    for question, own in pairs:
        texts: list[Any] = [turn.text for turn in own]
        if style == "arena_hard":
            texts = [{"content": turn.text, "token_len": turn.tokens} for turn in own]
        lines.append({"question_id": question.identity, "answer_id": answer_id(label, question, own),
                      "model_id": label, "choices": [{"index": 0, "turns": texts}], "tstamp": TIMESTAMP})
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def answer_id(label: str, question: Question, answers: Sequence[Turn]) -> str:
    """22 hexadecimal digits that follow from model, question and answers."""
    parts = [label, question.name, *(turn.text for turn in answers)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:22]
