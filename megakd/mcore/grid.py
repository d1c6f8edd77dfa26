"""A role's process groups. Student, teacher and reference each have a grid of their own over the same ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from megakd.layout import Coordinates, Layout


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


def make_grid(layout: Layout) -> Grid:
    """Makes the process groups of a layout. Collective over the world: every rank calls it, in the same order."""
    shape = [layout.tensor, layout.context, layout.data, layout.pipeline]
    hyper = HyperCommGrid(shape, ["tp", "cp", "dp", "pp"])
    groups = ProcessGroupCollection()
    groups.tp = hyper.create_pg("tp")
    groups.cp = hyper.create_pg("cp")
    groups.dp = hyper.create_pg("dp")
    groups.pp = hyper.create_pg("pp")
    groups.mp = hyper.create_pg(["tp", "pp"])
    groups.dp_cp = hyper.create_pg(["cp", "dp"])
    groups.tp_cp = hyper.create_pg(["tp", "cp"])
    groups.tp_dp_cp = hyper.create_pg(["tp", "cp", "dp"])
    # Dense models: the expert groups are those of one expert rank.
    alone = _group_of_one()
    groups.ep = alone
    groups.expt_tp = groups.tp
    groups.expt_dp = groups.dp
    groups.tp_ep = groups.tp
    groups.tp_ep_pp = groups.mp
    groups.intra_dp_cp = groups.dp_cp
    groups.intra_expt_dp = groups.expt_dp
    groups.inter_dist_opt = alone
    groups.intra_dist_opt = hyper.create_pg(["tp", "cp", "dp", "pp"])
    pipelines = hyper.get_rank_enum("pp")
    groups.embd = _my_group([sorted({ranks[0], ranks[-1]}) for ranks in pipelines])
    groups.pos_embd = _my_group([[ranks[0]] for ranks in pipelines])
    return Grid(layout, layout.coordinates(dist.get_rank()), groups)


def _my_group(enumeration: list[list[int]]) -> dist.ProcessGroup | None:
    """Makes a group of each list of ranks; returns this rank's, or None where no list has it."""
    mine = None
    for ranks in enumeration:
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = group
    return mine


def _group_of_one() -> dist.ProcessGroup:
    group, _ = dist.new_subgroups_by_enumeration([[rank] for rank in range(dist.get_world_size())])
    return group
