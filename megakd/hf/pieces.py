"""Which box of which Hugging Face tensor lies where in a model chunk's parameters. Pure arithmetic; imports no torch.

The importer and the exporter both walk the table of `pieces`, so that they cannot disagree about a layout.

Names of sizes below: H hidden, F local ffn columns, V local vocabulary rows, d head_dim, G local query groups (padded),
R query heads of a group. The parameters are those of a megatron-core GPTModel; its linear_qkv is ordered group by
group, [R query heads, key, value] each, and the tensor ranks hold consecutive groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from megakd.errors import ConfigError
from megakd.hf.families import Architecture

VOCAB_MULTIPLE = 128  # rows of a rank's embedding: a multiple of what tensor cores like


def padded_vocab(vocab_size: int, tensor_size: int) -> int:
    """Rows of the embedding and head over all tensor ranks: the next multiple of 128 x tensor_size."""
    multiple = VOCAB_MULTIPLE * tensor_size
    return -(-vocab_size // multiple) * multiple


def padded_kv_heads(kv_heads: int, tensor_size: int) -> int:
    """Query groups over all tensor ranks: the next multiple of tensor_size.

    A padded group is all zero and inert: its output is zero, and so is the gradient of each of its weights (the value
    and output projections are each other's factors, and both are zero) and its part in the gradients of the norms of
    queries and keys (what they normalise there is zero).
    """
    return -(-kv_heads // tensor_size) * tensor_size


NORMS = {
    "local": ("input_layernorm.weight", "pre_mlp_layernorm.weight"),
    "te": ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
}
"""Layer spec -> a layer's two norms. Its other parameters, the embedding, the final norm and the head have the same
names and shapes in both specs. Transformer Engine's modules have a state besides (`_extra_state`: FP8's scales and
recipe, pickled), which is no parameter and belongs to none of the tensors that a model is read from or written to."""


def spec_of(device: str, *, emulated: bool) -> str:
    """Layer spec on a device: Transformer Engine's on "cuda" (`check_backend` refuses a machine without it), but the
    local one where FP8 is emulated."""
    return "te" if device == "cuda" and not emulated else "local"


@dataclass(frozen=True)
class Shard:
    """Which part of a model one model chunk of one rank holds."""

    tensor_rank: int
    tensor_size: int
    first_layer: int
    layers: int
    embedding: bool
    """The chunk starts with the word embedding (first pipeline stage)."""
    head: bool
    """The chunk ends with the final norm and the LM head (last pipeline stage)."""
    spec: str
    """Layer spec: "local" or "te" (`NORMS`)."""


@dataclass(frozen=True)
class Piece:
    """A box of a Hugging Face tensor and where it lies in a local parameter.

    `parameter.view(local_view)[local_index]` has the elements of the box, in the box's order.
    """

    parameter: str
    local_view: tuple[int, ...]
    local_index: tuple[slice | int, ...]
    hf_name: str
    hf_shape: tuple[int, ...]
    hf_offset: tuple[int, ...]
    hf_size: tuple[int, ...]
    primary: bool
    """True for exactly one owner of each element over all shards of a model."""

    @property
    def hf_index(self) -> tuple[slice, ...]:
        """The box as an index of the Hugging Face tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.hf_offset, self.hf_size, strict=True))

    @property
    def elements(self) -> int:
        """Number of elements in the box."""
        count = 1
        for size in self.hf_size:
            count *= size
        return count


@cache
def chunk_layers(layers: int, pipeline: int, virtual_pipeline: int) -> tuple[int, ...]:
    """Layers of each part of a model, in the order in which a token passes them: the one answer to how a model is cut.
    Stage p holds the parts p, p + pipeline, p + 2 x pipeline, ... (megatron-core's order).

    The parts are equal where the layers divide by their number. Else some have a layer less than the others: first the
    last part, which the head and the loss are with; then the first, with the embedding; then one of each stage from the
    front, where the activations of most micro-batches are held; then a second one of each stage in the same order, and
    so on. So two parts, and two stages, differ by one layer at most.

    A checkpoint does not say how its model was cut: a change of this rule would read those in uneven cuts wrongly.

    Args:
        layers: of the model, at least one for each part (`check_layout`).
        pipeline: stages.
        virtual_pipeline: parts of a stage.
    """
    parts = pipeline * virtual_pipeline
    assert layers >= parts, "check_layout comes first"
    cut = [-(-layers // parts)] * parts
    for number in range(sum(cut) - layers):
        turn, place = divmod(number, pipeline)
        # Of the last stage from its last part backwards.
        part = place - 1 + turn * pipeline if place > 0 else parts - 1 - turn * pipeline
        cut[part] -= 1
    return tuple(cut)


def stage_shards(
    architecture: Architecture,
    *,
    tensor_rank: int,
    tensor_size: int,
    pipeline_rank: int,
    pipeline_size: int,
    virtual_pipeline: int = 1,
    spec: str,
) -> list[Shard]:
    """The model chunks of a rank, in megatron-core's order: chunk c of stage p holds part c * pipeline_size + p."""
    cut = chunk_layers(architecture.layers, pipeline_size, virtual_pipeline)
    firsts = list(accumulate(cut, initial=0))
    return [
        Shard(
            tensor_rank=tensor_rank,
            tensor_size=tensor_size,
            first_layer=firsts[part],
            layers=cut[part],
            embedding=part == 0,
            head=part == len(cut) - 1,
            spec=spec,
        )
        for part in range(pipeline_rank, len(cut), pipeline_size)
    ]


def check_layout(
    architecture: Architecture, tensor: int, pipeline: int, virtual_pipeline: int, pad_heads: bool, field: str
) -> None:
    """Refuse a layout that the model cannot be cut into.

    Args:
        architecture: the model.
        tensor: tensor-parallel size.
        pipeline: pipeline stages.
        virtual_pipeline: model chunks of a stage.
        pad_heads: whether zero query groups may be added.
        field: name of the role's settings, such as `student`.

    Raises:
        ConfigError: naming the setting, the rule and the fix.
    """
    prefix = f"{field}.parallel"
    if architecture.ffn_size % tensor != 0:
        sizes = _divisors(architecture.ffn_size, tensor)
        rule = f"the model's intermediate_size {architecture.ffn_size} must be a multiple of it"
        raise ConfigError(f"{prefix}.tensor", tensor, rule, f"Use one of {sizes}")
    groups, padded = architecture.kv_heads, padded_kv_heads(architecture.kv_heads, tensor)
    if padded != groups and not pad_heads:
        added = (padded - groups) * architecture.heads_per_group
        percent = 100 * added / architecture.heads
        heads = f"{architecture.heads} query heads in {groups} key/value groups"
        fix = (
            f"Set {prefix}.pad_heads=true, which adds {added} zero heads = {percent:.0f}% more attention work and "
            f"changes no result, or use one of {_divisors(groups, tensor)}"
        )
        raise ConfigError(f"{prefix}.tensor", tensor, f"the model's {heads} do not divide by it", fix)
    if virtual_pipeline > 1 and pipeline == 1:
        rule = "an interleaved pipeline needs pipeline > 1"
        raise ConfigError(f"{prefix}.virtual_pipeline", virtual_pipeline, rule, f"Set {prefix}.virtual_pipeline=1")
    parts = pipeline * virtual_pipeline
    if architecture.layers < parts:
        name = f"{prefix}.pipeline" if virtual_pipeline == 1 else f"{prefix}.pipeline x {prefix}.virtual_pipeline"
        rule = f"no part of a pipeline may be without a layer, and the model has {architecture.layers}"
        raise ConfigError(name, parts, rule, f"Use at most {architecture.layers}")


def _divisors(number: int, near: int) -> str:
    """The divisors of `number` that are at most twice `near`, to suggest."""
    return ", ".join(str(size) for size in range(1, 2 * near + 1) if number % size == 0)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def pieces(architecture: Architecture, shard: Shard) -> list[Piece]:
    """All boxes of a chunk, in the model's order. A parameter that is all padding has none."""
    return [piece for parameter in _chunk(architecture, shard) for piece in parameter.pieces]


def parameter_shapes(architecture: Architecture, shard: Shard) -> dict[str, tuple[int, ...]]:
    """Name and shape of each parameter that a chunk must have, in the model's order."""
    return {parameter.name: parameter.shape for parameter in _chunk(architecture, shard)}


def head_pieces(architecture: Architecture, tensor_rank: int, tensor_size: int) -> list[Piece]:
    """The boxes of one tensor rank's LM head alone (the embedding's, where the two are tied): none or one."""
    return _vocabulary("head", "head", architecture, tensor_rank, tensor_size, primary=False).pieces


@dataclass(frozen=True)
class _Parameter:
    name: str
    shape: tuple[int, ...]
    pieces: list[Piece]


def _chunk(a: Architecture, shard: Shard) -> list[_Parameter]:
    parameters = []
    rank, size = shard.tensor_rank, shard.tensor_size
    if shard.embedding:
        name = "embedding.word_embeddings.weight"
        parameters.append(_vocabulary(name, "embedding", a, rank, size, primary=True))
    for layer in range(shard.layers):
        parameters += _layer(a, shard, f"decoder.layers.{layer}", f"model.layers.{shard.first_layer + layer}")
    if shard.head:
        parameters.append(_norm("decoder.final_layernorm.weight", "model.norm.weight", a.hidden_size, rank))
        if not (a.tied_embeddings and shard.embedding):
            # Tied on a stage that does not hold the embedding: a copy, which the embedding's owner is primary of.
            parameters.append(_vocabulary("output_layer.weight", "head", a, rank, size, primary=not a.tied_embeddings))
    return parameters


def _layer(a: Architecture, shard: Shard, local: str, hf: str) -> list[_Parameter]:
    rank, hidden, ffn = shard.tensor_rank, a.hidden_size, a.ffn_size // shard.tensor_size
    attention_norm, mlp_norm = NORMS[shard.spec]
    parameters = [
        _norm(f"{local}.{attention_norm}", f"{hf}.input_layernorm.weight", hidden, rank),
        _qkv(f"{local}.self_attention.linear_qkv.weight", f"{hf}.self_attn", "weight", (hidden,), a, shard),
    ]
    if a.qkv_bias:
        parameters.append(_qkv(f"{local}.self_attention.linear_qkv.bias", f"{hf}.self_attn", "bias", (), a, shard))

    first_group, real_groups, groups = _groups(a, shard)
    group_columns = a.heads_per_group * a.head_dim
    projection = f"{local}.self_attention.linear_proj.weight"
    columns = _piece(
        parameter=projection,
        local_view=(hidden, groups * group_columns),
        local_index=(slice(0, hidden), slice(0, real_groups * group_columns)),
        hf_name=f"{hf}.self_attn.o_proj.weight",
        hf_shape=(hidden, a.heads * a.head_dim),
        axis=1,
        start=first_group * group_columns,
        count=real_groups * group_columns,
        primary=True,
    )
    parameters.append(_Parameter(projection, (hidden, groups * group_columns), columns))
    if a.qk_norm:
        parameters += [_norm(f"{local}.self_attention.{kind}_layernorm.weight", f"{hf}.self_attn.{kind}_norm.weight",
                             a.head_dim, rank) for kind in ("q", "k")]
    parameters.append(_norm(f"{local}.{mlp_norm}", f"{hf}.post_attention_layernorm.weight", hidden, rank))

    fc1, fc2 = f"{local}.mlp.linear_fc1.weight", f"{local}.mlp.linear_fc2.weight"
    gate_and_up = [
        piece
        for half, name in enumerate(("gate_proj", "up_proj"))
        for piece in _piece(
            parameter=fc1,
            local_view=(2, ffn, hidden),
            local_index=(half, slice(0, ffn), slice(0, hidden)),
            hf_name=f"{hf}.mlp.{name}.weight",
            hf_shape=(a.ffn_size, hidden),
            axis=0,
            start=rank * ffn,
            count=ffn,
            primary=True,
        )
    ]
    down = _piece(
        parameter=fc2,
        local_view=(hidden, ffn),
        local_index=(slice(0, hidden), slice(0, ffn)),
        hf_name=f"{hf}.mlp.down_proj.weight",
        hf_shape=(hidden, a.ffn_size),
        axis=1,
        start=rank * ffn,
        count=ffn,
        primary=True,
    )
    return [*parameters, _Parameter(fc1, (2 * ffn, hidden), gate_and_up), _Parameter(fc2, (hidden, ffn), down)]


def _groups(a: Architecture, shard: Shard) -> tuple[int, int, int]:
    """First query group of a shard, how many of its groups are real, and how many it has with padding."""
    groups = padded_kv_heads(a.kv_heads, shard.tensor_size) // shard.tensor_size
    first = shard.tensor_rank * groups
    return first, min(max(a.kv_heads - first, 0), groups), groups


def _qkv(name: str, hf: str, kind: str, rest: tuple[int, ...], a: Architecture, shard: Shard) -> _Parameter:
    """linear_qkv's weight (`rest` = (H,)) or bias (`rest` = ()), seen as [G, R + 2, d, *rest]."""
    first_group, real_groups, groups = _groups(a, shard)
    per_group = a.heads_per_group
    view = (groups, per_group + 2, a.head_dim, *rest)
    tail = tuple(slice(0, size) for size in view[2:])
    boxes = []
    for source, place, heads in (("q", slice(0, per_group), per_group), ("k", per_group, 1), ("v", per_group + 1, 1)):
        boxes += _piece(
            parameter=name,
            local_view=view,
            local_index=(slice(0, real_groups), place, *tail),
            hf_name=f"{hf}.{source}_proj.{kind}",
            hf_shape=(a.kv_heads * heads * a.head_dim, *rest),
            axis=0,
            start=first_group * heads * a.head_dim,
            count=real_groups * heads * a.head_dim,
            primary=True,
        )
    return _Parameter(name, (groups * (per_group + 2) * a.head_dim, *rest), boxes)


def _norm(name: str, hf_name: str, width: int, tensor_rank: int) -> _Parameter:
    """A norm's weight, as wide as what it normalises: the whole of it on every tensor rank."""
    whole = _piece(
        parameter=name,
        local_view=(width,),
        local_index=(slice(0, width),),
        hf_name=hf_name,
        hf_shape=(width,),
        axis=0,
        start=0,
        count=width,
        primary=tensor_rank == 0,
    )
    return _Parameter(name, (width,), whole)


def _vocabulary(
    name: str, kind: str, a: Architecture, tensor_rank: int, tensor_size: int, *, primary: bool
) -> _Parameter:
    """The local rows of the embedding or of the head."""
    rows = padded_vocab(a.vocab_size, tensor_size) // tensor_size
    start = tensor_rank * rows
    count = min(max(a.vocab_size - start, 0), rows)
    real = _piece(
        parameter=name,
        local_view=(rows, a.hidden_size),
        local_index=(slice(0, count), slice(0, a.hidden_size)),
        hf_name="model.embed_tokens.weight" if kind == "embedding" or a.tied_embeddings else "lm_head.weight",
        hf_shape=(a.vocab_size, a.hidden_size),
        axis=0,
        start=start,
        count=count,
        primary=primary,
    )
    return _Parameter(name, (rows, a.hidden_size), real)


def _piece(*, axis: int, start: int, count: int, hf_shape: tuple[int, ...], **rest) -> list[Piece]:
    """The box [start, start + count) along one axis of a Hugging Face tensor; nothing where it is empty."""
    if count == 0:
        return []
    offset = tuple(start if i == axis else 0 for i in range(len(hf_shape)))
    size = tuple(count if i == axis else full for i, full in enumerate(hf_shape))
    return [Piece(hf_shape=hf_shape, hf_offset=offset, hf_size=size, **rest)]
