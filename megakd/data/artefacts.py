"""Rollouts on disk: JSON lines, a header first.

The header says which model generated them, with which tokenizer and sampling; a run with another tokenizer is refused,
for the ids would mean something else. A file gets its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megakd.data.files import Place, describe_names, list_files, read_rows, type_name
from megakd.data.tokenizers import Tokenizer
from megakd.disk import atomic_writer
from megakd.errors import DataError

FORMAT = "megakd rollouts 2"
SKIPPED = {"left_out": "prompt too long for the generator", "alike": "too few different answers"}
"""Finish reasons of a prompt that has no answers, and what they mean."""
FINISH_REASONS = ("stop", "length", *SKIPPED)


@dataclass(frozen=True)
class Rollout:
    """One generated response."""

    key: str
    """The row that its prompt came from."""
    index: int
    """Which of the responses to its prompt it is: 0, 1, ..."""
    prompt_hash: str
    tokens: tuple[int, ...]
    """The ids as they were drawn, with the stop id where `finish_reason` is "stop"."""
    text: str
    finish_reason: str
    """"stop"; "length": cut by the limit of new tokens; or, where the prompt has no response, one of SKIPPED."""
    log_probs: tuple[float, ...] | None
    """The generator's, one a token; None where it did not tell."""


@dataclass(frozen=True)
class RolloutsHeader:
    """Where rollouts come from."""

    generator: str
    """Hash of the generator's weights."""
    tokenizer: str
    """Its tokenizer's fingerprint."""
    sampling: dict[str, Any]
    """Its sampling settings."""


def prompt_hash(tokens: Sequence[int]) -> str:
    """A name for a prompt's ids: 16 hexadecimal digits of their SHA-256."""
    return hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()[:16]


def write_rollouts(path: str | Path, header: RolloutsHeader, rollouts: Sequence[Rollout]) -> None:
    """Writes rollouts, one a line; the file is there whole or not at all.

    Args:
        path: a name that ends in .jsonl or .jsonl.gz.
        header: where they come from.
        rollouts: those of a key one after another, by index. Log-probabilities are written with 6 decimals.

    Raises:
        DataError: a key's indices are not 0, 1, ..., or a rollout that `read_rollouts` would refuse.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(path, None, None, "rollouts are JSON lines", "Name the file .jsonl or .jsonl.gz")
    seen: Counter[str] = Counter()
    for rollout in rollouts:
        if rollout.index != seen[rollout.key]:
            problem = f"response {rollout.index} of {rollout.key!r} where {seen[rollout.key]} is due"
            raise DataError(path, None, "index", problem, "Write a key's responses in the order 0, 1, ...")
        seen[rollout.key] += 1
    with atomic_writer(path) as stream:
        stream.write(_line({"format": FORMAT, **asdict(header), "rollouts": len(rollouts)}))
        for number, rollout in enumerate(rollouts, start=2):
            log_probs = None if rollout.log_probs is None else [round(value, 6) for value in rollout.log_probs]
            row = {**asdict(rollout), "log_probs": log_probs}
            _rollout(Place(path, number), {**row, "tokens": list(rollout.tokens)}, vocab_size=None)
            stream.write(_line(row))


def read_rollouts(
    path: str | Path, tokenizer: Tokenizer, *, keys: Iterable[str] = ()
) -> tuple[RolloutsHeader, dict[str, tuple[Rollout, ...]]]:
    """Reads what `write_rollouts` wrote.

    Args:
        path: the file.
        tokenizer: this run's; the file's must be the same.
        keys: rows that need a rollout; the file may have more.

    Returns:
        the header, and the rollouts by key, each key's in the order of their indices.

    Raises:
        DataError: not such a file, another tokenizer, a cut file, a damaged row, missing keys.
    """
    [file] = list_files(path)
    lines = read_rows(file)
    place, first = next(lines)
    header = _header(place, first)
    if header.tokenizer != tokenizer.fingerprint:
        raise place.error("tokenizer", f"the rollouts were written with the tokenizer {header.tokenizer[:12]}, this "
                          f"run's is {tokenizer.fingerprint[:12]} ({tokenizer.directory})",
                          "Generate again, or use the tokenizer and chat template of the generator")
    rollouts: dict[str, tuple[Rollout, ...]] = {}
    count = 0
    for place, row in lines:
        rollout = _rollout(place, row, vocab_size=tokenizer.vocab_size)
        own = rollouts.setdefault(rollout.key, ())
        if rollout.index != len(own):
            problem = f"response {rollout.index} of {rollout.key!r} where {len(own)} is due"
            raise place.error("index", problem, "Generate again")
        rollouts[rollout.key] = (*own, rollout)
        count += 1
    if count != first["rollouts"]:
        problem = f"{count} rollouts, but the header says {first['rollouts']}: the file is cut"
        raise DataError(file, None, None, problem, "Copy or generate it again")
    wanted = list(keys)
    missing = [key for key in wanted if key not in rollouts]
    if missing:
        problem = f"no rollout for {len(missing)} of {len(wanted)} rows: {describe_names(missing)}"
        raise DataError(file, None, "key", problem, "Generate on the data files that the training reads")
    return header, rollouts


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _header(place: Place, row: dict[str, Any]) -> RolloutsHeader:
    names = [field.name for field in fields(RolloutsHeader)]
    if "format" not in row or row["format"] != FORMAT or any(name not in row for name in (*names, "rollouts")):
        raise place.error(None, f"not the header of a rollouts file ({FORMAT!r})", "Give a file that `generate` wrote")
    return RolloutsHeader(**{name: row[name] for name in names})


def _rollout(place: Place, row: dict[str, Any], *, vocab_size: int | None) -> Rollout:
    """One row, checked field by field."""
    again = "Generate the file again"
    for name in (field.name for field in fields(Rollout)):
        if name not in row:
            raise place.error(name, f"missing; the row has {describe_names(row)}", again)
    for name in ("key", "prompt_hash", "text"):
        if not isinstance(row[name], str):
            raise place.error(name, f"{type_name(row[name])}, not a string", again)
    if type(row["index"]) is not int or row["index"] < 0:
        raise place.error("index", f"{row['index']!r} is not a number from 0", again)
    tokens, log_probs, reason = row["tokens"], row["log_probs"], row["finish_reason"]
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        raise place.error("tokens", "not a list of token ids", again)
    if vocab_size is not None and tokens and max(tokens) >= vocab_size:
        raise place.error("tokens", f"id {max(tokens)} is outside the vocabulary of {vocab_size}", again)
    if reason not in FINISH_REASONS:
        raise place.error("finish_reason", f"{reason!r} is none of {', '.join(FINISH_REASONS)}", again)
    if (reason in SKIPPED and tokens) or (reason == "length" and not tokens):
        raise place.error("tokens", f"{len(tokens)} tokens with the finish reason {reason!r}", again)
    if log_probs is not None:
        numbers = isinstance(log_probs, list) and all(type(value) in (int, float) for value in log_probs)
        if not numbers or not all(map(math.isfinite, log_probs)):
            raise place.error("log_probs", "not a list of finite numbers", again)
        if len(log_probs) != len(tokens):
            raise place.error("log_probs", f"{len(log_probs)} numbers for {len(tokens)} tokens", again)
        log_probs = tuple(map(float, log_probs))
    return Rollout(row["key"], row["index"], row["prompt_hash"], tuple(tokens), row["text"], reason, log_probs)
