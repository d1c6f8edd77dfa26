"""Memory of a rank in a training step: what its tensors take at the fullest moment.

It is what the allocator has handed out (`torch.cuda.max_memory_allocated` on a GPU), part by part. What the device
holds besides (CUDA's context, NCCL's buffers, blocks that the allocator keeps but nobody uses) is the cluster
description's `reserved_gib` and the plan's margin.

It is within 3 % of what tiny models take (tests/mcore/test_planning.py).

Legend of the formulas: h hidden, q query heads x head size, k key heads x head size, f MLP width; all on one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megakd.hf.pieces import Shard
from megakd.planning.setup import STATISTICS_BYTES, RoleSetup, TrainingSetup
from megakd.planning.sizes import LayerWidths, head_columns, layer_widths, matrix_parameters, shard_parameters

GATHERED = "gathered sequence's buffer"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    kept: dict[str, float]
    """What is there throughout the stage: part -> bytes."""
    phases: dict[str, dict[str, float]]
    """Moment of a step -> part -> bytes that are there besides."""
    host: float = 0.0
    """Bytes of the host's memory that the optimizer's states take between steps (`optimizer.offload`)."""

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
    kept = _model_states(setup, shards)
    for role, teacher in setup.teachers.items():
        kept[f"{role}: weights"] = max(forward_weights(setup, teacher, stage)
                                       for stage in set(teacher.alike))
    for role, architecture in setup.heads.items() if last else ():
        columns = head_columns(architecture, trained.parallel.tensor)
        kept[f"{role}: head for the loss"] = columns * architecture.hidden_size * setup.parameter_bytes
    if buffer := _gather_buffer(setup):
        kept[GATHERED] = buffer
    signals = _signals(setup) if last else {}
    phases = {f"{role} runs": _teacher_phase(setup, role) for role in setup.teachers}
    phases |= {name: signals | parts for name, parts in _student_phases(setup, shards, pipeline_rank).items()}
    if shards[0].embedding:
        rows = head_columns(trained.architecture, trained.parallel.tensor)
        dense = rows * trained.architecture.hidden_size * setup.parameter_bytes
        phases["embedding's gradient"] = signals | {"embedding's gradient": 2 * dense}
    if setup.device == "cpu":
        # gloo reduces a copy of what it is given; NCCL works in place.
        copied = _largest_chunk(setup, shards) * STATISTICS_BYTES
        phases["gradients are summed"] = signals | {"gloo's copy of the gradients": copied}
    if not setup.offload:
        return Memory(kept, phases)
    # The optimizer's states are there during its step alone, when activations and signals are gone.
    states = kept.pop("optimizer")
    phases["optimizer's step"] = {"optimizer": states}
    if setup.device == "cpu":
        phases["optimizer's step"]["gloo's copy of the parameters"] = (
            _largest_chunk(setup, shards) * setup.parameter_bytes)
        kept["optimizer's host buffers"] = states  # in the same memory
    return Memory(kept, phases, states)


def _largest_chunk(setup: TrainingSetup, shards: Sequence[Shard]) -> int:
    """Parameters of it: gradients are summed and parameters gathered a chunk at a time."""
    return max(shard_parameters(setup.trained.architecture, shard) for shard in shards)


def _gather_buffer(setup: TrainingSetup) -> float:
    """megatron-core's one buffer for the sequences that the trained model's linears gather; frozen ones and Transformer
    Engine's make one each time."""
    if not setup.trained.parallel.sequence:
        return 0.0
    return setup.work.roles["student"].most("tokens") * setup.trained.architecture.hidden_size * setup.parameter_bytes


def forward_weights(setup: TrainingSetup, role: RoleSetup, pipeline_rank: int) -> float:
    """Bytes of a model's weights that only runs forward: with FP8 products its matrices are kept in FP8, besides or in
    place of bf16. Scales of blocks (MXFP8: 3 % of them) are left out."""
    shards = role.shards(pipeline_rank, setup.spec)
    whole = sum(shard_parameters(role.architecture, shard) for shard in shards) * setup.parameter_bytes
    if setup.dtype != "fp8":
        return float(whole)
    matrices = matrix_parameters(role.architecture, shards)
    return float(whole + matrices - (setup.parameter_bytes * matrices if role.fp8_weights else 0))


def _model_states(setup: TrainingSetup, shards: Sequence[Shard]) -> dict[str, float]:
    """Weights, gradients and optimizer of the trained model (megatron-core's distributed optimizer)."""
    parameters = sum(shard_parameters(setup.trained.architecture, shard) for shard in shards)
    copies = setup.trained.layout.copies
    # Adam's two moments; a master copy where the weights themselves are not float32.
    states = 2 * STATISTICS_BYTES + (0 if setup.dtype == "fp32" else STATISTICS_BYTES)
    kept = {
        "weights": float(parameters * setup.parameter_bytes),
        "gradients": float(parameters * STATISTICS_BYTES),
        "optimizer": parameters * states / copies,
    }
    if setup.spec == "te":
        # Products add gradients to their sums; what a hook then finds as a gradient is one such for each shape of
        # weights, which nobody writes (Transformer Engine, `get_dummy_wgrad`).
        widths = layer_widths(setup.trained.architecture, setup.trained.parallel.tensor)
        kept["gradients' stand-ins"] = float(widths.parameters * setup.parameter_bytes)
    if setup.dtype == "fp8":
        matrices = matrix_parameters(setup.trained.architecture, shards)
        kept["weights in fp8"] = 2.0 * matrices  # as they are and transposed, kept over a step's micro-batches
        if setup.trained.fp8_weights:
            kept["weights"] -= matrices * setup.parameter_bytes
    return kept


def _student_phases(setup: TrainingSetup, shards: list[Shard], pipeline_rank: int) -> dict[str, dict[str, float]]:
    """Activations of all micro-batches under way, with what the loss needs, and with what a layer's backward needs."""
    trained, work = setup.trained, setup.work.roles["student"]
    widths = layer_widths(trained.architecture, trained.parallel.tensor)
    under_way = trained.warmup(pipeline_rank, len(work.micro_batches))
    layer = saved_of_layer(setup, widths, trained.recompute)
    tokens = work.most("tokens")
    residual = widths.hidden * _share(setup) * tokens * setup.parameter_bytes
    activations = trained.layers_under_way(pipeline_rank, len(work.micro_batches)) * layer * tokens
    if trained.parallel.virtual_pipeline > 1:
        activations += under_way * residual  # what a chunk gives is not freed when it is sent
    backward = {"activations": activations, "a layer's gradients": _layer_gradients(setup, widths, tokens)}
    if trained.recompute != "none":
        backward["a layer made again"] = (saved_of_layer(setup, widths, "none") - layer) * tokens
    phases = {"backward": backward}
    if trained.parallel.context > 1:
        # The last layer's attention, before its MLP has kept anything.
        kept = activations + (saved_of_layer(setup, widths, "mlp") - layer) * tokens
        phases["keys and values travel"] = {"activations": kept, "keys and values": _exchange(setup, widths) * tokens}
    if not shards[-1].head:
        return phases
    if trained.architecture.tied_embeddings and shards[0].embedding:
        backward["head's gradient"] = _head_gradients(setup)  # waits for the embedding's
    # The final norm's input, normalised and weighted.
    forward = {"activations": activations + 3 * residual}
    whole = widths.hidden * tokens * setup.parameter_bytes
    # The row losses give the gradients of their rows, which are put in their places in an empty row.
    places = {"gradients in their places": whole, "loss positions": _rows(setup),
              "head's gradient": _head_gradients(setup)}
    phases |= {"loss": forward | {"loss": _loss(setup)}, "loss's backward": forward | places}
    if setup.spec == "local":
        # Of the norm in elementary operations: five float32 numbers where one is normalised.
        norm = 5 * residual / setup.parameter_bytes * STATISTICS_BYTES
        phases["final norm's backward"] = {"activations": activations + residual, "final norm's gradients": norm,
                                           "head's gradient": _head_gradients(setup)}
    if trained.parallel.sequence:
        phases["last hidden states"] = forward | {"gathered sequence": whole * (1 + _copies(setup))}
    return phases


def _copies(setup: TrainingSetup) -> int:
    """Copies of what a collective gathers: gloo makes one, NCCL none."""
    return 1 if setup.device == "cpu" else 0


def _exchange(setup: TrainingSetup, widths: LayerWidths) -> float:
    """Bytes a token that a layer's forward pass has for the exchange with the context ranks besides what it keeps.

    The local attention gathers all ranks' keys and values before it puts them in order. Transformer Engine's holds each
    message of its ring, and each rank's part of its result, until it has all.
    """
    ranks, pair = setup.trained.parallel.context, 2 * widths.key
    numbers = (ranks + 1) * pair if setup.spec == "local" else (ranks - 1) * pair + ranks * widths.query
    return numbers * setup.parameter_bytes


def _layer_gradients(setup: TrainingSetup, widths: LayerWidths, tokens: float) -> float:
    """What a layer's backward pass has at its fullest besides what the forward passes kept: bytes.

    The pass goes through the MLP first, while all that it kept is there, and frees that on its way: after the product
    of the two halves their product, after the first matrix the rest.
    """
    trained = setup.trained
    residual, whole, mlp = widths.hidden * _share(setup), widths.hidden, widths.ffn
    gathered = whole if trained.parallel.sequence else 0
    freed = (5 if setup.spec == "local" else 3) * mlp
    # The matrices' own gradients, where their products do not add them to the sums.
    second = widths.hidden * mlp / tokens if setup.spec == "local" else 0.0
    first = 2 * second
    moments = (
        gathered * (1 + _copies(setup)),
        gathered + mlp + second,
        2 * mlp,  # those of both halves, and of their product, which is gone
        2 * mlp + whole + gathered * _copies(setup) + first - freed,
    )
    if (ranks := trained.parallel.context) > 1:
        pair = 2 * widths.key
        # The attention's turn. Gradients of its result and its queries; those of all keys and values, and of one part's
        # or by rank; or the two buffers of a ring, keys, values and their gradients in both, and one rank's results.
        numbers = 2 * widths.query + 2 * ranks * pair if setup.spec == "local" else 3 * widths.query + 5 * pair
        moments = (*moments, numbers - freed)
    again = residual if trained.recompute != "none" else 0  # what the layer gives, made again
    return (residual + max(moments) + again) * tokens * setup.parameter_bytes


def _share(setup: TrainingSetup) -> float:
    """Part of the residual stream that a tensor rank keeps."""
    return 1 / setup.trained.parallel.tensor if setup.trained.parallel.sequence else 1.0


def saved_of_layer(setup: TrainingSetup, widths: LayerWidths, recompute: str) -> float:
    """Bytes a token that one layer keeps for its backward pass."""
    hidden, ranks = widths.hidden * _share(setup), setup.trained.parallel.context
    if recompute == "full":
        return hidden * setup.parameter_bytes
    mlp = 0 if recompute == "mlp" else 1
    if setup.spec == "local":
        # Both norms: input, normalised, weighted. Attention: query and key rotated, the packed projection, its output
        # sequence by sequence and together, the row sums. MLP: both halves, their activation, one half with its
        # offset, and the product. Rotation: cosine and sine, once for query and once for key.
        attention = 4 * widths.query + 3 * widths.key
        if ranks > 1:
            # All ranks' keys and values instead of the rotated key and the projection; a mask for each part, as wide as
            # the parts before it and itself.
            work = setup.work.roles["student"]
            mask = work.most("pairs") / work.most("tokens") * (1 + 1 / (2 * ranks))
            attention = 3 * widths.query + 2 * ranks * widths.key + mask
        if widths.by_head:
            # Norms of heads: both normalised; their inputs are the packed projection, the queries of several groups
            # taken out of it. It is kept in any case but across context ranks.
            attention += widths.by_head + (widths.query if widths.key > widths.head_dim else 0)
            attention += widths.query + 2 * widths.key if ranks > 1 else 0
        numbers = 6 * hidden + attention + 5 * widths.ffn * mlp
        statistics = 4 * widths.head_dim + widths.heads + widths.by_head // widths.head_dim + 2
        return numbers * setup.parameter_bytes + STATISTICS_BYTES * statistics
    # Transformer Engine keeps a norm's input and output, what attention has taken and given (queries and keys rotated,
    # its own copy of the values, which stood between them; a ring over context ranks the last rank's), both halves of
    # the MLP and their product. Its rotation keeps the angles alone, so that of a norm of heads the input is kept, and
    # in 16 bits the projection after the attention has the attention's output for its own. From its sources; not
    # measured on a GPU yet.
    rounded = setup.dtype == "fp8"
    numbers = 2 * hidden + 2 * widths.query + 2 * widths.key + widths.by_head + 2 * widths.ffn * mlp
    inputs = 2 * hidden + widths.ffn * mlp + (widths.query if rounded else 0)
    linear_bytes = 1 if rounded else setup.parameter_bytes
    statistics = widths.heads + widths.by_head // widths.head_dim + 2
    return numbers * setup.parameter_bytes + inputs * linear_bytes + STATISTICS_BYTES * statistics


def _loss(setup: TrainingSetup) -> float:
    """Hidden states at the loss positions and their gradient, the head's gradients, and a chunk's logits."""
    trained, work = setup.trained, setup.work.roles["student"]
    columns = head_columns(trained.architecture, trained.parallel.tensor)
    # Beside the logits a CPU has a block's scratch, and CUDA's kernels a few chunks' gradients in the head's 16 bits.
    scratch = 0.125 * STATISTICS_BYTES if setup.device == "cpu" else 0.0
    gradient = setup.parameter_bytes if setup.gradient_apart else 0
    widest = 0.0
    for call in setup.losses:
        rows = max(each.rows(call.kinds) for each, _ in work.repeated)
        apart = gradient * min(setup.gradient_tokens, rows) if call.gradient != "none" else 0
        logits = call.models * (STATISTICS_BYTES + scratch) * min(setup.chunk_tokens, rows)
        widest = max(widest, (logits + apart) * columns)
    # When the logits are gone, the head's gradient in 16 bits is made of that in float32.
    rounded = gradient * columns * trained.architecture.hidden_size
    return _rows(setup) + _head_gradients(setup) + max(widest, rounded)


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
    rows = work.sum("all_rows") * teacher.architecture.hidden_size
    return {f"{role}: forward": forward_bytes(setup, teacher, work.most("tokens"), streams=5),
            f"{role}: rows to send": 3 * rows * setup.parameter_bytes}


def forward_bytes(setup: TrainingSetup, role: RoleSetup, tokens: float, streams: int) -> float:
    """The widest moment of a forward pass without gradients; and the angles of the positions.

    It is in the MLP: both halves, their activation, one half with its offset and the product. Or, where heads together
    are wide, in the attention, when it has its results: the packed projection, queries (normalised, keys too) as they
    were taken out of it and as they are rotated; and the results sequence by sequence and together, or what the
    projection makes of them, before and after it is scattered.

    Args:
        setup: says the dtype.
        role: whose pass.
        tokens: positions on a rank.
        streams: tensors of the residual stream's size: a layer's input, what its attention gave, the sum of both and
            its norm; under megatron-core's schedules also what the micro-batch before gave.
    """
    widths = layer_widths(role.architecture, role.parallel.tensor)
    hidden = widths.hidden / (role.parallel.tensor if role.parallel.sequence else 1)
    attention = 4 * widths.query + (4 if widths.by_head else 3) * widths.key + (streams - 1) * hidden
    scattered = widths.hidden * (1 + _copies(setup)) + hidden if role.parallel.sequence else 0
    numbers = max(5 * widths.ffn + streams * hidden, attention + max(widths.query, scattered))
    return tokens * (numbers * setup.parameter_bytes + widths.head_dim * STATISTICS_BYTES)
