"""What a rank measures for the planner's tests: bytes that the allocator hands out, and every collective's bytes."""

from __future__ import annotations

import gc
import warnings
from collections import Counter

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tests.mcore.cases import Distillation, Job

OPERATIONS = {
    "allreduce_": "all_reduce", "_allgather_base_": "all_gather", "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter", "reduce_scatter_tensor_coalesced_": "reduce_scatter", "send": "send",
    "recv_": "receive",
}
STEPS = 3
"""Of which the one with the lowest peak counts."""
FEW = 32
"""Bytes of a call that carries numbers, not tensors: metrics, norms, shapes of messages."""


class Collectives(TorchDispatchMode):
    """Adds up the bytes of all collectives by operation and number of ranks in a call; groups of one do not count."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("c10d.").removesuffix(".default")
        if str(function).startswith("c10d.") and name in OPERATIONS:
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            size = max(_bytes(arg) for arg in args[:2])
            if group.size() > 1 and size > FEW:
                # Messages go over any group: megatron-core takes the world's for one way between two stages.
                ranks = 2 if OPERATIONS[name] in ("send", "receive") else group.size()
                self.bytes[OPERATIONS[name], ranks] += size
        return function(*args, **(kwargs or {}))


def _bytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def measured_step(case: Distillation) -> dict:
    """A step's peak of allocated bytes (from before the model was built), and its collectives."""
    before = _tensors()
    job = Job(case)
    job.trainer.prepare_states(0)
    job.trainer.zero_grad()
    kept = sum(size for place, size in _tensors().items() if place not in before)
    # The lowest of some, as gloo's threads let go of what they have sent a little sooner or later.
    peak = min(_peak_of_step(job, number) for number in range(STEPS))
    with Collectives() as collectives:
        job.step(STEPS)
    return {"kept": kept, "peak": kept + peak, "calls": dict(collectives.bytes)}


def _peak_of_step(job: Job, number: int) -> int:
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as stepped:
        job.step(number)
    live = peak = 0
    for _, size in _allocations(stepped):
        live += size
        peak = max(peak, live)
    return peak


def _tensors() -> dict[int, int]:
    """Address -> bytes of the memory of all tensors that there are."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of objects that tell that they are deprecated when asked for their type
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _allocations(run: profile) -> list[tuple[int, int]]:
    """(time, bytes) of everything that the allocator gave (positive) and took back (negative)."""
    events = run.profiler.kineto_results.events()
    return sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
