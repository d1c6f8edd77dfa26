"""The modules that a transformer layer is built from: local ones for any device, Transformer Engine's on CUDA.

Legend: S positions that this rank holds, B sequences, N local query heads, G local key/value groups, D head width, H
hidden width, W positions of all context ranks. Packed sequences are one row: S is then their tokens together, and B is
1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
import torch.distributed as dist
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megakd.batch import Padding
from megakd.mcore.fp8_emulation import Emulation, RoundingColumnParallelLinear, RoundingRowParallelLinear
from megakd.rollout.cache import KVCache


class RMSNorm(nn.Module):
    """Root-mean-square norm, of hidden states or of each head's queries or keys, whose weight says that its gradient is
    summed over the tensor group under sequence parallelism (megatron-core's own wrapper of torch.nn.RMSNorm refuses
    sequence parallelism)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., H], or [..., D] of heads -> the same shape and dtype; the mean is taken in float32."""
        return nn.functional.rms_norm(hidden.float(), hidden.shape[-1:], None, self.eps).to(hidden.dtype) * self.weight


class CachedAttention(nn.Module):
    """Causal attention within each sequence of a packed row, or (rollouts) with kept keys and values.

    megatron-core's own attention for any device takes no packed sequences. In a rollout `KVCache.attend` knows each
    row's own positions.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection, **_: object
    ):
        super().__init__()
        self.layer_number = layer_number
        self.context = config.context_parallel_size
        self.cp_group = pg_collection.cp
        self.cache: KVCache | None = None
        self.cache_layer = 0

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        *_: object,
        packed_seq_params: PackedSeqParams | None,
        **__: object,
    ) -> Tensor:
        """-> context [S, B, N*D] in the query's dtype.

        Heads are local. Collectives: an all-gather of keys and values over the context group, and in the backward pass
        a reduce-scatter of their gradients; none without context parallelism, nor with a cache.
        """
        if self.cache is not None:
            context_SBND = self.cache.attend(self.cache_layer, query_SBND, key_SBGD, value_SBGD)
            return context_SBND.flatten(2)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        if self.context > 1:
            return self._across_ranks(query_SBND, key_SBGD, value_SBGD, lengths)
        grouped = query_SBND.shape[2] != key_SBGD.shape[2]
        # One call a sequence: attention's own work is theirs alone, and no mask of the whole row is ever made.
        contexts = [
            nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
            for query, key, value in zip(
                *(tensor.permute(1, 2, 0, 3).split(lengths, 2) for tensor in (query_SBND, key_SBGD, value_SBGD)),
                strict=True,
            )
        ]
        return torch.cat([context_BNSD.permute(2, 0, 1, 3) for context_BNSD in contexts]).flatten(2)

    def _across_ranks(
        self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """Attention of this rank's parts of each sequence to all that comes before them."""
        padding = Padding(context=self.context, context_rank=dist.get_rank(self.cp_group))
        both_WBGE = gather_from_sequence_parallel_region(
            torch.cat([key_SBGD, value_SBGD], dim=-1), tensor_parallel_output_grad=True, group=self.cp_group
        )
        both_WBGE = both_WBGE[_sequence_order(lengths, self.context).to(both_WBGE.device)]
        grouped = query_SBND.shape[2] != key_SBGD.shape[2]
        contexts, own, start = [], 0, 0
        for length in lengths:
            for part in padding.own(length):
                query = query_SBND[own : own + len(part)].permute(1, 2, 0, 3)
                key, value = both_WBGE[start : start + part.stop].permute(1, 2, 0, 3).chunk(2, dim=-1)
                seen_SS = torch.ones(len(part), part.stop, dtype=torch.bool, device=query.device).tril(part.start)
                context = nn.functional.scaled_dot_product_attention(
                    query, key, value, attn_mask=seen_SS, enable_gqa=grouped
                )
                contexts.append(context.permute(2, 0, 1, 3))
                own += len(part)
            start += length
        return torch.cat(contexts).flatten(2)


class CachedTEAttention(nn.Module):
    """Transformer Engine's attention for training and scoring, and the cache's for rollouts."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        pg_collection: ProcessGroupCollection,
        **options: object,
    ):
        super().__init__()
        # Importable only where Transformer Engine is; `check_precision` has made sure of that.
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        self.layer_number = layer_number
        self.cache: KVCache | None = None
        self.cache_layer = 0
        self.inner = TEDotProductAttention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            pg_collection=pg_collection,
            **options,
        )

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        *args: object,
        packed_seq_params: PackedSeqParams | None,
        **kwargs: object,
    ) -> Tensor:
        """-> context [S, B, N*D] in the query's dtype."""
        if self.cache is not None:
            return self.cache.attend(self.cache_layer, query_SBND, key_SBGD, value_SBGD).flatten(2)
        query, key, value = (tensor.squeeze(1) for tensor in (query_SBND, key_SBGD, value_SBGD))
        packed = replace(packed_seq_params, qkv_format="thd")
        if self.inner.config.context_parallel_size > 1:
            # It asks for them under context parallelism. Filling counts as tokens: at a sequence's end none sees it.
            packed = replace(packed, cu_seqlens_q_padded=packed.cu_seqlens_q, cu_seqlens_kv_padded=packed.cu_seqlens_kv)
        return self.inner(query, key, value, *args, packed_seq_params=packed, **kwargs).view(len(query), 1, -1)


def _sequence_order(lengths: Sequence[int], ranks: int) -> Tensor:
    """Where each position of a whole row [W] stands among the context ranks' shares, one rank's after the other's.

    Args:
        lengths: of the row's sequences, with their filling.
        ranks: that the row is cut over (`Padding.own`).
    """
    starts = [0, *accumulate(lengths)]
    shares = [torch.arange(start + part.start, start + part.stop) for rank in range(ranks)
              for start, length in zip(starts, lengths, strict=False)
              for part in Padding(context=ranks, context_rank=rank).own(length)]
    return torch.cat(shares).argsort()


def packed_sequences(cu_seqlens: Tensor, longest: int) -> PackedSeqParams:
    """megatron-core's description of a packed row (`Batch.cu_seqlens` and `Batch.longest`).

    It does not say "thd": on that word megatron-core drops the batch dimension before the rotary embedding and rotates
    sequence by sequence, where `HiddenGPT` has each position's own angles at hand. The attention alone needs to know.
    """
    return PackedSeqParams("sbhd", cu_seqlens, cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest)


def local_block(
    layers: int, *, qk_norm: bool, emulations: Sequence[Emulation | None] | None = None
) -> TransformerBlockSubmodules:
    """The modules of a pipeline stage built from megatron-core's own linears: any device, no Transformer Engine.

    Args:
        layers: of the stage.
        qk_norm: `Architecture.qk_norm`.
        emulations: how each layer's linears round to FP8, or None for one that does not; None where none does.
    """
    specs = [_local_layer(emulation, qk_norm) for emulation in emulations or [None] * layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def _local_layer(emulation: Emulation | None, qk_norm: bool) -> ModuleSpec:
    column: type | ModuleSpec = ColumnParallelLinear
    row: type | ModuleSpec = RowParallelLinear
    if emulation is not None:
        column = ModuleSpec(module=RoundingColumnParallelLinear, params={"emulation": emulation})
        row = ModuleSpec(module=RoundingRowParallelLinear, params={"emulation": emulation})
    norm_by_head = RMSNorm if qk_norm else None
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column, core_attention=CachedAttention, linear_proj=row, q_layernorm=norm_by_head,
                    k_layernorm=norm_by_head,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def transformer_engine_block(layers: int, *, qk_norm: bool) -> TransformerBlockSubmodules:
    """The modules of a pipeline stage built from Transformer Engine's fused ones (CUDA only); as `local_block`."""
    from megatron.core.extensions.transformer_engine import TENorm

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
    layer.submodules.self_attention.submodules.core_attention = CachedTEAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=TENorm)


def attention_of(layer: TransformerLayer) -> CachedAttention | CachedTEAttention:
    """The module of a layer that a cache is attached to."""
    return layer.self_attention.core_attention


__all__ = [
    "CachedAttention",
    "CachedTEAttention",
    "RMSNorm",
    "attention_of",
    "local_block",
    "packed_sequences",
    "transformer_engine_block",
]
