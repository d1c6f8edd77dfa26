"""What a rank's processes tell each other in an optimizer step: which collectives, over which axis, of how many bytes.

Bytes are those of the whole tensor that a call works on: what is reduced, what an all-gather gives, what a
reduce-scatter is given, what a message holds. What goes over a rank's links for it is `Call.link_bytes`. Calls of a few
numbers (metrics, the gradient's norm, shapes of messages, sums of sequences over their context ranks) are left out.

Legend: T loss positions; h hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megakd.planning.setup import STATISTICS_BYTES, RoleSetup, TrainingSetup
from megakd.planning.sizes import buffer_numbers, head_columns, layer_widths, matrix_parameters
from megakd.planning.work import RoleWork


@dataclass(frozen=True)
class Call:
    """Equal calls of one collective."""

    operation: str
    """all_reduce, all_gather, reduce_scatter, send or receive."""
    axis: str
    """tensor, context, data (and context, as gradients are summed over both), pipeline, tied (the first and last
    stage) or world."""
    size: int
    """Ranks that take part."""
    size_bytes: float
    """Of one call."""
    calls: float
    purpose: str

    @property
    def bytes(self) -> float:
        """Of all calls."""
        return self.size_bytes * self.calls

    @property
    def link_bytes(self) -> float:
        """What a rank sends for all calls, by the ring algorithms."""
        share = (self.size - 1) / self.size
        factor = {"all_reduce": 2 * share, "all_gather": share, "reduce_scatter": share, "send": 1.0, "receive": 0.0}
        return factor[self.operation] * self.bytes


def training_traffic(setup: TrainingSetup, rank: int) -> list[Call]:
    """The calls of a rank of the world in one step.

    In a real step all are exact where replicas, and their context ranks, have equally much to do; one with less has
    less.
    """
    trained = setup.trained
    pipeline_rank = trained.layout.coordinates(rank).pipeline
    calls = []
    for role, teacher in setup.teachers.items():
        stage = teacher.layout.coordinates(rank).pipeline
        calls += model_calls(teacher, setup, setup.work.roles[role], stage, role)
        calls += transport_calls(setup, role, rank)
    calls += model_calls(trained, setup, setup.work.roles["student"], pipeline_rank, "student", training=True)
    if pipeline_rank == trained.parallel.pipeline - 1:
        calls += loss_calls(setup, setup.work.roles["student"])
    calls += gradient_calls(setup, pipeline_rank)
    return [call for call in calls if call.size > 1 and call.calls > 0 and call.size_bytes > 0]


def model_calls(role: RoleSetup, setup: TrainingSetup, work: RoleWork, pipeline_rank: int, name: str, *,
                training: bool = False) -> list[Call]:
    """The calls of a model's layers, embedding and pipeline on one stage, over a step's micro-batches."""
    tensor, stages = role.parallel.tensor, role.parallel.pipeline
    shards = role.shards(pipeline_rank, setup.spec)
    layers = sum(shard.layers for shard in shards)
    micro_batches = len(work.micro_batches)
    tokens = work.sum("tokens") / micro_batches
    size = tokens * role.architecture.hidden_size * setup.parameter_bytes
    first, last = shards[0].embedding, shards[-1].head
    made_again = {"none": 0, "mlp": 1, "full": 2}[role.recompute] if training else 0  # of a layer's two regions
    calls = []
    if role.parallel.sequence:
        gathers = layers * (2 + (4 if training else 0) + made_again) + (last + (first if training else 0))
        scatters = layers * (2 + (2 if training else 0) + made_again) + first
        calls += [Call("all_gather", "tensor", tensor, size, gathers * micro_batches, f"{name}: layers"),
                  Call("reduce_scatter", "tensor", tensor, size, scatters * micro_batches, f"{name}: layers")]
    else:
        reduces = layers * (2 + (2 if training else 0) + made_again) + first
        calls.append(Call("all_reduce", "tensor", tensor, size, reduces * micro_batches, f"{name}: layers"))
    if training:
        # Of what each tensor rank has normalised a part of: its positions, its heads.
        norms = (2 * layers + last) * role.architecture.hidden_size if role.parallel.sequence else 0
        norms += 2 * layers * role.architecture.head_dim if role.architecture.qk_norm else 0
        calls += [Call("all_reduce", "tensor", tensor, norms * STATISTICS_BYTES, 1,
                       f"{name}: gradients of norms")] * (norms > 0)
    calls += context_calls(role, setup, tokens, layers * micro_batches, name, training)
    message = size / (tensor if role.parallel.sequence else 1)
    chunks = stages * role.parallel.virtual_pipeline
    parts = [pipeline_rank + number * stages for number in range(role.parallel.virtual_pipeline)]
    onward, back = sum(part < chunks - 1 for part in parts), sum(part > 0 for part in parts)
    # A training's activations go onward and their gradients back over the same links.
    sends, receives = (onward + back,) * 2 if training else (onward, back)
    calls += [Call("send", "pipeline", stages, message, sends * micro_batches, f"{name}: activations"),
              Call("receive", "pipeline", stages, message, receives * micro_batches, f"{name}: activations")]
    return calls


def context_calls(role: RoleSetup, setup: TrainingSetup, tokens: float, passes: int, name: str,
                  training: bool) -> list[Call]:
    """Keys and values on their way between context ranks, for so many `passes` of a layer over a rank's `tokens`.

    The local attention gathers them, side by side, and scatters the sum of their gradients. Transformer Engine's sends
    them round a ring ("p2p", which megatron-core chooses): forward every rank's reach all others; backward they go
    round again, their gradients a message behind, so that the first message is of the ones, the last of the others, and
    those between are of both (AttnFuncWithCPAndKVP2P in its context_parallel.py; from reading, not measured).
    """
    ranks = role.parallel.context
    if ranks == 1:
        return []
    own = 2 * tokens * layer_widths(role.architecture, role.parallel.tensor).key * setup.parameter_bytes
    forward = passes * (2 if training and role.recompute == "full" else 1)
    purpose = f"{name}: keys and values"
    if setup.spec == "local":
        calls = [Call("all_gather", "context", ranks, ranks * own, forward, purpose)]
        return calls + [Call("reduce_scatter", "context", ranks, ranks * own, passes, purpose)] * training
    single, double = forward * (ranks - 1), 0
    if training:
        single, double = single + 2 * passes, (ranks - 2) * passes
    return [Call(way, "context", ranks, size, count, purpose) for way in ("send", "receive")
            for size, count in ((own, single), (2 * own, double))]


def transport_calls(setup: TrainingSetup, role: str, rank: int) -> list[Call]:
    """A teacher's hidden states on their way to the student's last stage: of its context rank's rows each tensor rank
    gets its share over the network, then they gather all. In an average step no row is taken to lie on the right rank
    already."""
    trained, teacher, place = setup.trained, setup.teachers[role], setup.trained.layout.coordinates(rank)
    reads = place.pipeline == trained.parallel.pipeline - 1
    makes = teacher.layout.coordinates(rank).pipeline == teacher.parallel.pipeline - 1
    tensor = trained.parallel.tensor
    if setup.work.moved is None:
        sent = setup.work.roles[role].sum("all_rows") / teacher.parallel.tensor if makes else 0
        gathered = setup.work.received(role) if reads else 0
        received = gathered / tensor
    else:
        moved = setup.work.moved[role]
        sent, received, gathered = moved.sent[rank], moved.received[rank], 0
        if reads:
            gathered = moved.gathered[trained.layout.copy(place)]
    row = teacher.architecture.hidden_size * setup.parameter_bytes
    return [Call("send", "world", trained.world, sent * row, 1, f"{role}: hidden states"),
            Call("receive", "world", trained.world, received * row, 1, f"{role}: hidden states"),
            Call("all_gather", "tensor", tensor, gathered * row, 1, f"{role}: hidden states")]


def loss_calls(setup: TrainingSetup, work: RoleWork) -> list[Call]:
    """A MAX and a SUM of a few numbers a token for each chunk; the sum of the student's d(hidden), of several chunks
    together on CUDA."""
    trained, calls = setup.trained, []
    tensor, hidden = trained.parallel.tensor, trained.architecture.hidden_size
    for loss in setup.losses:
        rows = [(each.rows(loss.kinds), times) for each, times in work.repeated]
        chunks = _pieces(rows, setup.chunk_tokens)
        every = sum(each * times for each, times in rows)
        statistics = (loss.models + loss.sums) * STATISTICS_BYTES * every
        calls.append(Call("all_reduce", "tensor", tensor, statistics / (2 * chunks), 2 * chunks, "loss: statistics"))
        if loss.gradient != "none":
            size, several = every * hidden * STATISTICS_BYTES, _pieces(rows, setup.gradient_tokens)
            calls.append(Call("all_reduce", "tensor", tensor, size / several, several, "loss: d(hidden)"))
    return calls


def _pieces(rows: Sequence[tuple[float, float]], tokens: int) -> float:
    """Pieces of at most so many tokens of micro-batches, which are given as (rows, times)."""
    return sum(math.ceil(each / tokens) * times for each, times in rows)


def gradient_calls(setup: TrainingSetup, pipeline_rank: int) -> list[Call]:
    """Gradients to the slices of the distributed optimizer, and the new parameters back to all replicas."""
    trained = setup.trained
    copies = trained.layout.copies
    shards = trained.shards(pipeline_rank, setup.spec)
    numbers = sum(buffer_numbers(trained.architecture, shard, copies) for shard in shards)
    published = numbers * setup.parameter_bytes
    if trained.fp8_weights:  # one byte of each
        published -= matrix_parameters(trained.architecture, shards) * (setup.parameter_bytes - 1)
    calls = [
        Call("reduce_scatter", "data", copies, numbers * STATISTICS_BYTES, 1, "gradients"),
        Call("all_gather", "data", copies, published, 1, "parameters"),
    ]
    stages = trained.parallel.pipeline
    if trained.architecture.tied_embeddings and stages > 1 and pipeline_rank in (0, stages - 1):
        rows = head_columns(trained.architecture, trained.parallel.tensor)
        calls.append(Call("all_reduce", "tied", 2, rows * trained.architecture.hidden_size * STATISTICS_BYTES, 1,
                          "gradient of the tied embedding"))
    return calls
