"""A teacher's scores of a student's answers, for PAD (arXiv 2502.14272): likelihood, and selection out of two.

The teacher reads texts: its tokenizer and chat template may be others than the student's.

Legend: T loss positions, H hidden width, L ids that are a letter.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.batch import Batch, Group, Kind, Sample
from megakd.config_stages import ScoreStage
from megakd.data.artefacts import Rollout
from megakd.data.readers import Message, PreferenceRow
from megakd.data.scores import Score
from megakd.data.tokenizers import Tokenizer
from megakd.errors import DataError, ModelError
from megakd.evaluation.sequences import Values, filled, sums_by_sequence
from megakd.losses import fused_token_log_probs
from megakd.mcore.model import Model, evaluating
from megakd.objectives.base import RoleOutput
from megakd.run import Run

logger = logging.getLogger("megakd")

LETTERS = ("A", "B")
FLOOR = 1e-8
"""Least probability of a letter: keeps the logarithm of the selection finite, as in the released code."""
NO_LETTER = 0.01
"""Where both letters together have less probability, the teacher has not answered the question; it is counted."""
REQUEST = (
    "Below are a request and two answers to it. Compare how relevant, accurate, complete, coherent and clear the "
    "answers are.\n\n[Request]\n{request}\n\n[Answer A]\n{first}\n\n[Answer B]\n{second}\n\n"
    "Which answer is better? Reply with its letter alone, A or B."
)


@dataclass(frozen=True)
class Question:
    """Which of two answers to a row is better? `first` and `second` are indices of its answers."""

    row: int
    first: int
    second: int


def score_rollouts(
    run: Run, stage: ScoreStage, model: Model, tokenizer: Tokenizer, rows: Sequence[PreferenceRow],
    answers: Sequence[Sequence[Rollout]],
) -> tuple[list[Score], dict[str, float]]:
    """Scores the answers of each row; and what to report. Every rank calls it, and gets the same.

    Args:
        run: this rank's run.
        stage: the settings.
        model: the teacher, frozen, in the layout of the stage's role.
        tokenizer: the teacher's.
        rows: the prompts.
        answers: to each row its answers, two or more.
    """
    with evaluating(model):
        likelihoods = _likelihoods(run, stage, model, tokenizer, rows, answers)
        asks = stage.signal.likelihood_weight < 1
        selections, report = (
            _selections(run, stage, model, tokenizer, rows, answers) if asks else ([None] * len(rows), {})
        )
    scores, weight = [], stage.signal.likelihood_weight
    for row, own, likelihood, selection in zip(rows, answers, likelihoods, selections, strict=True):
        for number, answer in enumerate(own):
            score, log_selected = likelihood[number], None if selection is None else selection[number]
            if score is not None:
                score = weight * score + (0.0 if log_selected is None else (1.0 - weight) * log_selected)
            scores.append(Score(row.key, answer.index, score, likelihood[number], log_selected))
    unscored = sum(score.score is None for score in scores)
    if unscored:
        logger.warning("%d of %d answers have no token that could be scored", unscored, len(scores))
    return scores, {"answers": len(scores), "unscored": unscored, **report}


def _likelihoods(
    run: Run, stage: ScoreStage, model: Model, tokenizer: Tokenizer, rows: Sequence[PreferenceRow],
    answers: Sequence[Sequence[Rollout]],
) -> list[list[float | None]]:
    """Mean log-likelihood a token of each answer; None for one without a token."""
    groups, cut = [], 0
    for row, own in zip(rows, answers, strict=True):
        for answer in own:
            # What the generator's limit has cut does not end there: no closing token.
            tokens, length = tokenizer.encode(row.prompt, answer.text, close=answer.finish_reason == "stop")
            if length >= stage.signal.max_length:
                problem = f"{length} tokens under the teacher's tokenizer, no fewer than the stage's max_length"
                raise DataError(row.key, None, "prompt", problem, f"Raise stages.{stage.name}.signal.max_length")
            cut += len(tokens) > stage.signal.max_length
            groups.append(Group(row.key, (Sample(tuple(tokens[: stage.signal.max_length]), length, Kind.ROLLOUT),)))
    if cut:
        logger.warning("%d of %d answers are longer than max_length %d tokens: their beginnings are scored",
                       cut, len(groups), stage.signal.max_length)

    def values(_: int, output: RoleOutput, batch: Batch) -> dict[str, Tensor]:
        return {"log_prob": _log_probs(stage, model, output, batch.positions.labels_T)}

    sums = _run(run, stage, model, tokenizer, groups, values)["log_prob"].tolist()
    lengths = [group.samples[0].response_length for group in groups]
    means = iter(total / length if length else None for total, length in zip(sums, lengths, strict=True))
    return [list(itertools.islice(means, len(own))) for own in answers]


def _selections(
    run: Run, stage: ScoreStage, model: Model, tokenizer: Tokenizer, rows: Sequence[PreferenceRow],
    answers: Sequence[Sequence[Rollout]],
) -> tuple[list[list[float]], dict[str, float]]:
    """Log of the probability that each answer is selected, `(FLOOR + sum over the others of p(its letter)) / (n - 1)`.

    The mean over both orders of a pair, or the one order, with the earlier answer first.
    """
    ids = [letter_ids(tokenizer, letter) for letter in LETTERS]
    questions = [
        Question(number, *pair)
        for number, own in enumerate(answers)
        for pair in itertools.combinations(range(len(own)), 2)
    ]
    if stage.signal.both_orders:
        questions += [Question(question.row, question.second, question.first) for question in questions]
    groups = [
        _question_group(tokenizer, rows[asked.row], [answers[asked.row][i].text for i in (asked.first, asked.second)],
                        stage)
        for asked in questions
    ]

    def values(_: int, output: RoleOutput, batch: Batch) -> dict[str, Tensor]:
        return {
            letter: _letter_probs(stage, model, output, its_ids) for letter, its_ids in zip(LETTERS, ids, strict=True)
        }

    probs = _run(run, stage, model, tokenizer, groups, values)
    mass = [[0.0] * len(own) for own in answers]
    orders = 2 if stage.signal.both_orders else 1
    for asked, first, second in zip(questions, probs["A"].tolist(), probs["B"].tolist(), strict=True):
        mass[asked.row][asked.first] += first / orders
        mass[asked.row][asked.second] += second / orders
    total_N = probs["A"] + probs["B"]
    silent = int((total_N < NO_LETTER).sum())
    if silent:
        logger.warning("%d of %d questions: the teacher gives the letters a probability below %g together", silent,
                       len(questions), NO_LETTER)
    selections = [[math.log((FLOOR + value) / (len(own) - 1)) for value in own] for own in mass]
    report = {"questions": len(questions), "no_letter": silent, "letter_mass": float(total_N.mean())}
    return selections, report


def letter_ids(tokenizer: Tokenizer, letter: str) -> list[int]:
    """The tokens that a reply may begin with to give a letter: those whose text is it, blanks around it apart.

    Raises:
        ModelError: there is none.
    """
    ids = [token for token in range(tokenizer.vocab_size) if tokenizer.decode([token]).strip() == letter]
    if not ids:
        raise ModelError(f"{tokenizer.directory}: no token of its tokenizer is the letter {letter!r}, so this teacher "
                         "cannot be asked to choose. Set signal.likelihood_weight: 1.0, or take another teacher")
    return ids


def _question_group(
    tokenizer: Tokenizer, row: PreferenceRow, texts: Sequence[str], stage: ScoreStage
) -> Group:
    """The question with one token behind it, at whose position the reply begins. Long answers are cut to fit."""
    request = "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in row.prompt)
    if len(row.prompt) == 1:
        request = row.prompt[0]["content"]
    keep = max(map(len, texts))
    while True:
        first, second = (text[:keep] for text in texts)
        content = REQUEST.format(request=request, first=first, second=second)
        tokens, length = tokenizer.encode([Message(role="user", content=content)], None, close=False)
        if length < stage.signal.max_length:
            return Group(row.key, (Sample((*tokens, tokenizer.pad_id), length, Kind.ROLLOUT),))
        if keep == 0:
            problem = f"the question takes {length} tokens without the answers, more than the stage's max_length"
            raise DataError(row.key, None, "prompt", problem, f"Raise stages.{stage.name}.signal.max_length")
        keep = keep * 3 // 4


def _letter_probs(stage: ScoreStage, model: Model, output: RoleOutput, ids: Sequence[int]) -> Tensor:
    """Probability [T] that the next token is one of `ids`."""
    tokens = len(output.hidden_TH)
    labels_LT = torch.tensor(ids, device=output.hidden_TH.device)[:, None].expand(-1, tokens)
    repeated = RoleOutput(output.hidden_TH.repeat(len(ids), 1), output.head_VH)
    return _log_probs(stage, model, repeated, labels_LT.reshape(-1)).exp().view(len(ids), tokens).sum(0)


def _log_probs(stage: ScoreStage, model: Model, output: RoleOutput, labels_T: Tensor) -> Tensor:
    return fused_token_log_probs(
        output.hidden_TH, output.head_VH, labels_T, tp_group=model.grid.groups.tp,
        vocab_size=model.architecture.vocab_size, chunk_tokens=stage.chunk_tokens,
    )


def _run(
    run: Run, stage: ScoreStage, model: Model, tokenizer: Tokenizer, groups: Sequence[Group], values: Values
) -> dict[str, Tensor]:
    """Sums of the groups' only sequences, in their order."""
    step = filled(run, groups, (stage.role,))
    batches = run.batches(step, stage.role, model, pad_id=tokenizer.pad_id)
    with torch.no_grad():
        sums = sums_by_sequence(run, model, batches, step.samples, values)
    return {name: total_N[: len(groups)] for name, total_N in sums.items()}
