"""Starts a process: backend, device, random numbers, and what megatron-core needs to run without a GPU.

megatron-core 0.16 is written for CUDA. The CPU runtime below answers the places where it says so; nothing else differs
between the two devices: the same models, schedules, optimizer and losses run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import megatron.core.optimizer
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as base_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import random as tensor_parallel_random
from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch.overrides import TorchFunctionMode

from megakd import gpus
from megakd.mcore.grid import Grid


@dataclass(frozen=True)
class World:
    """This process among all of the run's."""

    rank: int
    size: int
    device: torch.device
    timeout: timedelta | None = None
    """How long a collective of the run's groups may wait; None: as long as torch has it."""


class _CudaMeansCpu(TorchFunctionMode):
    """Answers the CUDA requests that megatron-core hard-codes with CPU tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # `device="cuda"`: schedules.py (token counts), clip_grads.py, optimizer.py (found_inf).
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        # `tensor.cuda()`: tensor_parallel/data.py, optimizer state moves.
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        # `param.type() == "torch.cuda.FloatTensor"`: optimizer/distrib_optimizer.py sorts parameters by it.
        if func is torch.Tensor.type and isinstance(result, str) and not result.startswith("torch.cuda."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


_cpu_mode: _CudaMeansCpu | None = None


def enable_cpu() -> None:
    """Makes megatron-core usable on CPU tensors in this process. Calling it again changes nothing."""
    global _cpu_mode
    if _cpu_mode is not None:
        return
    # p2p_communication.py, mappings.py, GlobalMemoryBuffer, rotary embedding: `device=torch.cuda.current_device()`.
    torch.cuda.current_device = lambda: torch.device("cpu")
    # p2p_communication.py waits for the device after batched sends.
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.empty_cache = lambda: None
    # transformer/attention.py and utils.py mark ranges for the profiler.
    torch.cuda.nvtx.range_push = lambda *_: None
    torch.cuda.nvtx.range_pop = lambda *_: None
    # tensor_parallel/random.py: the tracker swaps the generator's state; on CPU there is one generator.
    tensor_parallel_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    tensor_parallel_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed
    _take_torchs_optimizer()
    _cpu_mode = _CudaMeansCpu()
    _cpu_mode.__enter__()


def _take_torchs_optimizer() -> None:
    """Has megatron-core's optimizer use what it uses where neither Transformer Engine nor apex is installed.

    It chooses at its import, by what is installed alone: on a machine with GPUs their kernels, which take no memory of
    the host's. Each module has names of its own.
    """
    core = megatron.core.optimizer
    core.Adam, core.SGD, core.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, torch.optim.SGD, True
    distrib_optimizer.Adam, distrib_optimizer.HAVE_APEX_OR_TE = torch.optim.Adam, False
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False
    for module in (base_optimizer, clip_grads):
        module.multi_tensor_applier = local_multi_tensor_applier
        module.multi_tensor_scale_impl = local_multi_tensor_scale
    clip_grads.l2_norm_impl = local_multi_tensor_l2_norm


def start(device: str, *, timeout: timedelta = timedelta(minutes=30), traces: Path | None = None) -> World:
    """Joins the run's processes. torchrun's variables RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR/PORT say which.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL, one GPU a rank).
        timeout: how long a collective may wait before the job fails.
        traces: folder for what the ranks were waiting for when one has failed so (CUDA: `gpus.record_collectives`).

    Raises:
        ConfigError: `cuda` is asked for and there is none, or fewer GPUs on this node than ranks.
    """
    gpus.check_device(os.environ, device)
    if device == "cuda":
        local = torch.device("cuda", gpus.device_index(os.environ, torch.cuda.device_count()))
        if (folder := gpus.record_collectives(os.environ, traces)) is not None:
            folder.mkdir(parents=True, exist_ok=True)  # torch opens the files alone
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", timeout=timeout, device_id=local)
    else:
        enable_cpu()
        local = torch.device("cpu")
        dist.init_process_group("gloo", timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), local, timeout)


def adopt(device: torch.device) -> World:
    """The World of a process whose default process group exists already (the tests' rank pools)."""
    if device.type == "cpu":
        enable_cpu()
    return World(dist.get_rank(), dist.get_world_size(), device)


def set_global_state(groups: ProcessGroupCollection) -> None:
    """Makes a grid's groups (the student's) megatron-core's global ones.

    Parts of megatron-core read them (FP8's scaling, the global memory buffer, defaults of arguments that we always
    give); nothing of ours does. Its own `initialize_model_parallel` has every rank make every group of the world:
    94,235 calls at 16,384 ranks. Calling it again with another grid replaces them.
    """
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    state = {
        "TENSOR_MODEL_PARALLEL": groups.tp, "PIPELINE_MODEL_PARALLEL": groups.pp, "MODEL_PARALLEL": groups.mp,
        "DATA_PARALLEL": groups.dp, "CONTEXT_PARALLEL": groups.cp, "TENSOR_AND_CONTEXT_PARALLEL": groups.tp_cp,
        "EXPERT_MODEL_PARALLEL": groups.ep, "EXPERT_TENSOR_PARALLEL": groups.expt_tp,
        "EXPERT_TENSOR_AND_MODEL_PARALLEL": groups.tp_ep, "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL": groups.tp_ep_pp,
        "EXPERT_DATA_PARALLEL": groups.expt_dp, "EMBEDDING": groups.embd, "POSITION_EMBEDDING": groups.pos_embd,
        "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE": groups.intra_dist_opt,
    }
    for name, group in state.items():
        _set(f"_{name}_GROUP", group)
    _set("_DATA_PARALLEL_GROUP_WITH_CP", groups.dp_cp)
    _set("_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP", groups.tp_dp_cp)
    for name, group in {"TENSOR_MODEL_PARALLEL": groups.tp, "PIPELINE": groups.pp, "DATA_PARALLEL": groups.dp,
                        "MODEL_PARALLEL": groups.mp, "CONTEXT_PARALLEL": groups.cp}.items():
        _set(f"_{name}_GLOBAL_RANKS", dist.get_process_group_ranks(group))
    parallel_state._set_global_memory_buffer()


def _set(name: str, value: object) -> None:
    assert hasattr(parallel_state, name), f"megatron-core's parallel_state has no {name}"
    setattr(parallel_state, name, value)


def seed(value: int, student: Grid) -> None:
    """Sets up megatron-core's global state and seeds all generators: alike on all ranks, and megatron-core's
    tensor-parallel one differently on each tensor rank of the student."""
    set_global_state(student.groups)
    torch.manual_seed(value)
    tensor_rank = student.at.tensor
    tensor_parallel_random.model_parallel_cuda_manual_seed(value, tp_rank=tensor_rank, ep_rank=0, etp_rank=tensor_rank)


def stop() -> None:
    """Leaves the run's processes."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
