"""Time of a training step, from the operations, the memory traffic and the messages of its parts.

Every part's time is a sum: products at the device's rate for them, attention at its kernel's, everything else at the
memory's, and messages at their link's. What megatron-core overlaps (gradients with the backward pass on CUDA) is
counted where it is longer than what it hides behind. Parts of the same kind of all pipeline stages are added up as the
schedule lets them follow one another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megakd.planning.cluster import Cluster, Link
from megakd.planning.setup import STATISTICS_BYTES, RoleSetup, TrainingSetup
from megakd.planning.sizes import LayerWidths, head_columns, layer_widths, shard_parameters
from megakd.planning.traffic import (
    Call,
    context_calls,
    gradient_calls,
    loss_calls,
    model_calls,
    training_traffic,
    transport_calls,
)
from megakd.planning.work import MicroBatch, RoleWork

BACKWARD = 2
"""Operations of a backward pass, in forward passes."""
ATTENTION_BACKWARD = 2.5
"""The same of attention, whose backward pass makes the scores again."""
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
LOGIT_PASSES = 5
"""Times that a model's logits of a chunk are read or written in a loss on a CPU."""
OPTIMIZER_PASSES = {"cuda": 7, "cpu": 13}
"""Times that AdamW reads or writes a number of the parameters: fused in one kernel, or operation by operation."""


@dataclass(frozen=True)
class StageTime:
    """Seconds of one micro-batch on one pipeline stage by part, without what it sends to the next."""

    forward: dict[str, float]
    backward: dict[str, float]

    @property
    def both(self) -> float:
        """Forward and backward."""
        return sum(self.forward.values()) + sum(self.backward.values())


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, part by part."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())


def products_seconds(cluster: Cluster, dtype: str, rows: float, products: Sequence[tuple[int, int]]) -> float:
    """Products of `rows` positions with weights of the given (inputs, outputs), which at the least have to be read."""
    rates, memory = cluster.device.rates[dtype], cluster.device.memory_gb_s * 1e9 / WEIGHT_BYTES[dtype]
    return sum(max(rates.seconds(2.0 * rows * inputs * outputs, min(rows, inputs, outputs)), inputs * outputs / memory)
               for inputs, outputs in products)


def attention_seconds(cluster: Cluster, widths: LayerWidths, pairs: float, length: float) -> float:
    """Scores and weighted values of causal attention within sequences of `length`, forward."""
    return cluster.device.attention.seconds(4.0 * widths.query * pairs, length)


def passes_seconds(cluster: Cluster, setup: TrainingSetup, widths: LayerWidths, tokens: float, sequence: int) -> float:
    """Norms, residual sums, rotations, activations and conversions of a layer, forward: each number is read and written
    as often as the layer's modules do it."""
    hidden, query, key, ffn = widths.hidden / sequence, widths.query, widths.key, widths.ffn
    if setup.spec == "te":
        # Norm in and out, residual two in and one out, for both halves of the layer; norms of heads and rotation in and
        # out; the MLP's halves in and their product out.
        size = (10 * hidden + 2 * (query + key) + 2 * widths.by_head + 3 * ffn) * setup.parameter_bytes
        if setup.dtype == "fp8":
            # Each product's input: read, written as it is and transposed.
            size += 4 * (2 * hidden + query + ffn)
    else:
        # A norm reads and writes 7 times in its elementary operations, a residual sum 3 times; query and key rotated
        # (and the packed projection gathered), the activation with its product and offset.
        size = (20 * hidden + 12 * query + 10 * key + 7 * widths.by_head + 7 * ffn) * setup.parameter_bytes
    return size * tokens / (cluster.device.passes_gb_s * 1e9)


def call_seconds(cluster: Cluster, call: Call, link: Link) -> float:
    """A collective on a ring over `link`."""
    steps = {"all_reduce": 2 * (call.size - 1), "send": 1, "receive": 1}.get(call.operation, call.size - 1)
    return call.link_bytes / (link.gb_s * 1e9) + call.calls * steps * link.latency_us * 1e-6


def link_of(cluster: Cluster, role: RoleSetup, axis: str) -> Link:
    """The slowest link on an axis of a role's layout: neighbours share a node (`layout.py`).

    Raises:
        ConfigError: as `Cluster.link`.
    """
    layout = role.layout
    stride = {"tensor": 1, "context": layout.tensor, "data": layout.tensor * layout.context,
              "pipeline": layout.world // layout.pipeline, "tied": layout.world // layout.pipeline, "world": 1}[axis]
    size = {"tensor": layout.tensor, "context": layout.context, "data": layout.data, "pipeline": layout.pipeline,
            "tied": layout.pipeline, "world": layout.world}[axis]
    return cluster.link(stride * size)


def stage_time(cluster: Cluster, setup: TrainingSetup, role: RoleSetup, name: str, pipeline_rank: int,
               micro: MicroBatch, *, training: bool) -> StageTime:
    """One micro-batch on a stage of a model: its layers with their collectives; the loss is `loss_seconds`."""
    device, widths = cluster.device, layer_widths(role.architecture, role.parallel.tensor)
    layers = sum(shard.layers for shard in role.shards(pipeline_rank, setup.spec))
    sequence = role.parallel.tensor if role.parallel.sequence else 1
    forward = {
        "products": products_seconds(cluster, setup.dtype, micro.tokens, layer_products(widths)),
        "attention": attention_seconds(cluster, widths, micro.pairs, 2 * micro.pairs / micro.tokens),
        "other kernels": passes_seconds(cluster, setup, widths, micro.tokens, sequence),
    }
    again = recomputed(widths, role.recompute) if training else 0.0
    backward = {
        "products": BACKWARD * forward["products"],
        "attention": ATTENTION_BACKWARD * forward["attention"],
        # Each gradient of a weight is added to the sum of the micro-batches: two read, one written; by Transformer
        # Engine's products themselves, so that the sum alone is.
        "other kernels": BACKWARD * forward["other kernels"]
        + (2 if setup.spec == "te" else 3) * STATISTICS_BYTES * widths.parameters / (device.memory_gb_s * 1e9),
    } if training else {}
    backward = {part: seconds + again * forward[part] for part, seconds in backward.items()}
    forward["calls"] = waiting_for_calls(setup, device.layer_forward_us * 1e-6, sum(forward.values()))
    if training:
        calls = (device.layer_backward_us + again * device.layer_forward_us) * 1e-6
        backward["calls"] = waiting_for_calls(setup, calls, sum(backward.values()))
    ways = tuple({part: seconds * layers for part, seconds in way.items()} for way in (forward, backward))
    messages = model_calls(role, setup, RoleWork((micro,)), pipeline_rank, name, training=training)
    heard = _heard(cluster, role, "tensor", messages) * (1 - cluster.overlap.tensor)
    share = (1 / 3 if role.recompute == "none" else 1 / 2) if training else 1
    ways[0]["tensor messages"] = heard * share
    if training:
        ways[1]["tensor messages"] = heard * (1 - share)
    if role.parallel.context > 1:
        # Transformer Engine's ring goes on beside the attention; how far that hides it has not been measured.
        onward = context_calls(role, setup, micro.tokens, layers, name, training=False)
        ways[0]["context messages"] = _heard(cluster, role, "context", onward)
        if training:
            ways[1]["context messages"] = _heard(cluster, role, "context", messages) - ways[0]["context messages"]
    return StageTime(*ways)


def stage_times(cluster: Cluster, setup: TrainingSetup, role: RoleSetup, name: str, micro: MicroBatch, *,
                training: bool) -> list[StageTime]:
    """`stage_time` of every stage."""
    made = {stage: stage_time(cluster, setup, role, name, stage, micro, training=training) for stage in set(role.alike)}
    return [made[stage] for stage in role.alike]


def _heard(cluster: Cluster, role: RoleSetup, axis: str, calls: Sequence[Call]) -> float:
    """Seconds of those calls that go over an axis; a message is received while the next is sent."""
    return sum(call_seconds(cluster, call, link_of(cluster, role, axis)) for call in calls
               if call.axis == axis and call.size > 1 and call.operation != "receive")


def layer_products(widths: LayerWidths) -> list[tuple[int, int]]:
    """(inputs, outputs) of a layer's matrices on a tensor rank."""
    return [(widths.hidden, widths.query + 2 * widths.key), (widths.query, widths.hidden),
            (widths.hidden, 2 * widths.ffn), (widths.ffn, widths.hidden)]


def recomputed(widths: LayerWidths, recompute: str) -> float:
    """Part of a layer's forward pass that its backward pass makes again."""
    return {"none": 0.0, "mlp": 3 * widths.ffn * widths.hidden / widths.parameters, "full": 1.0}[recompute]


def waiting_for_calls(setup: TrainingSetup, calls: float, kernels: float) -> float:
    """What calls add to the kernels' own time: all of theirs where the caller computes (CPU), else what is longer."""
    return calls if setup.device == "cpu" else max(0.0, calls - kernels)


def pipeline_seconds(stages: Sequence[StageTime], micro_batches: int, chunks: int) -> float:
    """The schedule's time: the slowest stage works through all micro-batches, after one has come down to it and until
    one has gone back up; with more chunks a stage, that way is as many times shorter."""
    slowest = max(stage.both for stage in stages)
    way = sum(stage.both for stage in stages) - slowest
    return micro_batches * slowest + way / chunks


def uneven_within(layers: int, pipeline: int, virtual_pipeline: int) -> bool:
    """Whether an interleaved pipeline has other chunks with a layer less than its first and its last.

    They take turns with longer ones and wait: such a schedule takes up to 29 % longer than `pipeline_seconds`
    says. All others take as long, or a little less where first and last stage have less to do.
    """
    return virtual_pipeline > 1 and -layers % (pipeline * virtual_pipeline) > 2


def loss_seconds(cluster: Cluster, setup: TrainingSetup, micro: MicroBatch) -> float:
    """The loss of one micro-batch, forward and backward: products with the heads, and passes over the logits."""
    trained, total, share = setup.trained, 0.0, setup.parameter_bytes / STATISTICS_BYTES
    columns = head_columns(trained.architecture, trained.parallel.tensor)
    # Heads stay in the parameters' own dtype when layers are FP8.
    dtype = "bf16" if setup.dtype == "fp8" else setup.dtype
    teachers = [architecture.hidden_size for architecture in setup.heads.values()]
    for call in setup.losses:
        rows = micro.rows(call.kinds)
        if rows == 0:
            continue
        chunk, added = min(rows, setup.chunk_tokens), math.ceil(rows / setup.gradient_tokens)
        products = {"forward": 3, "backward": 4, "none": 0}[call.gradient]
        heads = [(trained.architecture.hidden_size, columns)] * products
        own = call.gradient != "none"
        heads += [(width, columns) for width in teachers[:call.models - own]]
        total += rows / chunk * products_seconds(cluster, dtype, chunk, heads)
        # Of numbers of 4 bytes. On a CPU a model's logits are written, read for the maximum and for the sums, and the
        # student's made a gradient; CUDA's kernels read them once for all sums and once for the gradient.
        if setup.device == "cpu":
            passes = LOGIT_PASSES * call.models * rows + (2 * rows if own else 0)
        else:
            passes = (3 * call.models + share if own else 2 * call.models) * rows
            passes += (1 + share) * trained.architecture.hidden_size if own else 0  # d(head) is weighted and rounded
        # The head's gradient is added up over the chunks.
        passes += (2 if own else 0) * added * trained.architecture.hidden_size
        total += passes * columns * STATISTICS_BYTES / (cluster.device.passes_gb_s * 1e9)
    messages = sum(call_seconds(cluster, call, link_of(cluster, trained, "tensor"))
                   for call in loss_calls(setup, RoleWork((micro,))) if call.size > 1)
    return total + messages


def training_time(cluster: Cluster, setup: TrainingSetup) -> StepTime:
    """Seconds of a step on the busiest ranks."""
    trained, work = setup.trained, setup.work
    parts: dict[str, float] = {}
    for role, teacher in setup.teachers.items():
        micro_batches = work.roles[role].micro_batches
        mean = work.roles[role].mean
        stages = stage_times(cluster, setup, teacher, role, mean, training=False)
        parts[f"{role}: forward"] = pipeline_seconds(stages, len(micro_batches), teacher.parallel.virtual_pipeline)
        last = trained.layout.rank(pipeline=trained.parallel.pipeline - 1)
        parts[f"{role}: hidden states"] = sum(
            call_seconds(cluster, call, link_of(cluster, trained, call.axis))
            for call in transport_calls(setup, role, last) if call.size > 1)
    parts |= _student_parts(cluster, setup)
    parts["every step's own"] = cluster.device.step_ms * 1e-3
    return StepTime(parts)


def _student_parts(cluster: Cluster, setup: TrainingSetup) -> dict[str, float]:
    """The pipeline's schedule, seen from its slowest stage; messages; the optimizer."""
    trained, work = setup.trained, setup.work.roles["student"]
    micro, count = work.mean, len(work.micro_batches)
    stages = stage_times(cluster, setup, trained, "student", micro, training=True)
    loss = loss_seconds(cluster, setup, micro)
    with_loss = [*stages[:-1], StageTime(stages[-1].forward | {"loss": loss}, stages[-1].backward)]
    slowest = max(with_loss, key=lambda stage: stage.both)
    parts: dict[str, float] = {}
    for way in (slowest.forward, slowest.backward):
        for part, seconds in way.items():
            name = part if part == "loss" else f"student: {part}"
            parts[name] = parts.get(name, 0.0) + count * seconds
    whole = pipeline_seconds(with_loss, count, trained.parallel.virtual_pipeline)
    parts["pipeline's wait"] = whole - count * slowest.both
    return parts | _after(cluster, setup, backward=count * sum(slowest.backward.values()))


def _after(cluster: Cluster, setup: TrainingSetup, backward: float) -> dict[str, float]:
    """Messages between stages and replicas, and the optimizer."""
    trained, device = setup.trained, cluster.device
    calls = training_traffic(setup, trained.layout.rank(pipeline=trained.parallel.pipeline - 1))
    between = sum(call_seconds(cluster, call, link_of(cluster, trained, "pipeline")) for call in calls
                  if call.axis in ("pipeline", "tied") and call.operation != "receive"
                  and not any(call.purpose.startswith(role) for role in setup.teachers))
    between *= 1 - (cluster.overlap.pipeline if trained.parallel.virtual_pipeline > 1 else 0)
    # The stage with most parameters is waited for.
    reduced, published = (max(sum(call_seconds(cluster, call, link_of(cluster, trained, "data"))
                                  for call in gradient_calls(setup, stage) if call.purpose == purpose and call.size > 1)
                              for stage in set(trained.alike)) for purpose in ("gradients", "parameters"))
    # Beside the last micro-batch's backward pass: only then are the gradients whole.
    behind = backward / len(setup.work.roles["student"].micro_batches) if setup.overlap else 0
    reduced -= min(cluster.overlap.data * reduced, behind)
    parameters = max(sum(shard_parameters(trained.architecture, shard) for shard in trained.shards(stage, setup.spec))
                     for stage in set(trained.alike))
    # All gradients cleared and divided; of a replica's own share gradient, master weight and two moments read and three
    # of them written.
    own = parameters / trained.layout.copies
    update = (3 * parameters + OPTIMIZER_PASSES[setup.device] * own) * STATISTICS_BYTES / (device.memory_gb_s * 1e9)
    return {"messages between stages": between, "gradients between replicas": reduced,
            "parameters to replicas": published, "optimizer": update}
