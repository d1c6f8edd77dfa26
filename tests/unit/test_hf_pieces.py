"""The table of pieces: every Hugging Face element has one owner, and lies where an independent cut puts it."""

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.errors import ConfigError
from megakd.hf.families import Architecture
from megakd.hf.pieces import (
    Shard,
    check_layout,
    chunk_layers,
    head_pieces,
    padded_kv_heads,
    padded_vocab,
    parameter_shapes,
    pieces,
    stage_shards,
)
from tests.hf_models import architecture, cut, random_tensors


@st.composite
def _cases(draw) -> tuple[Architecture, list[Shard]]:
    """An architecture and the shards of all tensor ranks and stages of a layout that it can be cut into."""
    tensor, pipeline = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    virtual = draw(st.integers(1, 3)) if pipeline > 1 else 1
    kv_heads = draw(st.integers(1, 6))
    a = architecture(
        hidden_size=draw(st.integers(1, 5)),
        layers=draw(st.integers(pipeline * virtual, 2 * pipeline * virtual + 1)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 2, 4])),
        ffn_size=tensor * draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 700)),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        family=draw(st.sampled_from(["llama", "qwen3"])),
    )
    check_layout(a, tensor, pipeline, virtual, True, "student")
    spec = draw(st.sampled_from(["local", "te"]))
    shards = [
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
    return a, shards


@settings(max_examples=150, deadline=None)
@given(_cases())
def test_each_element_has_one_primary_owner(case):
    a, shards = case
    owners = {name: np.zeros(tensor.shape, dtype=int) for name, tensor in random_tensors(a).items()}
    for shard in shards:
        for piece in pieces(a, shard):
            assert piece.hf_shape == owners[piece.hf_name].shape
            owners[piece.hf_name][piece.hf_index] += piece.primary
    for name, count in owners.items():
        assert (count == 1).all(), name


@settings(max_examples=150, deadline=None)
@given(_cases())
def test_pieces_fill_the_parameters_as_the_cut_does(case):
    a, shards = case
    tensors = random_tensors(a)
    for shard in shards:
        expected = cut(a, tensors, shard)
        assert parameter_shapes(a, shard) == {name: tuple(tensor.shape) for name, tensor in expected.items()}
        filled = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        times = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        for piece in pieces(a, shard):
            box = tensors[piece.hf_name][piece.hf_index]
            assert tuple(box.shape) == piece.hf_size and box.numel() == piece.elements
            local = filled[piece.parameter].view(piece.local_view)[piece.local_index]
            local.copy_(box.reshape(local.shape))
            assert torch.equal(local.reshape(piece.hf_size), box)
            times[piece.parameter].view(piece.local_view)[piece.local_index] += 1
        for name, tensor in expected.items():
            assert torch.equal(filled[name], tensor), name
            assert times[name].max() <= 1, name


@settings(max_examples=150, deadline=None)
@given(_cases())
def test_layers_follow_the_pipeline(case):
    a, shards = case
    first_rank = [shard for shard in shards if shard.tensor_rank == 0]
    assert sum(shard.embedding for shard in first_rank) == sum(shard.head for shard in first_rank) == 1
    held = sorted(shard.first_layer + layer for shard in first_rank for layer in range(shard.layers))
    assert held == list(range(a.layers))


def test_interleaved_stages():
    a = architecture(layers=8)
    of_stage = [
        stage_shards(
            a, tensor_rank=0, tensor_size=1, pipeline_rank=p, pipeline_size=2, virtual_pipeline=2, spec="local"
        )
        for p in range(2)
    ]
    assert [[(s.first_layer, s.layers, s.embedding, s.head) for s in stage] for stage in of_stage] == [
        [(0, 2, True, False), (4, 2, False, False)],
        [(2, 2, False, False), (6, 2, False, True)],
    ]


@pytest.mark.parametrize(("sizes", "expected"), [
    ((126, 4, 1), (31, 32, 32, 31)),
    ((126, 8, 1), (15, *[16] * 6, 15)),
    ((126, 16, 1), (7, *[8] * 14, 7)),
    ((126, 8, 8), (1, *[2] * 62, 1)),
    ((5, 2, 1), (3, 2)),  # the head's part is short before the embedding's
    ((10, 7, 1), (1, 1, 1, 2, 2, 2, 1)),  # then those from the front
    ((7, 2, 3), (1, 1, 1, 1, 2, 1)),  # of the last stage from its last part on
    ((80, 8, 5), (2,) * 40),
])
def test_where_layers_do_not_divide_first_and_last_part_have_less(sizes, expected):
    """A checkpoint does not say how its model was cut: these may not change."""
    assert chunk_layers(*sizes) == expected


def test_parts_and_stages_differ_by_one_layer_at_most():
    for layers, pipeline, virtual in product(range(1, 40), range(1, 9), range(1, 6)):
        if layers < pipeline * virtual:
            continue
        parts = chunk_layers(layers, pipeline, virtual)
        stages = [sum(parts[stage::pipeline]) for stage in range(pipeline)]
        assert sum(parts) == layers and len(parts) == pipeline * virtual and min(parts) > 0
        assert max(parts) - min(parts) <= 1 and max(stages) - min(stages) <= 1
        assert parts[-1] == min(parts) and stages[-1] == min(stages)


def test_a_tied_head_on_another_stage_is_a_copy():
    a = architecture()
    last = Shard(tensor_rank=0, tensor_size=1, first_layer=2, layers=2, embedding=False, head=True, spec="local")
    (head,) = [piece for piece in pieces(a, last) if piece.parameter == "output_layer.weight"]
    assert head.hf_name == "model.embed_tokens.weight" and not head.primary
    assert [piece.hf_name for piece in head_pieces(architecture(tied_embeddings=False), 0, 1)] == ["lm_head.weight"]


def test_padding():
    assert [padded_vocab(v, t) for v, t in ((128, 1), (129, 1), (49152, 2), (49153, 4))] == [128, 256, 49152, 49664]
    assert [padded_kv_heads(k, t) for k, t in ((3, 1), (3, 2), (8, 16))] == [3, 4, 16]


@pytest.mark.parametrize(
    ("sizes", "field", "words"),
    [
        ((5, 1, 1, True), "teacher.parallel.tensor", ["intermediate_size 24", "1, 2, 3, 4, 6, 8"]),
        ((2, 1, 1, False), "teacher.parallel.tensor", ["teacher.parallel.pad_heads=true", "2 zero heads = 33%"]),
        ((4, 1, 1, False), "teacher.parallel.tensor", ["2 zero heads = 33%", "one of 1, 3"]),
        ((6, 1, 1, False), "teacher.parallel.tensor", ["6 zero heads = 100%"]),
        ((1, 5, 1, False), "teacher.parallel.pipeline", ["the model has 4.", "at most 4"]),
        ((1, 2, 3, False), "teacher.parallel.pipeline x teacher.parallel.virtual_pipeline", ["the model has 4."]),
        ((1, 1, 2, False), "teacher.parallel.virtual_pipeline", ["pipeline > 1"]),
    ],
)
def test_layouts_that_are_refused(sizes, field, words):
    with pytest.raises(ConfigError) as error:
        check_layout(architecture(), *sizes, "teacher")
    assert error.value.field == field
    for word in words:
        assert word in str(error.value)


def test_layouts_that_are_accepted():
    check_layout(architecture(), 3, 2, 2, False, "student")
    check_layout(architecture(), 4, 4, 1, True, "student")


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"family": "qwen3"}])
def test_both_layer_specs_hold_the_same_boxes_under_other_names(changes):
    a, others = architecture(**changes), {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    local, engine = (stage_shards(a, tensor_rank=1, tensor_size=2, pipeline_rank=0, pipeline_size=1, spec=spec)[0]
                     for spec in ("local", "te"))

    def renamed(name: str) -> str:
        layer, own = ".".join(name.split(".")[:3]), ".".join(name.split(".")[3:])
        return f"{layer}.{others[own]}" if own in others else name

    assert parameter_shapes(a, engine) == {renamed(name): shape for name, shape in parameter_shapes(a, local).items()}
    assert pieces(a, engine) == [dataclasses.replace(piece, parameter=renamed(piece.parameter))
                                 for piece in pieces(a, local)]
    assert sum(name.endswith("layer_norm_weight") for name in parameter_shapes(a, engine)) == 2 * a.layers
