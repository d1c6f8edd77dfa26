"""Memory of a rank in a training step: what its tensors take at the fullest moment.

It is what the allocator has handed out (`torch.cuda.max_memory_allocated` on a GPU), part by part. What the device
holds besides (CUDA's context, NCCL's buffers, blocks that the allocator keeps but nobody uses) is the cluster
description's `reserved_gib` and the plan's margin.

It is within 5 % of what tiny models take (tests/mcore/test_planning.py), but for sequence parallelism, where the
measured numbers themselves differ from run to run by more.

Legend of the formulas: h hidden, q query heads x head size, k key heads x head size, f MLP width; all on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from megakd.hf.pieces import Shard
from megakd.planning.setup import STATISTICS_BYTES, TrainingSetup
from megakd.planning.sizes import LayerWidths, head_columns, layer_widths, shard_parameters


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    kept: dict[str, float]
    """What is there throughout the stage: part -> bytes."""
    phases: dict[str, dict[str, float]]
    """Moment of a step -> part -> bytes that are there besides."""

    @property
    def fullest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, float]:
        """All parts at the fullest moment."""
        return self.kept | self.phases[self.fullest]

    @property
    def total(self) -> float:
        """Bytes at the fullest moment."""
        return sum(self.parts.values())


def training_memory(setup: TrainingSetup, pipeline_rank: int) -> Memory:
    """Memory of a rank that holds `pipeline_rank` of the trained model.

    Teachers are counted as on their own stage with most: where a rank stands in a teacher's pipeline depends on the
    layouts of both.
    """
    trained = setup.trained
    shards = trained.shards(pipeline_rank, setup.spec)
    last = shards[-1].head
    kept = _model_states(setup, sum(shard_parameters(trained.architecture, shard) for shard in shards))
    for role, teacher in setup.teachers.items():
        most = max(sum(shard_parameters(teacher.architecture, shard) for shard in teacher.shards(stage, setup.spec))
                   for stage in range(teacher.parallel.pipeline))
        kept[f"{role}: weights"] = most * setup.parameter_bytes
    for role, architecture in setup.heads.items() if last else ():
        columns = head_columns(architecture, trained.parallel.tensor)
        kept[f"{role}: head for the loss"] = columns * architecture.hidden_size * setup.parameter_bytes
    signals = _signals(setup) if last else {}
    phases = {f"{role} runs": _teacher_phase(setup, role) for role in setup.teachers}
    phases |= {name: signals | parts for name, parts in _student_phases(setup, shards, pipeline_rank).items()}
    if shards[0].embedding:
        rows = head_columns(trained.architecture, trained.parallel.tensor)
        dense = rows * trained.architecture.hidden_size * setup.parameter_bytes
        phases["embedding's gradient"] = signals | {"embedding's gradient": 2 * dense}
    if setup.device == "cpu":
        # gloo reduces a copy of what it is given; NCCL works in place.
        chunk = max(shard_parameters(trained.architecture, shard) for shard in shards)
        phases["gradients are summed"] = signals | {"gloo's copy of the gradients": chunk * STATISTICS_BYTES}
    return Memory(kept, phases)


def _model_states(setup: TrainingSetup, parameters: int) -> dict[str, float]:
    """Weights, gradients and optimizer of the trained model (megatron-core's distributed optimizer)."""
    replicas = setup.trained.layout.data * setup.trained.parallel.context
    # Adam's two moments; a master copy where the weights themselves are not float32.
    states = 2 * STATISTICS_BYTES + (0 if setup.dtype == "fp32" else STATISTICS_BYTES)
    kept = {
        "weights": float(parameters * setup.parameter_bytes),
        "gradients": float(parameters * STATISTICS_BYTES),
        "optimizer": parameters * states / replicas,
    }
    if setup.dtype == "fp8":
        kept["weights in fp8"] = 2.0 * parameters  # as they are and transposed, kept over a step's micro-batches
    return kept


def _student_phases(setup: TrainingSetup, shards: list[Shard], pipeline_rank: int) -> dict[str, dict[str, float]]:
    """Activations of all micro-batches under way, with what the loss needs, and with what a layer's backward needs."""
    trained, work = setup.trained, setup.work.roles["student"]
    widths = layer_widths(trained.architecture, trained.parallel.tensor)
    under_way = trained.warmup(pipeline_rank, len(work.micro_batches))
    layer = saved_of_layer(setup, widths, trained.recompute)
    tokens = work.most("tokens") / trained.parallel.context
    activations = under_way * shards[0].layers * layer * tokens
    # Those of an MLP's two halves and of their product; the residual's.
    backward = {"a layer's gradients": (3 * widths.ffn + 2 * widths.hidden) * tokens * setup.parameter_bytes}
    if trained.recompute != "none":
        backward["a layer made again"] = (saved_of_layer(setup, widths, "none") - layer) * tokens
    if trained.parallel.sequence:
        # megatron-core keeps one buffer for what it gathers, and the loss another for the last hidden states.
        whole = widths.hidden * tokens * setup.parameter_bytes
        backward["gathered sequence"] = whole * (2 if shards[-1].head else 1)
    if not shards[-1].head:
        return {"backward": {"activations": activations, **backward}}
    activations += 2 * widths.hidden * _share(setup) * tokens * setup.parameter_bytes
    backward["loss positions"] = _rows(setup)
    if trained.architecture.tied_embeddings and shards[0].embedding:
        backward["head's gradient"] = _head_gradients(setup)  # waits for the embedding's
    return {"loss": {"activations": activations, "loss": _loss(setup)},
            "backward": {"activations": activations, **backward}}


def _share(setup: TrainingSetup) -> float:
    """Part of the residual stream that a tensor rank keeps."""
    return 1 / setup.trained.parallel.tensor if setup.trained.parallel.sequence else 1.0


def saved_of_layer(setup: TrainingSetup, widths: LayerWidths, recompute: str) -> float:
    """Bytes a token that one layer keeps for its backward pass."""
    hidden = widths.hidden * _share(setup)
    if recompute == "full":
        return hidden * setup.parameter_bytes
    mlp = 0 if recompute == "mlp" else 1
    if setup.spec == "local":
        # Both norms: input, normalised, weighted. Attention: query and key rotated, the packed projection, its output
        # sequence by sequence and together, the row sums. MLP: both halves, their activation, one half with its
        # offset, and the product. Rotation: cosine and sine, once for query and once for key.
        numbers = 6 * hidden + 4 * widths.query + 3 * widths.key + 5 * widths.ffn * mlp
        return numbers * setup.parameter_bytes + STATISTICS_BYTES * (4 * widths.head_dim + widths.heads + 2)
    # Transformer Engine keeps a norm's input and output, the projection, rotated query and key, the attention's output,
    # both halves of the MLP and their product. From its sources; not measured on a GPU yet.
    linear_bytes = 1 if setup.dtype == "fp8" else setup.parameter_bytes
    numbers = (2 * hidden + 3 * widths.query + 3 * widths.key + 2 * widths.ffn * mlp) * setup.parameter_bytes
    inputs = (2 * hidden + widths.query + widths.ffn * mlp) * linear_bytes
    return numbers + inputs + STATISTICS_BYTES * (widths.heads + 2)


def _loss(setup: TrainingSetup) -> float:
    """Hidden states at the loss positions and their gradient, the head's gradients, and a chunk's logits."""
    trained, work = setup.trained, setup.work.roles["student"]
    columns = head_columns(trained.architecture, trained.parallel.tensor)
    widest = max(call.models * min(setup.chunk_tokens, max(each.rows(call.kinds) for each in work.micro_batches))
                 for call in setup.losses)
    return _rows(setup) + _head_gradients(setup) + 1.125 * widest * columns * STATISTICS_BYTES  # and a block's scratch


def _rows(setup: TrainingSetup) -> float:
    """The student's hidden states at a micro-batch's loss positions, and their gradient."""
    each = setup.trained.architecture.hidden_size * (setup.parameter_bytes + STATISTICS_BYTES)
    return setup.work.roles["student"].most("all_rows") * each


def _head_gradients(setup: TrainingSetup) -> float:
    """Gradients of the head: one that the forward pass makes is kept until the backward pass."""
    calls = max(1, sum(call.gradient == "forward" for call in setup.losses))
    columns = head_columns(setup.trained.architecture, setup.trained.parallel.tensor)
    return calls * columns * setup.trained.architecture.hidden_size * STATISTICS_BYTES


def _signals(setup: TrainingSetup) -> dict[str, float]:
    """The teachers' hidden states of a whole step on the student's last stage."""
    return {
        f"{role}: hidden states": setup.work.received(role) * architecture.hidden_size * setup.parameter_bytes
        for role, architecture in setup.heads.items()
    }


def _teacher_phase(setup: TrainingSetup, role: str) -> dict[str, float]:
    """A teacher's forward pass: the widest moment of a layer, and the rows that it has collected."""
    teacher, work = setup.teachers[role], setup.work.roles[role]
    widths = layer_widths(teacher.architecture, teacher.parallel.tensor)
    # Both halves of the MLP, their activation, one half with its offset and the product; the residual stream twice.
    numbers = work.most("tokens") * (5 * widths.ffn + 2 * widths.hidden)
    rows = work.sum("all_rows") * widths.hidden
    return {f"{role}: forward": numbers * setup.parameter_bytes,
            f"{role}: rows to send": 3 * rows * setup.parameter_bytes}
