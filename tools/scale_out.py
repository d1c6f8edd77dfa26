"""What a rank does at the start, before each step and in a checkpoint, counted for any number of ranks in one process.

    python tools/scale_out.py --worlds 64,1024,16384

No rank is started: the process groups are made by the real code over torch's fake backend, steps are planned by the
real code, and the slices of a checkpoint follow from the sizes of the parameters. Seconds are of this machine's CPU.
docs/cluster.md, "What grows with the number of ranks", quotes it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from statistics import median

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from megakd.batch import Group, Kind, Sample, Step
from megakd.hf.families import Architecture
from megakd.hf.pieces import parameter_shapes, stage_shards
from megakd.layout import Layout
from megakd.mcore import runtime
from megakd.mcore.grid import make_grid
from megakd.teacher.transport import route, shares

LLAMA_8B = Architecture("llama", 4096, 32, 32, 8, 128, 14336, 128256, 1e-5, 5e5, None, False, False, 8192)
STUDENT, TEACHER = {"tensor": 8}, {"tensor": 8, "pipeline": 4}
"""An 8B student and a 70B teacher, as slurm/adpa_70b_to_7b.yaml has them."""
GROUPS_A_REPLICA = 4
BUCKET, BUCKET_A_RANK = 40_000_000, 1_000_000
"""Numbers of a gradient bucket: megatron-core's smallest, and what it takes for each data-parallel rank."""


@dataclass(frozen=True)
class Groups:
    """Process groups that one rank makes."""

    made: int
    """Those that it is a member of."""
    asked: int
    """Calls, for groups of others too."""
    largest: int
    seconds: float


@contextmanager
def one_rank_of(world: int, rank: int) -> Iterator[None]:
    """This process as one rank among many that are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        runtime.stop()


def groups_of(world: int, rank: int) -> Groups:
    """The groups that a rank makes for a student and a teacher."""
    sizes: list[tuple[int, bool]] = []
    real = distributed_c10d._new_process_group_helper

    def counting(size, group_rank, *args, **kwargs):
        sizes.append((size, group_rank is not None))
        return real(size, group_rank, *args, **kwargs)

    with one_rank_of(world, rank):
        distributed_c10d._new_process_group_helper = counting
        start = time.process_time()
        try:
            student = make_grid(Layout(world, **STUDENT))
            runtime.set_global_state(student.groups)
            make_grid(Layout(world, **TEACHER))
        finally:
            distributed_c10d._new_process_group_helper = real
        seconds = time.process_time() - start
    own = [size for size, member in sizes if member]
    return Groups(len(own), len(sizes), max(own), seconds)


@dataclass(frozen=True)
class Plans:
    """What one rank plans and moves in a step; and how many others it comes to know."""

    seconds: float
    """For the tables of both roles, the route and this rank's messages."""
    messages: float
    """Mean over the steps, as of the rows."""
    rows: float
    """Sent and received."""
    peers: int
    """Other ranks that it has sent to or received from after all the steps."""


def random_step(groups: int, draw: random.Random) -> Step:
    """Preference pairs of 40 prompt tokens and answers of 100 to 1,000."""
    tokens = (5,) * 1040
    return Step(tuple(
        Group(str(number), tuple(Sample(tokens[: 40 + draw.randint(100, 1000)], 40, kind)
                                 for kind in (Kind.CHOSEN, Kind.REJECTED)))
        for number in range(groups)))


def plans_of(world: int, steps: int, micro_batch: int = 1) -> Plans:
    """Some steps of constant work a replica, on a rank that both sends and receives."""
    student, teacher, draw = Layout(world, **STUDENT), Layout(world, **TEACHER), random.Random(1)
    rank = teacher.rank(data=teacher.data // 2, pipeline=teacher.pipeline - 1)
    seconds, messages, peers = [], [], set()
    for _ in range(steps):
        step = random_step(GROUPS_A_REPLICA * student.data, draw)
        start = time.process_time()
        table = step.table(student.data, micro_batch)
        beside = step.table_beside(table, teacher.data, micro_batch)
        rows = shares(step.groups, (Kind.CHOSEN, Kind.REJECTED), student.context)
        way = route(teacher, student, beside, table, rows, step.sample_ids)
        sent, received = way.sends(rank), way.receives(rank)
        seconds.append(time.process_time() - start)
        messages += [message.rows for message in sent + received]
        peers |= {message.receiver for message in sent} | {message.sender for message in received}
    return Plans(median(seconds), len(messages) / steps, sum(messages) / steps, len(peers - {rank}))


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint says about where its numbers are."""

    files: int
    slices_of_a_rank: float
    """The mean."""
    slices: int
    bytes_of_a_group: int
    """JSON of a data group's slices: what its first rank's file says, and what a rank of another layout reads."""


def metadata_of(world: int) -> Metadata:
    """Of the student: the distributed optimizer cuts each bucket of a model chunk into equal parts, one a replica."""
    layout = Layout(world, **STUDENT)
    [shard] = stage_shards(LLAMA_8B, tensor_rank=0, tensor_size=layout.tensor, pipeline_rank=0, pipeline_size=1,
                           spec="te")
    members: list[dict[str, list[int]]] = [{} for _ in range(layout.data)]
    limit = max(BUCKET, BUCKET_A_RANK * layout.data)
    bucket: list[tuple[str, int]] = []
    shapes = list(parameter_shapes(LLAMA_8B, shard).items())
    for number, (name, shape) in enumerate(shapes):
        bucket.append((f"0.{name}", prod(shape)))
        if sum(size for _, size in bucket) >= limit or number == len(shapes) - 1:
            _cut(bucket, members)
            bucket = []
    told = [{"rank": layout.rank(data=data), "slices": slices} for data, slices in enumerate(members)]
    slices = sum(map(len, members))
    return Metadata(world, slices / layout.data, slices * layout.tensor, len(json.dumps(told)))


def _cut(bucket: list[tuple[str, int]], members: list[dict[str, list[int]]]) -> None:
    share, place = -(-sum(size for _, size in bucket) // len(members)), 0
    for name, size in bucket:
        for data in range(place // share, (place + size - 1) // share + 1):
            first, end = max(place, data * share), min(place + size, (data + 1) * share)
            members[data][name] = [first - place, end - place]
        place += size


def main() -> int:
    """Prints a row a world."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", default="64,1024,16384", help="numbers of ranks, multiples of 32")
    parser.add_argument("--steps", type=int, default=10, help="steps whose transport is planned")
    options = parser.parse_args()
    print("student TP8, teacher TP8 PP4, 4 preference pairs a student replica and step\n")
    heads = ("ranks", "groups made", "asked for", "s", "plan a step, s", "messages", "rows", "peers",
             "slices a rank", "in all", "metadata a group, KiB")
    print(" | ".join(heads))
    for world in map(int, options.worlds.split(",")):
        groups, plans, metadata = groups_of(world, 3), plans_of(world, options.steps), metadata_of(world)
        print(" | ".join([
            f"{world:,}", f"{groups.made}", f"{groups.asked:,}", f"{groups.seconds:.2f}", f"{plans.seconds:.3f}",
            f"{plans.messages:.1f}", f"{plans.rows:,.0f}", f"{plans.peers}", f"{metadata.slices_of_a_rank:.1f}",
            f"{metadata.slices:,}", f"{metadata.bytes_of_a_group / 1024:,.0f}",
        ]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
