"""Texts to ids and back: the libraries behind `tokenizers.Tokenizer`. Each is imported only where its file is used."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from megakd.errors import ModelError


class Backend(Protocol):
    """Text to ids and back, without any token added at the ends."""

    vocabulary: dict[str, int]
    special_tokens: frozenset[str]
    """Tokens that a text's other characters never make; ends of turns are among them."""
    default_special: dict[str, str]
    """Named special tokens that the tokenizer's own file knows ("eos_token": "</s>")."""
    rules: str
    """All that decides about ids besides the vocabulary, as text to compare."""

    def require(self, special: dict[str, str], config: dict[str, Any]) -> None: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...


class HuggingFaceBackend:
    """A `tokenizer.json`, read by the `tokenizers` library."""

    def __init__(self, file: Path):
        import tokenizers

        self.file = file
        self._library = tokenizers
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception on damaged files
            raise ModelError(f"{file}: not readable as a tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.default_special: dict[str, str] = {}
        self.vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def special_tokens(self) -> frozenset[str]:
        return frozenset(token.content for token in self._added() if token.special)

    def _added(self):
        return self._tokenizer.get_added_tokens_decoder().values()

    def require(self, special: dict[str, str], config: dict[str, Any]) -> None:
        """Takes over the configuration's special tokens as transformers does, and refuses those that it would add."""
        decoder = config["added_tokens_decoder"] if "added_tokens_decoder" in config else {}
        wanted = [(token["content"], int(number)) for number, token in decoder.items()]
        for token, number in wanted + [(token, None) for token in special.values()]:
            if token not in self.vocabulary or number not in (None, self.vocabulary[token]):
                there = "" if number is None else f" as id {number}"
                here = f"as id {self.vocabulary[token]}" if token in self.vocabulary else "has not"
                raise ModelError(f"{self.file.parent}: tokenizer_config.json has the token {token!r}{there}, but "
                                 f"tokenizer.json {here}. Save the tokenizer again with transformers, to mend it")
        self._tokenizer.add_tokens([self._library.AddedToken(**_flags(token)) for token in decoder.values()])
        added = {token.content for token in self._added()}
        self._tokenizer.add_special_tokens([token for token in special.values() if token not in added])

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    @cached_property
    def rules(self) -> str:
        """What the library made of the file, as far as ids depend on it. Settings that are off are left out, and merges
        have one form: files of one tokenizer differ in both by the version that wrote them."""
        content = json.loads(self._tokenizer.to_str())
        model = {key: value for key, value in content["model"].items() if key not in ("vocab", "merges")}
        merges = content["model"]["merges"] if "merges" in content["model"] else []
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
        added = [{**token, "special": None} for token in content["added_tokens"]]
        rules = [model, pairs, added, content["normalizer"], content["pre_tokenizer"]]
        return json.dumps(_set_only(rules), sort_keys=True)


def _flags(token: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an AddedToken, from a configuration's entry."""
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: token[name] for name in names if name in token}


def _set_only(value: Any) -> Any:
    """A JSON value without the fields that are null, false or empty."""
    if isinstance(value, dict):
        return {key: _set_only(item) for key, item in value.items() if item not in (None, False, "")}
    return [_set_only(item) for item in value] if isinstance(value, list) else value


class SentencePieceBackend:
    """A SentencePiece `tokenizer.model`. The control symbols in a text ("</s>" in a chat template) become their ids;
    the texts between are tokenised one by one, as the model's reference code does."""

    def __init__(self, file: Path):
        try:
            import sentencepiece
        except ImportError as error:
            raise ModelError(f"{file}: reading a SentencePiece model needs sentencepiece: pip install sentencepiece"
                             ) from error
        self.file = file
        self._model = model = sentencepiece.SentencePieceProcessor()
        try:
            model.Load(str(file))
        except (RuntimeError, OSError) as error:
            raise ModelError(f"{file}: not readable as a SentencePiece model: {error}. A tiktoken vocabulary of that "
                             "name cannot be used: take the model's tokenizer.json") from error
        pieces = [model.IdToPiece(number) for number in range(model.GetPieceSize())]
        self.vocabulary = {piece: number for number, piece in enumerate(pieces)}
        self._control = {piece: number for piece, number in self.vocabulary.items() if model.IsControl(number)}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")  # (?!) matches nothing
        self.special_tokens = frozenset(self._control)
        ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "pad_token": model.pad_id()}
        self.default_special = {name: pieces[number] for name, number in ids.items() if number >= 0}
        self.rules = hashlib.sha256(file.read_bytes()).hexdigest()

    def require(self, special: dict[str, str], config: dict[str, Any]) -> None:
        """Refuses tokens of the configuration that the model does not have."""
        decoder = config["added_tokens_decoder"] if "added_tokens_decoder" in config else {}
        for token in [*(token["content"] for token in decoder.values()), *special.values()]:
            if token not in self.vocabulary:
                raise ModelError(f"{self.file.parent}: tokenizer_config.json has the token {token!r}, tokenizer.model "
                                 "has not. Save the tokenizer with transformers, as a tokenizer.json")

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = []
        for part in self._pattern.split(text):
            tokens.extend([self._control[part]] if part in self._control else self._model.EncodeAsIds(part))
        return tokens

    def decode(self, tokens: list[int]) -> str:
        return self._model.DecodeIds([token for token in tokens if not self._model.IsControl(token)])


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; an optional file that is not there has nothing to say."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: not a JSON object")
    return content
