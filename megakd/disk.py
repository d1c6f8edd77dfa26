"""Files that appear whole or not at all, and are on the disk when they do. Imports no torch."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file that gets its name only when the block ends without an error; a `.gz` name is compressed.

    The data are on the disk before the name is (fsync, then rename), so a reader sees the old or the new file and never
    half of one, even when the machine stops. Its unfinished neighbour has the suffix `.partial`; the next attempt
    writes over it, as one job at a time owns a run folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as raw:
            if path.suffix == ".gz":
                with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as stream:  # same rows, same bytes
                    yield stream
            else:
                yield raw
            raw.flush()
            os.fsync(raw.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)
    sync(path.parent)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Writes UTF-8 by `atomic_writer`."""
    with atomic_writer(path) as stream:
        stream.write(text.encode())


def write_json_atomic(path: str | Path, value: Any) -> None:
    """`write_text_atomic` of readable JSON. NaN, and what JSON has no word for, is refused before that."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sync(path: Path) -> None:
    """Waits until a file's content or a folder's names are on the disk, so that a power cut cannot leave a renamed
    folder with empty files, nor take back a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
