"""What one micro-batch is, and how a step's sequences are cut into micro-batches.

Legend: B sequences of a micro-batch, S padded length, T loss positions of the micro-batch (row-major over B, then S).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor


class Kind(IntEnum):
    """What a sequence is to the objective."""

    CHOSEN = 0
    REJECTED = 1
    ROLLOUT = 2


@dataclass(frozen=True)
class Sample:
    """One tokenised sequence. `tokens[prompt_length:]` is the response, with its closing token where it has one."""

    tokens: tuple[int, ...]
    prompt_length: int
    kind: Kind

    def __post_init__(self):
        if not 1 <= self.prompt_length <= len(self.tokens):
            raise ValueError(
                f"a prompt of {self.prompt_length} tokens in a sequence of {len(self.tokens)}: the first "
                "response token needs a token before it"
            )


@dataclass(frozen=True)
class Group:
    """Sequences that stay in one micro-batch (a preference pair; a chosen answer and a rollout of one prompt).

    `key` names the row that it came from ("pairs.jsonl:17"), for messages and artefacts.
    """

    key: str
    samples: tuple[Sample, ...]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(sample.tokens) for sample in self.samples)


@dataclass(frozen=True)
class LossPositions:
    """The T positions of a micro-batch that have a loss, row-major over (sequence, position)."""

    rows_T: Tensor
    columns_T: Tensor
    labels_T: Tensor
    kinds_T: Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on one device.

    `labels_BS[b, s]` is the token after `tokens_BS[b, s]`; `loss_mask_BS` is True where that next token belongs to the
    response. `sample_ids_B` numbers the sequences within the step (the same numbers for every role and layout);
    `group_ids_B` numbers the groups within the micro-batch.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    position_ids_BS: Tensor
    kinds_B: Tensor
    sample_ids_B: Tensor
    group_ids_B: Tensor

    @cached_property
    def positions(self) -> LossPositions:
        """The loss positions, in the order that every [T, ...] tensor of this micro-batch has."""
        rows_T, columns_T = self.loss_mask_BS.nonzero(as_tuple=True)
        return LossPositions(rows_T, columns_T, self.labels_BS[rows_T, columns_T], self.kinds_B[rows_T])

    def counts(self) -> dict[str, int]:
        """The denominators that this micro-batch adds to: `tokens`, `<kind>_tokens` for each kind, and `groups`."""
        kinds_T = self.positions.kinds_T
        counts = {f"{kind.name.lower()}_tokens": int((kinds_T == kind).sum()) for kind in Kind}
        return {"tokens": kinds_T.numel(), "groups": int(self.group_ids_B.max()) + 1, **counts}


def number_samples(groups: Sequence[Group]) -> list[range]:
    """The sample ids of each group of a step: consecutive numbers in the order of the step's groups."""
    starts = [0]
    for group in groups:
        starts.append(starts[-1] + len(group.samples))
    return [range(start, stop) for start, stop in zip(starts, starts[1:], strict=False)]


def split_step(lengths: Sequence[int], data: int, micro_batch: int) -> list[list[list[int]]]:
    """Deals a step's groups out to data-parallel ranks and micro-batches.

    Groups of like length share a micro-batch, so that little is padded; the ranks get like amounts. It is a pure
    function of its arguments: every rank of every role computes the same table without talking.

    Args:
        lengths: the length of each group of the step.
        data: number of data-parallel ranks; `len(lengths)` is a multiple of `data * micro_batch`.
        micro_batch: groups in a micro-batch.

    Returns:
        `table[rank][micro]`: the numbers of the step's groups in that micro-batch.
    """
    if len(lengths) % (data * micro_batch) != 0:
        raise ValueError(f"{len(lengths)} groups are not a multiple of data {data} x micro_batch {micro_batch}")
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    micro_batches = [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]
    return [micro_batches[rank::data] for rank in range(data)]


@dataclass(frozen=True)
class Padding:
    """How wide a model needs its micro-batches."""

    multiple: int = 1
    """S is a multiple of it (sequence parallelism needs the tensor size)."""
    uniform: bool = False
    """Whether all micro-batches of a step have one width (the interleaved schedule needs it)."""


def collate(
    groups: Sequence[Group],
    sample_ids: Sequence[Sequence[int]],
    *,
    pad_id: int,
    multiple: int = 1,
    at_least: int = 1,
    device: torch.device | str = "cpu",
) -> Batch:
    """Pads groups to one micro-batch.

    Args:
        groups: the micro-batch's groups, G of them.
        sample_ids: for each group its sequences' numbers within the step (`number_samples`).
        pad_id: token written on padding; it is never attended to by a real token and has no loss.
        multiple: S is rounded up to a multiple of it.
        at_least: smallest S before that rounding.
        device: where the tensors go.
    """
    flat = [
        (sample, number, ids[i])
        for number, (group, ids) in enumerate(zip(groups, sample_ids, strict=True))
        for i, sample in enumerate(group.samples)
    ]
    longest = max(at_least, *(len(sample.tokens) for sample, _, _ in flat))
    width = -(-longest // multiple) * multiple
    tokens_BS = torch.full((len(flat), width), pad_id, dtype=torch.int64)
    labels_BS = torch.full((len(flat), width), pad_id, dtype=torch.int64)
    loss_mask_BS = torch.zeros((len(flat), width), dtype=torch.bool)
    for row, (sample, _, _) in enumerate(flat):
        length = len(sample.tokens)
        tokens_BS[row, :length] = torch.tensor(sample.tokens)
        labels_BS[row, : length - 1] = tokens_BS[row, 1:length]
        loss_mask_BS[row, sample.prompt_length - 1 : length - 1] = True
    position_ids_BS = torch.arange(width).expand(len(flat), width).contiguous()
    integers = [[int(sample.kind) for sample, _, _ in flat], [i for _, _, i in flat], [number for _, number, _ in flat]]
    kinds_B, sample_ids_B, group_ids_B = (torch.tensor(values) for values in integers)
    tensors = (tokens_BS, labels_BS, loss_mask_BS, position_ids_BS, kinds_B, sample_ids_B, group_ids_B)
    return Batch(*(tensor.to(device) for tensor in tensors))


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
        counts = {f"{kind.name.lower()}_tokens": 0 for kind in Kind}
        for group in self.groups:
            for sample in group.samples:
                counts[f"{sample.kind.name.lower()}_tokens"] += len(sample.tokens) - sample.prompt_length
        return {"tokens": sum(counts.values()), "groups": len(self.groups), **counts}

    @property
    def all_tokens(self) -> int:
        """Real tokens, prompts included: what a model has to work through."""
        return sum(len(sample.tokens) for group in self.groups for sample in group.samples)

    def table(self, data: int, micro_batch: int) -> list[list[list[int]]]:
        """`split_step` of this step's groups for a role with `data` replicas."""
        return split_step([group.length for group in self.groups], data, micro_batch)

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
        groups, sample_ids = [], []
        for group, numbers in zip(self.groups, self.sample_ids, strict=True):
            kept = [
                (sample, number) for sample, number in zip(group.samples, numbers, strict=True) if sample.kind in kinds
            ]
            groups.append(Group(group.key, tuple(sample for sample, _ in kept)))
            sample_ids.append([number for _, number in kept])
        at_least = max(group.length for group in groups) if padding.uniform else 1
        return [
            collate(
                [groups[number] for number in numbers],
                [sample_ids[number] for number in numbers],
                pad_id=pad_id,
                multiple=padding.multiple,
                at_least=at_least,
                device=device,
            )
            for numbers in micro_batches
        ]
