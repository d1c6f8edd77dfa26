"""A role that is read from disk: what a `score` stage wrote of it, brought to the student's micro-batches.

Every tensor rank of the student's last stage reads its replica's rows itself. Tensor ranks are neighbours on one node
(layout.py), so the rows come from the disk once and from the node's page cache after that: a copy in memory, where
reading by one and broadcasting would add a collective and make the others wait for its disk.

Legend: T loss positions of a student's micro-batch, K the teacher's hidden width or the listed tokens of a position,
V local vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.batch import Group, Kind, Padding, Step
from megakd.comm import broadcast_json
from megakd.config_stages import TrainStage
from megakd.data.signals import HEADER, SignalsReader, named_samples
from megakd.errors import DataError, MegakdError
from megakd.hf.families import Architecture
from megakd.hf.importer import load_head
from megakd.losses import TopK
from megakd.manifest import hash_path
from megakd.mcore.grid import Grid
from megakd.objectives.base import RoleOutput, StoredListedLogProbs, StoredLogProbs, StoredTopK, TeacherOutput
from megakd.provenance import ROLLOUTS, SIGNALS
from megakd.teacher.online import OnlineTeacher

if TYPE_CHECKING:
    from megakd.run import Run


@dataclass(frozen=True)
class CachedTeacher:
    """One role of a stage whose signals are on disk. `head_VK` as `OnlineTeacher` has it, for hidden states alone."""

    reader: SignalsReader
    kinds: tuple[Kind, ...]
    head_VK: Tensor | None
    device: torch.device

    def signals(
        self, step: Step, student: Grid, student_micro_batch: int, *, pad_id: int
    ) -> list[TeacherOutput] | None:
        """Reads a step; as `OnlineTeacher.signals`, without collectives.

        Raises:
            DataError: an answer that was not scored, or as other tokens.
        """
        if not student.is_last_stage:
            return None
        table = step.table(student.layout.data, student_micro_batch)
        own = Padding(context=student.layout.context, context_rank=student.at.context)
        return [self._output([step.groups[number] for number in numbers], own) for numbers in table[student.at.data]]

    def _output(self, groups: Sequence[Group], own: Padding) -> TeacherOutput:
        """Of the groups' answers of this role's kinds, at the rank's own positions, in the order in which `collate`
        packs them."""
        samples = [(name, sample) for group in groups for name, sample in named_samples(group)
                   if sample.kind in self.kinds]
        entries = [self.reader.entry(name, sample).part(rows)
                   for name, sample in samples for rows in own.own_rows(sample)]
        values = {name: values_TW.to(self.device) for name, values_TW in self.reader.read(entries).items()}
        match sorted(values):
            case ["hidden"]:
                return RoleOutput(values["hidden"], self.head_VK)
            case ["ids", "log_probs"]:
                return StoredTopK(TopK(values["ids"].long(), values["log_probs"]))
            case _ if self.reader.source.settings["kind"] == "top_k":
                return StoredListedLogProbs(values["log_probs"])
        return StoredLogProbs(values["log_probs"][:, 0])


def load_role(
    run: Run, stage: TrainStage, role: str, kinds: tuple[Kind, ...], groups: Sequence[Group], student: Grid
) -> OnlineTeacher | CachedTeacher:
    """A role of a training stage, beside the student or from disk as the stage says. Every rank calls it.

    Args:
        run: this rank's run.
        stage: the training.
        role: `teacher` or `reference`.
        kinds: of the sequences that it scores.
        groups: all of the stage's groups.
        student: the trained model's grid.

    Raises:
        MegakdError: the signals are not whole, or of another model, tokenizer or other answers; the same on all ranks.
    """
    if role not in stage.signals.stages:
        return run.load_teacher(role, run.recipe.teacher_model(stage, role), kinds, student)
    folder = run.folder(stage.signals.stages[role]) / SIGNALS
    # Rank 0 reads and hashes the files; all the others hear of it, so that none waits for one that has left.
    problem = find_problem(run, stage, role, kinds, groups) if run.is_root else None
    problem = broadcast_json(problem, 0, dist.group.WORLD, run.world.device)
    if problem is not None:
        raise MegakdError(problem)
    reader, head_VK = SignalsReader(folder), None
    if student.is_last_stage and "hidden" in reader.columns:
        directory = run.recipe.path_of_model(run.recipe.teacher_model(stage, role))
        head_VK = load_head(directory, Architecture.read(directory), student.at.tensor, student.layout.tensor,
                            reader.columns["hidden"].dtype, run.world.device)
    return CachedTeacher(reader, kinds, head_VK, run.world.device)


def find_problem(
    run: Run, stage: TrainStage, role: str, kinds: tuple[Kind, ...], groups: Sequence[Group]
) -> str | None:
    """What is wrong with a role's signals for a stage (see `load_role`), or None. Reads the files; asks no rank."""
    folder = run.folder(stage.signals.stages[role]) / SIGNALS
    try:
        reader = SignalsReader(folder)
        _check_source(run, stage, role, reader)
        reader.require(groups, kinds)
    except MegakdError as error:
        return str(error)
    return None


def _check_source(run: Run, stage: TrainStage, role: str, reader: SignalsReader) -> None:
    """Refuses signals that were made of something else than what the run has now."""
    source, model = reader.source, run.recipe.path_of_model(run.recipe.teacher_model(stage, role))
    now = {f"the {role}'s model {model}": (source.model, hash_path(model)),
           f"the tokenizer {run.tokenizer.directory}": (source.tokenizer, run.tokenizer.fingerprint)}
    for name, theirs in source.inputs.items():
        file = run.folder(stage.signals.teacher) / SIGNALS / HEADER if name == "at" else None
        if file is None and getattr(stage, name) is not None:
            file = run.folder(getattr(stage, name)) / ROLLOUTS
        if file is not None:
            now[str(file)] = (theirs, hash_path(file))
    for what, (then, today) in now.items():
        if then != today:
            raise DataError(reader.folder, None, None, f"{what} is no longer what these signals were made with",
                            f"Make them again: --redo {stage.signals.stages[role]}")
