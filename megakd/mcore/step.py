"""Forward and backward of one optimizer step on megatron-core's schedules, and how its loss is divided.

Legend: S packed positions, B = 1 row, T loss positions, H hidden width, K a teacher's hidden width.

The denominator. Every term of an objective is a sum over its own kind of thing (chosen tokens, rejected tokens,
pairs) and is to be divided by the number of those things in the whole step. That number follows from the step's
sequences alone, so it is known before the forward. megatron-core divides the summed gradient once, by the step's number
of loss tokens (`calculate_per_token_loss=True` and a 3-tuple from the loss function: schedules.py
`forward_step_calc_loss`, finalize_model_grads.py). So a term's sum is multiplied by tokens/count
(`LossContext.factor`), and the gradient does not depend on how the step is cut into micro-batches and data-parallel
ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megakd.batch import Batch
from megakd.comm import broadcast_json
from megakd.mcore.layers import packed_sequences
from megakd.mcore.model import Model
from megakd.objectives.base import LossContext, LossTerms, Objective, RoleOutput, TeacherOutput


def select_positions(model: Model, hidden_SBH: Tensor, batch: Batch) -> Tensor:
    """The hidden states [T, H] at a micro-batch's loss positions, under context parallelism those of this rank.

    Collectives: one all-gather over the tensor group under sequence parallelism. There the losses return the complete
    d(hidden) on every rank, so the gather's backward keeps this rank's part and sums nothing.
    """
    if model.config.sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(
            hidden_SBH, tensor_parallel_output_grad=False, group=model.grid.groups.tp
        )
    return hidden_SBH[batch.positions.places_T, 0]


def run_packed(chunk: torch.nn.Module, batch: Batch) -> Tensor:
    """Forward of a chunk over a micro-batch, whose sequences are one packed row -> hidden [S, 1, H]."""
    packed = packed_sequences(batch.cu_seqlens, batch.longest)
    return chunk(batch.tokens_P[None], batch.position_ids_P[None], packed)


def forward_hidden(model: Model, batches: Sequence[Batch]) -> list[Tensor] | None:
    """Runs a model forward-only over micro-batches.

    Returns:
        On the last pipeline stage the hidden states [T, H] of each micro-batch; None on the other stages.
    """

    def forward_step(iterator: Iterator[Batch], chunk: torch.nn.Module):
        batch = next(iterator)

        def collect(hidden_SBH: Tensor, non_loss_data: bool) -> Tensor:
            return select_positions(model, hidden_SBH, batch)

        return run_packed(chunk, batch) if model.graphs is None else model.graphs(batch), collect

    with torch.no_grad():
        outputs = _run_schedule(model, forward_step, batches, forward_only=True, collect_non_loss_data=True)
    return outputs if model.grid.is_last_stage else None


@dataclass(frozen=True)
class StepResult:
    """What a step's forward and backward report, the same on every rank.

    `metrics` holds the loss under "loss", each term and each metric by name; all are divided by their global counts.
    """

    metrics: Mapping[str, float]


def forward_backward(
    model: Model,
    batches: Sequence[Batch],
    teachers: Sequence[Mapping[str, TeacherOutput]] | None,
    objective: Objective,
    context: LossContext,
) -> StepResult:
    """Forward and backward of one step; the gradients are complete and divided when it returns.

    Args:
        model: its chunks are wrapped in DistributedDataParallel.
        batches: this rank's micro-batches.
        teachers: for each micro-batch the teachers' outputs by role (on the last stage; None elsewhere).
        objective: what to minimise.
        context: the loss's tensor group, vocabulary, chunk size and the step's denominators.
    """

    def forward_step(iterator: Iterator[tuple[Batch, Mapping[str, TeacherOutput]]], chunk: torch.nn.Module):
        batch, signals = next(iterator)
        hidden_SBH = run_packed(chunk, batch)
        return hidden_SBH, partial(loss_function, batch, signals)

    def loss_function(batch: Batch, signals: Mapping[str, TeacherOutput], hidden_SBH: Tensor):
        student = RoleOutput(select_positions(model, hidden_SBH, batch), model.head_VH)
        terms = objective.loss(student, signals, batch, context)
        loss = _weighted_sum(terms, context) if terms.loss is None else terms.loss
        tokens = torch.full((), batch.positions.labels_T.numel(), dtype=torch.int, device=hidden_SBH.device)
        return loss, tokens, _sums(terms, context)

    items = list(zip(batches, teachers if teachers is not None else [{}] * len(batches), strict=True))
    reports = _run_schedule(model, forward_step, items, forward_only=False, collect_non_loss_data=False)
    return StepResult(_reduce_reports(model, reports))


def _weighted_sum(terms: LossTerms, context: LossContext) -> Tensor:
    """The micro-batch's share of the loss times the step's token count, which megatron-core divides by."""
    return sum(term.values_N.sum() * context.factor(term.weight, term.denominator) for term in terms.terms)


def _sums(terms: LossTerms, context: LossContext) -> dict[str, Tensor]:
    """The micro-batch's share of every reported mean; they add up to the means over micro-batches and ranks."""
    report: dict[str, Tensor] = {}
    loss = 0.0
    for term in terms.terms:
        mean = term.values_N.detach().sum() / context.divisor(term.denominator)
        report[term.name] = mean
        loss = loss + term.weight * mean
    for metric in terms.metrics:
        report[metric.name] = metric.total.detach() / context.divisor(metric.denominator)
    return {"loss": loss, **report}


def _reduce_reports(model: Model, reports: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Adds the reports up over micro-batches, context ranks and replicas and tells them to all pipeline stages.

    Collectives: a SUM over the data and context group, a broadcast of names and one of values over the pipeline group.
    """
    groups = model.grid.groups
    last = model.grid.layout.pipeline - 1
    device = next(model.chunks[0].parameters()).device
    names = list(reports[0]) if model.grid.is_last_stage else []
    if model.grid.is_last_stage:
        totals = torch.stack([sum(report[name].float() for report in reports) for name in names]).to(device)
        dist.all_reduce(totals, group=groups.dp_cp)
    if model.grid.layout.pipeline > 1:
        names = broadcast_json(names, last, groups.pp, device)
        totals = totals if model.grid.is_last_stage else torch.empty(len(names), device=device)
        dist.broadcast(totals, group=groups.pp, group_src=last)
    return dict(zip(names, totals.tolist(), strict=True))


def _run_schedule(
    model: Model, forward_step, items: Sequence, *, forward_only: bool, collect_non_loss_data: bool
) -> list:
    """megatron-core's schedule for the model's layout: none, 1F1B or interleaved."""
    layout = model.grid.layout
    virtual = len(model.chunks)
    schedule = get_forward_backward_func(layout.pipeline, virtual if virtual > 1 else None)
    first = items[0][0] if isinstance(items[0], tuple) else items[0]
    iterators = [iter(items) for _ in range(virtual)]
    return schedule(
        forward_step_func=forward_step,
        data_iterator=iterators if virtual > 1 else iterators[0],
        model=model.chunks if virtual > 1 else model.chunks[0],
        num_microbatches=len(items),
        # Of the whole row: megatron-core divides it by the context and tensor ranks.
        seq_length=len(first.tokens_P) * layout.context,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
        p2p_communicator=P2PCommunicator(model.grid.groups.pp, model.config) if layout.pipeline > 1 else None,
        pg_collection=model.grid.groups,
    )
