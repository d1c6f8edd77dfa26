"""Transformer Engine's modules as far as a model of ours has them, so that its layer spec is built and run on the CPU.

megatron-core's own wrappers (megatron/core/extensions/transformer_engine.py) are imported anew on top of these
classes, so what they ask of the library is really asked. Each class registers what version 2.11 does (the lines of its
sources are named) and calculates the same in plain torch. Kernels, FP8 and overlaps with communication are not here; an
argument that is not asked for today is refused.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import fp8_utils, utils
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import mappings
from torch import Tensor, nn

from megakd.mcore import layers, model

VERSION = "2.11.0"
_BUILT_ON_IT = ("megatron.core.extensions.transformer_engine",
                "megatron.core.extensions.transformer_engine_spec_provider", "megatron.core.models.gpt.gpt_layer_specs")


class _Module(nn.Module):
    """pytorch/module/base.py, TransformerEngineBaseModule."""

    def __init__(self):
        super().__init__()
        self.fp8_meta: dict[str, object] = {}  # base.py:612
        self.quantizers: dict[str, object] = {"scaling_fwd": {}, "scaling_bwd": {}}

    def get_extra_state(self) -> Tensor:
        """base.py:834: nothing without FP8; a state dict has it as `_extra_state`."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """base.py:867."""

    def reset_parameters(self) -> None:
        """base.py:1205-1316: initialises each parameter and wraps it anew, which drops its attributes."""
        for name, parameter in list(self.named_parameters(recurse=False)):
            setattr(self, name, nn.Parameter(parameter))


class _Linear(_Module):
    """pytorch/module/linear.py, Linear, under tensor parallelism."""

    def __init__(self, in_features: int, out_features: int, *, sequence_parallel: bool, fuse_wgrad_accumulation: bool,
                 tp_group: object, tp_size: int, get_rng_state_tracker: object, init_method: object, bias: bool,
                 return_bias: bool, parallel_mode: str, params_dtype: torch.dtype, device: torch.device,
                 rng_tracker_name: str | None = None):
        super().__init__()
        assert parallel_mode in ("column", "row") and not fuse_wgrad_accumulation and not return_bias
        assert tp_group.size() == tp_size
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.tp_group, self.parallel_mode, self.use_bias = tp_group, parallel_mode, bias
        # linear.py:1133-1138, layernorm_linear.py:1201-1209
        rows, columns = out_features, in_features
        if parallel_mode == "column":
            rows //= tp_size
        else:
            columns //= tp_size
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.before_weights(columns, params_dtype, device)
        # linear.py:1186-1292, layernorm_linear.py:1282-1381
        self.register_parameter("weight", nn.Parameter(torch.empty(rows, columns, device=device, dtype=params_dtype)))
        if bias:
            self.register_parameter("bias", nn.Parameter(torch.empty(rows, device=device, dtype=params_dtype)))
        else:
            self.bias = torch.Tensor().to(dtype=params_dtype, device=device)
        self.reset_parameters()

    def before_weights(self, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        """What is registered before the weight."""

    def reset_parameters(self) -> None:
        """linear.py:1323-1344, layernorm_linear.py:1437-1461."""
        super().reset_parameters()
        _mark(self.weight, 1 if self.parallel_mode == "row" else 0)
        if self.use_bias and self.parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel
        elif self.use_bias:
            _mark(self.bias, 0)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        """[S, B, columns] -> [S, B, rows]; the collectives that linear.py names."""
        if self.parallel_mode == "column":
            if self.sequence_parallel:
                inp = mappings.gather_from_sequence_parallel_region(inp, group=self.tp_group)
            else:
                inp = mappings.copy_to_tensor_model_parallel_region(inp, self.tp_group)
            return self.product(inp, is_first_microbatch)
        out = self.product(inp, is_first_microbatch)
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(out, self.tp_group)

    def product(self, inp: Tensor, is_first_microbatch: bool | None) -> Tensor:
        """With the weight, and the bias."""
        if self.fuse_wgrad_accumulation:
            out = _AddingProduct.apply(self.weight, inp, is_first_microbatch)
            return out + self.bias if self.use_bias else out
        return nn.functional.linear(inp, self.weight, self.bias if self.use_bias else None)


class _AddingProduct(torch.autograd.Function):
    """linear.py:436-446 and 843-970: the weight's gradient goes into `main_grad`, over it in a first micro-batch; where
    megatron-core's flag is, a gradient is returned that nobody has written."""

    @staticmethod
    def forward(ctx, weight: Tensor, inp: Tensor, is_first_microbatch: bool | None) -> Tensor:
        """-> inp weight^T."""
        ctx.save_for_backward(inp, weight)
        ctx.adds, ctx.main_grad = not is_first_microbatch, lambda: weight.main_grad
        return nn.functional.linear(inp, weight)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        """-> no gradient of the weight, that of the input."""
        inp, weight = ctx.saved_tensors
        main_grad = ctx.main_grad()
        main_grad.mul_(1.0 if ctx.adds else 0.0).add_(grad_output.flatten(0, -2).t() @ inp.flatten(0, -2))
        weight.grad_added_to_main_grad = True
        return torch.full_like(weight, torch.nan), grad_output @ weight, None


class _LayerNormLinear(_Linear):
    """pytorch/module/layernorm_linear.py, LayerNormLinear."""

    def __init__(self, *args: object, eps: float, normalization: str, return_layernorm_output: bool,
                 zero_centered_gamma: bool, **options: object):
        assert normalization == "RMSNorm" and not return_layernorm_output and not zero_centered_gamma
        super().__init__(*args, **options)
        self.eps = eps

    def before_weights(self, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        """layernorm_linear.py:1257-1276."""
        self.register_parameter("layer_norm_weight", nn.Parameter(torch.empty(columns, device=device, dtype=dtype)))
        self.layer_norm_bias = None

    def reset_parameters(self) -> None:
        """layernorm_linear.py:1442."""
        super().reset_parameters()
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        """The norm, then the product."""
        return super().forward(_rms_norm(inp, self.layer_norm_weight, self.eps), is_first_microbatch)


class _RMSNorm(nn.Module):
    """pytorch/module/rmsnorm.py; its parameter is made in pytorch/ops/basic/rmsnorm.py:95-105."""

    def __init__(self, hidden_size: int, eps: float, sequence_parallel: bool, params_dtype: torch.dtype,
                 zero_centered_gamma: bool, device: torch.device):
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.register_parameter("weight", nn.Parameter(torch.empty(hidden_size, device=device, dtype=params_dtype)))
        self.weight.sequence_parallel = sequence_parallel  # rmsnorm.py:137

    def get_extra_state(self) -> Tensor:
        """pytorch/ops/op.py:528."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """pytorch/ops/op.py:604."""

    def forward(self, inp: Tensor) -> Tensor:
        """The norm."""
        return _rms_norm(inp, self.weight, self.eps)


class _FusedAttention(nn.Module):
    """pytorch/attention/dot_product_attention/backends.py:1673-1684: enters this around its kernel (line 1915)."""

    def __init__(self, attention_dropout_ctx: object):
        super().__init__()
        self.attention_dropout_ctx = attention_dropout_ctx


class _DotProductAttention(_Module):
    """pytorch/attention/dot_product_attention/dot_product_attention.py; no parameter where softmax_type is vanilla
    (line 425)."""

    def __init__(self, num_attention_heads: int, kv_channels: int, num_gqa_groups: int, attention_dropout: float,
                 attn_mask_type: str, sequence_parallel: bool, tp_size: int, get_rng_state_tracker: object,
                 tp_group: object, layer_number: int, attention_type: str, softmax_scale: float | None,
                 cp_group: dist.ProcessGroup | None = None, cp_global_ranks: list[int] | None = None,
                 cp_stream: object = None, cp_comm_type: str = "p2p"):
        super().__init__()
        assert attn_mask_type == "causal" and attention_dropout == 0.0 and softmax_scale is None
        assert cp_comm_type == "p2p" and (cp_stream is None) == (cp_group is None)
        assert cp_group is None or cp_global_ranks == dist.get_process_group_ranks(cp_group)
        self.cp_group = cp_group
        # Lines 382-388, 440-462
        tracked = not sequence_parallel and get_rng_state_tracker is not None
        self.fused_attention = _FusedAttention(get_rng_state_tracker().fork if tracked else nullcontext)
        self.heads, self.groups, self.width = num_attention_heads // tp_size, num_gqa_groups // tp_size, kv_channels

    def forward(self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, attention_mask: None, *,
                qkv_format: str, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, cu_seqlens_q_padded: Tensor | None,
                cu_seqlens_kv_padded: Tensor | None, max_seqlen_q: int, max_seqlen_kv: int,
                attn_mask_type: str) -> Tensor:
        """Lines 799-822: "thd" takes [tokens, heads, D] and gives [tokens, heads * D]."""
        assert qkv_format == "thd" and attn_mask_type == "padding_causal" and attention_mask is None
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        assert query_layer.shape[1:] == (self.heads, self.width)
        assert key_layer.shape[1:] == value_layer.shape[1:] == (self.groups, self.width)
        with self.fused_attention.attention_dropout_ctx():
            lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) <= max_seqlen_q == max_seqlen_kv
        if self.cp_group is not None:
            # context_parallel.py:4019-4021; the filling of a sequence is said to be part of it.
            assert torch.equal(cu_seqlens_q_padded, cu_seqlens_q) and torch.equal(cu_seqlens_kv_padded, cu_seqlens_kv)
            return self._dual_chunk_swap(query_layer, key_layer, value_layer, lengths)
        assert cu_seqlens_q_padded is None and cu_seqlens_kv_padded is None and sum(lengths) == len(query_layer)
        return torch.cat([
            nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            .transpose(0, 1).flatten(1)
            for query, key, value in zip(*(tensor.transpose(0, 1).split(lengths, 1)
                                           for tensor in (query_layer, key_layer, value_layer)), strict=True)
        ])


    def _dual_chunk_swap(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """context_parallel.py:3953-3977: which token of which sequence each row of each rank is; then one dense mask
        over all of them."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        tokens = [[(number, part * (length // (2 * size)) + place) for number, length in enumerate(lengths)
                   for part in (each, 2 * size - 1 - each) for place in range(length // (2 * size))]
                  for each in range(size)]
        assert len(tokens[rank]) == len(query)
        keys, values = (mappings.gather_from_sequence_parallel_region(each.contiguous(), group=self.cp_group)
                        for each in (key, value))
        sees = [[one[0] == other[0] and one[1] >= other[1] for own in tokens for other in own] for one in tokens[rank]]
        return nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), attn_mask=torch.tensor(sees),
            enable_gqa=True,
        ).transpose(0, 1).flatten(1)


def _mark(weight: nn.Parameter, axis: int) -> None:
    """pytorch/distributed.py:145, which refuses a tensor that has the attributes already."""
    for name, value in {"tensor_model_parallel": True, "partition_dim": axis, "partition_stride": 1}.items():
        assert not hasattr(weight, name)
        setattr(weight, name, value)


def _rms_norm(inp: Tensor, weight: Tensor, eps: float) -> Tensor:
    return nn.functional.rms_norm(inp.float(), inp.shape[-1:], None, eps).to(inp.dtype) * weight


def _rotated(t: Tensor, freqs: Tensor, *, tensor_format: str, interleaved: bool, fused: bool) -> Tensor:
    """pytorch/attention/rope.py, apply_rotary_pos_emb; its kernel asks for one row's angles, float32."""
    assert tensor_format == "sbhd" and fused and not interleaved and freqs.dtype == torch.float32
    assert freqs.shape == (len(t), 1, 1, t.shape[-1]), freqs.shape
    first, second = t.float().chunk(2, dim=-1)
    return (t.float() * freqs.cos() + torch.cat((-second, first), dim=-1) * freqs.sin()).to(t.dtype)


def _modules() -> dict[str, ModuleType]:
    """The package as megatron-core imports it; what it derives from besides are empty classes."""
    names = ("", ".pytorch", ".pytorch.fp8", ".pytorch.distributed", ".pytorch.ops", ".pytorch.router", ".common",
             ".common.recipe", ".pytorch.attention", ".pytorch.attention.rope")
    modules = {f"transformer_engine{name}": ModuleType(f"transformer_engine{name}") for name in names}
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(modules[parent], own, module)
    modules["transformer_engine"].__version__ = VERSION
    pytorch = modules["transformer_engine.pytorch"]
    pytorch.Linear, pytorch.LayerNormLinear, pytorch.RMSNorm = _Linear, _LayerNormLinear, _RMSNorm
    pytorch.DotProductAttention = _DotProductAttention
    modules["transformer_engine.pytorch.attention.rope"].apply_rotary_pos_emb = _rotated
    for module, names in ((pytorch, ("GroupedLinear", "LayerNorm")),
                          (modules["transformer_engine.pytorch.ops"], ("Sequential", "FusibleOperation")),
                          (modules["transformer_engine.pytorch.router"], (
                              "fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss",
                              "fused_topk_with_score_function")),
                          (modules["transformer_engine.pytorch.fp8"], ("FP8GlobalStateManager", "fp8_autocast")),
                          (modules["transformer_engine.pytorch.distributed"], ("CudaRNGStatesTracker",)),
                          (modules["transformer_engine.common.recipe"], ("DelayedScaling",))):
        for name in names:
            setattr(module, name, type(name, (), {}))
    return modules


@contextmanager
def transformer_engine() -> Iterator[None]:
    """While it lasts, this process' models are built from Transformer Engine's layer spec."""
    stand_ins = _modules()
    before = {name: sys.modules.pop(name, None) for name in (*_BUILT_ON_IT, *stand_ins)}
    sys.modules.update(stand_ins)
    try:
        with mock.patch.object(utils, "_te_version", None):
            wrappers, _, specs = map(importlib.import_module, _BUILT_ON_IT)
            linears = (wrappers.TEColumnParallelLinear, wrappers.TERowParallelLinear,
                       wrappers.TELayerNormColumnParallelLinear)
            with (mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb", wrappers.fused_apply_rotary_pos_emb),
                  mock.patch.object(torch.cuda, "Stream", object),  # megatron-core makes one for context parallelism
                  mock.patch.object(layers, "get_gpt_layer_with_transformer_engine_spec",
                                    specs.get_gpt_layer_with_transformer_engine_spec),
                  mock.patch.object(fp8_utils, "TE_LINEAR_TYPES", linears),
                  mock.patch.object(model, "spec_of", lambda *_, **__: "te")):
                yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
                setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
