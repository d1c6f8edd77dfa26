"""Rows to sequences: the groups that an objective trains on, and the prompts that a generator answers."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megakd.batch import Group, Kind, Sample
from megakd.data.artefacts import SKIPPED, Rollout, prompt_hash
from megakd.data.files import describe_names
from megakd.data.readers import PreferenceRow, read_preferences
from megakd.data.sampler import StepSampler
from megakd.data.tokenizers import Tokenizer
from megakd.errors import DataError, ModelError

logger = logging.getLogger("megakd")

TooLong = Literal["error", "drop"]
Answers = Mapping[str, Sequence[Rollout]]
"""Generated answers by row key, as `read_rollouts` gives them."""

Scores = Mapping[tuple[str, int], float | None]
"""A teacher's scores by row key and index, as `read_scores` gives them: None for an answer that has none."""
UNSCORED = "an answer that the teacher could not score"
GENERATED = (Kind.ROLLOUT, Kind.TEACHER_ANSWER)
"""Kinds of sequences whose answers are not the data's."""


@dataclass(frozen=True)
class Generated:
    """What models have answered to the rows' prompts, and how the teacher scores it."""

    answers: Mapping[Kind, Answers]
    """For `Kind.ROLLOUT` and `Kind.TEACHER_ANSWER` as far as an objective takes them."""
    scores: Scores | None
    """Of the rollouts; None where the objective takes none."""


NOTHING_GENERATED = Generated({}, None)


@dataclass(frozen=True)
class KeyedPrompt:
    """A tokenised prompt, with the generation prompt at its end."""

    key: str
    tokens: tuple[int, ...]
    hash: str


def read_rows(paths: Sequence[Path], count: int | None, seed: int, answer: str) -> list[PreferenceRow]:
    """The rows of data files; `count` of them in an order that the seed alone decides, or all in the files' order.

    Every row needs a prompt, which is all that a generator asks for; `preference_groups` asks for what an objective
    takes.

    Args:
        paths: files and folders.
        count: how many rows, or None for all.
        seed: of the draw.
        answer: the field that is the rows' answer (`data.answer`).
    """
    rows = [replace(row, answer_field=answer) for row in read_preferences(paths, require=("prompt",))]
    if count is None:
        return rows
    return [rows[index] for index in StepSampler(len(rows), min(count, len(rows)), seed).indices(0)]


def preference_groups(
    rows: Sequence[PreferenceRow],
    tokenizer: Tokenizer,
    kinds: Sequence[Kind],
    *,
    max_length: int,
    too_long: TooLong,
    generated: Generated = NOTHING_GENERATED,
    on_policy: float = 0.0,
) -> list[Group]:
    """One group for each row with the sequences of each kind, in the order of `kinds`: one, or all that were generated.

    Every sequence ends with the tokenizer's closing token, once; a rollout that was cut by its length does not. A group
    is left out whole, and counted in one warning, when a sequence is too long (`too_long="drop"`), when its prompt was
    left out by the generator (likewise), when its answers were too alike, or when the two answers of its pair (chosen
    and rejected, or the teacher's and the student's) are the same tokens.

    Args:
        rows: prompts with the texts that `kinds` need.
        tokenizer: the student's, which is also its teachers'.
        kinds: what the objective's groups hold (`Requires.kinds`).
        max_length: tokens of the longest sequence allowed, prompt and closing token included.
        too_long: whether a longer sequence is an error or its group is dropped.
        generated: answers for the generated kinds, with scores where the objective takes them.
        on_policy: share of the rows whose group holds the rollouts alone, in place of `kinds`. A row is one of them or
            not by its key.

    Raises:
        DataError: a sequence is too long, a text, an answer or a score is missing, an answer was made on another
            prompt, the chat template refuses a conversation, or nothing is left.
    """
    for kind in dict.fromkeys((*kinds, *((Kind.ROLLOUT,) if on_policy > 0 else ()))):
        if kind in GENERATED:
            _require_answers(rows, kind, generated.answers.get(kind, {}))
    groups: list[Group] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        samples, reason = _samples(row, tokenizer, kinds_of(row, kinds, on_policy), generated)
        reason = _reason_to_drop(row, samples, reason, max_length, too_long)
        if reason is None:
            groups.append(Group(row.key, tuple(samples)))
        else:
            dropped[reason] += 1
    _report(rows, "groups", len(groups), dropped)
    return groups


def kinds_of(row: PreferenceRow, kinds: Sequence[Kind], on_policy: float) -> Sequence[Kind]:
    """What a row's group holds: the student's rollouts alone for a share of the rows, by their keys, else `kinds`."""
    return (Kind.ROLLOUT,) if _share(row.key) < on_policy else kinds


def group_of(row: PreferenceRow, tokenizer: Tokenizer, kinds: Sequence[Kind], generated: Generated) -> Group:
    """One row's group, of answers that are known to be there and to fit.

    Raises:
        DataError: a text is missing, or an answer was made on another prompt.
    """
    samples, _ = _samples(row, tokenizer, kinds, generated)
    return Group(row.key, tuple(samples))


def held_out_groups(
    rows: Sequence[PreferenceRow], tokenizer: Tokenizer, *, max_length: int, too_long: TooLong
) -> list[Group]:
    """What is measured of held-out rows: the pairs of those that have a rejected answer, then the others' answers."""
    pairs = [row for row in rows if row.rejected is not None]
    answers = [row for row in rows if row.rejected is None]
    groups: list[Group] = []
    for some, kinds in ((pairs, (Kind.CHOSEN, Kind.REJECTED)), (answers, (Kind.CHOSEN,))):
        if some:
            groups += preference_groups(some, tokenizer, kinds, max_length=max_length, too_long=too_long)
    return groups


def sample_id(key: str) -> int:
    """A number that names a row whatever other rows are drawn beside it; it seeds the row's noise."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:15], 16)


def prompts(
    rows: Sequence[PreferenceRow], tokenizer: Tokenizer, max_prompt: int, *, too_long: TooLong
) -> tuple[list[KeyedPrompt], list[KeyedPrompt]]:
    """The prompts to generate on, one for each key, and those left out as too long.

    Those left out belong in the rollout file too, as `left_out(prompt)`, so that a training on the same rows knows why
    they have no rollout.

    Args:
        rows: rows; a row that comes twice (a file named twice) gives one prompt.
        tokenizer: the generator's.
        max_prompt: tokens of the longest prompt allowed.
        too_long: whether a longer one is an error or is left out, counted in one warning.

    Raises:
        DataError: a prompt is too long, one key stands for two prompts, or nothing is left.
    """
    kept: dict[str, KeyedPrompt] = {}
    left: dict[str, KeyedPrompt] = {}
    for row in rows:
        tokens = tuple(_encode(row, tokenizer, None)[0])
        prompt = KeyedPrompt(row.key, tokens, prompt_hash(tokens))
        for known in (kept, left):
            if row.key in known and known[row.key].hash != prompt.hash:
                raise _error(row, "prompt", "two files of this name have different prompts on this line",
                             "Rename one of them")
        if len(tokens) <= max_prompt:
            kept[row.key] = prompt
        elif too_long == "drop":
            left[row.key] = prompt
        else:
            raise _error(row, "prompt", f"{len(tokens)} tokens, more than the limit of {max_prompt}",
                         f"Raise the limit to {len(tokens)}, or set too_long to drop")
    _report(rows, "prompts", len(kept), Counter({f"longer than {max_prompt} tokens": len(left)}))
    return list(kept.values()), list(left.values())


def left_out(prompt: KeyedPrompt) -> Rollout:
    """What the rollout file says about a prompt that was too long to generate on."""
    return skipped(prompt, "left_out")


def skipped(prompt: KeyedPrompt, reason: str) -> Rollout:
    """What the rollout file says about a prompt without answers; `reason` is a key of artefacts.SKIPPED."""
    return Rollout(prompt.key, 0, prompt.hash, (), "", reason, None)


def _share(key: str) -> float:
    """A number in [0, 1) that depends on a row's key alone, evenly spread over keys."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:13], 16) / 16**13


def _require_answers(rows: Sequence[PreferenceRow], kind: Kind, answers: Answers) -> None:
    missing = [row for row in rows if row.key not in answers]
    if missing:
        names = describe_names(row.key for row in missing)
        raise _error(missing[0], kind.name.lower(), f"{len(missing)} of {len(rows)} rows have none: {names}",
                     "Generate on the data files that the training reads")


def _samples(
    row: PreferenceRow, tokenizer: Tokenizer, kinds: Sequence[Kind], generated: Generated
) -> tuple[list[Sample], str | None]:
    """The sequences of a row, and the finish reason of a generator that has no answer to its prompt."""
    samples: list[Sample] = []
    for kind in kinds:
        if kind in GENERATED:
            answers = generated.answers[kind][row.key]
            if answers[0].finish_reason in SKIPPED:
                return [], answers[0].finish_reason
            scores = generated.scores if kind is Kind.ROLLOUT else None
            if scores is not None and _is_unscored(row, answers, scores):
                return [], UNSCORED
            samples += [_answer_sample(row, tokenizer, kind, answer, scores) for answer in answers]
        else:
            response = row.answer if kind is Kind.CHOSEN else row.rejected
            if response is None:
                raise _missing(row, kind)
            tokens, length = _encode(row, tokenizer, response)
            samples.append(Sample(tuple(tokens), length, kind))
    return samples, None


def _is_unscored(row: PreferenceRow, answers: Sequence[Rollout], scores: Scores) -> bool:
    """Whether the teacher could not score one of a row's answers; an error where it was not asked to."""
    missing = [answer.index for answer in answers if (row.key, answer.index) not in scores]
    if missing:
        raise _error(row, "score", f"the teacher's scores lack answer {missing[0]}", "Score again")
    return any(scores[row.key, answer.index] is None for answer in answers)


def _answer_sample(
    row: PreferenceRow, tokenizer: Tokenizer, kind: Kind, answer: Rollout, scores: Scores | None
) -> Sample:
    prompt, length = _encode(row, tokenizer, None)
    if answer.prompt_hash != prompt_hash(prompt):
        raise _error(row, kind.name.lower(), "it was generated on another prompt: the row or the chat template has "
                     "changed", "Generate again")
    response = answer.tokens
    if answer.finish_reason == "stop" and (not response or response[-1] not in tokenizer.stop_ids):
        response = (*response, tokenizer.closing_id)
    score = math.nan if scores is None else scores[row.key, answer.index]
    return Sample((*prompt, *response), length, kind, score)


def _reason_to_drop(
    row: PreferenceRow, samples: Sequence[Sample], reason: str | None, max_length: int, too_long: TooLong
) -> str | None:
    """Why a row makes no group, or None; an error where too long sequences are errors."""
    if reason == "left_out" and too_long == "error":
        raise _error(row, "rollout", "the generator left this row out: its prompt was too long",
                     "Raise the generator's prompt limit, or set too_long to drop")
    if reason is not None:
        return reason if reason == UNSCORED else SKIPPED[reason]
    for sample in samples:
        count = len(sample.tokens)
        if count > max_length:
            if too_long == "error":
                parts = f"prompt {sample.prompt_length}, response {count - sample.prompt_length}"
                problem = f"{count} tokens ({parts}), more than max_length {max_length}"
                raise _error(row, _field(row, sample.kind), problem,
                             f"Raise max_length to {count} or more, or set too_long to drop")
            return f"longer than max_length {max_length}"
    by_kind = {sample.kind: sample.tokens for sample in samples}
    for pair in ((Kind.CHOSEN, Kind.REJECTED), (Kind.TEACHER_ANSWER, Kind.ROLLOUT)):
        if by_kind.keys() >= set(pair) and by_kind[pair[0]] == by_kind[pair[1]]:
            first, second = (kind.name.lower().replace("_", " ") for kind in pair)
            return f"{first} and {second} are the same tokens"
    scored = [sample.tokens for sample in samples if not math.isnan(sample.score)]
    return "two of its scored answers are the same tokens" if len(set(scored)) < len(scored) else None


def _encode(row: PreferenceRow, tokenizer: Tokenizer, response: str | None) -> tuple[list[int], int]:
    try:
        return tokenizer.encode(row.prompt, response, close=response is not None)
    except ModelError as error:
        raise _error(row, "prompt", str(error), "Change the conversation, or give another chat template") from error


def _report(rows: Sequence[PreferenceRow], what: str, kept: int, dropped: Counter[str]) -> None:
    """Says what was left out; nothing may be left out that is not counted here, and something must be kept."""
    reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items() if number)
    if kept == 0:
        first = rows[0].place.file if rows else "<none>"
        raise DataError(first, None, None, f"no {what} are left: {reasons or 'there was no row'}",
                        "Give other data, or raise the limit")
    if reasons:
        logger.warning("%d of %d %s left out: %s", dropped.total(), dropped.total() + kept, what, reasons)


def _field(row: PreferenceRow, kind: Kind) -> str:
    """What a row calls a sequence of a kind."""
    return row.answer_field if kind is Kind.CHOSEN else kind.name.lower()


def _missing(row: PreferenceRow, kind: Kind) -> DataError:
    other = {"chosen": "reference", "reference": "chosen"}[row.answer_field]
    fix = "Add it to every row"
    if kind is Kind.CHOSEN and getattr(row, other) is not None:
        fix += f", or write data.answer: {other}, which the row has"
    return _error(row, _field(row, kind), "missing, and it is needed to train on or to compare with", fix)


def _error(row: PreferenceRow, field: str, problem: str, fix: str) -> DataError:
    return row.place.error(field, problem, fix)
