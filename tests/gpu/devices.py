"""Where the tests of this folder run: every body on the CPU, where it is tried out, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from megakd.check_precision import LEAST_CAPABILITY

GPUS = torch.cuda.device_count()
NO_CUDA = ("no CUDA device" if GPUS == 0 else
           "Transformer Engine is not installed" if importlib.util.find_spec("transformer_engine") is None else "")
NO_SECOND_RANK = NO_CUDA or (
    "" if GPUS > 1 or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" else
    "one GPU, and NCCL_MULTI_RANK_GPU_ENABLE=1 (NCCL 2.30) is not set"
)


def on_cuda(*values: object, unless: str = NO_CUDA):
    """The parameters "cuda" and `values` of a test, skipped where there is a reason to."""
    return pytest.param("cuda", *values, marks=[pytest.mark.gpu, pytest.mark.skipif(bool(unless), reason=unless)])


DEVICES = pytest.mark.parametrize("device", ["cpu", on_cuda()])


def lacking(recipe: str) -> str:
    """Why a recipe cannot be trained with here; empty where it can."""
    if NO_CUDA:
        return NO_CUDA
    capability = torch.cuda.get_device_capability()
    enough = capability >= LEAST_CAPABILITY[recipe]
    return "" if enough else f"the GPU has compute capability {capability}, {recipe} needs more"
