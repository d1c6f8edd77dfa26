"""Signals on disk: what is written is what is read in any order, and what is cut, foreign or changed is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from megakd.batch import Group, Kind, Sample
from megakd.data.signals import (
    Column,
    Entry,
    Name,
    ShardWriter,
    SignalsReader,
    Source,
    named_samples,
    shard_name,
    tokens_hash,
    write_index,
)
from megakd.errors import DataError

SOURCE = Source({"kind": "top_k", "k": 3, "at": None}, "weights", "tokenizer", {"rollouts": "hash"})
GROUPS = [
    Group("a.jsonl:1", (Sample((1, 2, 3, 4), 2, Kind.CHOSEN), Sample((1, 2, 9), 2, Kind.REJECTED))),
    Group("b\u2028\r\n.jsonl:1", (Sample((5, 6, 7, 8, 9), 1, Kind.ROLLOUT), Sample((5,), 1, Kind.ROLLOUT),
                                  Sample((5, 5), 1, Kind.ROLLOUT))),
]
COLUMNS = {
    "hidden": {"hidden": Column(torch.bfloat16, 5)},
    "tokens": {"log_probs": Column(torch.float32, 1)},
    "listed": {"ids": Column(torch.int32, 3), "log_probs": Column(torch.float32, 3)},
}


def values_of(name: Name, sample: Sample, columns: dict[str, Column]) -> dict[str, torch.Tensor]:
    """Numbers that an answer's name and the column decide."""
    rows = len(sample.tokens) - sample.prompt_length
    start = 100 * int(name.kind) + 10 * name.index
    return {key: (start + torch.arange(rows)[:, None] + torch.arange(column.width) / 8).to(column.dtype)
            for key, column in columns.items()}


@pytest.fixture(params=COLUMNS)
def columns(request) -> dict[str, Column]:
    return COLUMNS[request.param]


@pytest.fixture
def folder(tmp_path, columns):
    """Two shards; the second has the first group."""
    entries = []
    for shard, group in enumerate(reversed(GROUPS)):
        named = list(named_samples(group))
        rows = sum(len(sample.tokens) - sample.prompt_length for _, sample in named)
        writer, start = ShardWriter(tmp_path / shard_name(shard), columns, rows), 0
        for name, sample in named:
            values = values_of(name, sample, columns)
            writer.append(values)
            count = len(sample.tokens) - sample.prompt_length
            entries.append(Entry(name, tokens_hash(sample), shard, start, count))
            start += count
        writer.close()
    write_index(tmp_path, SOURCE, columns, entries)
    return tmp_path


def test_what_is_written_is_read_in_any_order(folder, columns):
    reader = SignalsReader(folder)
    assert reader.source == SOURCE and reader.columns == columns
    reader.require(GROUPS, tuple(Kind))
    named = [pair for group in GROUPS for pair in named_samples(group)]
    for order in (named, named[::-1], named[2:3], named[3:4], []):
        found = reader.read([reader.entry(name, sample) for name, sample in order])
        for key, column in columns.items():
            nothing = torch.empty(0, column.width, dtype=column.dtype)
            right = torch.cat([nothing, *(values_of(*pair, columns)[key] for pair in order)])
            assert torch.equal(found[key], right) and found[key].dtype == column.dtype
    assert str(named[1][0]) == "row a.jsonl:1, rejected answer 0"
    assert named[-1][0] == Name(GROUPS[1].key, Kind.ROLLOUT, 2)


def test_shards_are_safetensors(folder, columns):
    for shard, rows in ((0, 5), (1, 3)):
        tensors = load_file(folder / shard_name(shard))
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
            name: (column.dtype, (rows, column.width)) for name, column in columns.items()}


def test_a_shard_without_rows(tmp_path, columns):
    writer = ShardWriter(tmp_path / "empty.safetensors", columns, 0)
    writer.close()
    assert {len(tensor) for tensor in load_file(tmp_path / "empty.safetensors").values()} == {0}


def test_a_shard_takes_the_rows_that_it_was_made_for(tmp_path, columns):
    rows = {name: torch.zeros(2, column.width) for name, column in columns.items()}
    writer = ShardWriter(tmp_path / "a", columns, 3)
    writer.append(rows)
    with pytest.raises(ValueError, match="after 2 of 3 rows"):
        writer.append(rows)
    with pytest.raises(ValueError, match="2 of 3 rows were written"):
        writer.close()
    with pytest.raises(ValueError, match="of 3 rows of"):
        ShardWriter(tmp_path / "b", columns, 3).append({name: rows[name][:, :0] for name in rows})


def refused(folder) -> str:
    with pytest.raises(DataError) as error:
        SignalsReader(folder).require(GROUPS, tuple(Kind))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_answer_that_was_not_scored_or_otherwise(folder):
    reader = SignalsReader(folder)
    chosen, rejected = GROUPS[0].samples
    for sample in (Sample((1, 2, 3, 5), 2, Kind.CHOSEN), Sample((1, 2, 3, 4), 1, Kind.CHOSEN)):
        with pytest.raises(DataError, match="row a.jsonl:1, chosen answer 0: its tokens differ from those"):
            reader.require([Group("a.jsonl:1", (sample, rejected))], (Kind.CHOSEN,))
    reader.require([Group("a.jsonl:1", (sample, rejected))], (Kind.REJECTED,))
    with pytest.raises(DataError, match="row a.jsonl:2, chosen answer 0 was not scored"):
        reader.require([Group("a.jsonl:2", (chosen,))], (Kind.CHOSEN,))
    with pytest.raises(DataError, match="row a.jsonl:1, rejected answer 1 was not scored"):
        reader.require([Group("a.jsonl:1", (rejected, rejected))], (Kind.REJECTED,))


def test_what_is_cut_or_damaged_is_refused(folder):
    header = json.loads((folder / "header.json").read_text())
    for file, message in (("shard-00001.safetensors", r"has \d+ bytes, its header says"),
                          ("index.jsonl", "is not the one that was written"),
                          ("header.json", "header.json is not that of")):
        content = (folder / file).read_bytes()
        for part in (content[:-3], None):
            (folder / file).unlink()
            if part is not None:
                (folder / file).write_bytes(part)
            no_header = part is None and file == "header.json"
            with pytest.raises(DataError, match="there is no header.json" if no_header else message):
                SignalsReader(folder)
        (folder / file).write_bytes(content)
    for change in ({"format": "megakd signals 0"}, {"columns": {"hidden": ["float8", 3]}}, {"shards": [1]}):
        (folder / "header.json").write_text(json.dumps(header | change))
        assert "header.json is not that of 'megakd signals 1'" in refused(folder)
    (folder / "header.json").write_text(json.dumps({"format": "megakd signals 1"}))
    assert "KeyError('settings')" in refused(folder)
