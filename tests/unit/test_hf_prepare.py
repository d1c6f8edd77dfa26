"""The quickstart's prepare.py, but for the download and the real conversion (the quickstart itself shows those)."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from megakd.errors import ConfigError
from megakd.hf.families import Architecture
from tests.hf_models import architecture, random_tensors, write_model

_FILE = Path(__file__).parents[2] / "examples" / "quickstart" / "prepare.py"
_SPEC = importlib.util.spec_from_file_location("quickstart_prepare", _FILE)
prepare = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(prepare)


def test_dropped_layers(tmp_path):
    a = architecture(layers=5)
    tensors = random_tensors(a)
    source = write_model(tmp_path / "source", a, tensors)
    prepare.drop_layers(source, tmp_path / "student", [1, 3], {"dropped_layers": [1, 3]})
    student = load_file(tmp_path / "student" / "model.safetensors")
    assert Architecture.read(tmp_path / "student") == a.with_layers(3)
    expected = {name: value for name, value in tensors.items() if not name.startswith("model.layers.")}
    for new, old in enumerate((0, 2, 4)):
        prefix = f"model.layers.{old}."
        its = {name: value for name, value in tensors.items() if name.startswith(prefix)}
        expected |= {name.replace(prefix, f"model.layers.{new}."): value for name, value in its.items()}
    assert student.keys() == expected.keys()
    assert all(student[name].equal(value) for name, value in expected.items())
    assert (tmp_path / "student" / "tokenizer.json").exists()


@pytest.mark.parametrize("dropped", [[4], [-1], [0, 1, 2, 3]])
def test_layers_that_cannot_be_dropped(tmp_path, dropped):
    source = write_model(tmp_path / "source", architecture(), random_tensors(architecture()))
    with pytest.raises(ConfigError, match="--drop-layers"):
        prepare.drop_layers(source, tmp_path / "student", dropped, {})
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_second_call_keeps_what_is_there_and_another_setting_is_refused(tmp_path, monkeypatch):
    made = []

    def convert(gguf, directory, made_from):
        made.append(directory)
        write_model(directory, architecture(), random_tensors(architecture()))
        (directory / prepare.NOTE).write_text(json.dumps(made_from))

    monkeypatch.setattr(prepare, "fetch", lambda cache: cache / "model.gguf")
    monkeypatch.setattr(prepare, "convert", convert)
    for output in ("first", "second", "second"):
        prepare.prepare(tmp_path / output, tmp_path / "cache", [2])
    assert len(made) == 1  # the cache serves the second output
    for output in ("first", "second"):
        assert Architecture.read(tmp_path / output / "reference").layers == 4
        assert Architecture.read(tmp_path / output / "student_start").layers == 3
    with pytest.raises(ConfigError, match=r"student_start.*made from"):
        prepare.prepare(tmp_path / "first", tmp_path / "cache", [1])

    # Interrupted while the student was written: only its partial folder is there.
    (tmp_path / "first" / "student_start").rename(tmp_path / "first" / "student_start.partial")
    prepare.prepare(tmp_path / "first", tmp_path / "cache", [1])
    assert Architecture.read(tmp_path / "first" / "student_start").layers == 3
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["reference", "student_start"]


def test_names_of_gguf_tensors():
    assert prepare.hf_name("token_embd.weight") == "model.embed_tokens.weight"
    assert prepare.hf_name("blk.12.attn_output.weight") == "model.layers.12.self_attn.o_proj.weight"
    a = architecture(layers=1)
    gguf = {f"{stem.format(0)}.weight" for stem in prepare.TENSOR_NAMES}
    assert {prepare.hf_name(name) for name in gguf} == set(random_tensors(a))


def test_rows_of_a_head():
    heads, size = 3, 8
    halves = np.arange(heads * size * 2).reshape(heads * size, 2)
    neighbours = np.empty_like(halves)  # what GGUF holds: row 2i is row i of the first half, 2i + 1 of the second
    for head in range(heads):
        for i in range(size // 2):
            neighbours[head * size + 2 * i] = halves[head * size + i]
            neighbours[head * size + 2 * i + 1] = halves[head * size + size // 2 + i]
    assert (prepare.halves_of_heads(neighbours, heads) == halves).all()
