"""Preference data in the formats that are usual, read into one form.

A row is an object with these fields (others are left alone):

- `prompt`: a string (one user turn), or messages `{"role", "content"}` that end with a user turn. It may be missing, or
  be just the first user turn's text, where the responses are whole conversations.
- `chosen`, `rejected`: a string, one assistant message, or a whole conversation that repeats the prompt and ends with
  the response (UltraFeedback, dpo-mix-7k).
- `reference`: a string; the answer of instruction data, which have no preferences.
- `system`: a string, put in front of the prompt where that has no system message.

A field that is null counts as missing. A field that is there is checked even where it is not required, for the prompt
may depend on it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from megakd.data.files import Place, describe_names, list_files, read_rows, type_name
from megakd.errors import DataError

logger = logging.getLogger("megakd")

ROLES = ("system", "user", "assistant")
_MESSAGE_FORM = 'Write {"role": "user" | "assistant" | "system", "content": "text"}'


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt and what belongs to it."""

    place: Place
    prompt: tuple[Message, ...]
    chosen: str | None
    rejected: str | None
    reference: str | None
    answer_field: str = "chosen"
    """Which of its texts is the answer to learn and to compare with (the recipe's `data.answer`)."""

    @property
    def key(self) -> str:
        """The row's name in messages and artefacts: "file name:line"."""
        return self.place.key

    @property
    def answer(self) -> str | None:
        """The text that `answer_field` names."""
        return self.reference if self.answer_field == "reference" else self.chosen


@dataclass(frozen=True)
class Preferences:
    """Rows, and what was read to get them: `read` = `len(rows)` + `identical`."""

    rows: list[PreferenceRow]
    read: int
    identical: int
    """Rows left out because chosen and rejected are the same text: they say nothing (their gradients cancel)."""


def read_preferences(
    paths: str | Path | Sequence[str | Path], *, require: tuple[str, ...] = ("prompt", "chosen", "rejected")
) -> list[PreferenceRow]:
    """The rows of `read_preferences_counted`, for callers to whom the logged count is enough."""
    return read_preferences_counted(paths, require=require).rows


def read_preferences_counted(
    paths: str | Path | Sequence[str | Path], *, require: tuple[str, ...] = ("prompt", "chosen", "rejected")
) -> Preferences:
    """Reads preference rows from files and folders (`files.list_files`), in their order.

    A pair whose chosen and rejected texts are equal is left out, where both are required; one warning says how many.

    Args:
        paths: .jsonl, .jsonl.gz, .json, .json.gz and .parquet files, and folders with such files.
        require: fields that every row must have besides the prompt, of "chosen", "rejected", "reference".

    Raises:
        DataError: the first file or row that cannot be used, with its place, the field and the fix.
    """
    assert set(require) <= {"prompt", "chosen", "rejected", "reference"}, require
    pair_wanted = {"chosen", "rejected"} <= set(require)
    rows: list[PreferenceRow] = []
    identical: list[str] = []
    files = list_files(paths)
    for file in files:
        for place, fields in read_rows(file):
            row = parse_row(place, fields, require)
            if pair_wanted and row.chosen == row.rejected:
                identical.append(row.key)
            else:
                rows.append(row)
    if identical:
        logger.warning("%d of %d pairs left out: chosen and rejected are the same text (%s)",
                       len(identical), len(identical) + len(rows), describe_names(identical))
    if not rows:
        raise DataError(files[0], None, "rejected", "in every pair chosen and rejected are the same text", "Give pairs "
                        "that differ")
    return Preferences(rows, len(rows) + len(identical), len(identical))


def parse_row(place: Place, fields: dict[str, Any], require: tuple[str, ...]) -> PreferenceRow:
    """One row in any of the formats that the module's text lists.

    Raises:
        DataError: what is wrong with it.
    """
    present = {name: value for name, value in fields.items() if value is not None}
    responses = {name: _response(place, name, present[name]) for name in ("chosen", "rejected") if name in present}
    conversations = {name: context for name, (context, _) in responses.items() if context}
    wanted = dict.fromkeys(("prompt", *require))  # there is no row without a prompt
    missing = [name for name in wanted if name not in present and not (name == "prompt" and conversations)]
    if missing:
        raise place.error(missing[0], f"missing; the row has {describe_names(fields)}", "Add it, or rename its column")
    texts = {name: text for name, (_, text) in responses.items()}
    if "reference" in present:
        texts["reference"] = _text(place, "reference", present["reference"])
    prompt = _with_system(place, present, _prompt(place, present, conversations))
    return PreferenceRow(place, prompt, texts.get("chosen"), texts.get("rejected"), texts.get("reference"))


# ----------------------------------------------------------------------------------------------- parts of a row

def _text(place: Place, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise place.error(field, f"{type_name(value)}, not a string", "Write it as a string")
    if not value.strip():
        raise place.error(field, "the text is empty", "Remove the row, or fill it")
    return _checked_unicode(place, field, value)


def _checked_unicode(place: Place, field: str, value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise place.error(field, f"half a surrogate pair (\\u{ord(value[error.start]):04x}) at character {error.start}",
                          "Remove it: no tokenizer can take it") from error
    return value


def _messages(place: Place, field: str, value: list[Any]) -> tuple[Message, ...]:
    """Checks messages one by one, and that a system message comes first only."""
    if not value:
        raise place.error(field, "an empty list of messages", _MESSAGE_FORM)
    messages = []
    for number, message in enumerate(value, start=1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise place.error(field, f"{where} is {type_name(message)}, not an object", _MESSAGE_FORM)
        absent = [name for name in ("role", "content") if name not in message]
        if absent:
            raise place.error(field, f"{where} has no {absent[0]!r}; it has {describe_names(message)}", _MESSAGE_FORM)
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise place.error(field, f"{where} has the unknown role {role!r}", f"Use one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise place.error(field, f"the content of {where} is {type_name(content)}, not a string", _MESSAGE_FORM)
        if role == "system" and number > 1:
            raise place.error(field, f"{where} is a system message", "A system message can only be the first")
        messages.append(Message(role=role, content=_checked_unicode(place, field, content)))
    return tuple(messages)


def _response(place: Place, field: str, value: Any) -> tuple[tuple[Message, ...], str]:
    """The messages in front of a response (none where it stands alone) and its text."""
    if isinstance(value, str):
        return (), _text(place, field, value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise place.error(field, f"{type_name(value)}, not a string or messages", "Write the response as a string")
    messages = _messages(place, field, value)
    if messages[-1]["role"] != "assistant":
        raise place.error(field, f"the last message is the {messages[-1]['role']}'s, not the assistant's",
                          "End the conversation with the response")
    return messages[:-1], _text(place, field, messages[-1]["content"])


def _prompt(
    place: Place, present: dict[str, Any], conversations: dict[str, tuple[Message, ...]]
) -> tuple[Message, ...]:
    """The prompt, from its field and from what the conversations repeat of it."""
    context = _common_context(place, conversations)
    value = present.get("prompt")
    match value:
        case None:
            prompt = context
        case str():
            text = _text(place, "prompt", value)
            prompt = context or (Message(role="user", content=text),)
            first = next((message["content"] for message in prompt if message["role"] == "user"), "")
            if first.strip() != text.strip():
                name = next(iter(conversations))
                raise place.error(name, "the conversation's first user turn is not the prompt",
                                  "Repeat the prompt as it is, or leave the field prompt out")
        case list():
            prompt = _messages(place, "prompt", value)
            if context and context not in (prompt, prompt[1:] if prompt[0]["role"] == "system" else prompt):
                name = next(iter(conversations))
                raise place.error(name, f"the conversation's first {len(context)} messages are not the prompt",
                                  "Repeat the prompt as it is, or give the response alone")
        case _:
            raise place.error("prompt", f"{type_name(value)}, not a string or messages", "Write it as a string")
    if prompt[-1]["role"] != "user":
        raise place.error("prompt", f"it ends with the {prompt[-1]['role']}'s message",
                          "A user turn must come before the response")
    if not prompt[-1]["content"].strip():
        raise place.error("prompt", "the last user turn is empty", "Remove the row, or fill it")
    return prompt


def _common_context(place: Place, conversations: dict[str, tuple[Message, ...]]) -> tuple[Message, ...]:
    """What all conversations have in front of their last message."""
    contexts = list(conversations.values())
    for other in contexts[1:]:
        if other != contexts[0]:
            parting = next(i for i in range(len(other) + 1) if contexts[0][i : i + 1] != other[i : i + 1])
            raise place.error("rejected", f"the conversation parts from chosen's at message {parting + 1}, "
                              f"before the response (of {len(contexts[0]) + 1} and {len(other) + 1} messages)",
                              "Both must repeat one prompt and differ in their last message only")
    return contexts[0] if contexts else ()


def _with_system(place: Place, present: dict[str, Any], prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    if "system" not in present:
        return prompt
    system = present["system"]
    if not isinstance(system, str):
        raise place.error("system", f"{type_name(system)}, not a string", "Write it as a string")
    if not system.strip():  # many sets have an empty one on every row
        return prompt
    if prompt[0]["role"] == "system":
        if prompt[0]["content"] != system:
            raise place.error("system", "the prompt has another system message", "Give one of the two")
        return prompt
    return (Message(role="system", content=_checked_unicode(place, "system", system)), *prompt)
