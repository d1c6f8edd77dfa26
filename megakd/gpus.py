"""Which GPU a rank takes, and what CUDA and NCCL read from the environment when they start. Imports torch late.

The project's one place for such variables. What the user has set stands.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path

from megakd.errors import ConfigError

TRACES = "collectives"
"""Folder of a run's folder where torch's flight recorder writes what each rank was waiting for."""
SHARES_GPUS = "NCCL_MULTI_RANK_GPU_ENABLE"
"""Set to 1, NCCL takes several ranks on one GPU (2.30.7 has it; without it NCCL refuses). For tests."""
_RECORDED_EVENTS = 2000


def order_kernels(environment: MutableMapping[str, str]) -> None:
    """Keeps kernels in the order of their launch; called before anything looks for a GPU, as CUDA reads this once.

    megatron-core's overlap of tensor and sequence parallelism with products relies on it up to Hopper
    (tensor_parallel/layers.py); results do not.
    """
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def check_device(environment: MutableMapping[str, str], device: str) -> None:
    """Refuses `device: cuda` where torch sees none. Raises ConfigError; makes no process group."""
    order_kernels(environment)
    if device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("device", "cuda", "torch sees no CUDA device here",
                          "Write device: cpu, or see `megakd doctor`")


def record_collectives(environment: MutableMapping[str, str], traces: Path | None) -> Path | None:
    """Has each rank write its last collectives when NCCL's watchdog gives one up; called before NCCL starts.

    torch has newer names for two of the variables, which go before the older ones; the older are set here, as every
    torch that we take reads them.

    Args:
        environment: this process'.
        traces: folder for the files `rank_<rank>`; None leaves them in torch's own place.

    Returns:
        The folder that has to be there, None where the user has named files of another place.
    """
    if "TORCH_FR_BUFFER_SIZE" not in environment:
        environment.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", str(_RECORDED_EVENTS))
    environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    name = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
    if traces is None or "TORCH_FR_DUMP_TEMP_FILE" in environment or name in environment:
        return None
    environment[name] = str(traces.absolute() / "rank_")
    return traces


def check_graph_memory(environment: Mapping[str, str]) -> None:
    """Refuses CUDA graphs beside a setting of torch's allocator under which NCCL's recorded collectives may touch
    memory that is no longer theirs (megatron-core's `CudaGraphManager` asks the same). Raises ConfigError."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        value = environment.get(name, "")
        if "expandable_segments:True" in value and environment.get("NCCL_GRAPH_REGISTER") != "0":
            raise ConfigError(name, value, "with expandable segments NCCL must not register the memory of CUDA graphs "
                              "(cuda_graphs and decode_graphs of roles)",
                              "Set NCCL_GRAPH_REGISTER=0, or leave expandable_segments out")


def ranks_here(environment: Mapping[str, str], world: int) -> int:
    """Ranks on this node: as the launcher says, all `world` where none has started this process. One that says a
    rank's own number alone has at least as many (slurm/rank.sh and torchrun say both)."""
    if "LOCAL_RANK" not in environment:
        return world
    return max(int(environment.get("LOCAL_WORLD_SIZE", "1")), int(environment["LOCAL_RANK"]) + 1)


def check_gpus(environment: Mapping[str, str], ranks: int, devices: int) -> None:
    """Refuses more ranks on a node than GPUs, unless NCCL is told that they share. Raises ConfigError."""
    if ranks > devices and environment.get(SHARES_GPUS) != "1":
        raise ConfigError(
            "device", "cuda", f"every rank takes a GPU of its own; here are {ranks} ranks, and torch sees {devices} "
            "GPUs", f"Start at most {devices} on a node (processes, --nproc-per-node, --ntasks-per-node); for a test, "
            f"{SHARES_GPUS}=1 lets them share, with an NCCL that has it",
        )


def device_index(environment: Mapping[str, str], devices: int) -> int:
    """The GPU of this rank among its node's `devices`. Ranks that share go round them.

    Raises:
        ConfigError: the node has more ranks than GPUs (`check_gpus`).
    """
    check_gpus(environment, ranks_here(environment, 1), devices)
    return int(environment["LOCAL_RANK"]) % devices
