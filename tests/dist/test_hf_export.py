"""Export from four ranks in several layouts; transformers loads what was written, with the same tensors."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megakd.hf.exporter import ExportTarget, export_model
from megakd.hf.families import Architecture
from megakd.hf.importer import load_parameters
from megakd.hf.pieces import parameter_shapes, stage_shards
from megakd.layout import Layout
from tests.hf_models import architecture, random_tensors, write_model
from tests.ranks import run_ranks, subgroup

_LLAMA = architecture()
_QWEN2 = architecture(family="qwen2", qkv_bias=True, tied_embeddings=False, hidden_size=24, layers=6)
_QWEN3 = architecture(family="qwen3", tied_embeddings=False)


def _import_and_export(source: Path, target: ExportTarget, layout: Layout, virtual: int, spec: str) -> int:
    """On each rank: fill this rank's parameters from `source`, export them; returns the files that it sees."""
    at = layout.coordinates(dist.get_rank())
    neighbours = [tuple(range(start, start + layout.tensor)) for start in range(0, layout.world, layout.tensor)]
    tp_group = [subgroup(ranks) for ranks in neighbours][dist.get_rank() // layout.tensor]
    a = Architecture.read(source)
    shards = stage_shards(
        a,
        tensor_rank=at.tensor,
        tensor_size=layout.tensor,
        pipeline_rank=at.pipeline,
        pipeline_size=layout.pipeline,
        virtual_pipeline=virtual,
        spec=spec,
    )
    chunks = [{name: torch.empty(s) for name, s in parameter_shapes(a, shard).items()} for shard in shards]
    for shard, parameters in zip(shards, chunks, strict=True):
        load_parameters(source, a, shard, parameters)
    if at.data > 0:
        for parameters in chunks:
            for value in parameters.values():
                value.fill_(7.0)  # a copy that must not be written
    export_model(target, a, shards, chunks, layout=layout, at=at, tp_group=tp_group, barrier_group=dist.group.WORLD)
    return len(list(target.directory.iterdir()))


@pytest.mark.parametrize(
    ("a", "layout", "virtual", "spec", "limit"),
    [
        (_LLAMA, Layout(4, tensor=2, pipeline=2), 1, "local", 2**30),
        (_LLAMA, Layout(4, tensor=2, pipeline=2), 2, "te", 6000),
        (_LLAMA, Layout(4, tensor=4), 1, "local", 2**30),
        (_QWEN2, Layout(4, tensor=2), 1, "local", 9000),
        (_QWEN2, Layout(4, pipeline=4), 1, "te", 2**30),
        (_QWEN2, Layout(4, pipeline=2), 2, "local", 2**30),
        (_QWEN3, Layout(4, tensor=2, pipeline=2), 2, "te", 6000),
    ],
)
def test_export_is_free_of_the_layout(tmp_path, a, layout, virtual, spec, limit):
    tensors = random_tensors(a)
    source = write_model(tmp_path / "source", a, tensors, files=2)
    target = ExportTarget(tmp_path / "out", source, torch.float32, limit)
    seen = run_ranks(4, _import_and_export, source, target, layout, virtual, spec)
    assert len(set(seen)) == 1  # complete on every rank when the call returns
    stored = {}
    for path in target.directory.glob("*.safetensors"):
        stored |= load_file(path)
    assert stored.keys() == tensors.keys()
    for name, value in tensors.items():
        assert stored[name].numpy().tobytes() == value.numpy().tobytes(), name
    assert Architecture.read(target.directory) == a


def test_transformers_loads_what_was_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    for a in (_LLAMA, _QWEN2, _QWEN3):
        folder = tmp_path / a.family
        tensors = random_tensors(a)
        source = write_model(folder / "source", a, tensors)
        target = ExportTarget(folder / "out", source, torch.bfloat16, 8000)
        layout = Layout(4, tensor=2, pipeline=2)
        run_ranks(4, _import_and_export, source, target, layout, 1, "local")
        model = transformers.AutoModelForCausalLM.from_pretrained(target.directory)
        state = model.state_dict()
        assert state.keys() - {"lm_head.weight"} == tensors.keys() - {"lm_head.weight"}
        for name, value in tensors.items():
            assert state[name].dtype == torch.bfloat16
            assert torch.equal(state[name], value.bfloat16()), name
        config = json.loads((target.directory / "config.json").read_text())
        assert config == json.loads((source / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
