"""What a model says of answers, on disk: rows of numbers a loss position, written in a stream and read in any order.

A folder with
- `header.json`: kind and settings, hashes of the model, the tokenizer and the files that the answers came from, the
  columns (name, dtype, width), and each shard's name, rows and bytes;
- `index.jsonl`: for each answer its row key, kind, number among the prompt's answers of that kind and the hash of its
  tokens; and its shard, first row and number of rows;
- `shard-<number>.safetensors`: one tensor [rows, width] a column.

Nothing in it depends on how a reader cuts or orders its batches: an answer is found by its name and is one run of rows
of memory-mapped files. The folder gets its name when all of it is on disk (`scoring.py`).

Legend: R rows of a shard, T rows of some answers one after the other, W width of a column.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megakd.batch import Group, Kind, Sample
from megakd.disk import atomic_writer, write_json_atomic
from megakd.errors import DataError
from megakd.hf.directory import bytes_of, open_tensors, safetensors_header, tensor_bytes

FORMAT = "megakd signals 1"
HEADER, INDEX = "header.json", "index.jsonl"
MICRO_BATCHES = 4
"""That a replica scores in one step, times its pipeline stages: enough to keep them busy."""
_FIX = "Score again"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int32": torch.int32}


@dataclass(frozen=True)
class Column:
    """One tensor of every shard: [R, width] of a dtype."""

    dtype: torch.dtype
    width: int


@dataclass(frozen=True)
class Name:
    """Which answer: the row that its prompt came from, its kind, and its number among the row's answers of it."""

    key: str
    kind: Kind
    index: int

    def __str__(self) -> str:
        return f"row {self.key}, {self.kind.name.lower().replace('_', ' ')} answer {self.index}"


@dataclass(frozen=True)
class Entry:
    """Where an answer's rows are."""

    name: Name
    tokens: str
    """`tokens_hash` of its sequence."""
    shard: int
    start: int
    rows: int

    def part(self, rows: range) -> Entry:
        """Some of its rows, counted from its first."""
        return replace(self, start=self.start + rows.start, rows=len(rows))


@dataclass(frozen=True)
class Source:
    """What signals were made of."""

    settings: dict[str, Any]
    """The score stage's signal."""
    model: str
    """Hash of the model's directory."""
    tokenizer: str
    """Fingerprint of the run's tokenizer."""
    inputs: dict[str, str]
    """Hashes of further artefacts by the setting that names their stage (`rollouts`, `teacher_answers`, `at`)."""


def tokens_hash(sample: Sample) -> str:
    """A name for a sequence's ids and where its answer begins: 16 hexadecimal digits of their SHA-256."""
    text = f"{sample.prompt_length}:{','.join(map(str, sample.tokens))}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def named_samples(group: Group) -> Iterator[tuple[Name, Sample]]:
    """A group's sequences with their names."""
    seen = dict.fromkeys(Kind, 0)
    for sample in group.samples:
        yield Name(group.key, sample.kind, seen[sample.kind]), sample
        seen[sample.kind] += 1


# -------------------------------------------------------------------------------------------------------------- writing
class ShardWriter:
    """Writes one shard, some rows of all its columns at a time. The number of rows is known beforehand."""

    def __init__(self, path: Path, columns: Mapping[str, Column], rows: int):
        self.columns, self.rows, self.done = columns, rows, 0
        tensors = {name: (column.dtype, (rows, column.width)) for name, column in columns.items()}
        header = safetensors_header(tensors)
        self.starts, offset = {}, len(header)
        for name, (dtype, shape) in tensors.items():
            self.starts[name] = offset
            offset += tensor_bytes(shape, dtype)
        self.file = path.open("wb")
        self.file.write(header)
        self.file.truncate(offset)

    def append(self, values: Mapping[str, Tensor]) -> None:
        """Writes the next rows: [T, W] for each column, on any device."""
        rows = len(next(iter(values.values())))
        for name, column in self.columns.items():
            tensor_TW = values[name].to(column.dtype)
            if tensor_TW.shape != (rows, column.width) or self.done + rows > self.rows:
                raise ValueError(f"{list(tensor_TW.shape)} after {self.done} of {self.rows} rows of {name} {column}")
            self.file.seek(self.starts[name] + self.done * tensor_bytes((column.width,), column.dtype))
            self.file.write(bytes_of(tensor_TW))
        self.done += rows

    def close(self) -> None:
        """Ends the file. Raises ValueError where rows are missing."""
        self.file.close()
        if self.done != self.rows:
            raise ValueError(f"{self.done} of {self.rows} rows were written")


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:05}.safetensors"


def write_index(folder: Path, source: Source, columns: Mapping[str, Column], entries: Sequence[Entry]) -> None:
    """Writes index and header, when the folder's shards are complete."""
    digest = hashlib.sha256()
    with atomic_writer(folder / INDEX) as stream:
        for entry in entries:
            name = entry.name
            line = [name.key, int(name.kind), name.index, entry.tokens, entry.shard, entry.start, entry.rows]
            encoded = json.dumps(line, ensure_ascii=False).encode() + b"\n"
            digest.update(encoded)
            stream.write(encoded)
    shards = [folder / shard_name(shard) for shard in sorted({entry.shard for entry in entries})]
    files = [{"file": path.name, "bytes": path.stat().st_size} for path in shards]
    described = {name: [str(column.dtype).removeprefix("torch."), column.width] for name, column in columns.items()}
    write_json_atomic(folder / HEADER, {"format": FORMAT, **asdict(source), "columns": described, "shards": files,
                                        "answers": len(entries), "index": digest.hexdigest()})


# -------------------------------------------------------------------------------------------------------------- reading
class SignalsReader:
    """Signals on disk. Opening reads header and index; the shards are memory-mapped.

    Raises:
        DataError: there is none, or it is not whole.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / HEADER).is_file():
            raise self._error(f"there is no {HEADER}", "Let the score stage finish")
        try:
            header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
            if header["format"] != FORMAT:
                raise ValueError(f"of the format {header['format']!r}")
            self.source = Source(header["settings"], header["model"], header["tokenizer"], header["inputs"])
            self.columns = {name: Column(_DTYPES[dtype], width) for name, (dtype, width) in header["columns"].items()}
            shards = {folder / shard["file"]: shard["bytes"] for shard in header["shards"]}
        except (ValueError, KeyError, TypeError) as error:
            raise self._error(f"{HEADER} is not that of {FORMAT!r} ({error!r})") from error
        for path, expected in shards.items():
            size = path.stat().st_size if path.is_file() else 0
            if size != expected:
                raise DataError(path, None, None, f"has {size} bytes, its header says {expected}: it is cut", _FIX)
        index = (folder / INDEX).read_bytes() if (folder / INDEX).is_file() else b""
        if hashlib.sha256(index).hexdigest() != header["index"]:
            raise DataError(folder / INDEX, None, None, "is not the one that was written: it is cut or damaged", _FIX)
        self.entries: dict[Name, Entry] = {}
        for line in index.splitlines():
            key, kind, number, tokens, *place = json.loads(line)
            name = Name(key, Kind(kind), number)
            self.entries[name] = Entry(name, tokens, *place)

    def entry(self, name: Name, sample: Sample) -> Entry:
        """Where an answer is.

        Raises:
            DataError: it was not scored, or as other tokens.
        """
        if name not in self.entries:
            raise self._error(f"{name} was not scored", "Score the data, rollouts and kinds of answers of the training")
        entry = self.entries[name]
        if entry.tokens != tokens_hash(sample):
            raise self._error(f"{name}: its tokens differ from those that were scored",
                              "Its row, answer, tokenizer or chat template has changed: score again")
        return entry

    def require(self, groups: Sequence[Group], kinds: Sequence[Kind]) -> None:
        """Refuses what `entry` would, of all answers of the kinds."""
        for group in groups:
            for name, sample in named_samples(group):
                if sample.kind in kinds:
                    self.entry(name, sample)

    def read(self, entries: Sequence[Entry]) -> dict[str, Tensor]:
        """The answers' rows of each column [T, W], one answer after the other, on the CPU."""
        found = {}
        for name, column in self.columns.items():
            nothing = torch.empty(0, column.width, dtype=column.dtype)
            rows = [self._slices[entry.shard, name][entry.start : entry.start + entry.rows] for entry in entries
                    if entry.rows]
            found[name] = torch.cat(rows) if rows else nothing
        return found

    @cached_property
    def _slices(self) -> dict[tuple[int, str], Any]:
        shards = {entry.shard for entry in self.entries.values()}
        files = {shard: open_tensors(self.folder / shard_name(shard)) for shard in shards}
        return {(shard, name): file.get_slice(name) for shard, file in files.items() for name in self.columns}

    def _error(self, problem: str, fix: str = _FIX) -> DataError:
        return DataError(self.folder, None, None, problem, fix)
