"""Score files: what is written is what is read, and scores of other rollouts are refused."""

from __future__ import annotations

import json

import pytest

from megakd.data.scores import Score, ScoresHeader, read_scores, write_scores
from megakd.errors import DataError
from megakd.manifest import hash_path

SCORES = [Score("a.jsonl:1", 0, -1.5, -0.5, -2.5), Score("a.jsonl:1", 1, None, None, -3.0)]


@pytest.fixture
def files(tmp_path):
    """(scores, rollouts)"""
    rollouts = tmp_path / "rollouts.jsonl"
    rollouts.write_text("{}\n")
    file = tmp_path / "scores.jsonl"
    write_scores(file, ScoresHeader("weights", hash_path(rollouts), {"likelihood_weight": 0.0}), SCORES)
    return file, rollouts


def refused(file, rollouts) -> str:
    with pytest.raises(DataError) as error:
        read_scores(file, rollouts)
    return str(error.value)


def test_what_is_written_is_read(files):
    assert read_scores(*files) == {("a.jsonl:1", 0): -1.5, ("a.jsonl:1", 1): None}


def test_scores_of_other_rollouts_are_refused(files):
    files[1].write_text('{"more": 1}\n')
    assert "field 'rollouts': these are scores of other rollouts than" in refused(*files)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[1:], "not the header of a scores file"),
        (lambda lines: lines[:-1], "1 scores, but the header says 2"),
        (lambda lines: [*lines[:2], lines[1]], "1 scores, but the header says 2"),
        (lambda lines: [lines[0], {**lines[1], "score": "x"}], "scores.jsonl:2: field 'score': 'x' is not a finite"),
        (lambda lines: [lines[0], {"key": "a"}], "scores.jsonl:2: field 'index': missing"),
    ],
)
def test_a_damaged_file_is_refused(change, words, files):
    lines = change([json.loads(line) for line in files[0].read_text().splitlines()])
    files[0].write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert words in refused(*files)
