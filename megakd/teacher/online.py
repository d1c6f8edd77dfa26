"""A teacher that runs beside the student: forward-only in its own layout, its hidden states sent to the student.

Legend: T loss positions of a student's micro-batch, K the teacher's hidden width, V local vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megakd.batch import Kind, Step
from megakd.mcore.grid import Grid
from megakd.mcore.model import Model
from megakd.mcore.step import forward_hidden
from megakd.objectives.base import RoleOutput, TeacherOutput
from megakd.teacher.transport import exchange, route, shares


@dataclass(frozen=True)
class OnlineTeacher:
    """One teacher role of a stage.

    `head_VK` is the teacher's LM head cut by the *student's* tensor parallelism, on the student's last stage: the loss
    turns the travelled hidden states into logits there.
    """

    model: Model
    micro_batch: int
    kinds: tuple[Kind, ...]
    head_VK: Tensor | None

    def signals(self, step: Step, student: Grid, student_micro_batch: int, *, pad_id: int) -> list[RoleOutput] | None:
        """Scores a step and brings the hidden states to the student's micro-batches.

        Collectives: those of the teacher's own forward, then those of `exchange`. Every rank of the world calls it.

        Returns:
            On the student's last stage one RoleOutput for each of its micro-batches (rows of this teacher's kinds, in
            the micro-batch's order); None elsewhere.
        """
        grid = self.model.grid
        student_table = step.table(student.layout.data, student_micro_batch)
        table = step.table_beside(student_table, grid.layout.data, self.micro_batch)
        device = next(self.model.chunks[0].parameters()).device
        batches = step.batches(table[grid.at.data], pad_id=pad_id, padding=self.model.padding, device=device,
                               kinds=self.kinds)
        local_hidden = forward_hidden(self.model, batches)
        rows = shares(step.groups, self.kinds, student.layout.context)
        plan = route(grid.layout, student.layout, table, student_table, rows, step.sample_ids)
        hidden = exchange(
            plan, dist.get_rank(dist.group.WORLD), local_hidden, width=self.model.config.hidden_size,
            dtype=self.model.dtype, device=device, world_group=dist.group.WORLD, student_tp_group=student.groups.tp,
        )
        if hidden is None:
            return None
        return [RoleOutput(hidden_TK, self.head_VK) for hidden_TK in hidden]


def by_micro_batch(
    signals: dict[str, Sequence[TeacherOutput] | None], micro_batches: int
) -> list[dict[str, TeacherOutput]]:
    """Turns role -> micro-batches into micro-batch -> role (empty dictionaries off the student's last stage)."""
    return [{role: outputs[number] for role, outputs in signals.items() if outputs is not None}
            for number in range(micro_batches)]
