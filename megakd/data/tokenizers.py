"""Conversations to token ids, for Hugging Face tokenizers (`tokenizer.json`) and SentencePiece (`tokenizer.model`).

transformers is not imported (it costs seconds a process): the library `tokenizers` reads the same file, and jinja2
renders the chat template with transformers' settings. The ids are those of `AutoTokenizer.apply_chat_template`; tests
compare them.

Prompt and response are tokenised separately. A merge across their border would give them other ids than a model meets
when it generates; separately, the prompt's ids begin every sequence on it, and the ids of rollouts and of training
sequences agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from megakd.data.backends import Backend, HuggingFaceBackend, SentencePieceBackend, read_json
from megakd.data.readers import Message
from megakd.errors import ModelError

TEMPLATE_DATE = datetime(2024, 7, 26)
"""The date that `strftime_now` gives a chat template: Llama 3's own fallback. With today's date a prompt would have
other ids on the day of the rollouts than on the day of the training."""

_QUESTION, _ANSWER = "megakdquestion", "megakdanswer"  # stand-ins that no template holds
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A tokenizer with its chat template.

    Args:
        directory: where it came from, for messages.
        backend: text to ids and back.
        template: the chat template (jinja2).
        special: the named special tokens of the tokenizer's configuration, as the template sees them.
        eos_ids: ids that end a generation, by the model's configuration.

    Attributes:
        vocab_size: highest id + 1 (a model's head may be wider: it is padded).
        closing_token, closing_id: what ends an assistant's turn, by the template.
        stop_ids: the ids that end a generation: the closing token, then the configuration's.
        pad_id: an id to fill batches with.
    """

    def __init__(
        self, directory: Path, backend: Backend, template: str, special: dict[str, str], eos_ids: Sequence[int]
    ):
        self.directory = directory
        self.template = template
        self.vocab_size = max(backend.vocabulary.values()) + 1
        self._backend = backend
        self._special = special
        self._template = _compile(directory, template)
        self._header = self._generation_header()
        self._tail, self._closing, self.closing_token = self._end_of_turn(eos_ids)
        self.closing_id = backend.vocabulary[self.closing_token]
        self.stop_ids = tuple(dict.fromkeys((self.closing_id, *eos_ids)))
        named_pad = special["pad_token"] if "pad_token" in special else self.closing_token
        self.pad_id = backend.vocabulary[named_pad]

    def encode(
        self, prompt_messages: Sequence[Message], response: str | None, *, close: bool
    ) -> tuple[list[int], int]:
        """The ids of a prompt and a response to it.

        The prompt ends with the template's generation prompt. The response is written as the template writes it (some
        templates strip it, or put a blank or an empty thought in front of it).

        Args:
            prompt_messages: a conversation that ends with a user turn.
            response: the answer, or None for the prompt alone.
            close: whether the closing token follows (once: a response that ends with it already gets no second one).

        Returns:
            tokens, and how many of them are the prompt's.

        Raises:
            ModelError: the template refuses the conversation.
        """
        prompt_text = self._render(prompt_messages, generation=True)
        tokens = self._backend.encode(prompt_text)
        prompt_length = len(tokens)
        if prompt_length == 0:
            raise ModelError(f"{self.directory}: the chat template makes an empty text of the prompt")
        if response is not None:
            body = self._response_text(prompt_messages, prompt_text, response)
            closing = self._closing if close and not body.endswith(self.closing_token) else ""
            tokens = tokens + self._encode_response(body + closing)
        return tokens, prompt_length

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text that is no part of a conversation, without a template."""
        return self._backend.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of a response's ids, without special tokens."""
        return self._backend.decode([token for token in tokens if token not in self.stop_ids])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides about ids: vocabulary, rules, template and the special tokens that it writes."""
        vocabulary = sorted(self._backend.vocabulary.items())
        parts = [vocabulary, self._backend.rules, self.template, sorted(self.written.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def written(self) -> dict[str, str]:
        """The special tokens that the template refers to by name."""
        names = jinja2.meta.find_undeclared_variables(self._template.environment.parse(self.template))
        return {name: token for name, token in self._special.items() if name in names}

    # ------------------------------------------------------------------------------------------- the template

    def _render(self, messages: Sequence[Message], *, generation: bool) -> str:
        try:
            return self._template.render(messages=[dict(message) for message in messages], tools=None, documents=None,
                                         add_generation_prompt=generation, **self._special)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ModelError(f"{self.directory}: the chat template refuses the conversation: {error}") from error

    def _generation_header(self) -> str:
        """What the template writes after a question and before the answer; the same for every prompt."""
        return self._render([Message(role="user", content=_QUESTION)], generation=True).rpartition(_QUESTION)[2]

    def _end_of_turn(self, eos_ids: Sequence[int]) -> tuple[str, str, str]:
        """What the template writes after an answer, the part of it up to and with the first token that stops, and that
        token. A template that writes nothing there leaves it to the configuration's end of sequence."""
        turns = [Message(role="user", content=_QUESTION), Message(role="assistant", content=_ANSWER)]
        text = self._render(turns, generation=False)
        if _QUESTION not in text or _ANSWER not in text:
            raise ModelError(f"{self.directory}: the chat template does not write the user's and the assistant's text")
        tail = text.rpartition(_ANSWER)[2]
        by_id = {number: token for token, number in self._backend.vocabulary.items()}
        stops = [by_id[number] for number in eos_ids if number in by_id]
        found = _first_of(tail, self._backend.special_tokens.union(self._special.values(), stops))
        if found is not None:
            return tail, tail[: tail.index(found) + len(found)], found
        if tail.strip() or not stops:
            raise ModelError(f"{self.directory}: the chat template writes {tail!r} after an answer, without a special "
                             "token that ends it. Name the token that does: eos_token in tokenizer_config.json, or "
                             "eos_token_id in generation_config.json")
        return tail, stops[0], stops[0]

    # ------------------------------------------------------------------------------------------- the response

    def _response_text(self, prompt_messages: Sequence[Message], prompt_text: str, response: str) -> str:
        """The response as the template writes it behind the prompt.

        Where the template writes the prompt differently once an answer follows (a system message that moves to the last
        user turn, a generation prompt that opens a thought), the response is taken as it stands.
        """
        answer = Message(role="assistant", content=response)
        whole = self._render([*prompt_messages, answer], generation=False)
        if whole.startswith(prompt_text) and whole.endswith(self._tail):
            return whole[len(prompt_text) : len(whole) - len(self._tail)]
        return response

    def _encode_response(self, text: str) -> list[int]:
        """Ids of a response behind the generation header: tokenizers that mark the beginning of a word by a blank put
        one in front of any text, but here the text goes on. Where a merge would cross the border, it stands alone."""
        header, joint = self._header_ids, self._backend.encode(self._header + text)
        return joint[len(header) :] if joint[: len(header)] == header else self._backend.encode(text)

    @cached_property
    def _header_ids(self) -> list[int]:
        return self._backend.encode(self._header)


def load_tokenizer(directory: str | Path, *, chat_template: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a model directory.

    `tokenizer.json` is used where it is there, `tokenizer.model` (SentencePiece) where it is not. The chat template is
    `chat_template`, or the directory's `chat_template.jinja`, or the one in its `tokenizer_config.json`.

    Args:
        directory: a Hugging Face model directory.
        chat_template: a template's text, or the path of a file that holds it, in place of the directory's own.

    Raises:
        ModelError: files are missing or damaged, there is no template, or the configuration names tokens that the
            tokenizer does not have.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ModelError(f"{directory}: there is no such model directory")
    config = read_json(directory / "tokenizer_config.json")
    if (directory / "tokenizer.json").exists():
        backend: Backend = HuggingFaceBackend(directory / "tokenizer.json")
    elif (directory / "tokenizer.model").exists():
        backend = SentencePieceBackend(directory / "tokenizer.model")
    else:
        names = ", ".join(sorted(entry.name for entry in directory.iterdir())) or "nothing"
        raise ModelError(f"{directory}: no tokenizer.json and no tokenizer.model; it holds {names}. transformers "
                         "writes one: AutoTokenizer.from_pretrained(directory).save_pretrained(directory)")
    special = backend.default_special | _special_tokens(directory, config)
    backend.require(special, config)
    eos_ids = [backend.vocabulary[special["eos_token"]]] if "eos_token" in special else []
    eos_ids += _eos_ids(directory)
    return Tokenizer(directory, backend, _read_template(directory, config, chat_template), special, eos_ids)


def require_same(one: Tokenizer, other: Tokenizer) -> None:
    """Checks that two models read and write the same ids, as every loss over the vocabulary needs.

    Raises:
        ModelError: names both directories and the first difference: size, token, rules or chat template.
    """
    if one.fingerprint == other.fingerprint:
        return
    difference = _first_difference(one, other)
    raise ModelError(f"{one.directory} and {other.directory} have different tokenizers: {difference}. Distillation "
                     "over the vocabulary needs one tokenizer and one chat template for all models")


def _first_difference(one: Tokenizer, other: Tokenizer) -> str:
    if one.vocab_size != other.vocab_size:
        return f"vocabulary sizes {one.vocab_size} and {other.vocab_size}"
    ours, theirs = one._backend.vocabulary.items(), other._backend.vocabulary.items()
    if ours != theirs:
        number = min(number for _, number in ours ^ theirs)
        names = [[token for token, its in items if its == number] for items in (ours, theirs)]
        return f"id {number} is {names[0][0] if names[0] else None!r} and {names[1][0] if names[1] else None!r}"
    if one._backend.rules != other._backend.rules:
        return "the vocabulary is the same, but merges, normalizer, pre-tokenizer or added tokens' flags differ"
    if one.template != other.template:
        at = next(i for i in range(len(other.template) + 1) if one.template[i : i + 1] != other.template[i : i + 1])
        return (f"the chat templates differ from character {at}: {one.template[at : at + 40]!r} and "
                f"{other.template[at : at + 40]!r}; give both models one chat template")
    return f"the chat template writes the special tokens {one.written} in the first and {other.written} in the second"


# ----------------------------------------------------------------------------------------------- files of a directory

class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's text in some templates; here it is written as it is."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True)).set_lineno(line)


def _compile(directory: Path, template: str) -> jinja2.Template:
    """Compiles a chat template with transformers' settings, in a sandbox: it comes with a model, not from us."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock])

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ModelError(f"{directory}: the chat template is not valid jinja2: {error}") from error


def _first_of(text: str, tokens: Iterable[str]) -> str | None:
    """The token that comes first in a text, the longest of those that begin there."""
    found = [(text.index(token), -len(token), token) for token in tokens if token and token in text]
    return min(found)[2] if found else None


def _special_tokens(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """The named special tokens; `special_tokens_map.json` fills what `tokenizer_config.json` leaves open."""
    values: dict[str, Any] = {}
    for source in (read_json(directory / "special_tokens_map.json"), config):
        values.update((name, source[name]) for name in _SPECIAL_NAMES if name in source and source[name] is not None)
    return {name: value["content"] if isinstance(value, dict) else value for name, value in values.items()}


def _eos_ids(directory: Path) -> list[int]:
    """The ids that end a generation, of `generation_config.json`, or of `config.json` where that is not there."""
    for name in ("generation_config.json", "config.json"):
        content = read_json(directory / name)
        if "eos_token_id" in content and content["eos_token_id"] is not None:
            value = content["eos_token_id"]
            return list(value) if isinstance(value, list) else [value]
    return []


def _read_template(directory: Path, config: dict[str, Any], given: str | Path | None) -> str:
    if isinstance(given, Path) or (given is not None and "{" not in given):  # a template's text always has braces
        if not Path(given).is_file():
            raise ModelError(f"{given}: there is no such chat template file")
        return Path(given).read_text(encoding="utf-8")
    if given is not None:
        return given
    if (directory / "chat_template.jinja").exists():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    template = config["chat_template"] if "chat_template" in config else None
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named["default"] if "default" in named else None
    if template is None:
        raise ModelError(f"{directory}: the model has no chat template. Give one as chat_template (a file or its text)")
    return template
