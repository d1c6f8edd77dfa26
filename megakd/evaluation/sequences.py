"""What a model gives each token of a step, in any layout, told to all ranks: token by token or summed over sequences.

Legend: T loss positions of a micro-batch, N sequences of the whole step (or loss positions, told token by token).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.batch import Batch, Group, Step
from megakd.comm import broadcast_json
from megakd.mcore.model import Model
from megakd.mcore.step import forward_hidden
from megakd.objectives.base import RoleOutput
from megakd.run import Run

Values = Callable[[int, RoleOutput, Batch], dict[str, Tensor]]
"""(number of the micro-batch, model, micro-batch) -> values [T] by name; NaN-free, zero where a name does not apply."""


def filled(run: Run, groups: Sequence[Group], roles: Sequence[str]) -> Step:
    """A step of `groups`, repeated to a multiple of what every role's replicas and micro-batches take at a time."""
    multiple = math.lcm(*(run.layout(role).data * run.recipe.role(role).micro_batch for role in roles))
    # The interleaved schedule wants a multiple of the pipeline's size in micro-batches, too.
    multiple *= math.lcm(*(run.layout(role).pipeline for role in roles))
    missing = -len(groups) % multiple
    return Step((*groups, *(groups[number % len(groups)] for number in range(missing))))


def sums_by_sequence(
    run: Run, model: Model, batches: Sequence[Batch], sequences: int, values: Values
) -> dict[str, Tensor]:
    """Runs a model forward over its micro-batches of a step and adds values up by sequence.

    Collectives: those of the model's forward and of `values`; SUM over the data group, broadcasts over the pipeline
    group. Every rank calls it.

    Args:
        run: this rank's run.
        model: a frozen model.
        batches: this rank's micro-batches.
        sequences: number N of the step's sequences.
        values: what each token gives, on the last pipeline stage.

    Returns:
        sums [N] by name, float64, on every rank.
    """
    return _added_up(run, model, batches, sequences, lambda batch: batch.sample_ids_B[batch.positions.rows_T], values)


def values_by_token(run: Run, model: Model, batches: Sequence[Batch], step: Step, values: Values) -> dict[str, Tensor]:
    """Runs a model forward over its micro-batches of `step`; the values of all the step's loss positions.

    Collectives and the other arguments: those of `sums_by_sequence`.

    Returns:
        values [N] by name, float64, on every rank: of sequence after sequence, in the order of their numbers.
    """
    lengths = [sample.response_length for group in step.groups for sample in group.samples]
    starts_N = torch.tensor([0, *itertools.accumulate(lengths)], device=run.world.device)

    def places(batch: Batch) -> Tensor:
        return starts_N[batch.sample_ids_B[batch.positions.rows_T]] + batch.positions.within_T

    return _added_up(run, model, batches, sum(lengths), places, values)


def _added_up(
    run: Run, model: Model, batches: Sequence[Batch], size: int, places: Callable[[Batch], Tensor], values: Values
) -> dict[str, Tensor]:
    """Values added up at `places` (T numbers below `size` for a micro-batch)."""
    hidden = forward_hidden(model, batches)
    totals: dict[str, Tensor] = {}
    if hidden is not None:
        for number, (batch, hidden_TH) in enumerate(zip(batches, hidden, strict=True)):
            places_T = places(batch)
            for name, values_T in values(number, RoleOutput(hidden_TH, model.head_VH), batch).items():
                total_N = totals.setdefault(name, torch.zeros(size, dtype=torch.float64, device=run.world.device))
                total_N.index_add_(0, places_T, values_T.double())
    grid, last = model.grid, model.grid.layout.pipeline - 1
    for total in totals.values():
        dist.all_reduce(total, group=grid.groups.dp_cp)
    plain = {name: total.tolist() for name, total in totals.items()}
    told = broadcast_json(plain, last, grid.groups.pp, run.world.device)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in told.items()}
