"""What a rank measures for the planner's tests: bytes that the allocator hands out, and every collective's bytes."""

from __future__ import annotations

import gc
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from megakd.batch import Kind, Padding, Step
from megakd.check_precision import rows_multiple
from megakd.config import Parallel, load
from megakd.hf.families import Architecture
from megakd.mcore import runtime
from megakd.mcore.decoder import PipelineDecoder
from megakd.mcore.model import evaluating, freeze
from megakd.mcore.step import forward_hidden
from megakd.objectives import build_objective
from megakd.objectives.base import RoleOutput
from megakd.planning.recipe import loss_calls
from megakd.planning.setup import RoleSetup, TrainingSetup
from megakd.planning.traffic import Call
from megakd.planning.work import work_of_step
from megakd.rollout import Prompt, Sampling, generate
from megakd.run import Run
from megakd.train import Training
from tests.mcore.cases import CPU, Distillation, Job, build

OPERATIONS = {
    "allreduce_": "all_reduce", "_allgather_base_": "all_gather", "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter", "reduce_scatter_tensor_coalesced_": "reduce_scatter", "send": "send",
    "recv_": "receive",
}
TRIES = 4
"""Steps of which one must be seen complete (see `peak_of`)."""
UNSEEN = 0.001
"""Part of a peak by which the profiler may be wrong about what is there at a step's end."""
PATIENCE = 0.002
"""Seconds in which gloo's thread lets go of a collective that is done."""
HELD_BY_GLOO = ("all", "reduce", "broadcast")
"""How the names of collectives begin among a process group's methods."""
LONGEST = 128
"""Positions that the tiny models have."""
FEW = 32
"""Bytes of a call that carries numbers, not tensors: metrics, norms, shapes of messages."""


class Collectives(TorchDispatchMode):
    """Adds up the bytes of all collectives by operation and number of ranks in a call; groups of one do not count."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("c10d.").removesuffix(".default")
        if str(function).startswith("c10d.") and name in OPERATIONS:
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            size = max(_bytes(arg) for arg in args[:2])
            if group.size() > 1 and size > FEW:
                # Messages go over any group: megatron-core takes the world's for one way between two stages.
                ranks = 2 if OPERATIONS[name] in ("send", "receive") else group.size()
                self.bytes[OPERATIONS[name], ranks] += size
        return function(*args, **(kwargs or {}))


def _bytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def setup_of(case: Distillation, world: int, device: str = "cpu") -> TrainingSetup:
    """The planner's view of a case's first step."""
    requires = build_objective(case.objective).requires
    cuts = {role: case.parallels[role] if role == "student" else case.parallels[role].forward
            for role in ("student", *requires.teachers)}
    roles = {role: RoleSetup(Architecture.read(case.directories[role]), cut, world,
                             case.micro_batches[role], case.recompute if role == "student" else "none",
                             case.precision.holds_fp8_weights(trained=role == "student"))
             for role, cut in cuts.items()}
    paddings = {role: Padding(rows_multiple(case.precision, setup.parallel),
                              uniform=setup.parallel.virtual_pipeline > 1) for role, setup in roles.items()}
    teachers = {role: roles[role] for role in requires.teachers}
    work = work_of_step(
        Step(case.groups[: case.global_batch]), {role: setup.layout for role, setup in roles.items()},
        {role: setup.micro_batch for role, setup in roles.items()}, paddings,
        {role: requires.teacher_kinds[role] for role in teachers},
    )
    return TrainingSetup(roles["student"], teachers, loss_calls(case.objective, requires), work, case.chunk_tokens,
                         case.precision.dtype, device, offload=case.offload)


@contextmanager
def old_objects_aside() -> Iterator[None]:
    """Has the garbage collector, and with it `tensors`, pass over everything that is there already: half a million
    objects of imported modules."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@old_objects_aside()
def measured_step(case: Distillation) -> dict:
    """What is kept before the first step and a later step's peak of allocated bytes (both from before the model was
    built), and its collectives."""
    if parallel_state.is_initialized():
        parallel_state.get_global_memory_buffer().buffer.clear()  # of earlier cases in this process
    before = tensors()
    job = Job(case)
    job.trainer.prepare_states(0)
    job.trainer.zero_grad()
    kept = _bytes_besides(before)
    job.step(0)  # makes what is made at first use, and then kept
    later = _bytes_besides(before)
    peak = peak_of(job.step, range(1, 1 + TRIES))
    with Collectives() as collectives:
        job.step(1 + TRIES)
    return {"kept": kept, "peak": later + peak, "calls": dict(collectives.bytes)}


def _bytes_besides(before: dict[int, int]) -> int:
    return sum(size for place, size in tensors().items() if place not in before)


def peak_of(run: Callable[[int], object], numbers: range) -> int:
    """The most bytes that were there in a call of `run`, above what was there before.

    The profiler sees what this thread allocates and frees. A call counts if what it saw adds up to what is really there
    at the end, on all ranks; the first such call of all `numbers` is the answer.
    """
    for number in numbers:
        before = sum(tensors().values())
        with gloo_lets_go_first(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            run(number)
        live = peak = 0
        for _, size in _allocations(seen):
            live += size
            peak = max(peak, live)
        unseen = torch.tensor(abs(live - (sum(tensors().values()) - before)) / peak)
        dist.all_reduce(unseen, dist.ReduceOp.MAX)
        if unseen <= UNSEEN:
            return peak
    raise AssertionError(f"in {len(numbers)} calls the profiler never saw all that was freed")


@contextmanager
def gloo_lets_go_first() -> Iterator[None]:
    """Waits for each collective at once, and until gloo's thread has dropped it.

    That thread and the caller both hold a collective, and with it its tensors. Where the thread is the last to let go,
    it frees them, which the profiler does not see: they would count as there until the step's end. How many do is
    chance, and a training step under sequence parallelism has hundreds of large ones.
    """
    originals = {name: method for name, method in vars(dist.ProcessGroup).items()
                 if name.lstrip("_").startswith(HELD_BY_GLOO)}

    def patient(original) -> Callable:
        def call(group, *args, **kwargs):
            work = original.__get__(group)(*args, **kwargs)
            work.wait()
            time.sleep(PATIENCE)
            return work

        return call

    try:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, patient(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)


def tensors() -> dict[int, int]:
    """Address -> bytes of the memory of all tensors that there are."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of objects that tell that they are deprecated when asked for their type
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _allocations(run: profile) -> list[tuple[int, int]]:
    """(time, bytes) of everything that the allocator gave (positive) and took back (negative)."""
    events = run.profiler.kineto_results.events()
    return sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")


# ----------------------------------------------------------------------------------------- stages that train nothing
@old_objects_aside()
def measured_generation(directory: str, parallel: Parallel, prompts: list[Prompt], sampling: Sampling,
                        slots: int) -> dict:
    """Bytes of a model and of the fullest moment of a generation, and the collectives of its forward pass over prompts
    and of one decoding round."""
    before = tensors()
    model = freeze(build(directory, parallel))
    decoder = PipelineDecoder(model, LONGEST)

    def answer(tokens: int) -> None:
        generate(decoder, prompts, replace(sampling, max_new_tokens=tokens), slots=slots, pad_id=0)

    def collectives(tokens: int) -> Counter:
        with Collectives() as seen:
            answer(tokens)
        return seen.bytes

    kept = _bytes_besides(before)
    answer(2)
    later = _bytes_besides(before)  # a pipeline stage keeps what it has received last
    peak = peak_of(lambda _: answer(sampling.max_new_tokens), range(TRIES))
    first, second, third = map(collectives, (1, 2, 3))
    assert third - second == second - first, "every decoding round sends the same"
    return {"kept": kept, "peak": later + peak, "prefill": dict(first), "round": dict(second - first)}


@old_objects_aside()
def measured_scoring(directory: str, parallel: Parallel, step: Step, micro_batch: int, k: int, chunk: int) -> dict:
    """Bytes of a model and of the fullest moment of a step of a score stage that lists likeliest tokens."""
    before = tensors()
    model = freeze(build(directory, parallel))
    context = model.loss_context(chunk, {})

    def score(_: int) -> None:  # as `Scorer.score`
        table = step.table(model.grid.layout.data, micro_batch)
        batches = step.batches(table[model.grid.at.data], pad_id=0, padding=model.padding, device=CPU)
        with evaluating(model):
            for hidden_TH in forward_hidden(model, batches) or ():
                RoleOutput(hidden_TH, model.head_VH).top_k(k, context)

    kept = _bytes_besides(before)
    score(0)
    later = _bytes_besides(before)
    return {"kept": kept, "peak": later + peak_of(score, range(TRIES))}


def counted(calls: Iterable[Call]) -> Counter[tuple[str, int]]:
    """Planned bytes of collectives, to compare with those of `Collectives`."""
    planned: Counter[tuple[str, int]] = Counter()
    for call in calls:
        planned[call.operation, 2 if call.operation in ("send", "receive") else call.size] += round(call.bytes)
    return planned


# ------------------------------------------------------------------------------------- answers drawn between the steps
def drawing_training(file: str) -> Training:
    """The only stage of a recipe on this rank, about to begin; all its answers are as long as they may be."""
    recipe = load(file)
    run, [stage] = Run(recipe, runtime.adopt(CPU)), recipe.stages
    runtime.seed(recipe.seed, run.grid("student", trained=True))
    run.tokenizer.stop_ids = ()
    training = Training(run, stage)
    training.trainer.prepare_states(0)
    return training


@old_objects_aside()
def measured_online(file: str) -> dict:
    """Bytes that the only stage of a recipe keeps, and of the fullest moment of a step with the draw before it; the
    collectives of a draw; how many tokens its answers have. Each step has a draw."""
    before = tensors()
    training = drawing_training(file)
    training.trainer.zero_grad()
    kept = _bytes_besides(before)

    def step(number: int) -> None:
        training.forward_backward(training.step_at(number))
        training.trainer.step()

    step(0)
    later = _bytes_besides(before)
    peak = peak_of(step, range(1, 1 + TRIES))
    with Collectives() as seen:
        drawn = training.step_at(1 + TRIES)
    lengths = [sample.response_length for group in drawn.groups for sample in group.samples
               if sample.kind in (Kind.ROLLOUT, Kind.TEACHER_ANSWER)]
    return {"kept": kept, "peak": later + peak, "calls": dict(seen.bytes), "lengths": lengths}
