"""What the models of a training stage work through in one optimizer step.

Either of a real step, sequence by sequence, or of an average one, from lengths alone: then the numbers are means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from megakd.batch import Group, Kind, Padding, Step
from megakd.layout import Layout
from megakd.teacher.transport import Route, route, shares


@dataclass(frozen=True)
class MicroBatch:
    """What a model is given at once."""

    tokens: float
    """Packed positions, filling included."""
    pairs: float
    """(position, attended position) pairs."""
    loss_tokens: Mapping[Kind, float]
    """Positions with a loss in the sequences of each kind: where heads are applied, and what a teacher sends."""

    def rows(self, kinds: Iterable[Kind]) -> float:
        """Loss positions of some kinds."""
        return sum(self.loss_tokens[kind] for kind in kinds if kind in self.loss_tokens)

    @property
    def all_rows(self) -> float:
        """Loss positions of all kinds."""
        return sum(self.loss_tokens.values())


@dataclass(frozen=True)
class RoleWork:
    """The micro-batches of the replica of a role that has most to do."""

    micro_batches: tuple[MicroBatch, ...]

    def most(self, number: str) -> float:
        """The largest `tokens`, `pairs` or `all_rows` of a micro-batch."""
        return self._most_and_sums[number][0]

    def sum(self, number: str) -> float:
        """The sum of `tokens`, `pairs` or `all_rows` over the micro-batches."""
        return self._most_and_sums[number][1]

    @cached_property
    def _most_and_sums(self) -> dict[str, tuple[float, float]]:
        """A plan asks for them hundreds of times, and there may be thousands of micro-batches."""
        numbers = {}
        for name in ("tokens", "pairs", "all_rows"):
            values = [getattr(each, name) for each in self.micro_batches]
            numbers[name] = (max(values), sum(values))
        return numbers

    @property
    def mean(self) -> MicroBatch:
        """The mean micro-batch."""
        count = len(self.micro_batches)
        kinds = self.micro_batches[0].loss_tokens
        rows = {kind: sum(each.rows((kind,)) for each in self.micro_batches) / count for kind in kinds}
        return MicroBatch(self.sum("tokens") / count, self.sum("pairs") / count, rows)


@dataclass(frozen=True)
class Moved:
    """A teacher's rows on their way to the student."""

    sent: tuple[int, ...]
    """For each rank of the world the rows that it gives to other ranks."""
    received: tuple[int, ...]
    """For each rank of the world the rows that it gets from other ranks."""
    gathered: tuple[int, ...]
    """For each replica of the student the rows that its tensor ranks then gather, filling included."""


@dataclass(frozen=True)
class StepWork:
    """One optimizer step."""

    roles: Mapping[str, RoleWork]
    """`student` is the model that is trained, whichever role lends it its settings."""
    teacher_kinds: Mapping[str, Sequence[Kind]]
    """Teacher role -> kinds of the sequences that it reads."""
    tokens: float
    """Of the whole step, over all replicas: what the throughput is told by."""
    moved: Mapping[str, Moved] | None = None
    """Teacher role -> its rows' ways in a real step; None in an average one."""

    def received(self, role: str) -> float:
        """Rows of a teacher that the student's busiest replica gets."""
        return sum(each.rows(self.teacher_kinds[role]) for each in self.roles["student"].micro_batches)


def work_of_step(step: Step, layouts: Mapping[str, Layout], micro_batches: Mapping[str, int],
                 paddings: Mapping[str, Padding], teacher_kinds: Mapping[str, Sequence[Kind]]) -> StepWork:
    """The work of a real step.

    Args:
        step: its groups.
        layouts: of each role; the student's is "student".
        micro_batches: groups of a micro-batch of each role.
        paddings: what each role's rows are filled up to.
        teacher_kinds: as StepWork has it.
    """
    student = step.table(layouts["student"].data, micro_batches["student"])
    tables = {role: step.table_beside(student, layouts[role].data, micro_batches[role])
              for role in teacher_kinds if role in layouts}
    tables["student"] = student
    roles = {}
    for role, table in tables.items():
        kinds = teacher_kinds.get(role, tuple(Kind))
        replicas = [_replica_work(step.groups, micros, kinds, paddings[role]) for micros in table]
        roles[role] = max(replicas, key=lambda work: work.sum("tokens"))
    moved = {}
    for role, kinds in teacher_kinds.items():
        if role not in layouts:  # read from disk
            continue
        way = route(layouts[role], layouts["student"], tables[role], tables["student"],
                    shares(step.groups, kinds, layouts["student"].context), step.sample_ids)
        moved[role] = _moved(way)
    return StepWork(roles, teacher_kinds, step.all_tokens, moved)


def _moved(way: Route) -> Moved:
    ranks = range(way.student.world)
    sent = tuple(sum(message.rows for message in way.sends(rank) if message.receiver != rank) for rank in ranks)
    received = tuple(sum(message.rows for message in way.receives(rank) if message.sender != rank) for rank in ranks)
    parts = range(way.student.tensor)
    gathered = tuple(way.student.tensor * max(way.received_rows(replica, part) for part in parts)
                     for replica in range(way.student.data))
    return Moved(sent, received, gathered)


def _replica_work(groups: Sequence[Group], micros: Sequence[Sequence[int]], kinds: Sequence[Kind],
                  padding: Padding) -> RoleWork:
    samples = [[sample for number in micro for sample in groups[number].samples if sample.kind in kinds]
               for micro in micros]
    totals = [sum(len(sample.tokens) for sample in own) for own in samples]
    batches = []
    for own, total in zip(samples, totals, strict=True):
        width = padding.width([max(totals) if padding.uniform else total])
        rows = {kind: sum(sample.response_length for sample in own if sample.kind == kind) for kind in kinds}
        batches.append(MicroBatch(width, _pairs([*(len(sample.tokens) for sample in own), width - total]), rows))
    return RoleWork(tuple(batches))


def _pairs(lengths: Iterable[int]) -> float:
    return sum(length * (length + 1) / 2 for length in lengths)


@dataclass(frozen=True)
class Lengths:
    """Mean lengths of what a stage trains on, in tokens."""

    prompt: float
    answer: float


def work_of_lengths(lengths: Lengths, kinds: Sequence[Kind], global_batch: int, layouts: Mapping[str, Layout],
                    micro_batches: Mapping[str, int], teacher_kinds: Mapping[str, Sequence[Kind]]) -> StepWork:
    """The work of an average step whose groups all hold an answer of each of `kinds`; of one that comes twice, two.

    The other arguments: as `work_of_step` has them. A micro-batch then has the mean number of tokens; the largest of a
    real step has more.
    """
    roles = {}
    for role, layout in layouts.items():
        own = tuple(kind for kind in kinds if kind in teacher_kinds.get(role, kinds))
        groups = micro_batches[role]
        roles[role] = _mean_work(lengths, own, groups, global_batch // (layout.data * groups))
    return StepWork(roles, teacher_kinds, global_batch * len(kinds) * (lengths.prompt + lengths.answer))


@cache
def _mean_work(lengths: Lengths, kinds: tuple[Kind, ...], groups: int, micro_batches: int) -> RoleWork:
    length = lengths.prompt + lengths.answer
    answers = len(kinds) * groups
    rows = {kind: kinds.count(kind) * groups * lengths.answer for kind in kinds}
    return RoleWork((MicroBatch(answers * length, answers * length * (length + 1) / 2, rows),) * micro_batches)
