"""Rollout files: what is written is what is read, and nothing else is read."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from megakd.data.artefacts import Rollout, RolloutsHeader, prompt_hash, read_rollouts, write_rollouts
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import DataError
from tests.tiny_tokenizer import PLAIN, write_tokenizer

ROLLOUTS = [
    Rollout("a.jsonl:1", 0, prompt_hash((1, 2)), (7, 8, 5), "two\nlines é \u2028", "stop", (-0.5, -1.25, -0.125)),
    Rollout("a.jsonl:2", 0, prompt_hash((1, 2)), (7, 8), "cut", "length", None),
    Rollout("a.jsonl:2", 1, prompt_hash((1, 2)), (9, 5), "another", "stop", None),
    Rollout("a.jsonl:3", 0, prompt_hash((1, 3)), (), "", "left_out", None),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def header(tokenizer):
    return RolloutsHeader("weights", tokenizer.fingerprint, {"temperature": 0.0, "seed": 1})


def refused(call, *args, **kwargs) -> str:
    with pytest.raises(DataError) as error:
        call(*args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize("name", ["rollouts.jsonl", "rollouts.jsonl.gz"])
def test_what_is_written_is_read(name, tmp_path, tokenizer, header):
    file = tmp_path / "stage" / name
    write_rollouts(file, header, ROLLOUTS)
    read = read_rollouts(file, tokenizer, keys=["a.jsonl:1", "a.jsonl:3"])
    first, second, third, fourth = ROLLOUTS
    assert read == (header, {first.key: (first,), second.key: (second, third), fourth.key: (fourth,)})
    assert [entry.name for entry in file.parent.iterdir()] == [name]


def test_a_hash_is_of_the_ids():
    assert prompt_hash([1, 23]) == prompt_hash((1, 23)) != prompt_hash([12, 3])
    assert len(prompt_hash([])) == 16


def test_rows_without_a_rollout_are_named(tmp_path, tokenizer, header):
    write_rollouts(tmp_path / "r.jsonl", header, ROLLOUTS)
    message = refused(read_rollouts, tmp_path / "r.jsonl", tokenizer, keys=[f"a.jsonl:{n}" for n in range(2, 6)])
    assert "no rollout for 2 of 4 rows: a.jsonl:4, a.jsonl:5" in message


def test_another_tokenizer_is_refused(tmp_path, tokenizer, header):
    write_rollouts(tmp_path / "r.jsonl", header, ROLLOUTS)
    other = load_tokenizer(write_tokenizer(tmp_path / "other", template=PLAIN))
    message = refused(read_rollouts, tmp_path / "r.jsonl", other)
    for word in (tokenizer.fingerprint[:12], other.fingerprint[:12], str(tmp_path / "other")):
        assert word in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[1:], "not the header of a rollouts file"),
        (lambda lines: lines[:-1], "3 rollouts, but the header says 4: the file is cut"),
        (lambda lines: [*lines[:2], *lines[1:3]], "r.jsonl:3: field 'index': response 0 of 'a.jsonl:1' where 1 is due"),
        (lambda lines: [{**lines[0], "format": "megakd rollouts 1"}, *lines[1:]], "not the header"),
    ],
)
def test_a_damaged_file_is_refused(change, words, tmp_path, tokenizer, header):
    file = tmp_path / "r.jsonl"
    write_rollouts(file, header, ROLLOUTS)
    lines = change([json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]])
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert words in refused(read_rollouts, file, tokenizer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": 3}, "field 'key': a number, not a string"),
        ({"index": -1}, "field 'index': -1 is not a number from 0"),
        ({"tokens": "7 8"}, "not a list of token ids"),
        ({"tokens": [7, True, 5]}, "not a list of token ids"),
        ({"tokens": [7, 8, 10_000]}, "id 10000 is outside the vocabulary"),
        ({"finish_reason": "eos"}, "'eos' is none of stop, length, left_out"),
        ({"finish_reason": "left_out"}, "3 tokens with the finish reason 'left_out'"),
        ({"tokens": [], "log_probs": [], "finish_reason": "length"}, "0 tokens with the finish reason 'length'"),
        ({"log_probs": [-1.0]}, "1 numbers for 3 tokens"),
        ({"log_probs": [-1.0, "x", 0.0]}, "not a list of finite numbers"),
        ({"log_probs": [-1.0, -math.inf, 0.0]}, "not a list of finite numbers"),
        ({"text": None}, "field 'text': null, not a string"),
    ],
)
def test_a_damaged_row_is_refused(change, words, tmp_path, tokenizer, header):
    file = tmp_path / "r.jsonl"
    write_rollouts(file, header, ROLLOUTS)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    lines[1].update(change)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = refused(read_rollouts, file, tokenizer)
    assert message.startswith(f"{file}:2: ") and words in message


def test_nothing_is_written_that_could_not_be_read(tmp_path, header):
    file = tmp_path / "r.jsonl"
    again = refused(write_rollouts, file, header, [*ROLLOUTS, ROLLOUTS[2]])
    assert "field 'index': response 1 of 'a.jsonl:2' where 2 is due" in again
    assert "not a list of finite numbers" in refused(
        write_rollouts, file, header, [replace(ROLLOUTS[0], log_probs=(math.nan, 0.0, 0.0))])
    assert ".jsonl" in refused(write_rollouts, tmp_path / "r.txt", header, ROLLOUTS)
    assert list(tmp_path.iterdir()) == []
