"""What one micro-batch is, and how a step's sequences are cut into micro-batches.

A micro-batch is packed: its sequences lie one after the other in one row of tokens, and none is padded to the longest.

Under context parallelism every sequence is cut: filled up to a multiple of 2C, for C context ranks, it has 2C equal
parts, of which rank c holds number c and number 2C-1-c. So each rank has early and late positions, and as much
attention to calculate as any other. Transformer Engine's attention takes no other order.

Legend: B sequences of a micro-batch, P packed positions that a rank holds (all of them without context parallelism), T
loss positions among them (in the order of P), W positions of the whole row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


class Kind(IntEnum):
    """What a sequence is to the objective."""

    CHOSEN = 0
    REJECTED = 1
    ROLLOUT = 2
    TEACHER_ANSWER = 3
    TEXT = 4
    """Pre-training text; its "prompt" is its first token."""


@dataclass(frozen=True)
class Draw:
    """What a policy gradient has to know of each token of a response."""

    log_probs: tuple[float, ...]
    """Under the distribution that it was drawn from."""
    returns: tuple[float, ...]
    """What drawing it is worth."""


@dataclass(frozen=True)
class Sample:
    """One tokenised sequence. `tokens[prompt_length:]` is the response, with its closing token where it has one."""

    tokens: tuple[int, ...]
    prompt_length: int
    kind: Kind
    score: float = math.nan
    """The teacher's score of the response, where a `score` stage has given it one."""
    draw: Draw | None = None
    """Where the objective takes a policy gradient."""

    def __post_init__(self):
        if not 1 <= self.prompt_length <= len(self.tokens):
            raise ValueError(
                f"a prompt of {self.prompt_length} tokens in a sequence of {len(self.tokens)}: the first "
                "response token needs a token before it"
            )

    @property
    def response_length(self) -> int:
        """Tokens of the response: its loss positions."""
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True)
class Group:
    """Sequences that stay in one micro-batch (a preference pair; a chosen answer and a rollout of one prompt).

    `key` names the row that it came from ("pairs.jsonl:17"), for messages and artefacts.
    """

    key: str
    samples: tuple[Sample, ...]

    @property
    def total_length(self) -> int:
        """Tokens of its sequences together."""
        return sum(len(sample.tokens) for sample in self.samples)


@dataclass(frozen=True)
class LossPositions:
    """The T positions of a micro-batch that have a loss, in the order of its sequences.

    `places_T` are their places among the P positions, `rows_T` their sequences' numbers in [0, B), `within_T` their
    numbers among all loss positions of their sequence, from 0.
    """

    places_T: Tensor
    rows_T: Tensor
    within_T: Tensor
    labels_T: Tensor
    kinds_T: Tensor
    of_kind: Mapping[Kind, Tensor]
    """Each kind's positions, as numbers in [0, T) (int64), to index by: a mask has the host wait for its device."""


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device. From the host to a GPU it goes by way of pinned memory (which torch's allocator keeps until
    the copy has ended): otherwise the host would wait for all that the GPU has been given before."""
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class Batch:
    """One micro-batch, packed, on one device; of a context rank (`Padding`), its part of each sequence.

    Sequence b, with its filling, is at `[cu_seqlens[b], cu_seqlens[b + 1])` of the whole row. Where the row had to be
    filled up (`Padding`) that filling is one sequence more in `cu_seqlens` (int32, B + 1 or B + 2 numbers), without
    loss. `labels_P[p]` is the token after `tokens_P[p]` in its sequence; `loss_mask_P` is True where that next token
    belongs to the response. `position_ids_P` starts at 0 in each sequence. `sample_ids_B` numbers the sequences within
    the step (the same numbers for every role and layout); `group_ids_B` numbers the groups within the micro-batch.
    `prompts_B` and `lengths_B` are the tokens of whole prompts and responses; a response's are its loss positions.
    `scores_B` (float64) are the teacher's scores, NaN where there are none. `draw_log_probs_T` and `returns_T`
    (float64) are those of `Draw`, at the loss positions; zero where there is none. `positions` are these, in the order
    that every [T, ...] tensor of this micro-batch has; `of_kind` the sequences of each kind, as numbers in [0, B), in
    the order of their groups (and within one, of its samples). `groups` is the number of groups, `context` that of the
    ranks that the row is cut over.
    """

    tokens_P: Tensor
    labels_P: Tensor
    loss_mask_P: Tensor
    position_ids_P: Tensor
    cu_seqlens: Tensor
    longest: int
    kinds_B: Tensor
    sample_ids_B: Tensor
    group_ids_B: Tensor
    prompts_B: Tensor
    lengths_B: Tensor
    scores_B: Tensor
    draw_log_probs_T: Tensor
    returns_T: Tensor
    positions: LossPositions
    of_kind: Mapping[Kind, Tensor]
    groups: int
    context: int

    def to(self, device: torch.device | str) -> Batch:
        """The micro-batch, which is the host's, on a device (`to_device`)."""

        def moved(value: object) -> object:
            match value:
                case Tensor():
                    return to_device(value, device)
                case LossPositions():
                    return replace(value, **{name: moved(own) for name, own in vars(value).items()})
                case Mapping():
                    return {kind: moved(own) for kind, own in value.items()}
            return value

        return replace(self, **{name: moved(value) for name, value in vars(self).items()})

    def counts(self) -> dict[str, int]:
        """The denominators that this micro-batch adds to: `tokens` and `groups`, and for each kind `<kind>_tokens` and
        `<kind>_answers`, which are sequences. Of the whole sequences, on every context rank."""
        counts = {f"{kind.name.lower()}_tokens": int(self.lengths_B[self.kinds_B == kind].sum()) for kind in Kind}
        counts |= {f"{kind.name.lower()}_answers": int((self.kinds_B == kind).sum()) for kind in Kind}
        return {"tokens": int(self.lengths_B.sum()), "groups": self.groups, **counts}


Table = Sequence[Sequence[Sequence[int]]]
"""`table[replica][micro-batch]`: numbers of a step's groups."""


def number_samples(groups: Sequence[Group]) -> list[range]:
    """The sample ids of each group of a step: consecutive numbers in the order of the step's groups."""
    starts = [0]
    for group in groups:
        starts.append(starts[-1] + len(group.samples))
    return [range(start, stop) for start, stop in zip(starts, starts[1:], strict=False)]


def split_step(lengths: Sequence[int], data: int, micro_batch: int) -> list[list[list[int]]]:
    """Deals a step's groups out to data-parallel ranks and micro-batches, so that all get like numbers of tokens.

    Ranks wait for the slowest of them, and pipeline stages for the longest micro-batch. It is a pure function of its
    arguments: every rank of every role computes the same table without talking.

    Args:
        lengths: the tokens of each group of the step.
        data: number of data-parallel ranks; `len(lengths)` is a multiple of `data * micro_batch`.
        micro_batch: groups in a micro-batch.

    Returns:
        `table[rank][micro]`: the numbers of the step's groups in that micro-batch.
    """
    if len(lengths) % (data * micro_batch) != 0:
        raise ValueError(f"{len(lengths)} groups are not a multiple of data {data} x micro_batch {micro_batch}")
    micro_batches = _deal(lengths, len(lengths) // micro_batch)
    totals = [sum(lengths[number] for number in numbers) for numbers in micro_batches]
    return [[micro_batches[micro] for micro in micros] for micros in _deal(totals, data)]


def split_beside(lengths: Sequence[int], other: Table, data: int, micro_batch: int) -> list[list[list[int]]]:
    """`split_step` for a role that gives what it makes of a group to the role that has it in `other`.

    The replicas of both roles are cut into gcd(data, len(other)) consecutive parts, and a part of the one role gets the
    groups of the same part of the other. So a replica has to do with as few of the other's as can be, the same ones in
    every step, and with equal numbers of replicas with its own number alone.
    """
    parts, table = math.gcd(data, len(other)), []
    for part in range(parts):
        size = len(other) // parts
        numbers = sorted(number for micros in other[part * size : (part + 1) * size]
                         for micro in micros for number in micro)
        own = split_step([lengths[number] for number in numbers], data // parts, micro_batch)
        table += [[[numbers[place] for place in micro] for micro in micros] for micros in own]
    return table


def _deal(lengths: Sequence[int], hands: int) -> list[list[int]]:
    """The numbers of `lengths` in `hands` equally many parts, whose sums differ by no more than two lengths do.

    Dealt in rounds from the longest down, one to each part; in each round the part that has least gets the longest.
    """
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    parts: list[list[int]] = [[] for _ in range(hands)]
    totals = [0] * hands
    for start in range(0, len(order), hands):
        poorest_first = sorted(range(hands), key=lambda hand: (totals[hand], hand))
        for hand, number in zip(poorest_first, order[start : start + hands], strict=True):
            parts[hand].append(number)
            totals[hand] += lengths[number]
    return parts


@dataclass(frozen=True)
class Padding:
    """What a model needs its packed rows to be filled up to, and which part of them a rank holds."""

    multiple: int = 1
    """P is a multiple of it (sequence parallelism needs the tensor size, FP8 its own blocks)."""
    uniform: bool = False
    """Whether all micro-batches of a replica's step have one P (the interleaved schedule needs it)."""
    few: bool = False
    """Whether P shall take few values, as each costs something (a CUDA graph): up to 16 multiples any, from there to 32
    every second, to 64 every fourth, and so on. A row is then filled up by an eighth of it at most."""
    context: int = 1
    """Context-parallel ranks that each sequence is cut over."""
    context_rank: int = 0
    """Which of them this is."""

    def filled(self, length: int) -> int:
        """The length of a sequence with its filling."""
        parts = 1 if self.context == 1 else 2 * self.context
        return -(-length // parts) * parts

    def width(self, lengths: Iterable[int], at_least: int = 1) -> int:
        """W of a row of sequences of these lengths (before filling), and no less than `at_least`."""
        multiple = math.lcm(self.multiple * self.context, self.filled(1))
        multiples = -(-max(at_least, sum(map(self.filled, lengths))) // multiple)
        step = 1 << max(0, (multiples - 1).bit_length() - 4) if self.few else 1
        return -(-multiples // step) * step * multiple

    def own(self, length: int) -> list[range]:
        """The positions of a sequence of `length` tokens, some of them perhaps filling, that this rank holds."""
        if self.context == 1:
            return [range(length)]
        part = self.filled(length) // (2 * self.context)
        numbers = (self.context_rank, 2 * self.context - 1 - self.context_rank)
        return [range(number * part, (number + 1) * part) for number in numbers]

    def own_rows(self, sample: Sample) -> list[range]:
        """Which of a sequence's loss positions, counted from its first, this rank holds: one or two ranges, none of
        them empty."""
        first, stop = sample.prompt_length - 1, len(sample.tokens) - 1
        rows = [range(max(own.start, first) - first, min(own.stop, stop) - first) for own in self.own(stop + 1)]
        return [each for each in rows if len(each) > 0]


def collate(
    groups: Sequence[Group],
    sample_ids: Sequence[Sequence[int]],
    *,
    pad_id: int,
    padding: Padding = Padding(),
    at_least: int = 1,
    device: torch.device | str = "cpu",
) -> Batch:
    """Packs groups into one micro-batch.

    Args:
        groups: the micro-batch's groups, G of them.
        sample_ids: for each group its sequences' numbers within the step (`number_samples`).
        pad_id: token that the row is filled up with; no real token attends to it, and it has no loss.
        padding: how the row is filled up and cut.
        at_least: smallest W before the row is filled up.
        device: where the tensors go.
    """
    flat = [
        (sample, number, ids[i])
        for number, (group, ids) in enumerate(zip(groups, sample_ids, strict=True))
        for i, sample in enumerate(group.samples)
    ]
    lengths = [padding.filled(len(sample.tokens)) for sample, _, _ in flat]
    width = padding.width((len(sample.tokens) for sample, _, _ in flat), at_least)
    if width > sum(lengths):
        lengths.append(width - sum(lengths))
    cu_seqlens = [0, *accumulate(lengths)]
    tokens_W = torch.full((width,), pad_id, dtype=torch.int64)
    labels_W = torch.full((width,), pad_id, dtype=torch.int64)
    loss_mask_W = torch.zeros(width, dtype=torch.bool)
    draws_2W = torch.zeros(2, width, dtype=torch.float64)
    for start, (sample, _, _) in zip(cu_seqlens, flat, strict=False):
        first, stop = start + sample.prompt_length - 1, start + len(sample.tokens)
        tokens_W[start:stop] = torch.tensor(sample.tokens)
        labels_W[start : stop - 1] = tokens_W[start + 1 : stop]
        loss_mask_W[first : stop - 1] = True
        if sample.draw is not None:
            draws_2W[:, first : stop - 1] = torch.tensor(
                [sample.draw.log_probs, sample.draw.returns], dtype=torch.float64
            )
    position_ids_W = torch.cat([torch.arange(length) for length in lengths])
    own_P = torch.cat([torch.arange(start + part.start, start + part.stop)
                       for start, length in zip(cu_seqlens, lengths, strict=False) for part in padding.own(length)])
    packed = [tensor_W[own_P] for tensor_W in (tokens_W, labels_W, loss_mask_W, position_ids_W)]
    draws_2T = draws_2W[:, own_P][:, packed[2]]
    tokens_P, labels_P, loss_mask_P, position_ids_P = packed
    kinds = [int(sample.kind) for sample, _, _ in flat]
    kinds_B, prompts_B = torch.tensor(kinds), torch.tensor([sample.prompt_length for sample, _, _ in flat])
    starts = torch.tensor(cu_seqlens, dtype=torch.int32)
    # All of it is made here, on the host: made on a device it would have the host wait for what was launched before.
    (places_T,) = loss_mask_P.nonzero(as_tuple=True)
    rows_T = torch.searchsorted(starts // padding.context, places_T.int(), right=True) - 1
    within_T = position_ids_P[places_T] - (prompts_B[rows_T] - 1)
    kinds_T = kinds_B[rows_T]
    positions = LossPositions(places_T, rows_T, within_T, labels_P[places_T], kinds_T, _by_kind(kinds_T))
    return Batch(
        tokens_P, labels_P, loss_mask_P, position_ids_P, starts, max(lengths), kinds_B,
        torch.tensor([number for _, _, number in flat]), torch.tensor([group for _, group, _ in flat]), prompts_B,
        torch.tensor([sample.response_length for sample, _, _ in flat]),
        torch.tensor([sample.score for sample, _, _ in flat], dtype=torch.float64), *draws_2T, positions,
        _by_kind(kinds_B), len(groups), padding.context,
    ).to(device)


def _by_kind(kinds_N: Tensor) -> dict[Kind, Tensor]:
    """Where each kind is among some."""
    return {kind: (kinds_N == kind).nonzero()[:, 0] for kind in Kind}


@dataclass(frozen=True)
class Step:
    """The groups of one optimizer step (or one evaluation step), and how each role's layout takes them.

    Every rank holds the whole step: what any rank of any role does with it follows without talking.
    """

    groups: tuple[Group, ...]

    @cached_property
    def sample_ids(self) -> list[range]:
        """The sample ids of each group."""
        return number_samples(self.groups)

    @property
    def samples(self) -> int:
        """Number of sequences."""
        return self.sample_ids[-1].stop

    @cached_property
    def counts(self) -> dict[str, int]:
        """The denominators of the whole step: those of `Batch.counts`, added up over all micro-batches."""
        samples = [sample for group in self.groups for sample in group.samples]
        counts = {"tokens": 0, "groups": len(self.groups)}
        for kind in Kind:
            lengths = [sample.response_length for sample in samples if sample.kind == kind]
            counts |= {f"{kind.name.lower()}_tokens": sum(lengths), f"{kind.name.lower()}_answers": len(lengths)}
            counts["tokens"] += sum(lengths)
        return counts

    @property
    def all_tokens(self) -> int:
        """Real tokens, prompts included: what a model has to work through."""
        return sum(len(sample.tokens) for group in self.groups for sample in group.samples)

    def table(self, data: int, micro_batch: int) -> list[list[list[int]]]:
        """`split_step` of this step's groups for a role with `data` replicas."""
        return split_step([group.total_length for group in self.groups], data, micro_batch)

    def table_beside(self, other: Table, data: int, micro_batch: int) -> list[list[list[int]]]:
        """`split_beside` of this step's groups: for a teacher with `data` replicas; `other` is the student's table."""
        return split_beside([group.total_length for group in self.groups], other, data, micro_batch)

    def batches(
        self,
        micro_batches: Sequence[Sequence[int]],
        *,
        pad_id: int,
        padding: Padding,
        device: torch.device | str,
        kinds: Sequence[Kind] = tuple(Kind),
    ) -> list[Batch]:
        """The micro-batches of one replica, given as its row of `table`; sequences of other kinds are left out."""
        groups, sample_ids = {}, {}
        for number in (number for numbers in micro_batches for number in numbers):
            group = self.groups[number]
            kept = [(sample, own) for sample, own in zip(group.samples, self.sample_ids[number], strict=True)
                    if sample.kind in kinds]
            groups[number] = Group(group.key, tuple(sample for sample, _ in kept))
            sample_ids[number] = [own for _, own in kept]
        longest = max(
            padding.width(len(sample.tokens) for number in numbers for sample in groups[number].samples)
            for numbers in micro_batches
        )
        return [
            collate(
                [groups[number] for number in numbers],
                [sample_ids[number] for number in numbers],
                pad_id=pad_id,
                padding=padding,
                at_least=longest if padding.uniform else 1,
                device=device,
            )
            for numbers in micro_batches
        ]
