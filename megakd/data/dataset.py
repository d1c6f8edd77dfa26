"""Rows to sequences: the groups that an objective trains on, and the prompts that a generator answers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megakd.batch import Group, Kind, Sample
from megakd.data.artefacts import Rollout, prompt_hash
from megakd.data.files import describe_names
from megakd.data.readers import PreferenceRow, read_preferences
from megakd.data.sampler import StepSampler
from megakd.data.tokenizers import Tokenizer
from megakd.errors import DataError, ModelError

logger = logging.getLogger("megakd")

TooLong = Literal["error", "drop"]


@dataclass(frozen=True)
class KeyedPrompt:
    """A tokenised prompt, with the generation prompt at its end."""

    key: str
    tokens: tuple[int, ...]
    hash: str


def read_rows(paths: Sequence[Path], count: int | None, seed: int) -> list[PreferenceRow]:
    """The rows of data files; `count` of them in an order that the seed alone decides, or all in the files' order.

    Every row needs a prompt and a chosen answer; `preference_groups` asks for what else an objective takes.
    """
    rows = read_preferences(paths, require=("prompt", "chosen"))
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
    rollouts: Mapping[str, Rollout] | None = None,
) -> list[Group]:
    """One group for each row, with one sequence for each kind, in the order of `kinds`.

    Every sequence ends with the tokenizer's closing token, once; a rollout that was cut by its length does not. A group
    is left out whole, and counted in one warning, when a sequence is too long (`too_long="drop"`), when its prompt was
    left out by the generator (likewise), or when chosen and rejected are the same tokens.

    Args:
        rows: prompts with the texts that `kinds` need.
        tokenizer: the student's, which is also its teachers'.
        kinds: what the objective's groups hold (`Requires.kinds`).
        max_length: tokens of the longest sequence allowed, prompt and closing token included.
        too_long: whether a longer sequence is an error or its group is dropped.
        rollouts: by row key; needed for `Kind.ROLLOUT`.

    Raises:
        DataError: a sequence is too long, a text or a rollout is missing, a rollout was made on another prompt, the
            chat template refuses a conversation, or nothing is left.
    """
    if Kind.ROLLOUT in kinds:
        _require_rollouts(rows, rollouts or {})
    groups: list[Group] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        samples = [_sample(row, tokenizer, kind, rollouts) for kind in kinds]
        reason = _reason_to_drop(row, samples, max_length, too_long)
        if reason is None:
            groups.append(Group(row.key, tuple(sample for sample in samples if sample is not None)))
        else:
            dropped[reason] += 1
    _report(rows, "groups", len(groups), dropped)
    return groups


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
    return Rollout(prompt.key, prompt.hash, (), "", "left_out", None)


def _require_rollouts(rows: Sequence[PreferenceRow], rollouts: Mapping[str, Rollout]) -> None:
    missing = [row for row in rows if row.key not in rollouts]
    if missing:
        names = describe_names(row.key for row in missing)
        raise _error(missing[0], "rollout", f"{len(missing)} of {len(rows)} rows have none: {names}",
                     "Generate on the data files that the training reads")


def _sample(
    row: PreferenceRow, tokenizer: Tokenizer, kind: Kind, rollouts: Mapping[str, Rollout] | None
) -> Sample | None:
    """One sequence of a row; None where the generator left the row's prompt out."""
    if kind is Kind.ROLLOUT:
        assert rollouts is not None
        return _rollout_sample(row, tokenizer, rollouts[row.key])
    response = row.chosen if kind is Kind.CHOSEN else row.rejected
    if response is None:
        raise _error(row, kind.name.lower(), "missing, and the objective needs it", "Add it to every row")
    tokens, length = _encode(row, tokenizer, response)
    return Sample(tuple(tokens), length, kind)


def _rollout_sample(row: PreferenceRow, tokenizer: Tokenizer, rollout: Rollout) -> Sample | None:
    prompt, length = _encode(row, tokenizer, None)
    if rollout.prompt_hash != prompt_hash(prompt):
        raise _error(row, "rollout", "it was generated on another prompt: the row or the chat template has changed",
                     "Generate again")
    if rollout.finish_reason == "left_out":
        return None
    response = rollout.tokens
    if rollout.finish_reason == "stop" and (not response or response[-1] not in tokenizer.stop_ids):
        response = (*response, tokenizer.closing_id)
    return Sample((*prompt, *response), length, Kind.ROLLOUT)


def _reason_to_drop(
    row: PreferenceRow, samples: Sequence[Sample | None], max_length: int, too_long: TooLong
) -> str | None:
    """Why a row makes no group, or None; an error where too long sequences are errors."""
    for sample in samples:
        if sample is None:
            if too_long == "error":
                raise _error(row, "rollout", "the generator left this row out: its prompt was too long",
                             "Raise the generator's prompt limit, or set too_long to drop")
            return "prompt too long for the generator"
        count = len(sample.tokens)
        if count > max_length:
            if too_long == "error":
                parts = f"prompt {sample.prompt_length}, response {count - sample.prompt_length}"
                problem = f"{count} tokens ({parts}), more than max_length {max_length}"
                raise _error(row, sample.kind.name.lower(), problem,
                             f"Raise max_length to {count} or more, or set too_long to drop")
            return f"longer than max_length {max_length}"
    by_kind = {sample.kind: sample.tokens for sample in samples if sample is not None}
    if {Kind.CHOSEN, Kind.REJECTED} <= by_kind.keys() and by_kind[Kind.CHOSEN] == by_kind[Kind.REJECTED]:
        return "chosen and rejected are the same tokens"
    return None


def _encode(row: PreferenceRow, tokenizer: Tokenizer, response: str | None) -> tuple[list[int], int]:
    try:
        return tokenizer.encode(row.prompt, response, close=response is not None)
    except ModelError as error:
        raise _error(row, "prompt", str(error), "Change the conversation, or give another chat template") from error


def _report(rows: Sequence[PreferenceRow], what: str, kept: int, dropped: Counter[str]) -> None:
    """Says what was left out; nothing may be left out that is not counted here, and something must be kept."""
    reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items() if number)
    if kept == 0:
        first = rows[0].key.rpartition(":")[0] if rows else "<none>"
        raise DataError(first, None, None, f"no {what} are left: {reasons or 'there was no row'}",
                        "Give other data, or raise the limit")
    if reasons:
        logger.warning("%d of %d %s left out: %s", dropped.total(), dropped.total() + kept, what, reasons)


def _error(row: PreferenceRow, field: str, problem: str, fix: str) -> DataError:
    file, _, line = row.key.rpartition(":")
    return DataError(file, int(line), field, problem, fix)
