"""Moves teachers' hidden states from the ranks that made them to the ranks whose loss reads them.

A teacher's layout is free of the student's, so the rows of one student micro-batch may lie in several teacher replicas
and several teacher micro-batches. `route` says, without talking to anybody, which rank sends which rows to which rank;
`exchange` does it. Every rank computes the same route from the step's groups.

The rows that teacher replica d made and student copy e needs form one block: all rows of the sequences that both have,
or, under context parallelism, those of the copy's own parts of them. A block is cut into as many ranges as the student
has tensor ranks; each of them gets one range over the network and the student's tensor group, whose links are the
fastest, gathers the ranges. So a row enters a student replica once, not once for each of its ranks.

Legend: R travelling rows, T rows of a micro-batch, K width of the teacher, S size of the student's tensor axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.batch import Group, Kind, Padding, Table, to_device
from megakd.layout import Layout

Shares = Sequence[Sequence[Sequence[range]]]
"""`shares[context rank][sample]`: ranges of the sample's travelling rows."""


@dataclass(frozen=True)
class Segment:
    """Rows `start:stop` of one sample's travelling rows."""

    sample: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Message:
    """Rows that one rank gives to another, in this order. `sender == receiver` is a local copy."""

    sender: int
    receiver: int
    segments: tuple[Segment, ...]

    @property
    def rows(self) -> int:
        return sum(segment.rows for segment in self.segments)


@dataclass(frozen=True)
class Block:
    """What teacher replica `teacher_data` makes and student copy `student_copy` needs, by ascending sample id.

    `turn` counts the blocks of the teacher replica.
    """

    teacher_data: int
    student_copy: int
    turn: int
    segments: tuple[Segment, ...]
    rows: int

    def bounds(self, part: int, parts: int) -> tuple[int, int]:
        """First and end row of range `part` of `parts` near-equal ranges."""
        return self.rows * part // parts, self.rows * (part + 1) // parts


@dataclass(frozen=True)
class Route:
    """Who sends what to whom in one step, for one teacher role. Made by `route`.

    `teacher_samples[d][m]` are the travelling samples of a micro-batch of a teacher replica in its row order,
    `student_segments[e][m]` what a student copy needs of them for one of its own, in its row order.
    """

    teacher: Layout
    student: Layout
    rows_of_sample: tuple[int, ...]
    teacher_samples: tuple[tuple[tuple[int, ...], ...], ...]
    student_segments: tuple[tuple[tuple[Segment, ...], ...], ...]
    blocks_of_teacher: tuple[tuple[Block, ...], ...]
    blocks_of_student: tuple[tuple[Block, ...], ...]

    def sends(self, rank: int) -> list[Message]:
        """The messages of `rank`, by receiver; a copy to itself is among them."""
        place = self.teacher.coordinates(rank)
        if place.pipeline != self.teacher.pipeline - 1:
            return []
        messages = [self._message(block, part) for block in self.blocks_of_teacher[place.data]
                    for part in range(self.student.tensor)]
        return [message for message in messages if message.sender == rank and message.rows > 0]

    def receives(self, rank: int) -> list[Message]:
        """The messages to `rank`, by sender's replica, in the order in which `exchange` lays them out."""
        place = self.student.coordinates(rank)
        if place.pipeline != self.student.pipeline - 1:
            return []
        blocks = self.blocks_of_student[self.student.copy(place)]
        messages = [self._message(block, place.tensor) for block in blocks]
        return [message for message in messages if message.rows > 0]

    def received_rows(self, student_copy: int, student_tensor: int) -> int:
        """Rows that one student rank holds before the gather."""
        bounds = (block.bounds(student_tensor, self.student.tensor) for block in self.blocks_of_student[student_copy])
        return sum(stop - start for start, stop in bounds)

    def _message(self, block: Block, part: int) -> Message:
        """Range `part` of a block."""
        data, context = divmod(block.student_copy, self.student.context)
        receiver = self.student.rank(tensor=part, context=context, data=data, pipeline=self.student.pipeline - 1)
        # Any tensor rank of the teacher replica could send. The receiver itself where it is one of them; else they take
        # turns over the ranges and the blocks, as one student tensor rank alone would burden few of many senders.
        last = self.teacher.pipeline - 1
        place = self.teacher.coordinates(receiver)
        sender = receiver
        if (place.pipeline, place.data) != (last, block.teacher_data):
            tensor = (block.turn * self.student.tensor + part) % self.teacher.tensor
            sender = self.teacher.rank(tensor=tensor, data=block.teacher_data, pipeline=last)
        first, end = block.bounds(part, self.student.tensor)
        segments, offset = [], 0
        for whole in block.segments:
            start, stop = max(first - offset, 0), min(end - offset, whole.rows)
            if start < stop:
                segments.append(Segment(whole.sample, whole.start + start, whole.start + stop))
            offset += whole.rows
        return Message(sender, receiver, tuple(segments))


def shares(groups: Iterable[Group], kinds: Sequence[Kind], context: int) -> Shares:
    """Of each sample of a step the loss positions that a teacher scores (all of its kinds', none of the others'), dealt
    out to the `context` ranks of a student replica as the sequences are."""
    samples = [sample for group in groups for sample in group.samples]
    paddings = [Padding(context=context, context_rank=rank) for rank in range(context)]
    return [[padding.own_rows(sample) if sample.kind in kinds else [] for sample in samples] for padding in paddings]


def route(
    teacher: Layout,
    student: Layout,
    teacher_table: Table,
    student_table: Table,
    rows: Shares,
    samples_of_group: Sequence[Sequence[int]],
) -> Route:
    """Plans one step's transport. Pure: no rank talks to another.

    Args:
        teacher: the sending role's layout, not context-parallel; only its last pipeline stage sends.
        student: the receiving role's layout, over the same world; only its last pipeline stage receives.
        teacher_table: the teacher's micro-batches, `[data][micro][group]`.
        student_table: the student's micro-batches; it holds the same groups.
        rows: what each context rank of the student needs of each sample id (`shares`): together all of its
            travelling rows.
        samples_of_group: for each group its sample ids (`megakd.batch.number_samples`).

    Raises:
        ValueError: the layouts are of different worlds, the teacher's or `rows` of another number of context ranks, or
            a table does not hold every group once.
    """
    if teacher.world != student.world:
        raise ValueError(f"teacher world {teacher.world} and student world {student.world} differ")
    if teacher.context != 1 or student.context != len(rows):
        raise ValueError(f"context sizes: teacher {teacher.context} (must be 1), student {student.context}, rows of "
                         f"{len(rows)}")
    rows_of_sample = tuple(sum(len(part) for own in of_ranks for part in own) for of_ranks in zip(*rows, strict=True))
    teacher_samples = _samples_in_order(teacher, teacher_table, rows_of_sample, samples_of_group)
    student_samples = _samples_in_order(student, student_table, rows_of_sample, samples_of_group)
    student_segments = tuple(
        tuple(tuple(Segment(sample, part.start, part.stop) for sample in micro for part in own[sample])
              for micro in micros)
        for micros in student_samples for own in rows
    )
    teacher_data_of = {sample: d for d, micros in enumerate(teacher_samples) for micro in micros for sample in micro}
    shared: dict[tuple[int, int], list[Segment]] = {}
    for e, micros in enumerate(student_segments):
        for segment in sorted((segment for micro in micros for segment in micro), key=lambda each: each.sample):
            shared.setdefault((teacher_data_of[segment.sample], e), []).append(segment)
    of_teacher: list[list[Block]] = [[] for _ in range(teacher.data)]
    of_student: list[list[Block]] = [[] for _ in range(student.copies)]
    for (d, e), segments in sorted(shared.items(), key=lambda each: each[0]):
        block = Block(d, e, len(of_teacher[d]), tuple(segments), sum(segment.rows for segment in segments))
        of_teacher[d].append(block)
        of_student[e].append(block)
    return Route(teacher, student, rows_of_sample, teacher_samples, student_segments,
                 tuple(map(tuple, of_teacher)), tuple(map(tuple, of_student)))


def _samples_in_order(layout: Layout, table: Table, rows_of_sample: Sequence[int],
                      samples_of_group: Sequence[Sequence[int]]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """A table of groups as a table of travelling samples, in the order in which `collate` lays them out."""
    groups = sorted(group for micros in table for micro in micros for group in micro)
    if len(table) != layout.data or groups != list(range(len(samples_of_group))):
        raise ValueError(f"a table of {len(table)} replicas and {len(groups)} groups does not hold each of "
                         f"{len(samples_of_group)} groups once over {layout.data} replicas")
    return tuple(
        tuple(tuple(sample for group in micro for sample in samples_of_group[group] if rows_of_sample[sample] > 0)
              for micro in micros)
        for micros in table
    )


def exchange(
    route: Route,
    rank: int,
    local_hidden: Sequence[Tensor] | None,
    *,
    width: int,
    dtype: torch.dtype,
    device: torch.device | str,
    world_group: dist.ProcessGroup | None,
    student_tp_group: dist.ProcessGroup | None,
) -> list[Tensor] | None:
    """Carries out a route. Every rank of `world_group` calls it once for each teacher role, in the same order.

    Collectives: one `batch_isend_irecv` in `world_group` on the ranks that send or receive (under NCCL some collective
    of all its ranks must have come first, as torch asks), then one all-gather in `student_tp_group` of the student's
    last stage. The result carries no gradient.

    Args:
        route: this step's route for this role.
        rank: this process' rank in `world_group`.
        local_hidden: on the teacher's last stage the rows of each of this replica's micro-batches, [T, K] each:
            row-major over the micro-batch's sequences, loss positions of travelling samples only. Elsewhere None.
        width: K.
        dtype: the teacher's dtype; rows travel and arrive in it.
        device: where the rows lie and arrive.
        world_group: the group of all the ranks; None for a world of one.
        student_tp_group: the student's tensor group of this rank; None where the student is not tensor-parallel.

    Returns:
        On the student's last stage one [T, K] tensor for each of its micro-batches, rows in the order of its loss
        own positions (those of the travelling kinds); elsewhere None.

    Raises:
        ValueError: `local_hidden` does not have the route's micro-batches, rows, width or dtype.
    """
    rows_of = _sender_rows(route, rank, local_hidden, width, dtype)
    place = route.student.coordinates(rank)
    receives, copy = route.receives(rank), route.student.copy(place)
    own_RK, operations, outgoing = None, [], []
    if place.pipeline == route.student.pipeline - 1:
        own_RK = torch.empty((_padded_rows(route, copy), width), dtype=dtype, device=device)
    offset = 0
    for message in receives:
        target_RK = own_RK[offset : offset + message.rows]
        offset += message.rows
        if message.sender == rank:
            target_RK.copy_(_pick(message, rows_of))
        else:
            peer = dist.get_global_rank(world_group, message.sender)
            operations.append(dist.P2POp(dist.irecv, target_RK, peer, group=world_group))
    for message in route.sends(rank):
        if message.receiver != rank:
            outgoing.append(_pick(message, rows_of))
            peer = dist.get_global_rank(world_group, message.receiver)
            operations.append(dist.P2POp(dist.isend, outgoing[-1], peer, group=world_group))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    if own_RK is None:
        return None
    return _gather(route, copy, own_RK, student_tp_group)


def _sender_rows(route: Route, rank: int, local_hidden: Sequence[Tensor] | None, width: int,
                 dtype: torch.dtype) -> dict[int, Tensor]:
    """For each travelling sample that this rank holds, its rows as a view. Checks what the teacher's forward gave."""
    place = route.teacher.coordinates(rank)
    if place.pipeline != route.teacher.pipeline - 1:
        if local_hidden is not None:
            raise ValueError(f"rank {rank} is not in the teacher's last pipeline stage, but was given hidden states")
        return {}
    micros = route.teacher_samples[place.data]
    if local_hidden is None or len(local_hidden) != len(micros):
        given = "none" if local_hidden is None else len(local_hidden)
        raise ValueError(f"rank {rank}: the route has {len(micros)} teacher micro-batches, the hidden states {given}")
    rows_of = {}
    for number, (samples, hidden_TK) in enumerate(zip(micros, local_hidden, strict=True)):
        expected = (sum(route.rows_of_sample[sample] for sample in samples), width)
        if tuple(hidden_TK.shape) != expected or hidden_TK.dtype != dtype:
            raise ValueError(f"rank {rank}, teacher micro-batch {number}: hidden states are {tuple(hidden_TK.shape)} "
                             f"{hidden_TK.dtype}, the route says {expected} {dtype}")
        pieces = hidden_TK.detach().split([route.rows_of_sample[sample] for sample in samples])
        rows_of.update(zip(samples, pieces, strict=True))
    return rows_of


def _pick(message: Message, rows_of: dict[int, Tensor]) -> Tensor:
    """The message's rows in one contiguous tensor [R, K]."""
    return torch.cat([rows_of[segment.sample][segment.start : segment.stop] for segment in message.segments])


def _padded_rows(route: Route, student_copy: int) -> int:
    """Rows of the longest share among a student copy's tensor ranks: the all-gather wants equal ones."""
    return max(route.received_rows(student_copy, part) for part in range(route.student.tensor))


def _gather(route: Route, student_copy: int, own_RK: Tensor, tp_group: dist.ProcessGroup | None) -> list[Tensor]:
    """All-gathers the tensor ranks' shares in `tp_group` and puts the rows in the order of the micro-batches."""
    parts, padded = route.student.tensor, own_RK.shape[0]
    if parts > 1 and padded > 0:
        gathered_RK = own_RK.new_empty((parts * padded, own_RK.shape[1]))
        dist.all_gather_into_tensor(gathered_RK, own_RK, group=tp_group)
    else:
        gathered_RK = own_RK
    places: dict[Segment, Tensor] = {}
    offsets = [part * padded for part in range(parts)]
    for block in route.blocks_of_student[student_copy]:
        ranges = []
        for part in range(parts):
            start, stop = block.bounds(part, parts)
            ranges.append(torch.arange(offsets[part], offsets[part] + stop - start))
            offsets[part] += stop - start
        sizes = [segment.rows for segment in block.segments]
        places.update(zip(block.segments, torch.cat(ranges).split(sizes), strict=True))
    nothing = torch.empty(0, dtype=torch.int64)
    order = [torch.cat([nothing, *(places[segment] for segment in segments)])
             for segments in route.student_segments[student_copy]]
    return [gathered_RK.index_select(0, to_device(places_T, own_RK.device)) for places_T in order]
