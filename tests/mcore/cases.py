"""What the real-model tests run on each rank: functions at module level, so that the pools can be sent them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megakd.batch import Group, Step
from megakd.config import Parallel, Precision
from megakd.config_stages import Optimizer
from megakd.hf.exporter import ExportTarget, export_model
from megakd.hf.families import Architecture
from megakd.hf.importer import load_head
from megakd.layout import Layout
from megakd.losses import fused_token_log_probs
from megakd.mcore import runtime
from megakd.mcore.checkpoint import box_of
from megakd.mcore.decoder import PipelineDecoder
from megakd.mcore.grid import Grid, make_grid
from megakd.mcore.model import Model, build_model, evaluating, freeze, unwrap
from megakd.mcore.optimizer import STATES, make_trainer
from megakd.mcore.step import forward_backward, forward_hidden
from megakd.objectives import build_objective
from megakd.rollout import Prompt, Sampling, generate
from megakd.teacher.online import OnlineTeacher, by_micro_batch

CPU = torch.device("cpu")
FP32 = Precision()

Box = tuple[str, tuple[int, ...], torch.Tensor]
"""Part of a Hugging Face tensor: its name, where the part begins, its values."""


@cache
def world() -> runtime.World:
    """This rank, with megatron-core made ready for its device: the CPU, or its GPU where the ranks talk by NCCL."""
    gpu = dist.get_backend() == "nccl"
    return runtime.adopt(torch.device("cuda", torch.cuda.current_device()) if gpu else CPU)


@cache
def grid(tensor: int, pipeline: int, context: int = 1) -> Grid:
    """The process groups of a layout, made once a pool."""
    made = make_grid(Layout(world().size, tensor, pipeline, context))
    runtime.seed(1, made)
    return made


def build(directory: str, parallel: Parallel, precision: Precision = FP32, recompute: str = "none", *,
          trained: bool = True) -> Model:
    """A model under a layout."""
    path = Path(directory)
    architecture = Architecture.read(path)
    parallel = parallel if trained else parallel.forward
    grid_of_model = grid(parallel.tensor, parallel.pipeline, parallel.context)
    return build_model(path, architecture, parallel, recompute, precision, grid_of_model, world().device,
                       trained=trained)


@dataclass
class KeptCalls:
    """A recorder of forward passes (mcore/graphs.py) on any device: it keeps the call. The first run of one may, like a
    capture, read and set no generator."""

    recorded: int = 0
    replayed: list[int] = field(default_factory=list)
    """The number of the recording, for each time that one was run again."""

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        number, tracker = self.recorded, get_cuda_rng_tracker()
        self.recorded += 1
        states, tracker.states_ = tracker.states_, {}  # whoever forks asks for a state here
        try:
            call()
        finally:
            tracker.states_ = states

        def replay() -> None:
            self.replayed.append(number)
            call()

        return replay


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
    """Length of the learning-rate schedule."""
    learning_rate: float = 1e-2
    warmup: float = 0.0
    weight_decay: float = 0.0
    eps: float = 1e-3
    clip: float = 1.0
    overlap: bool | None = None
    offload: bool = False
    precision: Precision = FP32
    recompute: str = "none"
    """Of the student."""
    chunk_tokens: int = 16


class Job:
    """A Distillation on this rank."""

    def __init__(self, case: Distillation):
        self.case = case
        self.objective = build_objective(case.objective)
        self.student = build(case.directories["student"], case.parallels["student"], case.precision, case.recompute)
        grid_of_student = self.student.grid
        self.teachers = {}
        for role in self.objective.requires.teachers:
            model = freeze(build(case.directories[role], case.parallels[role], case.precision, trained=False))
            head = None
            if grid_of_student.is_last_stage:
                head = load_head(case.directories[role], model.architecture, grid_of_student.at.tensor,
                                 grid_of_student.layout.tensor, model.dtype, world().device)
            kinds = self.objective.requires.teacher_kinds[role]
            self.teachers[role] = OnlineTeacher(model, case.micro_batches[role], kinds, head)
        settings = Optimizer(lr=case.learning_rate, warmup=case.warmup, weight_decay=case.weight_decay, eps=case.eps,
                             clip=case.clip, overlap=case.overlap, offload=case.offload)
        self.trainer = make_trainer(self.student, settings, case.steps)

    def forward_backward(self, number: int) -> dict[str, float]:
        """Forward and backward of step `number`; returns its metrics."""
        case, student = self.case, self.student
        start = number * case.global_batch % len(case.groups)
        step = Step(case.groups[start : start + case.global_batch])
        micro_batch = case.micro_batches["student"]
        signals = {role: teacher.signals(step, student.grid, micro_batch, pad_id=0)
                   for role, teacher in self.teachers.items()}
        table = step.table(student.grid.layout.data, micro_batch)
        batches = step.batches(table[student.grid.at.data], pad_id=0, padding=student.padding, device=world().device)
        context = student.loss_context(case.chunk_tokens, step.counts)
        self.trainer.zero_grad()
        teachers = by_micro_batch(signals, len(batches))
        return dict(forward_backward(student, batches, teachers, self.objective, context).metrics)

    def step(self, number: int) -> dict[str, float]:
        """One optimizer step; returns its metrics, as `train_step` does."""
        metrics = self.forward_backward(number)
        learning_rate = self.trainer.learning_rate
        return {**metrics, "grad_norm": self.trainer.step(), "lr": learning_rate}

    def gradients(self) -> list[Box]:
        """This rank's boxes of the Hugging Face tensors' gradients."""
        return [(piece.hf_name, piece.hf_offset, values.to(CPU, copy=True))
                for piece, values in self.trainer.gradient_boxes()]

    def states(self) -> dict[str, list[Box]]:
        """This rank's boxes of the master weights and of Adam's moments, by `STATES`."""
        boxes: dict[str, list[Box]] = {state: [] for state in STATES}
        for chunk in range(len(self.student.chunks)):
            parameters = self.student.parameters_of(chunk)
            for state in STATES:
                whole = {name: self.whole_state(parameter, state) for name, parameter in parameters.items()}
                boxes[state] += [(piece.hf_name, piece.hf_offset,
                                  box_of(whole[piece.parameter], piece).to(CPU, copy=True))
                                 for piece in self.student.pieces_of(chunk) if piece.primary]
        return boxes

    def whole_state(self, parameter: torch.nn.Parameter, state: str) -> torch.Tensor:
        """A state of a local parameter, put together from the slices of the data-parallel ranks."""
        full = torch.zeros(parameter.numel(), device=world().device)
        if (owned := self.trainer.slice_of(parameter)) is not None:
            with self.trainer.states_at_hand():
                full[owned] = self.trainer.states_of(parameter)[state].detach()
        dist.all_reduce(full, group=self.student.grid.groups.dp_cp)
        return full.view(parameter.shape)

    def local_states(self) -> dict[str, torch.Tensor]:
        """All that this rank keeps, in float32: parameters whole, states in its own slices."""
        kept = {}
        with self.trainer.states_at_hand():
            for chunk in range(len(self.student.chunks)):
                for name, parameter in self.student.parameters_of(chunk).items():
                    # Of an FP8 parameter this is a plain tensor, which a CPU can compare.
                    kept[f"{chunk}.{name}"] = parameter.detach().float().to(CPU, copy=True)
                    if self.trainer.slice_of(parameter) is not None:
                        for state, values in self.trainer.states_of(parameter).items():
                            kept[f"{chunk}.{name}.{state}"] = values.detach().to(CPU, copy=True)
        return kept


def first_gradients(case: Distillation):
    """Metrics and gradients of the first step."""
    job = Job(case)
    return job.forward_backward(0), job.gradients()


def first_step(case: Distillation):
    """Metrics of the first step, its gradients, and the master weights after it."""
    job = Job(case)
    metrics, gradients, rate = job.forward_backward(0), job.gradients(), job.trainer.learning_rate
    metrics |= {"grad_norm": job.trainer.step(), "lr": rate}
    return metrics, gradients, job.states()["param"]


def log_probs_and_answers(
    directory: str, parallel: Parallel, groups: Sequence[Group], micro_batch: int, prompts: Sequence[Prompt],
    sampling: Sampling, slots: int, export_to: Path | None,
) -> tuple[dict[int, list[float]] | None, list[tuple[int, ...]]]:
    """A model's log-probs of each sequence's response (on the last stage), and its answers to the prompts; and the
    model written back."""
    model = build(directory, parallel)
    if export_to is not None:
        export_model(
            ExportTarget(export_to, Path(directory), torch.float32), model.architecture, model.shards,
            list(map(model.parameters_of, range(len(model.chunks)))), layout=model.grid.layout, at=model.grid.at,
            tp_group=model.grid.groups.tp, barrier_group=dist.group.WORLD)
    with evaluating(model):
        answers = generate(PipelineDecoder(model, 512), prompts, sampling, slots=slots, pad_id=0)
        return _log_probs(model, groups, micro_batch), [answer.tokens for answer in answers]


def _log_probs(model: Model, groups: Sequence[Group], micro_batch: int) -> dict[int, list[float]] | None:
    step = Step(tuple(groups))
    batches = step.batches(step.table(1, micro_batch)[0], pad_id=0, padding=model.padding, device="cpu")
    outputs = forward_hidden(model, batches)
    if outputs is None:
        return None
    found: dict[int, list[float]] = {}
    for batch, hidden_TH in zip(batches, outputs, strict=True):
        log_probs_T = fused_token_log_probs(hidden_TH, model.head_VH, batch.positions.labels_T,
                                            tp_group=model.grid.groups.tp, vocab_size=model.architecture.vocab_size)
        samples_T = batch.sample_ids_B[batch.positions.rows_T]
        for sample, log_prob in zip(samples_T.tolist(), log_probs_T.tolist(), strict=True):
            found.setdefault(sample, []).append(log_prob)
    return found


def forward_calls(case: Distillation) -> dict[str, int]:
    """How often the first student layer's attention and MLP run forward in a step of one micro-batch."""
    job = Job(case)
    layer, calls = unwrap(job.student.chunks[0]).decoder.layers[0], {"attention": 0, "mlp": 0}
    for name, module in (("attention", layer.self_attention), ("mlp", layer.mlp)):
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    job.forward_backward(0)
    return calls


def curve(case: Distillation) -> list[dict[str, float]]:
    """The metrics of each step of a training."""
    job = Job(case)
    return [job.step(number) for number in range(case.steps)]


def memory_of(tensors: list[torch.Tensor]) -> int:
    """Bytes behind tensors."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def assemble(results: Sequence[Sequence[Box]]) -> dict[str, torch.Tensor]:
    """The boxes of all ranks as whole Hugging Face tensors; replicas hold the same boxes."""
    sizes: dict[str, list[int]] = {}
    for boxes in results:
        for name, offset, values in boxes:
            ends = [start + size for start, size in zip(offset, values.shape, strict=True)]
            sizes[name] = [max(a, b) for a, b in zip(sizes.get(name, ends), ends, strict=True)]
    whole = {name: torch.full(size, float("nan")) for name, size in sizes.items()}
    for boxes in results:
        for name, offset, values in boxes:
            whole[name][tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))] = values
    return whole
