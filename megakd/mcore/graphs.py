"""CUDA graphs of forward passes: the launches of their kernels recorded once a size, and replayed. `GraphedForward` is
for the packed rows of a model that only runs forward, `GraphedDecoding` for a rollout's passes of one token a row.

A graph replays the same kernels on the same memory, so a recorded pass reads its rows from buffers that stay where they
are and leaves its hidden states in another. What differs between two passes of a size is numbers in these buffers:
tokens, positions, where sequences begin, and what the stage before has sent.

What holds in a recording (docs/decisions.md says by which sources): nothing waits for the device or reads numbers from
it; no generator is read or set (`_no_random_states`); whatever a module makes at its first call (FP8 copies of weights,
cuDNN's plans, compiled activations, NCCL's communicators) is there before, from the passes that warm up. FP8's
histories of amaxes would have to be reduced outside; models that only run forward have none.

Legend: P rows of a packed micro-batch, S of them on this tensor rank, B its sequences; R rows of a rollout's pass; H
hidden width. Not yet run on a GPU; tests record by keeping the call.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megakd.batch import Batch
from megakd.mcore.layers import packed_sequences
from megakd.mcore.model import HiddenGPT, Model, unwrap
from megakd.rollout.cache import KVCache

logger = logging.getLogger("megakd")

WARM_UPS = 3
"""Passes before a recording. The first makes what is made once; the others run as the recorded one will."""


class Recorder(Protocol):
    """Records a call whose inputs and outputs lie in memory that stays where it is."""

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        """-> what does the same again, on the numbers that are in that memory then."""


class CudaRecorder:
    """Captures CUDA graphs, all in one memory pool: their passes run one after the other, and what outlives a pass is
    outside of the pool, so that each may overwrite what another has left there."""

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()
        # The same for warming up and capturing: cuBLAS has a workspace for each stream.
        self._stream = torch.cuda.Stream()

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        """Warms up and captures.

        Collectives: those of `call`, `WARM_UPS` + 1 times; ranks of a tensor group record the same sizes in the same
        order. NCCL's watchdog asks for events meanwhile, from a thread of its own, hence "thread_local".
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with _no_collection(), torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            call()
        return graph.replay


@dataclass(frozen=True)
class Size:
    """What a recorded pass is made for; a micro-batch of another size needs another."""

    rows: int
    sequences: int
    """At most, and the filling. Those that a micro-batch has fewer are empty, at its end."""
    longest: int
    """That a sequence may be: attention launches so many blocks."""

    @staticmethod
    def of(batch: Batch) -> Size:
        """The size for a micro-batch: powers of two, so that few are asked for. `Padding.length` keeps rows to few."""
        rows, own = len(batch.tokens_P), len(batch.sample_ids_B)
        return Size(rows, _power_of_two(own + 1), min(rows, _power_of_two(batch.longest)))


@dataclass(frozen=True)
class _Buffers:
    """Memory of the passes for rows up to some number: as long as there is a recorded one, it stays where it is."""

    tokens_P: Tensor
    positions_P: Tensor
    received_S1H: Tensor | None
    """From the pipeline stage before; None on the first."""
    hidden_S1H: Tensor


@dataclass
class _Pass:
    """One size's: its parts of the buffers, where its sequences begin, and what runs it once it is recorded."""

    buffers: _Buffers
    cu_seqlens: Tensor
    replay: Callable[[], None] | None = None


class GraphedForward:
    """A model's packed forward pass by recordings, each made when its size first comes. Nothing runs without one.

    Sizes are few because of `Padding.length` (8 for each doubling of the longest row, beyond 16 steps) and `Size.of`
    (in one stage one or two numbers of sequences, two or three lengths), so that all recordings are kept.
    """

    def __init__(self, model: Model, recorder: Recorder):
        # Interleaved stages are a ring in which sends may be under way; a capture waits for all of its device.
        [chunk] = model.chunks
        assert model.config.cuda_graph_impl == "none", "megatron-core would record layers by itself"
        assert model.config.fp8 is None or model.config.fp8_recipe != "delayed"
        self._chunk, self._is_first = unwrap(chunk), model.grid.is_first_stage
        self._parts = model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1
        self._width, self._dtype = model.config.hidden_size, model.dtype
        self._recorder = recorder
        self._buffers: dict[int, _Buffers] = {}
        self._passes: dict[Size, _Pass] = {}

    def __call__(self, batch: Batch) -> Tensor:
        """-> hidden [S, 1, H] of a micro-batch, the caller's own; without gradients.

        What the stage before has sent is taken from where megatron-core's schedule has put it (`set_input_tensor`). A
        copy is handed out, as it may still be on its way to the next stage when the next micro-batch comes.

        Collectives: the pass' own; where a size comes for the first time, those of `Recorder.record`.
        """
        size = Size.of(batch)
        if size not in self._passes:
            self._passes[size] = self._memory_for(size, batch.tokens_P.device)
        own = self._passes[size]
        buffers, begins = own.buffers, len(batch.cu_seqlens)
        if not self._is_first:
            buffers.received_S1H.copy_(self._chunk.decoder.input_tensor)
        buffers.tokens_P.copy_(batch.tokens_P)
        buffers.positions_P.copy_(batch.position_ids_P)
        own.cu_seqlens[:begins].copy_(batch.cu_seqlens)
        own.cu_seqlens[begins:].fill_(size.rows)
        if own.replay is None:
            own.replay = self._record(size, own)
        own.replay()
        return buffers.hidden_S1H.clone()

    def _record(self, size: Size, own: _Pass) -> Callable[[], None]:
        """Records a size's pass, whose memory holds a micro-batch."""
        chunk, buffers = self._chunk, own.buffers
        packed = packed_sequences(own.cu_seqlens, size.longest)

        def call() -> None:
            if not self._is_first:
                chunk.set_input_tensor(buffers.received_S1H)
            buffers.hidden_S1H.copy_(chunk(buffers.tokens_P[None], buffers.positions_P[None], packed))

        assert not chunk.training
        logger.info("records a forward pass of %d rows in %d sequences of up to %d tokens (CUDA graph %d)", size.rows,
                    size.sequences, size.longest, len(self._passes))
        with torch.no_grad(), _no_random_states(chunk):
            return self._recorder.record(call)

    def _memory_for(self, size: Size, device: torch.device) -> _Pass:
        """What a size's pass reads and writes. Rows of up to a power of two share theirs, so that all passes together
        hold no more than some four times the longest row's hidden states, and on later stages as much again."""
        capacity = _power_of_two(size.rows)
        if capacity not in self._buffers:
            tokens_P, positions_P = torch.zeros(2, capacity, dtype=torch.int64, device=device)
            shape = (-(-capacity // self._parts), 1, self._width)
            hidden_S1H = torch.zeros(shape, dtype=self._dtype, device=device)
            received_S1H = None if self._is_first else torch.zeros_like(hidden_S1H)
            self._buffers[capacity] = _Buffers(tokens_P, positions_P, received_S1H, hidden_S1H)
        whole, on_rank = self._buffers[capacity], size.rows // self._parts
        buffers = _Buffers(whole.tokens_P[: size.rows], whole.positions_P[: size.rows],
                           None if self._is_first else whole.received_S1H[:on_rank], whole.hidden_S1H[:on_rank])
        return _Pass(buffers, torch.zeros(size.sequences + 1, dtype=torch.int32, device=device))


LENGTHS = 256
"""A recorded decoding pass reads a multiple of so many positions of every row: a recording serves as many tokens, and
half as many positions a row are read in the mean that nobody sees."""

Launch = Callable[[int, Tensor, Tensor, KVCache, Tensor | None], Tensor]
"""Runs a part of a model by its modules (`rollout.ring.Decoder.run`)."""


@dataclass(frozen=True)
class DecodingSize:
    """What a recorded decoding pass is made for."""

    part: int
    rows: int
    """A power of two, or all slots: rows finish one by one, and where weights are what is read more cost little."""
    length: int
    """Positions that are read of each row."""


class GraphedDecoding:
    """A rollout's passes of one token a row on one cache, whose memory the recordings hold; they end with it."""

    def __init__(self, model: Model, cache: KVCache, recorder: Recorder):
        assert model.config.cuda_graph_impl == "none", "megatron-core would record layers by itself"
        assert model.config.fp8 is None or model.config.fp8_recipe != "delayed"
        self._chunks, self._stages = [unwrap(chunk) for chunk in model.chunks], model.grid.layout.pipeline
        self._recorder = recorder
        self._tokens_R1, self._positions_R1 = torch.zeros(2, cache.slots, 1, dtype=torch.int64, device=cache.device)
        shape = (1, cache.slots, model.config.hidden_size)
        self._received_1RH, self._hidden_1RH = torch.zeros(2, *shape, dtype=model.dtype, device=cache.device)
        self._own_1R1 = torch.zeros(1, cache.slots, 1, dtype=model.dtype, device=cache.device)
        self._passes: dict[DecodingSize, Callable[[], None]] = {}

    def __call__(self, launch: Launch, part: int, tokens_R1: Tensor, positions_R1: Tensor, cache: KVCache,
                 hidden_1RH: Tensor | None) -> Tensor:
        """-> hidden [1, R, H] of a part, the caller's own. In slots that are not in use the first position is written:
        what fills up the rows reads a token there, of which nothing is left but the model's biases. A token with which
        a sequence begins has some of the largest numbers in a model, and one scale for all rows would follow them.

        Collectives: the part's own; where a size comes for the first time, those of `Recorder.record`.
        """
        own = len(tokens_R1)
        size = DecodingSize(part, min(_power_of_two(own), cache.slots),
                            min(math.ceil(cache.length / LENGTHS) * LENGTHS, cache.max_length))
        for buffer, numbers in ((self._tokens_R1, tokens_R1), (self._positions_R1, positions_R1)):
            buffer[:own].copy_(numbers)
            buffer[own : size.rows].zero_()
        self._own_1R1[:, :own].fill_(1)
        self._own_1R1[:, own:].zero_()
        if hidden_1RH is not None:
            self._received_1RH[:, :own].copy_(hidden_1RH)
            self._received_1RH[:, own:].zero_()
        if size not in self._passes:
            self._passes[size] = self._record(size, launch, cache)
        self._passes[size]()
        return self._hidden_1RH[:, :own].clone()

    def _record(self, size: DecodingSize, launch: Launch, cache: KVCache) -> Callable[[], None]:
        """Records a size's pass, whose rows are in the buffers. To run it several times writes the same keys."""
        tokens_R1, positions_R1 = self._tokens_R1[: size.rows], self._positions_R1[: size.rows]
        received_1RH = None if size.part == 0 else self._received_1RH[:, : size.rows]
        hidden_1RH = self._hidden_1RH[:, : size.rows]

        def call() -> None:
            cache.begin_next_tokens(positions_R1, size.length)
            with self._embedded(chunk, size):
                hidden_1RH.copy_(launch(size.part, tokens_R1, positions_R1, cache, received_1RH))

        chunk = self._chunks[size.part // self._stages]
        assert not chunk.training
        logger.info("records a decoding pass of %d rows over %d positions (CUDA graph %d)", size.rows, size.length,
                    len(self._passes) + 1)
        with torch.no_grad(), _no_random_states(chunk):
            return self._recorder.record(call)

    @contextmanager
    def _embedded(self, chunk: HiddenGPT, size: DecodingSize) -> Iterator[None]:
        """Has the first part embed what fills up the rows as zeros."""
        if size.part > 0:
            yield
            return
        own_1R1 = self._own_1R1[:, : size.rows]
        hook = chunk.embedding.register_forward_hook(lambda _, __, hidden_1RH: hidden_1RH * own_1R1)
        try:
            yield
        finally:
            hook.remove()


def replay_forward(model: Model, graph_tokens: int, recorder: Recorder) -> Model:
    """Has a model's packed forward passes (`forward_hidden`) be recorded and replayed.

    Args:
        model: frozen, with one chunk on this rank.
        graph_tokens: its rows are filled up to multiples of it, and longer ones to fewer sizes (`Padding`).
        recorder: `CudaRecorder`; models that run one after the other may share it.
    """
    model.rows = math.lcm(model.rows, graph_tokens)
    model.graphs = GraphedForward(model, recorder)
    return model


def _power_of_two(number: int) -> int:
    """The smallest that is not below a number."""
    return 1 << (number - 1).bit_length()


@contextmanager
def _no_random_states(chunk: HiddenGPT) -> Iterator[None]:
    """Lets megatron-core's generators be, which torch neither reads nor sets in a capture.

    They are swapped in around what may drop something out: the embedding and the block under sequence parallelism,
    which ask for the tracker each time, and otherwise Transformer Engine's attentions, which have kept its method
    (`attention_dropout_ctx`). Evaluation drops nothing.
    """
    tracker = get_cuda_rng_tracker()
    keepers = [module for module in chunk.modules() if hasattr(module, "attention_dropout_ctx")]
    kept = [module.attention_dropout_ctx for module in keepers]
    for module in keepers:
        module.attention_dropout_ctx = nullcontext
    tracker.fork = lambda *_, **__: nullcontext()
    try:
        yield
    finally:
        del tracker.fork
        for module, context in zip(keepers, kept, strict=True):
            module.attention_dropout_ctx = context


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps Python from freeing a graph of another model in the middle of a capture, which would break it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
