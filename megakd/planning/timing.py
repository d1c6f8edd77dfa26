"""Time of a training step, from the operations, the memory traffic and the messages of its parts.

Every part's time is a sum: products at the device's rate for them, attention at its kernel's, everything else at the
memory's, and messages at their link's. What megatron-core overlaps (gradients with the backward pass on CUDA) is
counted where it is longer than what it hides behind. Parts of the same kind of all pipeline stages are added up as the
schedule lets them follow one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megakd.planning.cluster import Cluster, Link
from megakd.planning.setup import RoleSetup, TrainingSetup
from megakd.planning.sizes import LayerWidths, head_columns, layer_widths, shard_parameters
from megakd.planning.traffic import Call, model_calls, training_traffic, transport_calls
from megakd.planning.work import MicroBatch

BACKWARD = 2
"""Operations of a backward pass, in forward passes."""


@dataclass(frozen=True)
class StageTime:
    """Seconds of one micro-batch on one pipeline stage, without what it sends to the next."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, part by part."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())


def products_seconds(cluster: Cluster, dtype: str, rows: float, parameters: float) -> float:
    """A matrix of `rows` positions times weights of `parameters` numbers."""
    rates = cluster.device.rates[dtype]
    operations = 2.0 * rows * parameters / (rates.peak_tflops * 1e12 * rates.efficiency)
    return max(operations, parameters * {"fp32": 4, "bf16": 2, "fp8": 1}[dtype] / (cluster.device.memory_gb_s * 1e9))


def attention_seconds(cluster: Cluster, widths: LayerWidths, pairs: float) -> float:
    """Scores and weighted values of causal attention, forward."""
    rates = cluster.device.attention
    return 4.0 * widths.query * pairs / (rates.peak_tflops * 1e12 * rates.efficiency)


def passes_seconds(cluster: Cluster, setup: TrainingSetup, widths: LayerWidths, tokens: float, sequence: int) -> float:
    """Norms, residual sums, rotations and activations of a layer, forward: every number is read or written once."""
    hidden = widths.hidden / sequence
    fused = setup.spec == "te"
    # Fused: norm in and out, residual two in and one out, for both halves of the layer; rotation in and out; the MLP's
    # halves in and their product out. Not fused: each elementary operation by itself.
    numbers = (10 * hidden + 2 * (widths.query + widths.key) + 3 * widths.ffn) if fused else \
        (22 * hidden + 10 * (widths.query + widths.key) + 9 * widths.ffn)
    return numbers * tokens * setup.parameter_bytes / (cluster.device.memory_gb_s * 1e9)


def call_seconds(cluster: Cluster, call: Call, link: Link) -> float:
    """A collective on a ring over `link`."""
    steps = {"all_reduce": 2 * (call.size - 1), "send": 1, "receive": 1}.get(call.operation, call.size - 1)
    return call.link_bytes / (link.gb_s * 1e9) + call.calls * steps * link.latency_us * 1e-6


def link_of(cluster: Cluster, role: RoleSetup, axis: str) -> Link:
    """The slowest link on an axis of a role's layout: neighbours share a node (`layout.py`)."""
    layout = role.layout
    stride = {"tensor": 1, "data": layout.tensor * layout.context, "pipeline": layout.world // layout.pipeline,
              "tied": layout.world // layout.pipeline, "world": 1}[axis]
    size = {"tensor": layout.tensor, "data": layout.data, "pipeline": layout.pipeline, "tied": layout.pipeline,
            "world": layout.world}[axis]
    return cluster.node_link if stride * size <= cluster.devices_per_node else cluster.network_link


def stage_time(cluster: Cluster, setup: TrainingSetup, role: RoleSetup, name: str, pipeline_rank: int,
               micro: MicroBatch, *, training: bool) -> StageTime:
    """One micro-batch on a stage of a model: its layers with their collectives; the loss is `loss_seconds`."""
    widths = layer_widths(role.architecture, role.parallel.tensor)
    layers = sum(shard.layers for shard in role.shards(pipeline_rank, setup.spec))
    tokens, pairs = micro.tokens / role.parallel.context, micro.pairs / role.parallel.context
    sequence = role.parallel.tensor if role.parallel.sequence else 1
    products = layers * products_seconds(cluster, setup.dtype, tokens, widths.parameters)
    attention = layers * attention_seconds(cluster, widths, pairs)
    passes = layers * passes_seconds(cluster, setup, widths, tokens, sequence)
    forward = products + attention + passes
    one = type(setup.work.roles[name])((micro,))
    messages = sum(call_seconds(cluster, call, link_of(cluster, role, "tensor"))
                   for call in model_calls(role, setup, one, pipeline_rank, name, training=training)
                   if call.axis == "tensor" and call.size > 1)
    if not training:
        return StageTime(forward + messages, 0.0)
    again = {"none": 0.0, "mlp": 3 * widths.ffn * widths.hidden / widths.parameters, "full": 1.0}[role.recompute]
    # Attention's backward pass makes the scores again: 2.5 forward passes.
    backward = BACKWARD * (products + passes) + 2.5 * attention + again * forward
    return StageTime(forward + messages / 3, backward + messages * 2 / 3)


def pipeline_seconds(stages: Sequence[StageTime], micro_batches: int, chunks: int) -> float:
    """The schedule's time: the slowest stage works through all micro-batches, after one has come down to it and until
    one has gone back up; with more chunks a stage, that way is as many times shorter."""
    slowest = max(stage.both for stage in stages)
    way = sum(stage.both for stage in stages) - slowest
    return micro_batches * slowest + way / chunks


def loss_seconds(cluster: Cluster, setup: TrainingSetup, micro: MicroBatch) -> float:
    """The loss of one micro-batch, forward and backward: products with the heads, and passes over the logits."""
    trained, total = setup.trained, 0.0
    columns = head_columns(trained.architecture, trained.parallel.tensor)
    # Heads stay in the parameters' own dtype when layers are FP8.
    dtype = "bf16" if setup.dtype == "fp8" else setup.dtype
    hidden = trained.architecture.hidden_size
    for call in setup.losses:
        rows = micro.rows(call.kinds)
        products = {"forward": 3, "backward": 4, "none": 0}[call.gradient]
        total += products * products_seconds(cluster, dtype, rows, columns * hidden)
        others = (call.models - 1) if call.gradient != "none" else call.models
        teachers = [architecture.hidden_size for architecture in setup.heads.values()][:others]
        total += sum(products_seconds(cluster, dtype, rows, columns * width) for width in teachers)
        # Made, reduced for the maximum and the sums, and turned into a gradient: read or written 5 times a model.
        total += 5 * call.models * rows * columns * 4 / (cluster.device.memory_gb_s * 1e9)
    return total


def training_time(cluster: Cluster, setup: TrainingSetup) -> StepTime:
    """Seconds of a step on the busiest ranks."""
    trained, work = setup.trained, setup.work
    parts = {}
    for role, teacher in setup.teachers.items():
        micro_batches = work.roles[role].micro_batches
        longest = max(micro_batches, key=lambda micro: micro.tokens)
        stages = [stage_time(cluster, setup, teacher, role, stage, longest, training=False)
                  for stage in range(teacher.parallel.pipeline)]
        parts[f"{role}: forward"] = pipeline_seconds(stages, len(micro_batches), teacher.parallel.virtual_pipeline)
        last = trained.layout.rank(pipeline=trained.parallel.pipeline - 1)
        parts[f"{role}: hidden states"] = sum(
            call_seconds(cluster, call, link_of(cluster, trained, call.axis))
            for call in transport_calls(setup, role, last) if call.size > 1)
    micro_batches = work.roles["student"].micro_batches
    mean = MicroBatch(work.roles["student"].sum("tokens") / len(micro_batches),
                      work.roles["student"].sum("pairs") / len(micro_batches),
                      {kind: sum(micro.loss_tokens.get(kind, 0) for micro in micro_batches) / len(micro_batches)
                       for kind in micro_batches[0].loss_tokens})
    stages = [stage_time(cluster, setup, trained, "student", stage, mean, training=True)
              for stage in range(trained.parallel.pipeline)]
    loss = loss_seconds(cluster, setup, mean)
    with_loss = [*stages[:-1], StageTime(stages[-1].forward + loss, stages[-1].backward)]
    one_stage = max(stage.both for stage in with_loss)
    whole = pipeline_seconds(with_loss, len(micro_batches), trained.parallel.virtual_pipeline)
    parts["student: layers"] = len(micro_batches) * stages[-1].both
    parts["loss"] = len(micro_batches) * loss
    parts["pipeline's wait"] = whole - parts["student: layers"] - parts["loss"]
    parts |= _after(cluster, setup, hidden_behind=one_stage * len(micro_batches))
    return StepTime(parts)


def _after(cluster: Cluster, setup: TrainingSetup, hidden_behind: float) -> dict[str, float]:
    """Messages between stages and replicas, and the optimizer."""
    trained = setup.trained
    calls = training_traffic(setup, trained.layout.rank(pipeline=trained.parallel.pipeline - 1))
    between = sum(call_seconds(cluster, call, link_of(cluster, trained, "pipeline")) for call in calls
                  if call.axis in ("pipeline", "tied") and call.operation != "receive")
    reduced = sum(call_seconds(cluster, call, link_of(cluster, trained, "data")) for call in calls
                  if call.purpose == "gradients")
    published = sum(call_seconds(cluster, call, link_of(cluster, trained, "data")) for call in calls
                    if call.purpose == "parameters")
    if setup.device == "cuda":
        reduced = max(0.0, reduced - hidden_behind / 2)
    parameters = max(sum(shard_parameters(trained.architecture, shard) for shard in trained.shards(stage, setup.spec))
                     for stage in range(trained.parallel.pipeline))
    # Gradient, master weight and two moments read, three of them written.
    update = parameters / trained.layout.data * 7 * 4 / (cluster.device.memory_gb_s * 1e9)
    return {"messages between stages": between, "gradients between replicas": reduced,
            "parameters to replicas": published, "optimizer": update}
