"""Filling a chunk's parameters from a directory: values, how much is read, and what is refused."""

import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import megakd.hf.importer as importer
from megakd.errors import ModelError
from megakd.hf.directory import tensor_files
from megakd.hf.families import FAMILIES, Architecture
from megakd.hf.importer import check_tied_head, load_head, load_parameters
from megakd.hf.pieces import Shard, padded_vocab, parameter_shapes, pieces, stage_shards
from megakd.hf.random_model import write_random_model
from tests.hf_models import architecture, cut, random_tensors, write_model

# name -> architecture, tensor size, pipeline size, virtual pipeline, spec, files of the source
_CASES = {
    "plain": (architecture(), 1, 1, 1, "local", 1),
    "tied, padded heads": (architecture(layers=5), 2, 2, 1, "local", 1),
    "untied, several files": (architecture(tied_embeddings=False, layers=7), 3, 2, 2, "te", 3),
    "bias, more ranks than groups": (architecture(qkv_bias=True, family="qwen2", kv_heads=2), 4, 1, 1, "local", 2),
    "norms of heads": (architecture(family="qwen3"), 2, 2, 1, "te", 2),
    "ranks with padding alone": (architecture(vocab_size=100, kv_heads=1, heads=2), 3, 1, 1, "te", 1),
}


def _shards(a: Architecture, tensor: int, pipeline: int, virtual: int, spec: str) -> list[Shard]:
    return [
        shard
        for stage in range(pipeline)
        for rank in range(tensor)
        for shard in stage_shards(
            a,
            tensor_rank=rank,
            tensor_size=tensor,
            pipeline_rank=stage,
            pipeline_size=pipeline,
            virtual_pipeline=virtual,
            spec=spec,
        )
    ]


def _empty(a: Architecture, shard: Shard, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Parameters of a shard, all NaN: what is not written shows."""
    return {name: torch.full(shape, math.nan, dtype=dtype) for name, shape in parameter_shapes(a, shard).items()}


@pytest.mark.parametrize("case", _CASES.values(), ids=_CASES)
def test_parameters_are_those_of_an_independent_cut(tmp_path, case):
    a, tensor, pipeline, virtual, spec, files = case
    tensors = random_tensors(a)
    directory = write_model(tmp_path / "model", a, tensors, files)
    for shard in _shards(a, tensor, pipeline, virtual, spec):
        parameters = _empty(a, shard)
        load_parameters(directory, a, shard, parameters)
        for name, expected in cut(a, tensors, shard).items():
            assert torch.equal(parameters[name], expected), (shard, name)


@pytest.mark.parametrize("case", _CASES.values(), ids=_CASES)
def test_whole_to_shards_to_whole(tmp_path, case):
    a, tensor, pipeline, virtual, spec, files = case
    tensors = random_tensors(a)
    directory = write_model(tmp_path / "model", a, tensors, files)
    whole = {name: torch.full_like(value, math.nan) for name, value in tensors.items()}
    for shard in _shards(a, tensor, pipeline, virtual, spec):
        parameters = _empty(a, shard)
        load_parameters(directory, a, shard, parameters)
        for piece in pieces(a, shard):
            local = parameters[piece.parameter].view(piece.local_view)[piece.local_index]
            whole[piece.hf_name][piece.hf_index] = local.reshape(piece.hf_size)
    for name, value in tensors.items():
        assert torch.equal(whole[name], value), name


def test_parameters_that_need_gradients_and_another_dtype(tmp_path):
    a = architecture()
    tensors = random_tensors(a)
    directory = write_model(tmp_path / "model", a, tensors)
    (shard,) = _shards(a, 1, 1, 1, "local")
    parameters = {name: torch.nn.Parameter(value) for name, value in _empty(a, shard, torch.bfloat16).items()}
    load_parameters(directory, a, shard, parameters)
    for name, expected in cut(a, tensors, shard).items():
        assert torch.equal(parameters[name].data, expected.bfloat16()), name


class _CountingFile:
    """A safetensors file that counts the elements that are read from it."""

    def __init__(self, file, read: list[int]):
        self.file, self.read = file, read

    def __enter__(self):
        self.opened = self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def keys(self):
        return self.opened.keys()

    def get_slice(self, name):
        outer, tensor = self, self.opened.get_slice(name)

        class Slice:
            get_shape, get_dtype = tensor.get_shape, tensor.get_dtype

            def __getitem__(self, index):
                part = tensor[index]
                outer.read.append(part.numel())
                return part

        return Slice()


def test_a_rank_reads_only_its_part(tmp_path, monkeypatch):
    a = architecture(kv_heads=6)
    tensors = random_tensors(a)
    directory = write_model(tmp_path / "model", a, tensors, files=2)
    read: list[int] = []
    original = importer.open_tensors
    monkeypatch.setattr(importer, "open_tensors", lambda path: _CountingFile(original(path), read))
    norms = sum(value.numel() for name, value in tensors.items() if "norm" in name)
    total = sum(value.numel() for value in tensors.values())
    for shard in _shards(a, 2, 1, 1, "local"):
        read.clear()
        load_parameters(directory, a, shard, _empty(a, shard))
        assert sum(read) == sum(piece.elements for piece in pieces(a, shard))
    # Of the matrices each of two ranks reads its half; the vocabulary splits at the padded half.
    embedding = a.vocab_size * a.hidden_size
    first_rows = min(padded_vocab(a.vocab_size, 2) // 2, a.vocab_size)
    assert sum(read) == norms + (total - norms - embedding) // 2 + (a.vocab_size - first_rows) * a.hidden_size


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tensor_size", [1, 2, 3])
def test_load_head(tmp_path, tied, tensor_size):
    a = architecture(tied_embeddings=tied)
    tensors = random_tensors(a)
    directory = write_model(tmp_path / "model", a, tensors)
    parts = [load_head(directory, a, rank, tensor_size, torch.float32, "cpu") for rank in range(tensor_size)]
    head = torch.cat(parts)
    assert head.shape == (padded_vocab(a.vocab_size, tensor_size), a.hidden_size)
    assert torch.equal(head[: a.vocab_size], tensors["model.embed_tokens.weight" if tied else "lm_head.weight"])
    assert (head[a.vocab_size :] == 0).all()


def test_refusals(tmp_path):
    a = architecture(tied_embeddings=False)
    tensors = random_tensors(a)
    (shard,) = _shards(a, 1, 1, 1, "local")

    def load(directory: Path, **changes: object) -> None:
        load_parameters(directory, a, shard, _empty(a, shard) | changes)

    with pytest.raises(ModelError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(tmp_path)

    lacking = {name: value for name, value in tensors.items() if name != "lm_head.weight"}
    with pytest.raises(ModelError, match=r"lack lm_head\.weight"):
        load(write_model(tmp_path / "lacking", a, lacking))

    wrong = tensors | {"model.norm.weight": torch.zeros(5)}
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \(5,\); config\.json means \(12,\)"):
        load(write_model(tmp_path / "wrong", a, wrong))

    quantised = tensors | {"model.norm.weight": torch.zeros(12, dtype=torch.int8)}
    with pytest.raises(ModelError, match=r"model\.norm\.weight has dtype I8"):
        load(write_model(tmp_path / "quantised", a, quantised))

    whole = write_model(tmp_path / "whole", a, tensors, files=2)
    with pytest.raises(ModelError, match=r"unknown decoder\.extra"):
        load(whole, **{"decoder.extra": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"final_layernorm\.weight has shape \(3,\)"):
        load(whole, **{"decoder.final_layernorm.weight": torch.zeros(3)})
    with pytest.raises(ModelError, match=r"missing decoder\.final_layernorm\.weight"):
        parameters = _empty(a, shard)
        del parameters["decoder.final_layernorm.weight"]
        load_parameters(whole, a, shard, parameters)

    second = whole / "model-00002-of-00002.safetensors"
    kept = second.read_bytes()
    second.write_bytes(kept[:40])
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors: cannot be read"):
        load(whole)
    save_file({"other": torch.zeros(1)}, second)
    with pytest.raises(ModelError, match="which the index puts there"):
        load(whole)
    second.unlink()
    with pytest.raises(ModelError, match=r"not there: model-00002-of-00002\.safetensors"):
        load(whole)
    (whole / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="not an index"):
        load(whole)


@pytest.mark.skipif("MEGAKD_TEST_MODEL" not in os.environ, reason="MEGAKD_TEST_MODEL names no model directory")
def test_a_real_model_comes_back_from_its_shards():
    directory = Path(os.environ["MEGAKD_TEST_MODEL"])
    a = Architecture.read(directory)
    owned = dict.fromkeys(tensor_files(directory), 0)
    (stored,) = set(tensor_files(directory).values())
    whole = load_file(stored)
    for shard in _shards(a, 2, 2, 1, "local"):
        parameters = _empty(a, shard)
        load_parameters(directory, a, shard, parameters)
        assert not any(value.isnan().any() for value in parameters.values())
        for piece in pieces(a, shard):
            local = parameters[piece.parameter].view(piece.local_view)[piece.local_index]
            assert torch.equal(local.reshape(piece.hf_size), whole[piece.hf_name][piece.hf_index])
            owned[piece.hf_name] += piece.elements if piece.primary else 0
    assert owned == {name: value.numel() for name, value in whole.items()}


def test_a_tied_head_that_the_files_hold_besides(tmp_path, monkeypatch):
    """As Qwen3's smallest models have it: no more is read for it, and another one is refused."""
    monkeypatch.setattr(importer, "_COMPARED_ROWS", 40)
    a = architecture(family="qwen3")
    tensors = random_tensors(a)
    head = tensors["model.embed_tokens.weight"].clone()
    for name, own in {"alone": {}, "same": {"lm_head.weight": head}}.items():
        check_tied_head(write_model(tmp_path / name, a, tensors | own, files=3))
    [whole] = _shards(a, 1, 1, 1, "local")
    load_parameters(tmp_path / "same", a, whole, parameters := _empty(a, whole))
    assert all(torch.equal(parameters[name], expected) for name, expected in cut(a, tensors, whole).items())
    head[-1, -1] += 1
    other = write_model(tmp_path / "other", a, tensors | {"lm_head.weight": head})
    with pytest.raises(ModelError, match="tie_word_embeddings = True, but lm_head.weight .* is not .*false"):
        check_tied_head(other)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_are_of_their_family(tmp_path, family):
    a = architecture(family=family, qkv_bias=FAMILIES[family].qkv_bias, head_dim=2)
    write_random_model(tmp_path, a, seed=1)
    assert Architecture.read(tmp_path) == a
    [whole] = _shards(a, 1, 1, 1, "local")
    load_parameters(tmp_path, a, whole, parameters := _empty(a, whole))
    for name, values in parameters.items():
        assert (values == 1).all() if "layernorm" in name else values.std() == pytest.approx(0.02, rel=0.4), name
