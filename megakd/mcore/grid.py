"""A role's process groups. Student, teacher and reference each have a grid of their own over the same ranks.

The groups of one axis part the world, so every rank makes one group an axis, its own, together with that group's other
ranks; what a rank does at the start does not grow with the number of groups. Axes that part the world alike share
their groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.distributed_c10d import _process_group_color

from megakd.layout import Coordinates, Layout

Partition = list[list[int]]
"""The world's ranks in groups, every rank in one of them."""


@dataclass(frozen=True)
class Grid:
    """One role's layout, this rank's place in it, and megatron-core's collection of its groups."""

    layout: Layout
    at: Coordinates
    groups: ProcessGroupCollection

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.at.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the final norm and the head."""
        return self.at.pipeline == self.layout.pipeline - 1


def make_grid(layout: Layout, timeout: timedelta | None = None) -> Grid:
    """Makes the process groups of a layout. Collective over the world: every rank calls it, in the same order.

    Args:
        layout: of the role.
        timeout: how long their collectives may wait. torch gives a group its backend's own timeout (NCCL's: 10
            minutes) and not the world's, where none is said.
    """
    hyper = HyperCommGrid([layout.tensor, layout.context, layout.data, layout.pipeline], ["tp", "cp", "dp", "pp"])
    rank = dist.get_rank(dist.group.WORLD)
    at, made = layout.coordinates(rank), _Groups(rank, timeout)
    pipelines = hyper.get_rank_enum("pp")

    def along(*axes: str) -> dist.ProcessGroup:
        return made.of(hyper.get_rank_enum(list(axes)))

    groups = ProcessGroupCollection()
    alone = made.of([[rank] for rank in range(layout.world)])
    groups.tp, groups.cp, groups.dp, groups.pp = along("tp"), along("cp"), along("dp"), along("pp")
    groups.mp, groups.dp_cp, groups.tp_cp = along("tp", "pp"), along("cp", "dp"), along("tp", "cp")
    groups.tp_dp_cp = along("tp", "cp", "dp")
    # Dense models: the expert groups are those of one expert rank.
    groups.ep = alone
    groups.expt_tp = groups.tp
    groups.expt_dp = groups.dp
    groups.tp_ep = groups.tp
    groups.tp_ep_pp = groups.mp
    groups.intra_dp_cp = groups.dp_cp
    groups.intra_expt_dp = groups.expt_dp
    groups.inter_dist_opt = alone
    groups.intra_dist_opt = along("tp", "cp", "dp", "pp")
    # Those between the two ends of a pipeline are each in a group of one, for every rank has to make a group.
    ends = [sorted({ranks[0], ranks[-1]}) for ranks in pipelines]
    tied = made.of(ends + [[rank] for ranks in pipelines for rank in ranks[1:-1]])
    groups.embd = tied if at.pipeline in (0, layout.pipeline - 1) else None
    groups.pos_embd = alone if at.pipeline == 0 else None
    return Grid(layout, at, groups)


class _Groups:
    """This rank's groups of a grid, each partition of the world once. All ranks ask for the same, in the same order."""

    def __init__(self, rank: int, timeout: timedelta | None):
        self._rank, self._timeout = rank, timeout
        self._made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}

    def of(self, partition: Partition) -> dist.ProcessGroup:
        """This rank's group of a partition. Collective over the world."""
        key = tuple(sorted(tuple(sorted(ranks)) for ranks in partition))
        if key not in self._made:
            self._made[key] = dist.group.WORLD if len(key) == 1 else _own_group(key, self._rank, self._timeout)
        return self._made[key]


def _own_group(
    partition: tuple[tuple[int, ...], ...], rank: int, timeout: timedelta | None
) -> dist.ProcessGroup:
    """Makes the group that `rank`, this process, has in a partition, and none of the others.

    torch names it after its ranks and the number of groups that a rank has made, so all must have made equally many.
    NCCL splits the world's communicator once for all groups of a partition, by a colour that torch takes from their
    ranks; where two colours are the same, the groups are made one after the other.
    """
    if len({_process_group_color(list(ranks)) for ranks in partition}) < len(partition):
        group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in partition], timeout)
        return group
    mine = next(ranks for ranks in partition if rank in ranks)
    return dist.new_group(list(mine), timeout, use_local_synchronization=True)
