"""Memory, messages and time of stages that train nothing: answers that a model generates, and answers that it scores.

Both follow the code that does it: `rollout/engine.py` with `rollout/cache.py` and `rollout/sampling.py`, and
`teacher/scoring.py`. Memory and messages are held to it by tests/mcore/test_planning_inference.py. How far the
times of generating are from a clock's is in benchmarks/results/rollouts; those of scoring have not been compared.

How slots drain. A replica has N answers of m tokens in the mean, the longest of l, and s slots in all (N where that is
less): those of a pass for each of its pipeline stages. A free slot is given to the next answer, so the slots stay full
until the last s answers are under way, and these end with the longest: N m / s + l - m rounds, in each of which every
row is given a token. That is exact for answers of one length, and where every answer has a slot; otherwise it supposes
that the longest answer is among the last. All rounds together have N m rows.

Legend: h hidden, f MLP width, k key heads x head size, V columns of the head; all on one rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megakd.batch import Kind
from megakd.errors import ConfigError
from megakd.planning.cluster import Cluster
from megakd.planning.memory import Memory, forward_bytes, forward_weights
from megakd.planning.setup import STATISTICS_BYTES, LossCall, RoleSetup, TrainingSetup
from megakd.planning.sizes import head_columns, layer_widths
from megakd.planning.timing import (
    StepTime,
    attention_seconds,
    call_seconds,
    layer_products,
    link_of,
    loss_seconds,
    passes_seconds,
    pipeline_seconds,
    products_seconds,
    stage_times,
    waiting_for_calls,
)
from megakd.planning.traffic import Call
from megakd.planning.work import Lengths, MicroBatch, RoleWork, StepWork
from megakd.rollout.engine import PREFILL_TOKENS
from megakd.rollout.sampling import KERNEL_PART

GREEDY_BYTES = 8
"""A column of a row while the likeliest token is looked for: the logit, and its copy without the padding's columns."""
NOISE_BYTES = 32
"""A column of a row while a token is drawn: the logit, its copy, and three 64-bit numbers of which the noise is being
made."""
INTEGER_BYTES = 8
DRAWN_BYTES = 8
"""Of each number that says what a part of a row's columns has drawn: told in float64."""
COUNTED = (Kind.CHOSEN,)
"""A kind to count loss positions by, where it makes no difference which."""


@dataclass(frozen=True)
class Passes:
    """Forward passes of a generation that are alike."""

    count: float
    """On one replica, those of all companies together."""
    tokens: float
    """Positions of one."""
    rows: float
    """Answers that one gives a token."""


@dataclass(frozen=True)
class Generation:
    """Answers to be generated on all replicas of a model."""

    role: RoleSetup
    slots: int
    """Rows of a forward pass; a replica has as many passes under way as pipeline stages."""
    prompts: int
    """Of all replicas."""
    n: int
    """Answers to each."""
    mean: Lengths
    longest: Lengths
    """The longest prompt, and the tokens that an answer may have."""
    sampled: bool
    """False: greedy."""
    top_k: int
    """0 keeps all tokens."""
    top_p: bool
    """Whether one is set."""
    dtype: str
    device: str
    replayed: bool = False
    """Whether passes of one token a row are replayed from CUDA graphs (`decode_graphs`)."""

    @property
    def answers(self) -> int:
        """Of the replica with most."""
        return math.ceil(self.prompts / self.role.layout.data) * self.n

    @property
    def rows(self) -> int:
        """Of a forward pass when most slots are in use."""
        return min(self.slots, math.ceil(self.answers / self.role.parallel.pipeline))

    @property
    def companies(self) -> int:
        """Forward passes under way, each with rows and a cache of its own."""
        return min(self.role.parallel.pipeline, math.ceil(self.answers / self.rows))

    @property
    def live(self) -> int:
        """Slots that are in use when most are."""
        return min(self.companies * self.rows, self.answers)

    @property
    def rounds(self) -> float:
        """Tokens that the rows are given one after the other (see the file's top)."""
        return self.answers * self.mean.answer / self.live + self.longest.answer - self.mean.answer

    @property
    def positions(self) -> float:
        """Of a row of the cache."""
        return self.longest.prompt + self.longest.answer

    @property
    def prefill_tokens(self) -> float:
        """Most prompt positions of a forward pass over prompts: some that are shorter than the longest may fill it."""
        return min(math.ceil(self.rows / self.n) * self.longest.prompt, max(PREFILL_TOKENS, self.longest.prompt))

    @property
    def gap_rows(self) -> int:
        """Rows whose keys and values a decoding pass copies together, as others between them are done."""
        return 0

    @property
    def prefill(self) -> Passes:
        """The forward passes over prompts.

        First the slots are filled. Then an answer ends in a decoding pass with the chance 1 / mean length, row by row:
        of the passes in which any ends, each has the mean number of those that end in it. A prompt is read once a pass.
        """
        first = self.companies * math.ceil(self.rows / self.n)
        together = max(1, int(PREFILL_TOKENS // self.mean.prompt))
        passes, read = self.companies * math.ceil(first / self.companies / together), float(first)
        later = self.answers - self.live
        if later > 0:
            rate = self.rows / self.mean.answer
            ending = rate / -math.expm1(-rate)
            times = later / ending
            read += times * max(1.0, ending / self.n)
            passes += times * math.ceil(max(1.0, ending / self.n) / together)
        prompts = read / passes
        tokens = min(prompts * self.mean.prompt, max(PREFILL_TOKENS, self.longest.prompt))
        return Passes(passes, tokens, min(prompts * self.n, self.rows))

    @property
    def decoding(self) -> Passes:
        """The forward passes of one token a row; the first token of an answer comes from the prefill."""
        rows = self.answers * self.mean.answer / self.rounds / self.companies
        return Passes(self.companies * self.rounds * max(0.0, 1 - 1 / self.mean.answer), rows, rows)

    @property
    def longest_row(self) -> float:
        """Positions that a decoding pass reads of a row, in the mean: those of its longest one. Of the first answers it
        grows to the longest answer, later it is near that."""
        return self.mean.prompt + self.longest.answer * (1 - self.longest.answer / (2 * self.rounds))


@dataclass(frozen=True)
class MixedGeneration(Generation):
    """One of two models that answer together (`rollout/mixed.py`). Of each copy of the model as many answers as it has
    slots are under way, in one company whatever its stages: their prompts are all read in one pass, and they end
    together, with the longest, before the next have their turn."""

    turns: int = 1

    @property
    def answers(self) -> int:
        """Of the replica with most: answers, not prompts, are shared out."""
        return math.ceil(self.prompts * self.n / self.role.layout.data)

    @property
    def rows(self) -> int:
        """Of a forward pass at first."""
        return min(self.slots, self.answers)

    @property
    def companies(self) -> int:
        """One: both models wait for each token."""
        return 1

    @property
    def rounds(self) -> float:
        """Tokens that the rows are given one after the other."""
        return self.turns * self.longest.answer

    @property
    def prefill_tokens(self) -> float:
        """Prompt positions of the pass over prompts: each answer reads its own, however many there are."""
        return self.rows * self.longest.prompt

    @property
    def gap_rows(self) -> int:
        """All but the one that is done first."""
        return self.rows - 1

    @property
    def prefill(self) -> Passes:
        """One pass a turn."""
        rows = self.answers / self.turns
        return Passes(self.turns, rows * self.mean.prompt, rows)

    @property
    def decoding(self) -> Passes:
        """As many a turn as the longest answer has tokens after its first."""
        passes = self.turns * (self.longest.answer - 1)
        rows = self.answers * (self.mean.answer - 1) / passes if passes > 0 else 0.0
        return Passes(passes, rows, rows)

    @property
    def longest_row(self) -> float:
        """It grows to the longest answer in each turn."""
        return self.mean.prompt + self.longest.answer / 2


@dataclass(frozen=True)
class Scoring:
    """Answers to be scored by all replicas of a model."""

    role: RoleSetup
    micro_batches: int
    """Of a replica at a time: their hidden states are held together."""
    groups: int
    """Of all replicas; a micro-batch has the role's number of them."""
    work: MicroBatch
    """What a micro-batch is; of loss positions of any one kind."""
    row_bytes: int
    """What is written of a loss position."""
    heads: bool
    """Whether logits are made; hidden states are written as they are."""
    kernels: bool
    """Whether CUDA has kernels for what is made of the logits: not for the likeliest tokens."""
    chunk_tokens: int
    dtype: str
    device: str

    @property
    def steps(self) -> int:
        """Times that all replicas work through `micro_batches`."""
        at_once = self.micro_batches * self.role.layout.data * self.role.micro_batch
        return math.ceil(self.groups / at_once)

    @property
    def disk_bytes(self) -> float:
        """What the stage writes: its columns, without the index."""
        return self.groups / self.role.micro_batch * self.work.all_rows * self.row_bytes


def answering(role: RoleSetup) -> RoleSetup:
    """A model while it answers: context ranks are replicas, and a token cannot be cut along the sequence
    (`PipelineDecoder`)."""
    return replace(role, parallel=role.parallel.forward.model_copy(update={"sequence": False}))


def as_training(task: Generation | Scoring, micro_batch: MicroBatch) -> TrainingSetup:
    """A forward pass in the terms of a training: its only teacher is the model itself, and nothing has a gradient."""
    work = RoleWork((micro_batch,))
    kinds = tuple(micro_batch.loss_tokens)
    step = StepWork({"student": work, "model": work}, {"model": kinds}, micro_batch.tokens,
                    micro_batch.loss_tokens)
    chunk = task.chunk_tokens if isinstance(task, Scoring) else math.ceil(micro_batch.all_rows)
    return TrainingSetup(task.role, {"model": task.role}, (LossCall(1, 2, kinds, "none"),), step, chunk, task.dtype,
                         task.device)


def _weights(task: Generation | Scoring, setup: TrainingSetup, pipeline_rank: int) -> dict[str, float]:
    return {"weights": forward_weights(setup, task.role, pipeline_rank)}


# ---------------------------------------------------------------------------------------------------------- generating
def generation_memory(task: Generation, pipeline_rank: int) -> Memory:
    """Memory of a rank that holds `pipeline_rank` of the model, with all slots in use and the cache at its end."""
    role = task.role
    setup = as_training(task, MicroBatch(1, 1, dict.fromkeys(COUNTED, 1)))
    widths = layer_widths(role.architecture, role.parallel.tensor)
    kept = _weights(task, setup, pipeline_rank)
    layers = sum(shard.layers for shard in role.shards(pipeline_rank, setup.spec))
    rows = task.companies * task.rows
    kept["keys and values"] = 2 * layers * rows * widths.key * task.positions * setup.parameter_bytes
    # Which of a row's positions each query head of a group may see, kept until these rows' next pass, and the same once
    # more for the group's heads, of the rows that pass.
    kept_mask, heads = rows * task.positions * setup.parameter_bytes, widths.heads * widths.head_dim // widths.key
    phases = {"prefill": {"forward": forward_bytes(setup, role, task.prefill_tokens, streams=4)},
              "decode": {"forward": forward_bytes(setup, role, task.rows, streams=4), "mask": kept_mask,
                         "heads' masks": task.rows * task.positions * heads * setup.parameter_bytes}}
    if task.gap_rows > 0:
        phases["decode"]["rows in use"] = 2 * task.gap_rows * widths.key * task.positions * setup.parameter_bytes
    if pipeline_rank == role.parallel.pipeline - 1:
        drawn = _drawing_bytes(task)
        hidden = task.prefill_tokens * widths.hidden * setup.parameter_bytes
        phases["first tokens"] = {"hidden states": hidden, "logits": drawn}
        phases["next tokens"] = {"mask": kept_mask, "logits": drawn}
    return Memory(kept, phases)


def _drawing_bytes(task: Generation) -> float:
    """Logits of all rows in float32, and what a token's draw makes of them."""
    role = task.role
    columns, hidden = head_columns(role.architecture, role.parallel.tensor), role.architecture.hidden_size
    each = _column_bytes(task)
    # On a CPU, where no product of 16-bit numbers gives 32-bit ones, the head is copied first.
    copy = columns * hidden * STATISTICS_BYTES if task.device == "cpu" and task.dtype != "fp32" else 0
    return max(task.rows * columns * each, task.rows * columns * STATISTICS_BYTES + copy)


def _column_bytes(task: Generation) -> int:
    """Of a column of a row while a token is drawn. The kernel (rollout/kernel.py) has the logit alone."""
    if task.device == "cuda" and not (task.sampled and task.top_p):
        return STATISTICS_BYTES
    return NOISE_BYTES if task.sampled else GREEDY_BYTES


def generation_traffic(task: Generation, pipeline_rank: int, tokens: float, rows: float) -> list[Call]:
    """The calls of a rank in one forward pass over `tokens` positions that gives `rows` rows a token.

    A decoding round has as many positions as rows. Left out is the broadcast of tokens from the last stage. With top_p
    this is the least: each token that is refused costs one more round of the race.
    """
    role = task.role
    setup = as_training(task, MicroBatch(tokens, tokens, dict.fromkeys(COUNTED, rows)))
    tensor, stages, chunks = role.parallel.tensor, role.parallel.pipeline, role.parallel.virtual_pipeline
    shards = role.shards(pipeline_rank, setup.spec)
    size = tokens * role.architecture.hidden_size * setup.parameter_bytes
    reduces = 2 * sum(shard.layers for shard in shards) + shards[0].embedding
    parts = [pipeline_rank + number * stages for number in range(chunks)]
    sends, receives = sum(part < chunks * stages - 1 for part in parts), sum(part > 0 for part in parts)
    calls = [Call("all_reduce", "tensor", tensor, size, reduces, "layers"),
             Call("send", "pipeline", stages, size, sends, "activations"),
             Call("receive", "pipeline", stages, size, receives, "activations")]
    if pipeline_rank == stages - 1:
        columns = head_columns(role.architecture, tensor)
        told = tensor * rows * DRAWN_BYTES  # of each rank and row a number
        parts = math.ceil(columns / KERNEL_PART) if task.device == "cuda" else 1
        calls.append(Call("all_gather", "tensor", tensor, 6 * parts * told, 1, "parts of rows"))
        if task.sampled and task.top_k > 0:
            columns = min(task.top_k, columns)
            calls.append(Call("all_gather", "tensor", tensor, tensor * rows * columns * STATISTICS_BYTES, 1, "top k"))
        if task.sampled and task.top_p:
            calls += [Call("all_reduce", "tensor", tensor, rows * DRAWN_BYTES, 2, "masses"),
                      Call("all_gather", "tensor", tensor, 3 * told, 1, "best columns")]
    return [call for call in calls if call.size > 1 and call.calls > 0]


def generation_calls(task: Generation, pipeline_rank: int) -> list[Call]:
    """The calls of a rank in all forward passes, of the mean size. Left out is what `generation_traffic` leaves out."""
    return [replace(call, calls=passes.count * call.calls) for passes in (task.prefill, task.decoding)
            if passes.count > 0 for call in generation_traffic(task, pipeline_rank, passes.tokens, passes.rows)]


def generation_time(cluster: Cluster, task: Generation) -> StepTime:
    """Seconds of the whole stage on the replica with most answers, without loading the model: prefill and decode.

    A pass of decoding reads all weights, and the keys and values of its rows up to the position of the longest one; its
    products and its collectives are those of as many positions as rows. Passes that are under way together take as long
    as one of them, or as the slowest stage takes for each of them. Replayed passes are as long as launched ones but for
    the host; recording them, and the rows and positions that they are filled up to, are not counted.

    Raises:
        ConfigError: passes are replayed, and the description does not say what that takes.
    """
    def seconds(passes: Passes, host_us: float, **attended: float) -> float:
        if passes.count == 0:
            return 0.0
        stages = _stage_seconds(cluster, task, passes.tokens, passes.rows, host_us, **attended)
        return passes.count / task.companies * max(sum(stages), task.companies * max(stages))

    prefill, decoding = task.prefill, task.decoding
    # A query for each row.
    read = decoding.rows * task.longest_row
    host_us = _replayed_us(cluster) if task.replayed else cluster.device.layer_forward_us
    return StepTime({
        "prefill": seconds(prefill, cluster.device.layer_forward_us,
                           pairs=prefill.tokens * (task.mean.prompt + 1) / 2, read=0.0),
        "decode": seconds(decoding, host_us, pairs=read, read=read)})


def _replayed_us(cluster: Cluster) -> float:
    if cluster.device.layer_replayed_us is None:
        raise ConfigError("device.layer_replayed_us", None, "a role's decode_graphs is planned by it",
                          f"Add it to the description of {cluster.name}, or leave decode_graphs out")
    return cluster.device.layer_replayed_us


def _stage_seconds(cluster: Cluster, task: Generation, tokens: float, rows: float, host_us: float, *, pairs: float,
                   read: float) -> list[float]:
    """A forward pass on each stage, on the last with the draw of a token for each of `rows`.

    Args:
        cluster: what it runs on.
        task: what is generated.
        tokens: positions.
        rows: responses that are given a token.
        host_us: what a layer takes however little it does.
        pairs: (position, attended position) pairs.
        read: positions whose keys and values are read from the cache.
    """
    role = task.role
    setup = as_training(task, MicroBatch(tokens, pairs, dict.fromkeys(COUNTED, rows)))
    widths = layer_widths(role.architecture, role.parallel.tensor)
    memory = cluster.device.memory_gb_s * 1e9
    cached = 2 * widths.key * read * setup.parameter_bytes / memory
    layer = (products_seconds(cluster, task.dtype, tokens, layer_products(widths))
             + max(attention_seconds(cluster, widths, pairs, pairs / tokens), cached)
             + passes_seconds(cluster, setup, widths, tokens, 1))
    layer += waiting_for_calls(setup, host_us * 1e-6, layer)
    seconds = [sum(shard.layers for shard in role.shards(stage, setup.spec)) * layer
               + sum(call_seconds(cluster, call, link_of(cluster, role, call.axis))
                     for call in generation_traffic(task, stage, tokens, rows) if call.operation != "receive")
               for stage in range(role.parallel.pipeline)]
    columns = head_columns(role.architecture, role.parallel.tensor)
    head = products_seconds(cluster, "fp32" if task.dtype == "fp32" else "bf16", rows, [(widths.hidden, columns)])
    # Every number that a draw makes is written once and read once.
    drawn = 2 * rows * columns * _column_bytes(task) / memory
    tell = 0.0 if role.parallel.pipeline == 1 else link_of(cluster, role, "pipeline").latency_us * 1e-6
    seconds[-1] += head + drawn + tell
    return seconds


# ------------------------------------------------------------------------------------------------------------- scoring
def scoring_memory(task: Scoring, pipeline_rank: int) -> Memory:
    """Memory of a rank that holds `pipeline_rank` of the model."""
    role = task.role
    setup = as_training(task, task.work)
    kept = _weights(task, setup, pipeline_rank)
    # Of all micro-batches: tokens and positions; rows, places and labels of the loss positions.
    numbers = 2 * task.work.tokens + 3 * task.work.all_rows
    forward = {"batches": task.micro_batches * numbers * INTEGER_BYTES,
               "forward": forward_bytes(setup, role, task.work.tokens, streams=5)}
    if pipeline_rank < role.parallel.pipeline - 1:
        return Memory(kept, {"forward": forward})
    rows = task.work.all_rows * role.architecture.hidden_size * setup.parameter_bytes
    phases = {"forward": forward | {"hidden states": (task.micro_batches - 1) * rows}}
    columns = head_columns(role.architecture, role.parallel.tensor)
    values = task.work.all_rows * task.row_bytes if task.heads else 0
    chunk = min(task.chunk_tokens, task.work.all_rows)
    # Beside the logits a CPU has a block's scratch; CUDA has none with kernels, and as much again without.
    scratch = 0.125 if task.device == "cpu" else 0.0 if task.kernels else 1.0
    logits = (1 + scratch) * chunk * columns * STATISTICS_BYTES if task.heads else 0
    phases["signals"] = {"batches": forward["batches"], "hidden states": task.micro_batches * rows, "values": values,
                         "logits": logits}
    return Memory(kept, phases)


def scoring_time(cluster: Cluster, task: Scoring) -> StepTime:
    """Seconds of the whole stage, without loading the model and without the disk (`Scoring.disk_bytes`)."""
    setup, role = as_training(task, task.work), task.role
    stages = stage_times(cluster, setup, role, "model", task.work, training=False)
    forward = pipeline_seconds(stages, task.micro_batches, role.parallel.virtual_pipeline)
    signals = loss_seconds(cluster, setup, task.work) if task.heads else 0.0
    return StepTime({"forward": task.steps * forward, "signals": task.steps * task.micro_batches * signals})
