"""Stage folders: complete or absent, skipped when they match, refused when they do not."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megakd import manifest as m
from megakd.errors import ConfigError, DataError

CONFIG = {"optimizer": {"lr": 1e-5, "steps": 10}, "roles": ["student", "teacher"]}
INPUTS = {"pairs.jsonl": "a" * 64, "models/reference": "b" * 64}


def _manifest(**changes) -> m.Manifest:
    values = {"stage": "adpa", "kind": "distill", "fingerprint": m.stage_fingerprint("distill", CONFIG, INPUTS),
              "inputs": INPUTS, "config": CONFIG, "versions": m.versions(), "layout": {"student": {"tensor": 2}},
              "ranks": 2, "started": "2026-01-01T00:00:00Z", "finished": "2026-01-01T00:01:00Z", "seconds": 60.0,
              "tokens": 1000, "metrics": {"loss": 0.5}}
    return m.Manifest(**{**values, **changes})


def test_fingerprint_depends_on_the_content_alone():
    one, other = {"a": 1, "b": {"c": [1, 2], "d": None}}, {"b": {"d": None, "c": (1, 2)}, "a": 1}
    assert m.fingerprint(one) == m.fingerprint(other)
    assert m.fingerprint({"a": 1}) != m.fingerprint({"a": 1.5}) != m.fingerprint({"a": "1"})
    assert re.fullmatch("[0-9a-f]{64}", m.fingerprint({"name": "é"}))
    with pytest.raises(TypeError, match="not JSON serializable"):
        m.fingerprint({"path": Path("x")})
    with pytest.raises(ValueError, match="Out of range float"):
        m.fingerprint({"lr": float("nan")})


def test_hash_path_sees_content_and_names(tmp_path, monkeypatch):
    for name, text in [("a/x.txt", "one"), ("a/sub/y.txt", "two"), ("b/x.txt", "one"), ("b/sub/y.txt", "two")]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    first = m.hash_path(tmp_path / "a")
    assert first == m.hash_path(str(tmp_path / "b"))
    (tmp_path / "b/sub/y.txt").rename(tmp_path / "b/sub/z.txt")
    assert first != m.hash_path(tmp_path / "b")
    (tmp_path / "a/x.txt").write_text("ONE")
    assert first != m.hash_path(tmp_path / "a")
    monkeypatch.setattr(m, "_SAMPLED_ABOVE", 1000)
    monkeypatch.setattr(m, "_SAMPLE_BYTES", 10)
    big = tmp_path / "big"
    seen = set()
    for content in [bytes(2000), bytes(2001), bytes(1999) + b"x", b"x" + bytes(1999)]:
        big.write_bytes(content)
        seen.add(m.hash_path(big))
    assert len(seen) == 4


def test_room_is_asked_of_the_nearest_existing_folder(tmp_path):
    m.require_room(tmp_path / "not" / "yet", 1, "one byte")
    message = r"output = .*not/yet.*3 models need 1073741824.0 GiB, and its disk has [\d.]+ [GM]iB free"
    with pytest.raises(ConfigError, match=message):
        m.require_room(tmp_path / "not" / "yet", 2**60, "3 models")


def test_manifest_round_trip_and_unreadable_ones(tmp_path):
    assert m.Manifest.read(tmp_path) is None
    _manifest().write(tmp_path)
    assert m.Manifest.read(tmp_path) == _manifest()
    path = tmp_path / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "seconds"}))
    with pytest.raises(DataError, match=r"manifest\.json: has the fields .*Remove the stage's folder"):
        m.Manifest.read(tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: is not JSON"):
        m.Manifest.read(tmp_path)


def test_a_stage_is_skipped_run_or_refused(tmp_path):
    case = {"stage": "adpa", "kind": "distill", "config": CONFIG, "inputs": INPUTS}
    assert m.finished_stage(tmp_path, **case) is None
    _manifest().write(tmp_path)
    assert m.finished_stage(tmp_path, **case) == _manifest()
    assert m.finished_stage(tmp_path, **{**case, "config": {**CONFIG, "roles": ("student", "teacher")}}) is not None
    other = {**CONFIG, "optimizer": {"lr": 1e-4, "clip": 1.0}}
    with pytest.raises(ConfigError) as caught:
        m.finished_stage(tmp_path, **{**case, "config": other, "inputs": {**INPUTS, "pairs.jsonl": "c" * 64}})
    text = str(caught.value)
    for line in ["config.optimizer.lr: 1e-05 -> 0.0001", "config.optimizer.steps: 10 -> (absent)",
                 "config.optimizer.clip: (absent) -> 1.0", f'inputs.pairs.jsonl: "{"a" * 64}" -> "{"c" * 64}"',
                 "Choose another output folder", "--redo adpa"]:
        assert line in text
    assert "roles" not in text and "models/reference" not in text


def test_differences_of_empty_and_missing():
    assert m.differences({"a": {}}, {"a": {"b": None}}) == ["a: {} -> (absent)", "a.b: (absent) -> null"]
    assert m.differences({"a": 1}, {"a": 1}) == []


def test_versions_name_what_is_installed_and_import_nothing():
    found = m.versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3])) and found["torch"] and found["megakd"]
    code = "import sys, megakd.manifest as m; m.versions(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(Path(m.__file__).parents[1])})
    assert done.stdout == "False\n"


def test_fields_are_the_documented_ones():
    assert {field.name for field in dataclasses.fields(m.Manifest)} == {
        "stage", "kind", "fingerprint", "inputs", "config", "versions", "layout", "ranks", "started", "finished",
        "seconds", "tokens", "metrics"}
