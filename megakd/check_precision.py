"""Whether this machine has the devices that a recipe asks for, and these and its models can do the arithmetic."""

from __future__ import annotations

import importlib.util
import os

from megakd import gpus
from megakd.config import Parallel, Precision, Recipe
from megakd.errors import ConfigError
from megakd.hf.families import Architecture
from megakd.hf.pieces import padded_kv_heads

FP8_MULTIPLES = {"tensorwise": 16, "delayed": 16, "blockwise": 16, "mxfp8": 32}
"""What both sides of every FP8 product are multiples of, by recipe: megatron-core's `get_fp8_align_size`; TE's
`assert_dim_for_fp8_exec` (utils.py) asks the same of the inner side. Blocks of 128 that a matrix does not fill are
filled up by the kernels (`Float8BlockQuantizer.get_scale_shape` rounds up), so blockwise asks no more."""
GATHERED_ROWS = {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
"""The same of the rows that a tensor rank has under sequence parallelism: blocks are made before rows are gathered
(`assert_dim_for_all_gather`, `Float8BlockQuantizer.is_quantizable`)."""
LEAST_CAPABILITY, LEAST_CUDA = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}, (12, 9)
"""Compute capability that a recipe needs, and CUDA for blockwise (quantization.py, `check_recipe_support`)."""
LEAST_TORCH = (2, 10)
"""For 16-bit numbers on CUDA: the first release whose `addmm` with `out_dtype` takes a float32 tensor to add to (its
_addmm_dtype_out_cuda asked for the operands' dtype before pull request 167931 of November 2025)."""
NO_MXFP8 = (12, 0)
"""From this compute capability on Transformer Engine 2.11 has not all of MXFP8's products."""
PACKED_ATTENTION, NO_PACKED_ATTENTION = (9, 0), 12
"""Compute capability from which cuDNN attends to packed sequences, and the major one that Transformer Engine leaves out
(`nvte_get_fused_attn_backend`, fused_attn.cpp; `get_attention_backend`). Elsewhere flash-attn does it, and without that
Transformer Engine makes whole square matrices of scores, which no plan counts and few memories hold."""


def check_backend(recipe: Recipe, world: int) -> None:
    """Refuses a device or precision that this machine does not have, and more of `world` ranks than it has GPUs.

    Raises:
        ConfigError: naming the setting.
    """
    gpus.check_device(os.environ, recipe.device)
    if recipe.device != "cuda":
        return
    import torch

    # An emulation is the local layers' products, which any device can do.
    emulated = recipe.precision.emulate
    if not emulated and importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError("device", "cuda", "the layers on CUDA are Transformer Engine's, which is not installed",
                          "Install megakd[gpu], or write device: cpu")
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("device", "cuda", "the losses on CUDA are Triton's kernels, which is not installed",
                          "pip install the release of triton that this build of PyTorch names, or write device: cpu")
    if recipe.precision.dtype != "fp32" and (release := _release(torch.__version__)) < LEAST_TORCH:
        raise ConfigError("precision.dtype", recipe.precision.dtype,
                          "the losses add products of 16-bit numbers to float32 ones (addmm with out_dtype), which "
                          f"CUDA's form of torch {'.'.join(map(str, release))} refuses and that of 2.10 takes",
                          "Install torch 2.10 or later, or write precision: fp32")
    if recipe.precision.dtype == "fp8" and not emulated:
        _check_capability(recipe.precision.fp8_recipe, torch.cuda.get_device_capability(), torch.version.cuda)
    if recipe.precision.dtype != "fp32" and not emulated:
        _check_attention(torch.cuda.get_device_capability())
    if any(role.cuda_graphs or role.decode_graphs for role in (recipe.student, recipe.teacher, recipe.reference)):
        gpus.check_graph_memory(os.environ)
    gpus.check_gpus(os.environ, gpus.ranks_here(os.environ, world), torch.cuda.device_count())


def _release(version: str) -> tuple[int, int]:
    """(2, 11) of "2.11.0+cu130"."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _check_capability(recipe: str, capability: tuple[int, int], cuda: str | None) -> None:
    found = f"{capability[0]}.{capability[1]}"
    if capability < LEAST_CAPABILITY["tensorwise"]:
        raise ConfigError("precision.dtype", "fp8", f"this GPU has compute capability {found}; FP8 needs 8.9 (Ada) or "
                          "later", "Write precision: bf16")
    if recipe == "mxfp8" and not LEAST_CAPABILITY["mxfp8"] <= capability < NO_MXFP8:
        raise ConfigError("precision.fp8_recipe", "mxfp8", f"needs Blackwell (compute capability 10.0 or more, below "
                          f"12.0); this GPU has {found}", "Write tensorwise or blockwise, or precision.emulate=true to "
                          "study its arithmetic")
    if recipe != "blockwise":
        return
    if capability < LEAST_CAPABILITY["blockwise"]:
        raise ConfigError("precision.fp8_recipe", "blockwise", f"needs Hopper (compute capability 9.0) or later; this "
                          f"GPU has {found}", "Write tensorwise")
    if cuda is None or tuple(int(part) for part in cuda.split(".")[:2]) < LEAST_CUDA:
        raise ConfigError("precision.fp8_recipe", "blockwise", f"needs CUDA 12.9 or later; torch is built for {cuda}",
                          "Install such a torch, or write tensorwise")


def _check_attention(capability: tuple[int, int]) -> None:
    if capability >= PACKED_ATTENTION and capability[0] != NO_PACKED_ATTENTION:
        return
    if importlib.util.find_spec("flash_attn") is None:
        rule = (f"this GPU has compute capability {capability[0]}.{capability[1]}, for which Transformer Engine's "
                "attention to packed sequences is flash-attn's, which is not installed")
        raise ConfigError("device", "cuda", rule,
                          "Install flash-attn (2.1.1 to 2.8.3), or take a Hopper or datacentre Blackwell GPU")


def rows_multiple(precision: Precision, parallel: Parallel) -> int:
    """What the rows of a packed micro-batch are a multiple of. An emulation takes any number."""
    ranks = parallel.tensor if parallel.sequence else 1
    if precision.dtype != "fp8" or precision.emulate:
        return ranks
    return ranks * (GATHERED_ROWS if ranks > 1 else FP8_MULTIPLES)[precision.fp8_recipe]


def check_sizes(architecture: Architecture, parallel: Parallel, precision: Precision, field: str) -> None:
    """Refuses a model whose products FP8 kernels cannot take. An emulation asks the same: of products that no GPU
    takes it would show nothing.

    Args:
        architecture: the model.
        parallel: how it is cut.
        precision: the recipe's.
        field: name of the role's settings, such as `student`.

    Raises:
        ConfigError: a width on one tensor rank is no multiple of what the recipe asks, or no layer is left in FP8.
    """
    if precision.dtype != "fp8":
        return
    a, tensor = architecture, parallel.tensor
    groups = padded_kv_heads(a.kv_heads, tensor) // tensor
    heads = groups * a.heads_per_group
    # Inner and outer sides of linear_qkv, linear_proj, linear_fc1 and linear_fc2.
    sides = {
        "hidden_size": a.hidden_size,
        f"{heads} query heads x head_dim {a.head_dim}": heads * a.head_dim,
        f"{heads} + 2 x {groups} heads x head_dim {a.head_dim}": (heads + 2 * groups) * a.head_dim,
        "share of intermediate_size": a.ffn_size // tensor,
    }
    multiple = FP8_MULTIPLES[precision.fp8_recipe]
    for name, size in sides.items():
        if size % multiple != 0:
            rule = (f"the {field}'s {name} = {size} on a tensor rank (of {tensor}) is no multiple of {multiple}, which "
                    "its products need")
            fixes = ["another fp8_recipe"] * (size % 16 == 0) + [f"a smaller {field}.parallel.tensor"] * (tensor > 1)
            raise ConfigError("precision.fp8_recipe", precision.fp8_recipe, rule,
                              f"Use {' or '.join([*fixes, 'precision: bf16'])}")
    _check_ends(a, parallel, precision, field)


def _check_ends(architecture: Architecture, parallel: Parallel, precision: Precision, field: str) -> None:
    most = architecture.layers // parallel.pipeline
    if precision.first_last_bf16 > most:
        raise ConfigError("precision.first_last_bf16", precision.first_last_bf16, f"the {field}'s shortest pipeline "
                          f"stage has {most} layers, and megatron-core allows no more", f"Use at most {most}")
    if 2 * precision.first_last_bf16 >= architecture.layers:
        raise ConfigError("precision.first_last_bf16", precision.first_last_bf16, f"of the {field}'s "
                          f"{architecture.layers} layers none would be left in FP8",
                          f"Use at most {(architecture.layers - 1) // 2}, or write precision: bf16")
