"""Writing a Hugging Face directory from one process; several ranks are in tests/dist/test_hf_export.py."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import megakd.hf.exporter as exporter
from megakd.errors import ModelError
from megakd.hf.directory import write_safetensors
from megakd.hf.exporter import MAX_SHARD_BYTES, ExportTarget, export_model, plan_files
from megakd.hf.families import Architecture
from megakd.hf.importer import load_parameters
from megakd.hf.pieces import parameter_shapes, stage_shards
from megakd.layout import Layout
from tests.hf_models import architecture, random_tensors, write_model


def _export(target: ExportTarget, a: Architecture, source: Path, spec: str = "local") -> None:
    """Import and export on a single rank."""
    shards = stage_shards(a, tensor_rank=0, tensor_size=1, pipeline_rank=0, pipeline_size=1, spec=spec)
    parameters = [{name: torch.empty(s) for name, s in parameter_shapes(a, shard).items()} for shard in shards]
    for shard, chunk in zip(shards, parameters, strict=True):
        load_parameters(source, a, shard, chunk)
    layout = Layout(1)
    export_model(
        target, a, shards, parameters, layout=layout, at=layout.coordinates(0), tp_group=None, barrier_group=None
    )


def _stored(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in directory.glob("*.safetensors"):
        part = load_file(path)
        assert not part.keys() & tensors.keys()
        tensors |= part
    return tensors


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("spec", ["local", "te"])
@pytest.mark.parametrize("a", [architecture(), architecture(family="qwen2", qkv_bias=True, tied_embeddings=False),
                               architecture(family="qwen3")])
def test_round_trip(tmp_path, a, spec, files):
    tensors = random_tensors(a)
    source = write_model(tmp_path / "source", a, tensors, files)
    largest = MAX_SHARD_BYTES if files == 1 else 8000
    _export(ExportTarget(tmp_path / "out", source, torch.float32, largest), a, source, spec)
    stored = _stored(tmp_path / "out")
    assert stored.keys() == tensors.keys()
    for name, value in tensors.items():
        assert stored[name].dtype == torch.float32
        assert stored[name].numpy().tobytes() == value.numpy().tobytes(), name
    assert (tmp_path / "out" / "model.safetensors").exists() == (files == 1)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((source / name).read_text())
    assert Architecture.read(tmp_path / "out") == a
    # What was written can be the source of the next round.
    _export(ExportTarget(tmp_path / "again", tmp_path / "out", torch.float32, largest), a, tmp_path / "out", spec)
    assert all(torch.equal(_stored(tmp_path / "again")[name], value) for name, value in tensors.items())


def test_files_and_index(tmp_path):
    a = architecture()
    tensors = random_tensors(a)
    source = write_model(tmp_path / "source", a, tensors)
    limit = 8000
    _export(ExportTarget(tmp_path / "out", source, torch.float32, limit), a, source)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * value.numel() for value in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    names = sorted(set(index["weight_map"].values()))
    count = len(names)
    assert names == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)] and count > 2
    for name in names:
        part = load_file(tmp_path / "out" / name)
        assert set(part) == {tensor for tensor, file in index["weight_map"].items() if file == name}
        assert len(part) == 1 or sum(4 * value.numel() for value in part.values()) <= limit
    planned = plan_files(a, 1, 1, torch.float32, limit)
    assert [(file.name, set(file.shapes)) for file in planned] == [
        (name, {t for t, file in index["weight_map"].items() if file == name}) for name in names
    ]


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_plan_has_each_tensor_once(pipeline, virtual):
    a = architecture(tied_embeddings=pipeline == 2)
    for limit in (1, 5000, MAX_SHARD_BYTES):
        files = plan_files(a, pipeline, virtual, torch.bfloat16, limit)
        shapes = [item for file in files for item in file.shapes.items()]
        assert sorted(shapes) == sorted((name, tuple(value.shape)) for name, value in random_tensors(a).items())
        assert {file.stage for file in files} == set(range(pipeline))
        assert len({file.name for file in files}) == len(files)


def test_fewer_layers_and_another_dtype(tmp_path):
    a = architecture()
    tensors = random_tensors(a)
    source = write_model(tmp_path / "source", a, tensors)
    config = json.loads((source / "config.json").read_text())
    del config["torch_dtype"]
    config |= {"dtype": "float32", "layer_types": ["full_attention"] * 4, "use_cache": True}
    (source / "config.json").write_text(json.dumps(config))
    _export(ExportTarget(tmp_path / "out", source, torch.bfloat16), a.with_layers(3), source)
    stored = _stored(tmp_path / "out")
    assert stored.keys() == {name for name in tensors if not name.startswith("model.layers.3.")}
    assert all(torch.equal(value, tensors[name].bfloat16()) for name, value in stored.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {
        "dtype": "bfloat16",
        "num_hidden_layers": 3,
        "layer_types": ["full_attention"] * 3,
    }


def test_an_existing_directory_is_not_replaced(tmp_path):
    a = architecture()
    source = write_model(tmp_path / "source", a, random_tensors(a))
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(ModelError, match="is there already"):
        _export(ExportTarget(source, source, torch.float32), a, source)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_an_interrupted_export_leaves_no_directory_and_the_next_starts_afresh(tmp_path, monkeypatch):
    a = architecture()
    source = write_model(tmp_path / "source", a, random_tensors(a))
    target = ExportTarget(tmp_path / "out", source, torch.float32, 8000)

    def broken(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(exporter, "write_config", broken)
        with pytest.raises(OSError, match="no space"):
            _export(target, a, source)
    assert not target.directory.exists()
    (tmp_path / "out.partial" / "model-00009-of-00009.safetensors").write_bytes(b"left behind")
    _export(target, a, source)
    assert not (tmp_path / "out.partial").exists()
    assert not (target.directory / "model-00009-of-00009.safetensors").exists()


def test_parameters_of_another_shard_are_refused(tmp_path):
    a = architecture()
    source = write_model(tmp_path / "source", a, random_tensors(a))
    (shard,) = stage_shards(a, tensor_rank=0, tensor_size=1, pipeline_rank=0, pipeline_size=1, spec="local")
    layout = Layout(1)
    with pytest.raises(ModelError, match=r"missing embedding\.word_embeddings\.weight"):
        export_model(
            ExportTarget(tmp_path / "out", source, torch.float32),
            a,
            [shard],
            [{}],
            layout=layout,
            at=layout.coordinates(0),
            tp_group=None,
            barrier_group=None,
        )
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_write_safetensors_takes_one_tensor_at_a_time(tmp_path, dtype):
    values = {"b": torch.randn(3, 5).to(dtype), "a": torch.randn(2, 7).to(dtype).t(), "ü": torch.randn(1).to(dtype)}
    path = tmp_path / "x.safetensors"
    sizes = []

    def tensors():
        for value in values.values():
            sizes.append(path.stat().st_size)
            yield value

    write_safetensors(path, {name: tuple(value.shape) for name, value in values.items()}, dtype, tensors())
    assert len(sizes) == 3
    read = load_file(path)
    assert read.keys() == values.keys() and all(torch.equal(read[name], value) for name, value in values.items())
