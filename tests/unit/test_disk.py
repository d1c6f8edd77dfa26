"""Files that appear whole or not at all."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megakd import disk


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "a.jsonl"
    with pytest.raises(KeyboardInterrupt), disk.atomic_writer(file) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert list(file.parent.iterdir()) == []
    file.write_bytes(b"old")
    with disk.atomic_writer(file) as stream:
        stream.write(b"new")
        assert file.read_bytes() == b"old"
    assert file.read_bytes() == b"new" and list(file.parent.iterdir()) == [file]


def test_the_same_content_compresses_to_the_same_bytes(tmp_path):
    for name in ("b.jsonl.gz", "c.jsonl.gz"):
        with disk.atomic_writer(tmp_path / name) as stream:
            stream.write(b"text")
    assert gzip.decompress((tmp_path / "b.jsonl.gz").read_bytes()) == b"text"
    assert (tmp_path / "b.jsonl.gz").read_bytes() == (tmp_path / "c.jsonl.gz").read_bytes()


def test_json_is_old_or_new(tmp_path):
    path = tmp_path / "x.json"
    disk.write_json_atomic(path, {"a": [1, "é"]})
    with pytest.raises(TypeError):
        disk.write_json_atomic(path, {"a": object()})
    with pytest.raises(ValueError):
        disk.write_json_atomic(path, {"a": float("inf")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, "é"]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_cleans_up(tmp_path):
    path = tmp_path / "x.json"
    disk.write_json_atomic(path, {"old": True})
    code = ("import sys, time; from megakd.disk import atomic_writer\n"
            "with atomic_writer(sys.argv[1]) as stream:\n"
            "    stream.write(b'half'); stream.flush(); print('ready', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(Path(disk.__file__).parents[1])})
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert json.loads(path.read_text()) == {"old": True}
    assert {entry.name for entry in tmp_path.iterdir()} == {"x.json", "x.json.partial"}
    disk.write_json_atomic(path, {"new": True})
    assert json.loads(path.read_text()) == {"new": True} and [entry.name for entry in tmp_path.iterdir()] == ["x.json"]
