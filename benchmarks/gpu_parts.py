"""The parts of benchmarks/gpu.py: each runs in a process of its own and writes what it has found as one JSON file.

    python -m benchmarks.gpu_parts PART '{"device": "cpu", "small": true, ...}'

`benchmarks/gpu.py` starts them, limits their time and puts the findings together; `Options` says what they are given.
The file is written again after each thing that was measured, so that a part that fails later leaves what it had.
"""

from __future__ import annotations

import atexit
import gc
import gzip
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import attention_backend, interleaved_seconds, seconds_a_call, seconds_of, timed_steps
from megakd.batch import Batch, Group, Kind, Sample, Step
from megakd.config import Parallel, Precision
from megakd.config_objectives import DckdObjective, Objective, SftObjective
from megakd.disk import write_json_atomic
from megakd.hf.families import Architecture
from megakd.hf.random_model import write_random_model

if TYPE_CHECKING:
    from megakd.mcore.model import Model
    from megakd.mcore.runtime import World
    from megakd.planning.setup import TrainingSetup
    from tests.mcore.cases import Distillation, Job

ROOT = Path(__file__).parents[1]
CALLS = 5
"""Calls of a kernel that are timed together."""


def llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocabulary: int, tied: bool) -> Architecture:
    """A Llama's sizes."""
    return Architecture("llama", hidden, layers, heads, kv_heads, hidden // heads, ffn, vocabulary, 1e-5, 5e5, None,
                        tied, False, 8192)


@dataclass(frozen=True)
class Shapes:
    """What is measured."""

    student: Architecture
    teacher: Architecture
    cut: Architecture
    """What is trained with tensor parallelism on one GPU."""
    prompt: int
    answer: int
    micro_batch: int
    """Groups; a group has a chosen and a rejected answer."""
    global_batch: int
    chunk_tokens: int
    warm_up: int
    steps: int
    loss_tokens: int
    loss_hidden: int
    loss_vocabulary: int
    kernel_rows: int
    kernel_repeats: int
    copied_bytes: int
    rows: int
    """Of the matrix products that are timed: a micro-batch's tokens."""
    graph_sequence: int
    """Tokens of a sequence in forward passes that are recorded."""
    graph_sequences: tuple[int, ...]
    """How many of them each pass has."""
    answers: int
    """That are decoded side by side."""
    decoded: int
    """Tokens of each."""


FULL = Shapes(
    student=llama(2048, 16, 32, 8, 8192, 128256, tied=True),  # as Llama 3.2 1B
    teacher=llama(4096, 32, 32, 32, 11008, 128256, tied=False),  # as Llama 2 7B, with the student's vocabulary
    cut=llama(1024, 4, 16, 4, 2816, 32000, tied=True),
    prompt=512, answer=1536, micro_batch=2, global_batch=4, chunk_tokens=2048, warm_up=3, steps=12, loss_tokens=8192,
    loss_hidden=4096, loss_vocabulary=128256, kernel_rows=4096, kernel_repeats=15, copied_bytes=1 << 32, rows=8192,
    graph_sequence=256, graph_sequences=(1, 4, 32), answers=32, decoded=128,
)
SMALL = Shapes(
    student=llama(64, 2, 4, 2, 96, 320, tied=True), teacher=llama(96, 2, 4, 4, 128, 320, tied=False),
    cut=llama(64, 2, 4, 2, 96, 320, tied=True), prompt=6, answer=10, micro_batch=1, global_batch=2, chunk_tokens=16,
    warm_up=1, steps=2, loss_tokens=48, loss_hidden=16, loss_vocabulary=96, kernel_rows=2, kernel_repeats=1,
    copied_bytes=1 << 16, rows=32, graph_sequence=8, graph_sequences=(1, 3), answers=3, decoded=4,
)


@dataclass(frozen=True)
class Options:
    """What benchmarks/gpu.py gives a part."""

    device: str
    small: bool
    scratch: str
    """Folder of the random models, and of what a part writes besides."""
    out: str
    """The part's JSON file."""
    cluster: str
    """Description of the card, for its peak rates and for plans."""
    nccl: str | None
    """NCCL library that lets ranks share a GPU; may be gzipped."""
    quickstart_models: str | None

    @property
    def shapes(self) -> Shapes:
        return SMALL if self.small else FULL

    @property
    def folder(self) -> Path:
        """Of the part's own files."""
        return Path(self.scratch)

    def write(self, found: dict[str, Any]) -> None:
        """What has been found so far."""
        write_json_atomic(self.out, found)


def start_alone(device: str) -> World:
    """This process as a world of one rank; it ends with the process."""
    from megakd.mcore import runtime

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine's host name need not resolve
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = runtime.start(device)
    atexit.register(runtime.stop)
    return world


# -------------------------------------------------------------------------------------------------------- environment
def environment(options: Options) -> None:
    """Versions, the card, and its floors: copies, and matrix products at the shapes that are used."""
    from megakd.planning.calibrate import Cold
    from megakd.planning.calibrate import seconds_of as seconds_a_call

    found: dict[str, Any] = {"versions": versions(), "card": card(options.device)}
    options.write(found)
    world, shapes = start_alone(options.device), options.shapes
    device = world.device
    found["copy_gb_s"] = copy_rate(world, torch.randn(shapes.copied_bytes // 4, device=device)) / 1e9
    found["gemms"] = []
    options.write(found)
    for name, inner, columns in products_of(shapes):
        operations = 2.0 * shapes.rows * inner * columns
        row: dict[str, Any] = {"name": name, "m": shapes.rows, "k": inner, "n": columns}
        operands = Cold(lambda inner=inner, columns=columns: [
            torch.randn(shapes.rows, inner, device=device).bfloat16(),
            torch.randn(columns, inner, device=device).bfloat16()], world)

        def bf16(operands: Cold = operands) -> torch.Tensor:
            input_MK, weight_NK = operands.next()
            return input_MK @ weight_NK.t()

        row["bf16_tflops"] = operations / seconds_a_call(world, bf16, 4) / 1e12
        found["gemms"].append(row)
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
            one = torch.ones((), device=device)
            operands.sets = [[each.to(torch.float8_e4m3fn) for each in pair] for pair in operands.sets]

            def fp8(operands: Cold = operands, one: torch.Tensor = one) -> torch.Tensor:
                input_MK, weight_NK = operands.next()
                return torch._scaled_mm(input_MK, weight_NK.t(), one, one, out_dtype=torch.bfloat16)

            row["fp8_tflops"] = operations / seconds_a_call(world, fp8, 4) / 1e12
        options.write(found)


def copy_rate(world: World, source: torch.Tensor) -> float:
    """Bytes a second, read and written, of copies of a tensor on its device."""
    from megakd.planning.calibrate import seconds_of as seconds_a_call

    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_a_call(world, lambda: target.copy_(source), 4)


def versions() -> dict[str, str | None]:
    """Of what takes part; None where a package is missing."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("megakd", "torch", "megatron-core", "transformer-engine", "triton", "transformers", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def card(device: str) -> dict[str, Any]:
    """What the GPU and its driver say of themselves."""
    if device != "cuda":
        return {"name": platform.processor()}
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which(query[0]) else None
    return {"name": properties.name, "capability": [properties.major, properties.minor],
            "memory_gib": properties.total_memory / 2**30, "multiprocessors": properties.multi_processor_count,
            "nvidia-smi": told}


def products_of(shapes: Shapes) -> list[tuple[str, int, int]]:
    """Name, inner numbers and columns of the products of both models' layers and heads."""
    found = []
    for role, a in (("student", shapes.student), ("teacher", shapes.teacher)):
        found += [(f"{role} qkv", a.hidden_size, (a.heads + 2 * a.kv_heads) * a.head_dim),
                  (f"{role} proj", a.heads * a.head_dim, a.hidden_size), (f"{role} fc1", a.hidden_size, 2 * a.ffn_size),
                  (f"{role} fc2", a.ffn_size, a.hidden_size), (f"{role} head", a.hidden_size, a.vocab_size)]
    return found


def models(options: Options) -> None:
    """Writes the random models that other parts train."""
    device, shapes = options.device, options.shapes
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for seed, (name, architecture) in enumerate((("student", shapes.student), ("teacher", shapes.teacher),
                                                 ("cut", shapes.cut))):
        write_random_model(options.folder / name, architecture, seed, dtype, device)
    options.write({"bytes": sum(file.stat().st_size for file in options.folder.glob("*/model.safetensors"))})


# ----------------------------------------------------------------------------------------------------------- training
def training(options: Options, recipe: str) -> None:
    """Steps of a student with its teacher, then of the student alone, in a precision: "bf16" or an FP8 recipe."""
    precision = precision_of(recipe, options.device)
    world = start_alone(options.device)
    found: dict[str, Any] = {"precision": recipe, "utilisation": UTILISATION}
    trainings = {"with its teacher": (DckdObjective(), (Kind.CHOSEN, Kind.REJECTED)),
                 "alone": (SftObjective(), (Kind.CHOSEN,))}
    for name, (objective, kinds) in trainings.items():
        case = distillation(options, options.shapes, objective, kinds, precision)
        job, found[name] = measured(options, case, world.device)
        options.write(found)
        found[name] |= longest_kernels(partial(job.step, 0), world.device)
        options.write(found)
        del job
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def precision_of(recipe: str, device: str) -> Precision:
    """`fp32`, `bf16`, or FP8 by a recipe, which is emulated on a CPU."""
    if recipe in ("fp32", "bf16"):
        return Precision(dtype=recipe)
    return Precision(dtype="fp8", fp8_recipe=recipe, emulate=device == "cpu")


def distillation(options: Options, shapes: Shapes, objective: Objective, kinds: tuple[Kind, ...],
                 precision: Precision) -> Distillation:
    """The case as tests/mcore/cases.py takes it: one step's groups, which are trained on again and again."""
    from tests.mcore.cases import Distillation

    draw = torch.Generator().manual_seed(7)

    def sample(kind: Kind) -> Sample:
        length, vocabulary = shapes.prompt + shapes.answer, shapes.student.vocab_size
        tokens = torch.randint(3, vocabulary, (length,), generator=draw).tolist()
        return Sample(tuple(tokens), shapes.prompt, kind)

    # A group of one answer is half of one of two: as many tokens in a step either way.
    fold = 2 // len(kinds)
    groups = tuple(Group(f"row:{number}", tuple(map(sample, kinds))) for number in range(shapes.global_batch * fold))
    roles = ("student", "teacher")
    return Distillation(
        {role: str(options.folder / role) for role in roles}, dict.fromkeys(roles, Parallel()),
        dict.fromkeys(roles, shapes.micro_batch * fold), objective, groups, len(groups),
        steps=shapes.warm_up + shapes.steps, learning_rate=1e-4, warmup=0.1, eps=1e-8, precision=precision,
        chunk_tokens=shapes.chunk_tokens,
    )


UTILISATION = (
    "MFU = model FLOP of a step / seconds / the card's dense bf16 peak (also for FP8). Model FLOP: 3 x the student's "
    "forward pass and 1 x the teacher's, of matrix products and causal attention alone, the heads at the loss "
    "positions (megakd/planning/sizes.py: model_flops). What is made a second time is counted once."
)


def model_flop(setup: TrainingSetup) -> dict[str, float]:
    """FLOP of a step by role: three forward passes of the trained model, one of each teacher."""
    from megakd.planning.sizes import model_flops

    roles = {"student": (setup.trained, 3.0)} | {role: (each, 1.0) for role, each in setup.teachers.items()}
    flop = {}
    for role, (each, passes) in roles.items():
        tokens, pairs, rows = (setup.work.roles[role].sum(number) for number in ("tokens", "pairs", "all_rows"))
        flop[role] = passes * model_flops(each.architecture, tokens, pairs, rows)
    return flop


def measured(options: Options, case: Distillation, device: torch.device) -> tuple[Job, dict[str, Any]]:
    """A training after its steps; their seconds, tokens, utilisation, memory and losses, its plan beside them."""
    from megakd.planning.cluster import load_cluster
    from megakd.planning.memory import training_memory
    from megakd.planning.timing import training_time
    from tests.mcore.cases import Job
    from tests.mcore.planning_cases import setup_of

    shapes, cluster = options.shapes, load_cluster(options.cluster)
    setup = setup_of(case, 1, options.device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    job, metrics = Job(case), []
    timed_steps(lambda number: metrics.append(job.step(number)), shapes.warm_up, 0, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [each.wall for each in timed_steps(lambda _: metrics.append(job.step(0)), 0, shapes.steps, device)]
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    planned, second, flop = training_memory(setup, 0), statistics.median(seconds), model_flop(setup)
    found = {
        "seconds": second, "all_seconds": seconds, "tokens": setup.work.tokens,
        "tokens_s": setup.work.tokens / second, "flop": flop,
        "mfu": sum(flop.values()) / second / (cluster.device.rates["bf16"].peak_tflops * 1e12),
        "peak_bytes": peak, "planned_bytes": planned.total, "planned_parts": planned.parts,
        "measured_over_planned_bytes": None if peak is None else peak / planned.total,
        "losses": [each["loss"] for each in metrics], "first": metrics[0], "last": metrics[-1],
        "attention": attention_backend(),
    }
    if setup.dtype in cluster.device.rates:
        time = training_time(cluster, setup)
        found |= {"planned_seconds": time.total, "planned_time": dict(time.parts)}
    return job, found


def longest_kernels(step: Callable[[], Any], device: torch.device, count: int = 25) -> dict[str, Any]:
    """The kernels (on a CPU operators) that a call spends most time in: name, calls, milliseconds, share of all."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        step()
        if gpu:
            torch.cuda.synchronize(device)
    micros = "self_device_time_total" if gpu else "self_cpu_time_total"
    rows = sorted(((getattr(each, micros), each.count, each.key) for each in seen.key_averages()), reverse=True)
    whole = sum(time for time, _, _ in rows)
    words = ("e4m3", "e5m2", "fp8", "qgmma")
    return {
        "kernels": [{"name": key[:120], "calls": calls, "ms": time / 1e3, "share": time / max(whole, 1e-9)}
                    for time, calls, key in rows[:count]],
        "kernels_ms": whole / 1e3, "fp8_kernels": sum(any(word in key.lower() for word in words) for *_, key in rows),
    }


# ------------------------------------------------------------------------------------------------------------- graphs
def teacher_graphs(options: Options) -> None:
    """Forward passes of the teacher alone, recorded as CUDA graphs and launched: milliseconds of both, what a recording
    takes, and the memory that all of them hold."""
    from megakd.mcore.graphs import CudaRecorder, replay_forward
    from megakd.mcore.model import freeze
    from megakd.mcore.step import forward_hidden
    from tests.mcore.cases import KeptCalls, build

    world, shapes, found = start_alone(options.device), options.shapes, {"passes": []}
    gpu = world.device.type == "cuda"
    for name in ("bf16", "tensorwise") if gpu else ("fp32",):
        model = freeze(build(str(options.folder / "teacher"), Parallel(), precision_of(name, options.device),
                             trained=False))
        replay_forward(model, shapes.graph_sequence, CudaRecorder() if gpu else KeptCalls())
        graphs, held = model.graphs, reserved(world.device)
        sample = Sample((3,) * shapes.graph_sequence, 1, Kind.CHOSEN)
        for sequences in shapes.graph_sequences:
            step = Step((Group("row:0", (sample,) * sequences),))
            batches = step.batches([[0]], pad_id=0, padding=model.padding, device=world.device)

            def forward(how: object, of: Model = model, its: list[Batch] = batches) -> None:
                of.graphs = how
                forward_hidden(of, its)

            recording = seconds_of(partial(forward, graphs), world.device).wall
            seconds = interleaved_seconds({"recorded": partial(forward, graphs), "launched": partial(forward, None)},
                                          shapes.steps, world.device)
            medians = {f"{kind}_ms": 1e3 * statistics.median(each[1:]) for kind, each in seconds.items()}
            found["passes"].append({"precision": name, "rows": len(batches[0].tokens_P), "recording_s": recording,
                                    **medians, "held_bytes": reserved(world.device) - held})
            options.write(found)


def rollouts(options: Options) -> None:
    """Answers of both models, decoded by launched passes and by recorded ones: milliseconds of a pass that gives each
    row a token, the bytes that it has to read, and seconds of everything, prompts and recordings included."""
    from megakd.mcore.decoder import PipelineDecoder
    from megakd.mcore.graphs import CudaRecorder
    from megakd.mcore.model import freeze
    from megakd.rollout import Prompt, Sampling, generate
    from tests.mcore.cases import KeptCalls, build

    world, shapes, found = start_alone(options.device), options.shapes, {"answers": []}
    gpu = world.device.type == "cuda"
    recorder = CudaRecorder() if gpu else KeptCalls()
    precision = precision_of("bf16" if gpu else "fp32", options.device)
    prompts = [Prompt(number, (3,) * shapes.prompt) for number in range(shapes.answers)]
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, n=1, max_new_tokens=shapes.decoded, stop_ids=(), seed=3)
    for role in ("student", "teacher"):
        model = freeze(build(str(options.folder / role), Parallel(), precision, trained=False))
        decoder, seconds = PipelineDecoder(model, shapes.prompt + shapes.decoded), {}
        for how in ("launched", "recorded"):
            model.decode_recorder = recorder if how == "recorded" else None
            for _ in range(2):  # the second is timed
                ends = [time.perf_counter()]
                generate(decoder, prompts, sampling, slots=shapes.answers, pad_id=0,
                         progress=lambda *_, ends=ends: ends.append(time.perf_counter()))
            passes = [end - begin for begin, end in pairwise(ends[-shapes.decoded :])]
            seconds[how] = {"pass_ms": 1e3 * statistics.median(passes), "seconds": ends[-1] - ends[0]}
        layers = {name: each for name, each in model.parameters_of(0).items() if name.startswith("decoder.")}
        weights = sum(each.numel() for each in layers.values()) + model.head_VH.numel()
        cached = 2 * model.architecture.layers * model.architecture.kv_heads * model.architecture.head_dim
        positions = shapes.answers * (shapes.prompt + shapes.decoded // 2)
        read_bytes = model.dtype.itemsize * (weights + cached * positions)
        found["answers"].append({"role": role, "rows": shapes.answers, **seconds, "read_bytes": read_bytes})
        options.write(found)


def reserved(device: torch.device) -> int:
    """Bytes that CUDA's allocator holds and cannot give back; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


# ---------------------------------------------------------------------------------------------- two ranks on one GPU
def tensor_parallel(options: Options) -> None:
    """The same training at tensor 1 and at tensor 2 with both ranks on one GPU: losses, and how far they are apart."""
    from benchmarks import gpu_parts  # by its name, for the ranks to find `cut`
    from tests.ranks import close_pools, run_ranks

    found: dict[str, Any] = {}
    for world in (1, 2):
        if world == 2 and options.device == "cuda":
            assert options.nccl is not None, "the driver has skipped this part"
            # The ranks inherit both.
            os.environ |= {"LD_PRELOAD": unpacked(options.nccl, options.folder), "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
        found[f"tensor {world}"] = run_ranks(world, gpu_parts.cut, options, device=options.device, timeout=600)[0]
        options.write(found)
        close_pools()
    steps = list(zip(found["tensor 1"], found["tensor 2"], strict=True))
    options.write(found | {f"apart: {name}": max(abs(two[name] - one[name]) / abs(one[name]) for one, two in steps)
                           for name in ("loss", "grad_norm")})


def unpacked(library: str, folder: Path) -> str:
    """A library, unpacked into a folder if it is gzipped."""
    if not library.endswith(".gz"):
        return library
    file = folder / Path(library).stem
    with gzip.open(library) as packed, file.open("wb") as written:
        shutil.copyfileobj(packed, written)
    return str(file)


def cut(options: Options) -> list[dict[str, float]]:
    """On a rank of `tensor_parallel`: the metrics of a training whose model all ranks share."""
    from tests.mcore.cases import Job

    # Short sequences: what is compared does not grow with them.
    shapes = replace(options.shapes, student=options.shapes.cut, prompt=min(options.shapes.prompt, 128),
                     answer=min(options.shapes.answer, 384))
    precision = precision_of("bf16" if options.device == "cuda" else "fp32", options.device)
    case = distillation(options, shapes, SftObjective(), (Kind.CHOSEN,), precision)
    parallel = Parallel(tensor=torch.distributed.get_world_size())
    job = Job(replace(case, directories={"student": str(options.folder / "cut")}, parallels={"student": parallel}))
    return [job.step(0) for _ in range(shapes.warm_up + shapes.steps)]


# ------------------------------------------------------------------------------------------------------------- losses
def fused_losses(options: Options) -> None:
    """benchmarks/losses.py: fused head and loss beside the bare products and other packages'."""
    from benchmarks import losses

    shapes = options.shapes
    gemms = ("the student's logits, d(hidden), d(head), and each teacher's logits (none of log_probs, two of "
             "advantage), in the inputs' dtype, in the fastest chunks of those tried")
    status = losses.main([
        "--device", options.device, "--dtype", "bf16" if options.device == "cuda" else "fp32",
        "--tokens", str(shapes.loss_tokens), "--vocab", str(shapes.loss_vocabulary),
        "--hidden", str(shapes.loss_hidden), "--sweep-tokens", str(shapes.loss_tokens), "--error-tokens", "16",
        "--repeats", "2" if options.small else "7", "--only", "forward_kl", "log_probs", "advantage",
        "--peers", "liger", "torch"], seen=lambda record: options.write({"gemms": gemms, **record}))
    assert status == 0, "a loss has failed; what it said is above"


def loss_kernels(options: Options) -> None:
    """benchmarks/loss_kernels.py: bytes a second of each kernel beside a copy's, on float32 logits, as all of them are
    (docs/decisions.md)."""
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    from benchmarks.loss_kernels import cases

    device, shapes = torch.device(options.device), options.shapes
    rows, width = shapes.kernel_rows, shapes.loss_vocabulary
    found: dict[str, Any] = {"rows": rows, "width": width, "kernels": []}

    def rate(run: Callable[[], Any], moved: float) -> float:
        seconds = [seconds_a_call(run, device, CALLS) for _ in range(shapes.kernel_repeats)]
        return moved / statistics.median(seconds[len(seconds) // 3 :])  # the first compile and warm up

    source = torch.randn(rows, width, device=device)
    target = torch.empty_like(source)
    found["copy_gb_s"] = rate(lambda: target.copy_(source), 2 * source.nbytes) / 1e9
    options.write(found)
    for case in cases(rows, width, torch.float32, device):
        row: dict[str, Any] = {"name": case.name, "dtype": "float32"}
        try:
            row["gb_s"] = rate(case.run, case.bytes) / 1e9
            row["share_of_copy"] = row["gb_s"] / found["copy_gb_s"]
        except Exception as error:  # of a kernel that does not compile: the others are measured all the same
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        found["kernels"].append(row)
        options.write(found)
    failed = [row["name"] for row in found["kernels"] if "error" in row]
    assert not failed, failed


# --------------------------------------------------------------------------------------------------------- quickstart
def quickstart(options: Options) -> None:
    """The quickstart's recipe on this device, in one process."""
    from benchmarks.record_run import measured as measured_run

    folder, output = options.folder / "quickstart_models", options.folder / "quickstart"
    if options.quickstart_models is not None:
        folder = Path(options.quickstart_models).absolute()
    overrides = [
        f"device={options.device}", "processes=1", f"precision={'bf16' if options.device == 'cuda' else 'fp32'}",
        f"output={output}", f"student.model={folder}/student_start", f"reference.model={folder}/reference",
        "student.parallel={}", "teacher.parallel={}", f"stages.dpo.init={folder}/reference",
        f"stages.dckd.init={folder}/student_start",
        f"stages.eval.models={{start: {folder}/student_start, dckd: run:student_dckd, final: run:student_adpa}}",
    ]
    if options.quickstart_models is None:
        from tests.recipes import write_tiny_model

        for seed, (name, layers) in enumerate((("reference", 4), ("student_start", 2))):
            write_tiny_model(folder / name, seed=seed, layers=layers, max_positions=1024)
        overrides += ["data.train_rows=6", "data.eval_rows=4", "data.max_length=1000", "stages.dpo.steps=1",
                      "stages.dckd.steps=1", "stages.adpa.steps=1", "stages.generate.max_new_tokens=4",
                      "stages.eval.prompts=2", "stages.eval.max_new_tokens=4"]
    command = [sys.executable, "-m", "megakd.cli", "run", "examples/quickstart/recipe.yaml", *overrides]
    subprocess.run(command, cwd=ROOT, check=True)
    options.write(measured_run(output))


PARTS: dict[str, Callable[..., None]] = {
    "environment": environment, "models": models, "loss_kernels": loss_kernels, "fused_losses": fused_losses,
    "training": training, "teacher_graphs": teacher_graphs, "rollouts": rollouts,
    "tensor_parallel": tensor_parallel, "quickstart": quickstart,
}


def main() -> int:
    """One part; `training` is followed by a colon and its precision."""
    name, _, argument = sys.argv[1].partition(":")
    options = Options(**json.loads(sys.argv[2]))
    PARTS[name](options, *([argument] if argument else []))
    return 0


if __name__ == "__main__":
    sys.exit(main())
