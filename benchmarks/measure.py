"""What the benchmarks measure with: seconds, peak of live bytes, collectives, errors, paired ratios."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")


# --------------------------------------------------------------------------------------------------------------- time
CPU = torch.device("cpu")


class Seconds(NamedTuple):
    """Of one call: of the clock, the slowest rank's; and of this rank's processor."""

    wall: float
    processor: float


def seconds_of(function: Callable[[], Any], device: torch.device = CPU) -> Seconds:
    """Seconds of one call, with all ranks starting together, until `device` has done what the call gave it to do."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several:
        dist.barrier(group=dist.group.WORLD)
    _wait_for(device)
    start, used = time.perf_counter(), time.process_time()
    result = function()
    _wait_for(device)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    del result  # what a call returns is given back to the system outside of the time
    if several:
        slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=dist.group.WORLD)
        seconds = slowest.item()
    return Seconds(seconds, used)


def attention_backend() -> str | None:
    """Which attention Transformer Engine has taken last in this process; None where it has not run."""
    module = sys.modules.get("transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention")
    kinds = ("flash", "fused", "unfused") if module is not None else ()
    return next((kind for kind in kinds if module._attention_backends[f"use_{kind}_attention"]), None)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_call(function: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Seconds of a call, of several on this rank that are given to `device` one after another without waiting.

    On CUDA between two of its events: while one call runs the next is launched, as in a training, so what Python takes
    for that is in the time of the first call alone.
    """
    if device.type != "cuda":
        return sum(seconds_of(function, device).wall for _ in range(calls)) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / calls


def timed_steps(step: Callable[[int], Any], warm_up: int, count: int, device: torch.device = CPU) -> list[Seconds]:
    """Seconds of the steps `warm_up`, `warm_up` + 1, ... of a training on this rank; those before are not timed."""
    for number in range(warm_up):
        step(number)
    return [seconds_of(partial(step, number), device) for number in range(warm_up, warm_up + count)]


def interleaved_seconds(functions: dict[str, Callable[[], Any]], repeats: int,
                        device: torch.device = CPU, calls: int = 1) -> dict[str, list[float]]:
    """Seconds of each function in each round. A round runs all of them, each round beginning with another one; with
    more `calls` than one it calls each so often (`seconds_a_call`), on one rank.

    A machine that slows down for a while slows down all of a round: hence times are compared within rounds.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()  # a collection between two calls need not walk through all modules
    gc.disable()
    try:
        for repeat in range(repeats):
            first = repeat % max(len(names), 1)
            for name in names[first:] + names[:first]:
                seconds[name].append(seconds_of(functions[name], device).wall if calls == 1 else
                                     seconds_a_call(functions[name], device, calls))
                gc.collect()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return seconds


def quartiles(numbers: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(numbers) == 1:
        return (numbers[0],) * 3
    return tuple(statistics.quantiles(numbers, n=4, method="inclusive"))


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(up / down for up, down in zip(numerators, denominators, strict=True))


# ------------------------------------------------------------------------------------------------------------- memory
def peak_extra_cuda_bytes(function: Callable[[], Result], device: torch.device) -> tuple[int, Result]:
    """Highest number of bytes that CUDA's allocator gave out during a call, above what was given out before."""
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = function()
    return torch.cuda.max_memory_allocated(device) - before, result


def peak_extra_bytes(function: Callable[[], Result], kept: Callable[[Result], Sequence[Tensor]]) -> tuple[int, Result]:
    """Highest number of bytes that a call holds at a time beyond its inputs and the tensors `kept(result)`.

    The profiler notes each allocation and release of torch's CPU allocator. That is exact where sums over the tensors
    that Python sees are not: operators hold temporaries of their own while they run (logsumexp holds two). Not seen
    is what libraries take elsewhere: the GEMM's packing buffers and gloo's buffers, the same for all who call them.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()
    blocks: list[_Block] = []
    at_address: dict[int, _Block] = {}
    moments = sorted(_allocations(profiled.profiler.kineto_results.experimental_event_tree()), key=lambda one: one[0])
    for moment, (_, address, size) in enumerate(moments):
        if size > 0:
            at_address[address] = _Block(size, moment)
            blocks.append(at_address[address])
        elif address in at_address:  # else an input's, or of something older
            at_address.pop(address).end = moment
    for tensor in kept(result):
        block = at_address.get(tensor.untyped_storage().data_ptr())
        if block is not None:  # a part of a larger block does not excuse all of it
            block.size = max(0, block.size - tensor.nbytes)
    changes = [0] * (len(moments) + 1)
    for block in blocks:
        changes[block.start] += block.size
        changes[len(moments) if block.end is None else block.end] -= block.size
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return peak, result


@dataclass
class _Block:
    size: int
    start: int
    end: int | None = None


def _allocations(events: list[Any]) -> Iterator[tuple[int, int, int]]:
    """Time, address and bytes (negative for a release) of the allocations in a tree of profiler events."""
    for event in events:
        kind, fields = event.typed
        if kind == torch._C._profiler._EventType.Allocation:
            yield event.start_time_ns, fields.ptr, fields.alloc_size
        yield from _allocations(event.children)


# -------------------------------------------------------------------------------------------------------- collectives
@dataclass
class Collectives:
    """Number of collectives by operator, and their bytes."""

    calls: dict[str, int] = field(default_factory=dict)
    bytes: int = 0


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives that are called on this rank within it, in forward and backward passes.

    It sees them where torch hands them to the process group, whatever Python function they were called by. Bytes are
    those of the larger of what goes in and what comes out: an all-reduce counts its tensor once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = Collectives()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.name().split("::")[1].split(".")[0].strip("_")
            sizes = [sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)) for arg in args]
            if name not in ("wait_tensor", "barrier", "monitored_barrier"):
                self.found.calls[name] = self.found.calls.get(name, 0) + 1
                self.found.bytes += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------------------- errors
def largest_relative_error(found: Tensor, right: Tensor) -> float:
    """Largest difference relative to the largest magnitude; inf for a wrong shape or what is not finite."""
    if found.shape != right.shape or not found.isfinite().all():
        return float("inf")
    difference, size = (found.double() - right).abs().max().item(), right.abs().max().item()
    return difference / size if size else (0.0 if difference == 0 else float("inf"))
