"""A grid's groups have the ranks that their axes say, whichever way they are made; and what a process without GPUs has
of megatron-core where there are some."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from megatron.core import optimizer, parallel_state
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as base_optimizer
from torch.distributed.distributed_c10d import _world

from megakd.layout import Layout
from megakd.mcore import grid, runtime
from tests.mcore.cases import CPU
from tests.ranks import run_ranks

TIMEOUT = timedelta(minutes=7)


def _groups(layout: Layout, collide: bool) -> tuple[dict[str, list[int] | None], int, dict[str, float]]:
    """The ranks of this rank's groups; how many it has made; and the sum of the ranks over each."""
    runtime.adopt(CPU)
    real, before = grid._process_group_color, len(_world.pg_names)
    if collide:
        grid._process_group_color = lambda ranks: 1
    try:
        groups = grid.make_grid(layout, TIMEOUT).groups
    finally:
        grid._process_group_color = real
    runtime.set_global_state(groups)
    assert parallel_state.get_tensor_model_parallel_group() is groups.tp
    ranks, sums = {}, {}
    for name, group in vars(groups).items():
        if group not in (None, dist.group.WORLD):
            assert group._get_backend(CPU).options._timeout == TIMEOUT, name
        ranks[name] = None if group is None else dist.get_process_group_ranks(group)
        if group is not None:
            total = torch.tensor(float(dist.get_rank()))
            dist.all_reduce(total, group=group)
            sums[name] = float(total)
    return ranks, len(_world.pg_names) - before, sums


AXES = {"tp": "tensor", "cp": "context", "dp": "data", "pp": "pipeline", "mp": "tensor pipeline",
        "dp_cp": "data context", "tp_cp": "tensor context", "tp_dp_cp": "tensor data context", "ep": "",
        "intra_dist_opt": "tensor data context pipeline"}


@pytest.mark.parametrize("collide", [False, True], ids=["one a partition", "colours collide"])
@pytest.mark.parametrize("layout, made", [
    (Layout(4, 1, 4), 2), (Layout(4, 2, 2), 3), (Layout(4, 2, 1), 3), (Layout(4), 1), (Layout(4, 1, 2), 3)])
def test_groups_of_a_layout(layout, made, collide):
    for rank, (ranks, count, sums) in enumerate(run_ranks(4, _groups, layout, collide)):
        at = layout.coordinates(rank)
        for name, axes in AXES.items():
            fixed = [axis for axis in ("tensor", "context", "data", "pipeline") if axis not in axes.split()]
            members = [other for other in range(4) if all(
                getattr(layout.coordinates(other), axis) == getattr(at, axis) for axis in fixed)]
            assert ranks[name] == members, name
        column = ranks["pp"]
        assert ranks["embd"] == (sorted({column[0], column[-1]}) if rank in (column[0], column[-1]) else None)
        assert ranks["pos_embd"] == ([rank] if at.pipeline == 0 else None)
        assert all(total == sum(ranks[name]) for name, total in sums.items())
        assert count == made


def test_on_the_cpu_megatron_core_takes_torchs_optimizer_whatever_is_installed(monkeypatch):
    chosen = [(module, name, getattr(module, name)) for module, names in (
        (optimizer, ("Adam", "SGD", "USING_PYTORCH_OPTIMIZER")),
        (distrib_optimizer, ("Adam", "HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER")),
        (base_optimizer, ("multi_tensor_applier", "multi_tensor_scale_impl")),
        (clip_grads, ("multi_tensor_applier", "multi_tensor_scale_impl", "l2_norm_impl"))) for name in names]
    assert optimizer.USING_PYTORCH_OPTIMIZER, "Transformer Engine or apex is here: its own choice is no reference"
    for module, name, _ in chosen:
        monkeypatch.setattr(module, name, "a kernel for GPUs")
    runtime._take_torchs_optimizer()
    for module, name, right in chosen:
        assert getattr(module, name) is right, f"{module.__name__}.{name}"
