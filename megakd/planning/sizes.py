"""Parameters and floating-point operations of a model and of its parts on a rank.

An operation is one addition or multiplication: a product of [m, k] and [k, n] has 2mnk. Only matrix products and
attention are counted, as everybody does who quotes a model's utilisation; norms and activations are below 1 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import lcm, prod

from megakd.hf.families import Architecture
from megakd.hf.pieces import Shard, padded_kv_heads, padded_vocab, parameter_shapes


def parameter_count(architecture: Architecture, norms_per_layer: int = 2) -> int:
    """Parameters of a whole model, as its Hugging Face directory has them.

    Args:
        architecture: its sizes.
        norms_per_layer: of hidden states, 2; families that also normalise what attention and MLP give (Gemma 2) have 4.
    """
    a = architecture
    qkv_columns = (a.heads + 2 * a.kv_heads) * a.head_dim
    attention = a.hidden_size * (qkv_columns + a.heads * a.head_dim) + (qkv_columns if a.qkv_bias else 0)
    norms = norms_per_layer * a.hidden_size + (2 * a.head_dim if a.qk_norm else 0)
    layer = attention + 3 * a.hidden_size * a.ffn_size + norms
    vocabularies = 1 if a.tied_embeddings else 2
    return vocabularies * a.vocab_size * a.hidden_size + a.layers * layer + a.hidden_size


def shard_parameters(architecture: Architecture, shard: Shard) -> int:
    """Parameters that one model chunk of a rank holds, padding included."""
    ends, layer = _chunk_parameters(architecture, shard.tensor_size, shard.embedding, shard.head, shard.spec, 1)
    return ends + shard.layers * layer


def matrix_parameters(architecture: Architecture, shards: Sequence[Shard]) -> int:
    """Weights of the layers' products in a rank's chunks: those that FP8 is about. Layers that stay in bf16
    (`first_last_bf16`) are counted as if they did not."""
    return sum(shard.layers * layer_widths(architecture, shard.tensor_size).parameters for shard in shards)


def buffer_numbers(architecture: Architecture, shard: Shard, replicas: int) -> int:
    """Numbers in the buffer that a chunk's gradients are reduced in: each parameter begins at a multiple of 64, and the
    whole divides by 128 and by the replicas (megatron-core's `_ParamAndGradBuffer`)."""
    ends, layer = _chunk_parameters(architecture, shard.tensor_size, shard.embedding, shard.head, shard.spec, 64)
    return _up(ends + shard.layers * layer, lcm(128, replicas))


@cache
def _chunk_parameters(architecture: Architecture, tensor_size: int, embedding: bool, head: bool, spec: str,
                      multiple: int) -> tuple[int, int]:
    """Parameters outside layers, and of one layer, as the table of pieces has them, each filled up to a multiple. A
    search asks for the same chunks thousands of times."""
    counts = [sum(_up(prod(shape), multiple) for shape in parameter_shapes(
        architecture, Shard(0, tensor_size, 0, layers, embedding, head, spec)).values()) for layers in (0, 1)]
    return counts[0], counts[1] - counts[0]


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class LayerWidths:
    """Numbers that a token has on one tensor rank at the places of a layer."""

    hidden: int
    query: int
    """Query heads x head size."""
    key: int
    """Key heads x head size; values have as many."""
    ffn: int
    head_dim: int
    heads: int
    by_head: int
    """Queries' and keys' numbers that are normalised, head by head: all or none."""

    @property
    def parameters(self) -> int:
        """Weights of the layer's matrix products."""
        return self.hidden * (2 * self.query + 2 * self.key + 3 * self.ffn)


def layer_widths(architecture: Architecture, tensor: int) -> LayerWidths:
    """The widths on a rank of a tensor group of `tensor` ranks, padded heads included."""
    a = architecture
    groups = padded_kv_heads(a.kv_heads, tensor) // tensor
    heads = groups * a.heads_per_group
    by_head = (heads + groups) * a.head_dim if a.qk_norm else 0
    return LayerWidths(
        hidden=a.hidden_size, query=heads * a.head_dim, key=groups * a.head_dim, ffn=a.ffn_size // tensor,
        head_dim=a.head_dim, heads=heads, by_head=by_head,
    )


def head_columns(architecture: Architecture, tensor: int) -> int:
    """Columns of the LM head on a rank of a tensor group."""
    return padded_vocab(architecture.vocab_size, tensor) // tensor


def layer_flops(widths: LayerWidths, tokens: float, pairs: float) -> float:
    """Forward operations of one layer on one tensor rank.

    Args:
        widths: of the rank.
        tokens: positions.
        pairs: (position, attended position) pairs: n(n + 1)/2 for a causal sequence of n.
    """
    return 2.0 * widths.parameters * tokens + 4.0 * widths.query * pairs


def model_flops(architecture: Architecture, tokens: float, pairs: float, head_tokens: float) -> float:
    """Forward operations of a whole model: its layers over `tokens` positions, its head over `head_tokens`."""
    a = architecture
    layers = a.layers * layer_flops(layer_widths(a, 1), tokens, pairs)
    return layers + 2.0 * a.hidden_size * a.vocab_size * head_tokens
