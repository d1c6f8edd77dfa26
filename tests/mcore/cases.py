"""What the real-model tests run on each rank: functions at module level, so that the pools can be sent them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from megakd.batch import Group, Step
from megakd.config import Optimizer, Parallel, Precision
from megakd.hf.families import Architecture
from megakd.hf.importer import load_head
from megakd.layout import Layout
from megakd.mcore import runtime
from megakd.mcore.grid import Grid, make_grid
from megakd.mcore.checkpoint import box_of
from megakd.mcore.model import Model, build_model, freeze
from megakd.mcore.optimizer import make_trainer
from megakd.mcore.step import forward_backward
from megakd.objectives import build_objective
from megakd.objectives.base import LossContext
from megakd.teacher.online import OnlineTeacher, by_micro_batch

CPU = torch.device("cpu")


@cache
def world() -> runtime.World:
    """This rank, with megatron-core made ready for the CPU."""
    return runtime.adopt(CPU)


@cache
def grid(tensor: int, pipeline: int) -> Grid:
    """The process groups of a layout, made once a pool."""
    layout = Layout(world().size, tensor, pipeline)
    runtime.seed(1, layout, world().rank)
    return make_grid(layout)


def build(directory: str, parallel: Parallel) -> Model:
    """A float32 model under a layout."""
    path = Path(directory)
    world()
    return build_model(path, Architecture.read(path), parallel, Precision(), grid(parallel.tensor, parallel.pipeline), CPU)


@dataclass(frozen=True)
class Distillation:
    """A student and its teachers in their layouts, and what to train on: all that a rank needs for a training case."""

    directories: dict[str, str]
    """Role -> model directory, the student's under "student"."""
    parallels: dict[str, Parallel]
    micro_batches: dict[str, int]
    objective: object
    groups: tuple[Group, ...]
    """Of all steps together, in order."""
    global_batch: int
    steps: int = 1
    learning_rate: float = 1e-2


class Job:
    """A Distillation on this rank."""

    def __init__(self, case: Distillation):
        self.case = case
        self.objective = build_objective(case.objective)
        self.student = build(case.directories["student"], case.parallels["student"])
        grid_of_student = self.student.grid
        self.teachers = {}
        for role in self.objective.requires.teachers:
            model = freeze(build(case.directories[role], case.parallels[role]))
            head = None
            if grid_of_student.is_last_stage:
                head = load_head(case.directories[role], model.architecture, grid_of_student.at.tensor,
                                 grid_of_student.layout.tensor, torch.float32, CPU)
            kinds = self.objective.requires.teacher_kinds[role]
            self.teachers[role] = OnlineTeacher(model, case.micro_batches[role], kinds, head)
        settings = Optimizer(lr=case.learning_rate, warmup=0.0, eps=1e-3)
        self.trainer = make_trainer(self.student, settings, case.steps)

    def forward_backward(self, number: int) -> dict[str, float]:
        """Forward and backward of step `number`; returns its metrics."""
        case, student = self.case, self.student
        start = number * case.global_batch % len(case.groups)
        step = Step(case.groups[start : start + case.global_batch])
        micro_batch = case.micro_batches["student"]
        signals = {role: teacher.signals(step, student.grid, micro_batch, pad_id=0) for role, teacher in self.teachers.items()}
        table = step.table(student.grid.layout.data, micro_batch)
        batches = step.batches(table[student.grid.at.data], pad_id=0, padding=student.padding, device=CPU)
        context = LossContext(student.grid.groups.tp, student.architecture.vocab_size, chunk_tokens=16)
        self.trainer.zero_grad()
        return dict(forward_backward(student, batches, by_micro_batch(signals, len(batches)), self.objective, context,
                                     step.counts).metrics)

    def gradients(self) -> list[tuple[str, tuple[int, ...], torch.Tensor]]:
        """This rank's boxes of the Hugging Face tensors' gradients: (name, offset, values)."""
        boxes = []
        group = self.student.grid.groups.dp_cp
        for chunk in range(len(self.student.chunks)):
            parameters = self.student.parameters_of(chunk)
            whole = {}
            for name, parameter in parameters.items():
                # The distributed optimizer leaves each replica the sum for its own slice only.
                full = torch.zeros(parameter.numel())
                if (owned := self.trainer.slice_of(parameter)) is not None:
                    full[owned] = parameter.main_grad.view(-1)[owned]
                dist.all_reduce(full, group=group)
                whole[name] = full.view(parameter.shape)
            for piece in self.student.pieces_of(chunk):
                if piece.primary:
                    boxes.append((piece.hf_name, piece.hf_offset, box_of(whole[piece.parameter], piece).clone()))
        return boxes


def first_gradients(case: Distillation):
    """Metrics and gradients of the first step."""
    job = Job(case)
    return job.forward_backward(0), job.gradients()


def loss_curve(case: Distillation) -> list[float]:
    """The loss of each step of a training."""
    job = Job(case)
    losses = []
    for number in range(case.steps):
        losses.append(job.forward_backward(number)["loss"])
        job.trainer.step()
    return losses
