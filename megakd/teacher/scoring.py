"""Lets a model score answers and writes what it says of each loss position, replica by replica, in a stream.

Each data-parallel replica writes a shard of its own, by the first tensor rank of its last pipeline stage. Which answer
stands in which row follows from the answers' lengths and the layout, so rank 0 writes the index without asking. A rank
holds the hidden states of one step: MICRO_BATCHES of its replica's micro-batches.

Legend: T loss positions of a micro-batch, H hidden width, K listed tokens of a position, W width of a column.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.batch import Batch, Group, Kind, Step
from megakd.config_signals import MAKER_OF, HiddenStatesSignal, TokenLogProbsSignal, TopKSignal
from megakd.config_stages import ScoreStage
from megakd.data.artefacts import read_rollouts
from megakd.data.dataset import Generated, preference_groups
from megakd.data.signals import (
    HEADER,
    MICRO_BATCHES,
    Column,
    Entry,
    ShardWriter,
    SignalsReader,
    Source,
    named_samples,
    shard_name,
    tokens_hash,
    write_index,
)
from megakd.errors import DataError
from megakd.evaluation.sequences import filled
from megakd.hf.directory import finish_directory, partial_directory, start_directory
from megakd.manifest import hash_path
from megakd.mcore.model import Model, evaluating, freeze
from megakd.mcore.step import forward_hidden
from megakd.objectives.base import RoleOutput
from megakd.provenance import ROLLOUTS, SIGNALS
from megakd.run import Run


def score_signals(run: Run, stage: ScoreStage) -> tuple[int, dict[str, float]]:
    """Writes `stages/<name>/signals`; the folder is there whole or not at all. Every rank calls it.

    Returns:
        the tokens that the model has worked through, and what to report.

    Raises:
        DataError: the data or the generated answers cannot be used; two answers have one name.
        LossInputError: a list of more tokens than the vocabulary has.
    """
    groups = groups_to_score(run, stage)
    model = freeze(run.load_model(stage.role, stage.model))
    scorer = Scorer(run, stage, model)
    entries = list(planned_entries(run, stage, groups))
    folder = run.folder(stage.name) / SIGNALS
    if run.is_root:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before its manifest was written
        start_directory(folder)
    dist.barrier(group=dist.group.WORLD)
    grid, writer = model.grid, None
    if grid.is_last_stage and grid.at.tensor == 0:
        rows = sum(entry.rows for entry in entries if entry.shard == grid.at.data)
        writer = ShardWriter(partial_directory(folder) / shard_name(grid.at.data), scorer.columns, rows)
    tokens = 0
    with evaluating(model):
        for step, wanted in steps_of(run, stage, groups):
            tokens += step.all_tokens
            for values, real_T in scorer.score(step, wanted):
                if writer is not None:
                    writer.append({name: values_TW[real_T] for name, values_TW in values.items()})
    if writer is not None:
        writer.close()
    dist.barrier(group=dist.group.WORLD)
    if run.is_root:
        write_index(partial_directory(folder), _source(run, stage), scorer.columns, entries)
        finish_directory(folder)
    dist.barrier(group=dist.group.WORLD)
    positions = sum(entry.rows for entry in entries)
    size = sum(column.width * column.dtype.itemsize for column in scorer.columns.values())
    return tokens, {"answers": len(entries), "positions": positions, "bytes": positions * size}


def groups_to_score(run: Run, stage: ScoreStage) -> list[Group]:
    """Each row's answers, one group a kind: what is left out of one kind (too long, no rollout) is in the others, so
    that every group that a training makes of the same rows has been scored."""
    data, groups = run.recipe.data, []
    for kind in (Kind[answers.upper()] for answers in stage.answers):
        answers = {}
        if kind.name.lower() in MAKER_OF:
            file = run.folder(getattr(stage, MAKER_OF[kind.name.lower()])) / ROLLOUTS
            _, answers[kind] = read_rollouts(file, run.tokenizer, keys=[row.key for row in run.train_rows])
        groups += preference_groups(run.train_rows, run.tokenizer, (kind,), max_length=data.max_length,
                                    too_long=data.too_long, generated=Generated(answers, None))
    return _without_repeats(groups)


def _without_repeats(groups: Sequence[Group]) -> list[Group]:
    """The groups of different names; a file that is named twice gives one twice."""
    kept: dict[tuple[str, Kind], Group] = {}
    for group in groups:
        name = (group.key, group.samples[0].kind)
        if name in kept and kept[name] != group:
            file, _, line = group.key.rpartition(":")
            raise DataError(file, int(line), None, "two files of this name have different rows on this line",
                            "Rename one of them")
        kept[name] = group
    return list(kept.values())


def steps_of(run: Run, stage: ScoreStage, groups: Sequence[Group]) -> Iterator[tuple[Step, int]]:
    """The answers in steps of a few micro-batches; and how many of a step's sequences are not there to fill it."""
    layout = run.layout(stage.role)
    size = MICRO_BATCHES * layout.pipeline * layout.data * run.recipe.role(stage.role).micro_batch
    for start in range(0, len(groups), size):
        part = groups[start : start + size]
        yield filled(run, part, (stage.role,)), sum(len(group.samples) for group in part)


def planned_entries(run: Run, stage: ScoreStage, groups: Sequence[Group]) -> Iterator[Entry]:
    """Where each answer will be: replica by replica, in the order in which they come out of the model."""
    layout, micro_batch = run.layout(stage.role), run.recipe.role(stage.role).micro_batch
    ends = [0] * layout.data
    for step, wanted in steps_of(run, stage, groups):
        for shard, micro_batches in enumerate(step.table(layout.data, micro_batch)):
            for number in (number for numbers in micro_batches for number in numbers):
                if step.sample_ids[number].start >= wanted:
                    continue
                for name, sample in named_samples(step.groups[number]):
                    rows = sample.response_length
                    yield Entry(name, tokens_hash(sample), shard, ends[shard], rows)
                    ends[shard] += rows


class Scorer:
    """One kind of signal of one model."""

    def __init__(self, run: Run, stage: ScoreStage, model: Model):
        self.run, self.stage, self.model = run, stage, model
        self.context = model.loss_context(stage.chunk_tokens, {})
        self.listed = None
        match stage.signal:
            case HiddenStatesSignal():
                self.columns = {"hidden": Column(model.dtype, model.config.hidden_size)}
            case TokenLogProbsSignal():
                self.columns = {"log_probs": Column(torch.float32, 1)}
            case TopKSignal(k=k, at=None):
                self.columns = {"ids": Column(torch.int32, k), "log_probs": Column(torch.float32, k)}
            case TopKSignal(at=name):
                self.listed = SignalsReader(run.folder(name) / SIGNALS)
                self.columns = {"log_probs": self.listed.columns["log_probs"]}

    def score(self, step: Step, wanted: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """On the last stage, for each micro-batch of this replica: the columns' values [T, W], and which of these
        positions belong to the step's first `wanted` sequences. Nothing on the other stages.

        Collectives: those of the model's forward, and of the signal's values over the tensor group.
        """
        batches = self.run.batches(step, self.stage.role, self.model, pad_id=self.run.tokenizer.pad_id)
        hidden = forward_hidden(self.model, batches)
        if hidden is None:
            return
        samples = [(*pair,) for group in step.groups for pair in named_samples(group)]
        for batch, hidden_TH in zip(batches, hidden, strict=True):
            named = [samples[number] for number in batch.sample_ids_B.tolist()]
            values = self._values(RoleOutput(hidden_TH, self.model.head_VH), batch, named)
            yield values, batch.sample_ids_B[batch.positions.rows_T] < wanted

    def _values(self, output: RoleOutput, batch: Batch, named: Sequence[tuple]) -> dict[str, Tensor]:
        match self.stage.signal:
            case HiddenStatesSignal():
                return {"hidden": output.hidden_TH}
            case TokenLogProbsSignal():
                return {"log_probs": output.token_log_probs(batch.positions.labels_T, self.context)[:, None]}
            case TopKSignal(k=k, at=None):
                top = output.top_k(k, self.context)
                return {"ids": top.ids_TK, "log_probs": top.log_probs_TK}
        rows = self.listed.read([self.listed.entry(name, sample) for name, sample in named])
        ids_TK = rows["ids"].to(output.hidden_TH.device, torch.int64)
        return {"log_probs": output.log_probs_at(ids_TK, self.context)}


def _source(run: Run, stage: ScoreStage) -> Source:
    inputs = {name: hash_path(run.folder(getattr(stage, name)) / ROLLOUTS) for name in stage.inputs}
    if isinstance(stage.signal, TopKSignal) and stage.signal.at is not None:
        inputs["at"] = hash_path(run.folder(stage.signal.at) / SIGNALS / HEADER)
    return Source(stage.signal.model_dump(mode="json"), hash_path(run.recipe.path_of_model(stage.model)),
                  run.tokenizer.fingerprint, inputs)
