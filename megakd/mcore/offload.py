"""The optimizer's states in the host's memory between steps (`optimizer.offload`).

What there is on a rank's device besides parameters and gradients (megatron-core 0.16.1, optimizer/distrib_optimizer.py;
Transformer Engine 2.11, pytorch/optimizers/fused_adam.py):

- `shard_fp32_from_float16_groups`: the master weights of 16-bit parameters, this rank's slices. FP8 parameters, blocks
  of them too, say that they are bfloat16 and have theirs here as well: what is elsewhere is how they are rounded anew
  (`quantize_param_shard`), which reads these and keeps none.
- `shard_fp32_groups`: of float32 parameters. These slices are the parameters themselves, so they stay.
- `optimizer.state`: Adam's `exp_avg` and `exp_avg_sq` of each slice, float32, made in the first step. torch's Adam has
  its step count beside them, one number on the host; the fused ones have it in the parameter group.
- Transformer Engine's FusedAdam keeps one integer more on the device, and scales (`_scales`) of states of fewer bits,
  which we do not have. NVIDIA's apex: not read; megatron-core asks it for the same names.

Master weights and moments move. Both fused kernels and torch change them in place and ask for their addresses at each
step, so only their memory comes and goes: the tensors stay the ones that megatron-core and Adam know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class OffloadedStates:
    """Keeps the states of a rank's optimizers in host buffers, pinned on CUDA, but for when they are asked for.

    On CUDA the copies run on a stream of their own. Putting away goes on beside what comes next: it begins after what
    the current stream has been given, and `record_stream` keeps the allocator from handing the memory on before the
    copy has ended. Fetching: the memory is taken on the current stream; the copy begins after what that had been given
    before (which may have used this memory) and after the copies to the host, which are on its own stream; the current
    stream waits for it. The host itself never reads a buffer, so it waits for nothing.
    """

    def __init__(self, optimizers: Sequence[DistributedOptimizer], device: torch.device):
        """Puts away what states there are.

        Args:
            optimizers: whose states; moments that they make later follow when they are put away next.
            device: where the states are when they are at hand.
        """
        self.at_hand = True
        self._optimizers = optimizers
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[Tensor, Tensor] = {}
        self._put_away()

    @contextmanager
    def fetched(self) -> Iterator[None]:
        """Has the states on the device; inside of another such context it does nothing."""
        if self.at_hand:
            yield
            return
        self._fetch()
        try:
            yield
        finally:
            self._put_away()

    def states(self) -> list[Tensor]:
        """The tensors that are moved."""
        masters = [master for each in self._optimizers for group in each.shard_fp32_from_float16_groups
                   for master in group]
        moments = [state[name] for each in self._optimizers for state in each.optimizer.state.values()
                   for name in MOMENTS if name in state]
        return masters + moments

    @torch.no_grad()
    def _fetch(self) -> None:
        for state, buffer in self._buffers.items():
            state.untyped_storage().resize_(buffer.nbytes)
        with self._copying():
            for state, buffer in self._buffers.items():
                state.copy_(buffer, non_blocking=True)
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self.at_hand = True

    @torch.no_grad()
    def _put_away(self) -> None:
        states = self.states()
        for state in states:
            if state not in self._buffers:
                self._buffers[state] = self._buffer_for(state)
        with self._copying():
            for state in states:
                self._buffers[state].copy_(state, non_blocking=True)
        for state in states:
            if self._stream is not None:
                state.record_stream(self._stream)
            state.untyped_storage().resize_(0)
        self.at_hand = False

    def _buffer_for(self, state: Tensor) -> Tensor:
        if state.untyped_storage().nbytes() != state.nbytes:
            # A view of more, as where megatron-core has made masters from FP8 weights themselves: takes its own part.
            state.data = state.data.clone()
        return torch.empty_like(state, device="cpu", pin_memory=self._stream is not None)

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """The copies' stream, after all that the current one has been given; on a CPU nothing."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield
