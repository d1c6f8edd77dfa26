"""Rows of data files, with the place of each.

JSON lines (`.jsonl`, `.jsonl.gz`), JSON lists (`.json`, `.json.gz`) and Parquet (`.parquet`), or folders of them. Every
row comes with a `Place`, so that whatever is found wrong with it later can be said with file and line.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_SHOWN = 8  # names that a message lists before it says how many more there are
_READ_ERRORS = (OSError, EOFError, zlib.error)  # gzip.BadGzipFile is an OSError


@dataclass(frozen=True)
class Place:
    """Where a row stands: its file and its line from 1 (the number of the row in JSON lists and Parquet)."""

    file: Path
    line: int

    @property
    def key(self) -> str:
        """The row's name in messages and artefacts: "pairs.jsonl:17"."""
        return f"{self.file.name}:{self.line}"

    def error(self, field: str | None, problem: str, fix: str) -> DataError:
        """The error to raise about this row."""
        return DataError(self.file, self.line, field, problem, fix)


def list_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The data files that `paths` stand for: files as given, a folder's files sorted by name.

    Raises:
        DataError: a path that is not there (the message says what is), a folder without data files, an unknown suffix.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    files: list[Path] = []
    for path in map(Path, paths):
        files.extend(_folder_files(path) if path.is_dir() else [_checked_file(path)])
    if not files:
        raise DataError("<none>", None, None, "no data file is given", "Name at least one file or folder")
    return files


def read_rows(file: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The rows of one file, in its order, each a JSON object.

    Raises:
        DataError: an empty or damaged file, a line that is not UTF-8, not JSON or not an object.
    """
    empty = True
    for place, row in _READERS[_suffix(file)](file):
        if not isinstance(row, dict):
            raise place.error(None, f"the row is {type_name(row)}, not an object", 'Write {"prompt": ..., ...}')
        empty = False
        yield place, row
    if empty:
        raise DataError(file, None, None, "the file has no rows", "Remove it from the list, or fill it")


def describe_names(names: Iterable[str]) -> str:
    """A short list of names for a message."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) + more) if names else "nothing"


# ----------------------------------------------------------------------------------------------- which files

def _suffix(file: Path) -> str | None:
    matching = [suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)]
    return matching[0] if matching else None


def _checked_file(path: Path) -> Path:
    if not path.exists():
        raise _missing(path)
    if _suffix(path) is None:
        raise DataError(path, None, None, f"unknown kind of file {path.suffix!r}", f"Use one of {', '.join(SUFFIXES)}")
    return path


def _missing(path: Path) -> DataError:
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    fix = f"{folder}/ holds {describe_names(names)}"
    return DataError(path, None, None, "there is no such file or folder", fix)


def _folder_files(folder: Path) -> list[Path]:
    files = [entry for entry in sorted(folder.iterdir()) if entry.is_file() and _suffix(entry) is not None]
    if files and not (folder / "state.json").exists():
        return files
    names = describe_names(sorted(entry.name for entry in folder.iterdir()))
    if (folder / "state.json").exists():
        raise DataError(folder, None, None, "a folder written by datasets.save_to_disk (Arrow files)",
                        "Write it as Parquet: load_from_disk(folder).to_parquet(file)")
    raise DataError(folder, None, None, f"the folder holds no data file but {names}", f"Use {', '.join(SUFFIXES)}")


# ----------------------------------------------------------------------------------------------- one kind each

def _read_json_lines(file: Path) -> Iterator[tuple[Place, Any]]:
    opener = gzip.open if file.name.lower().endswith(".gz") else open
    with _reading(file), opener(file, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if raw.strip():
                place = Place(file, number)
                yield place, _parse(_decode(raw, place, first=number == 1), place)


def _read_json_list(file: Path) -> Iterator[tuple[Place, Any]]:
    with _reading(file):
        data = file.read_bytes()
        raw = gzip.decompress(data) if file.name.lower().endswith(".gz") else data
    if not raw.strip():
        return
    whole = Place(file, 1)
    rows = _parse(_decode(raw, whole, first=True), whole)
    if not isinstance(rows, list):
        raise DataError(file, None, None, f"the file holds {type_name(rows)}, not a list of rows",
                        "Write [row, row, ...], or name a file with one row a line .jsonl")
    for number, row in enumerate(rows, start=1):
        yield Place(file, number), row


def _read_parquet(file: Path) -> Iterator[tuple[Place, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(file, None, None, "reading Parquet needs pyarrow", "pip install pyarrow") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield Place(file, number), row
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(file, None, None, f"not readable as Parquet after row {number}: {error}",
                        "Write it again") from error


_READERS = {".jsonl": _read_json_lines, ".jsonl.gz": _read_json_lines, ".json": _read_json_list,
            ".json.gz": _read_json_list, ".parquet": _read_parquet}


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except _READ_ERRORS as error:
        raise DataError(file, None, None, f"not readable: {error}", "Check permissions, or fetch it again") from error


def _decode(raw: bytes, place: Place, *, first: bool) -> str:
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{raw[error.start]:02x} at position {error.start} is not UTF-8"
        raise place.error(None, byte, "Convert the file to UTF-8") from error


def _parse(text: str, place: Place) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        problem = f"not JSON: {error.msg} at {where}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        problem = f"not JSON that can be read: {error}"
    raise place.error(None, problem, "Write one JSON object a line (.jsonl), or a list of them (.json)")


def type_name(value: Any) -> str:
    """What a JSON value is, in words."""
    for kind, name in _TYPE_NAMES:
        if isinstance(value, kind):
            return name
    return f"a {type(value).__name__}"


_TYPE_NAMES = ((type(None), "null"), (bool, "a boolean"), ((int, float), "a number"), (str, "a string"),
               (list, "a list"), (dict, "an object"))
