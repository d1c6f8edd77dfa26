"""Pre-training text: its pieces, their order, and what cannot be read."""

from __future__ import annotations

import json

import pytest

from megakd.batch import Group, Kind, Sample, Step
from megakd.data.texts import read_texts
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import ConfigError, DataError
from tests.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer"))


def write(folder, rows):
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [file]


def test_texts_are_cut_and_every_token_but_a_lone_last_one_is_there(tokenizer, tmp_path):
    texts = ["Boats and kites. " * 5, "x"]
    found = read_texts(write(tmp_path, [{"text": text} for text in texts]), tokenizer, max_length=8, global_batch=2,
                       seed=1)
    whole = tokenizer.encode_text(texts[0])
    assert len(whole) > 16 and tokenizer.decode(whole) == texts[0] and len(tokenizer.encode_text("x")) == 1
    expected = [tuple(whole[start : start + 8]) for start in range(0, len(whole), 8)]
    assert found.pieces == (expected if len(expected[-1]) > 1 else expected[:-1])


def test_each_group_of_a_step_gets_one_piece_and_an_epoch_has_all(tokenizer, tmp_path):
    rows = [{"text": "kites and boats " * number} for number in range(1, 5)]
    texts = read_texts(write(tmp_path, rows), tokenizer, max_length=64, global_batch=2, seed=3)
    count = len(texts.pieces)
    assert count % 2 == 0
    step = Step(tuple(Group(f"row:{n}", (Sample((1, 2, 3), 1, Kind.ROLLOUT),)) for n in range(2)))
    seen = []
    for number in range(count // 2):
        added = texts.beside(step, number)
        for before, after in zip(step.groups, added.groups, strict=True):
            assert after.key == before.key and after.samples[:-1] == before.samples
            assert after.samples[-1].kind is Kind.TEXT and after.samples[-1].prompt_length == 1
            seen.append(after.samples[-1].tokens)
        assert added.counts["text_answers"] == 2
    assert sorted(seen) == sorted(texts.pieces)


@pytest.mark.parametrize(("row", "found"), [({"texts": "a b"}, "missing"), ({"text": 3}, "a number"),
                                            ({"text": "  "}, "a string")])
def test_a_row_without_text_is_named(tokenizer, tmp_path, row, found):
    with pytest.raises(DataError, match=rf"text.jsonl:2: field 'text': {found}"):
        read_texts(write(tmp_path, [{"text": "fine text"}, row]), tokenizer, max_length=8, global_batch=1, seed=1)


def test_fewer_pieces_than_a_step_takes(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="holds 1 pieces"):
        read_texts(write(tmp_path, [{"text": "fine"}]), tokenizer, max_length=8, global_batch=2, seed=1)
    with pytest.raises(DataError, match="no text has two tokens"):
        read_texts(write(tmp_path, [{"text": "x"}]), tokenizer, max_length=8, global_batch=2, seed=1)
