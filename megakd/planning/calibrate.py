"""Measures a node's rates and writes them as a cluster's description (`megakd plan --calibrate`).

All ranks measure at the same time: processes of a node share its memory, its power and, on a CPU, its caches, and a
training has them all at work. Of each measurement the median over its repetitions counts, and of the ranks the slowest.

Legend: M rows, K inner numbers, N columns of a product.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from megakd.batch import Batch, Group, Kind, Sample, Step
from megakd.comm import all_gather_json
from megakd.config import Parallel, Precision
from megakd.config_objectives import SftObjective
from megakd.config_stages import Optimizer
from megakd.disk import write_text_atomic
from megakd.hf.families import Architecture
from megakd.hf.random_model import write_random_model
from megakd.layout import Layout
from megakd.mcore import runtime
from megakd.mcore.graphs import CudaRecorder, Recorder, replay_forward
from megakd.mcore.grid import Grid, make_grid
from megakd.mcore.model import Model, build_model, freeze
from megakd.mcore.optimizer import make_trainer
from megakd.mcore.runtime import World
from megakd.mcore.step import forward_backward, forward_hidden
from megakd.objectives import build_objective
from megakd.planning.cluster import Cluster, Link
from megakd.planning.setup import STATISTICS_BYTES
from megakd.planning.timing import OPTIMIZER_PASSES

GIB = 2**30
REPEATS = 7
SMALL = {"cpu": 2e8, "cuda": 2e12}
"""Operations of the products of one repetition, at least."""
COLD_BYTES = {"cpu": 1 << 27, "cuda": 1 << 28}
"""More than caches hold."""
MOST_SETS = 64
SIDES = {"cpu": (128, 256, 512, 1024), "cuda": (256, 512, 1024, 2048, 4096, 8192)}
LENGTHS = {"cpu": (64, 128, 256, 512, 1024), "cuda": (256, 512, 1024, 2048, 4096, 8192)}
DTYPES = {"cpu": {"fp32": torch.float32}, "cuda": {"fp32": torch.float32, "bf16": torch.bfloat16}}
PASS_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Numbers of a tensor in the measurement of norms and activations: what a micro-batch has in a layer."""
UPDATE_NUMBERS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Numbers of the parameters in the measurement of an update."""
REPLAYED_LAYERS = (16, 64)
"""Of the models whose replayed passes are timed: so many that the device takes longer for them than the host for all
that is around them."""
MESSAGE_BYTES = (1 << 10, 1 << 20, 1 << 22, 1 << 24)


def calibrate(device: str, path: Path) -> None:
    """Measures on this rank (all ranks call it) and lets rank 0 write the description.

    Raises:
        ConfigError: `cuda` is asked for and there is none.
    """
    world = runtime.start(device)
    try:
        cluster = measured_cluster(world)
        if world.rank == 0:
            text = yaml.safe_dump(cluster.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            Cluster.model_validate(yaml.safe_load(text))
            write_text_atomic(path, text)
    finally:
        runtime.stop()


def measured_cluster(world: World) -> Cluster:
    """This machine's description. Collective over the world."""
    kind, grid = world.device.type, make_grid(Layout(world.size, 1, 1), world.timeout)
    runtime.seed(1, grid)
    rates = {name: fitted(products(world, dtype), min) for name, dtype in DTYPES[kind].items()}
    attention = fitted(attentions(world, torch.float32 if kind == "cpu" else torch.bfloat16), itemgetter(0))
    forward_us, backward_us, step_ms = fixed_times(world, grid)
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else world.size
    node, network = links(world, local)
    facts = {
        "kind": torch.cuda.get_device_name(world.device) if kind == "cuda" else cpu_name(),
        "memory_gib": round(device_memory(world) / GIB / (local if kind == "cpu" else 1), 2),
        "reserved_gib": 5.0 if kind == "cuda" else 0.5,
        "memory_gb_s": round(update_rate(world), 1), "passes_gb_s": round(passes_rate(world), 1), "rates": rates,
        "attention": attention,
        "layer_forward_us": forward_us, "layer_backward_us": backward_us, "step_ms": step_ms,
        # A CPU records no graphs.
        **({"layer_replayed_us": replayed_time(world, grid, CudaRecorder())} if kind == "cuda" else {}),
    }
    here = f"measured with {world.size} ranks at work, torch {torch.__version__}"
    measured = ("device.memory_gib", "device.memory_gb_s", "device.passes_gb_s",
                *(f"device.rates.{name}" for name in rates), "device.attention", "device.layer_forward_us",
                "device.layer_backward_us", "device.step_ms",
                *(["device.layer_replayed_us"] if kind == "cuda" else []),
                *(["node_link"] if node else []), *(["network_link"] if network else []))
    overlap = "assumed" if kind == "cuda" else "nothing is done beside gloo's messages"
    sources = dict.fromkeys(measured, here) | {"device.reserved_gib": "assumed", "overlap": overlap}
    return Cluster.model_validate({
        "name": f"{facts['kind']} x {local}", "device_type": kind, "devices_per_node": local, "device": facts,
        "node_link": node, "network_link": network,
        "overlap": {"tensor": 0.0, "data": 0.9 if kind == "cuda" else 0.0, "pipeline": 0.9 if kind == "cuda" else 0.0},
        "sources": sources,
    })


# ------------------------------------------------------------------------------------------------------------ the clock
def seconds_of(world: World, function: Callable[[], Any], calls: int = 1) -> float:
    """Seconds of a call: the median of REPEATS rounds of `calls` calls, of the slowest rank.

    What the calls of a round return is held until its end, as a forward pass holds what the backward pass needs: memory
    that is handed out anew is slower than memory that was written a moment ago.
    """
    rounds = []
    for number in range(REPEATS + 1):
        held = []
        dist.barrier(group=dist.group.WORLD)
        synchronize(world)
        start = time.perf_counter()
        for _ in range(calls):
            held.append(function())
        synchronize(world)
        if number > 0:  # the first warms up
            rounds.append((time.perf_counter() - start) / calls)
    return max(all_gather_json(statistics.median(rounds), dist.group.WORLD, world.device))


def synchronize(world: World) -> None:
    """Waits for the device's kernels."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


# ------------------------------------------------------------------------------------------------------------ the rates
def products(world: World, dtype: torch.dtype) -> list[tuple[int, int, int, float]]:
    """(M, K, N, 10^12 operations a second) of products as a layer has them: 4 x, 1 x and 1/4 x as wide as they are
    deep, over several numbers of rows; forward, and the two of the backward pass."""
    kind, found = world.device.type, []
    sides = SIDES[kind]
    for rows, inner in zip(sides, sides[1:] + sides[-1:], strict=True):
        for columns in (inner // 4, inner, 4 * inner):
            shapes = (rows, inner), (columns, inner), (rows, columns)
            operands = Cold(lambda shapes=shapes: [
                torch.randn(shape, dtype=dtype, device=world.device) for shape in shapes], world)
            operations = 2.0 * rows * inner * columns
            calls = max(1, round(SMALL[kind] / operations))

            def forward(operands: Cold = operands) -> Tensor:
                input_MK, weight_NK, _ = operands.next()
                return input_MK @ weight_NK.t()

            def of_input(operands: Cold = operands) -> Tensor:
                _, weight_NK, gradient_MN = operands.next()
                return gradient_MN @ weight_NK

            def of_weight(operands: Cold = operands) -> Tensor:
                input_MK, _, gradient_MN = operands.next()
                return gradient_MN.t() @ input_MK

            for shape, product in (((rows, inner, columns), forward), ((rows, columns, inner), of_input),
                                   ((columns, rows, inner), of_weight)):
                found.append((*shape, round(operations / seconds_of(world, product, calls) / 1e12, 5)))
    return found


class Cold:
    """Operands in turns, so many that none is left in a cache when its turn comes again: so it is in a model."""

    def __init__(self, make: Callable[[], list[Tensor]], world: World):
        first = make()
        size = sum(tensor.nbytes for tensor in first)
        self.sets = [first, *(make() for _ in range(min(MOST_SETS, COLD_BYTES[world.device.type] // size)))]
        self.turn = 0

    def next(self) -> list[Tensor]:
        """The operands of the coming call."""
        self.turn += 1
        return self.sets[self.turn % len(self.sets)]


def attentions(world: World, dtype: torch.dtype) -> list[tuple[int, int, int, float]]:
    """(length, length, head width, 10^12 operations a second) of causal attention, forward and backward."""
    kind, found, heads, width = world.device.type, [], 8, 64
    for length in LENGTHS[kind]:
        count = max(1, LENGTHS[kind][-1] // length)
        query, key, value = (torch.randn(count, heads, length, width, dtype=dtype, device=world.device,
                                         requires_grad=True) for _ in range(3))
        gradient = torch.randn_like(query)

        def both(query: Tensor = query, key: Tensor = key, value: Tensor = value, gradient: Tensor = gradient) -> None:
            # One call a sequence, as the layers have it on a CPU.
            for number in range(len(query)):
                out = nn.functional.scaled_dot_product_attention(
                    query[number : number + 1], key[number : number + 1], value[number : number + 1], is_causal=True)
                torch.autograd.backward(out, gradient[number : number + 1])

        operations = 3.5 * 4 * count * heads * width * length * (length + 1) / 2
        seconds = seconds_of(world, both)
        found.append((length, length, width, round(operations / seconds / 1e12, 5)))
    return found


def fitted(points: Sequence[tuple[int, int, int, float]], side: Callable[[Sequence[int]], int]) -> dict[str, Any]:
    """`Rates` of measured products: 1/rate = 1/best + half/(best side) by least squares of the relative error."""
    # Minimise sum over points of (rate (a + b / side) - 1)^2: two linear equations.
    rows = [(rate, rate / side(shape)) for *shape, rate in points]
    aa, ab, bb = (sum(f(x, y) for x, y in rows) for f in (lambda x, y: x * x, lambda x, y: x * y, lambda x, y: y * y))
    a, b = sum(x for x, _ in rows), sum(y for _, y in rows)
    determinant = aa * bb - ab * ab
    inverse, slope = ((a * bb - b * ab) / determinant, (aa * b - ab * a) / determinant)
    if inverse <= 0:  # in few and unsteady points the rate may grow faster than the side: the best of them is the best
        inverse = 1 / max(rate for *_, rate in points)
        slope = (b - inverse * ab) / bb
    if slope < 0:  # no loss at short sides
        inverse, slope = a / aa, 0.0
    best = 1 / inverse
    peak = max(best, *(rate for *_, rate in points))
    return {"peak_tflops": round(peak, 6), "efficiency": round(best / peak, 4), "half_side": round(slope / inverse, 1),
            "measured": [list(point) for point in points]}


def update_rate(world: World) -> float:
    """10^9 bytes a second of an optimizer's step: gradients cleared and copied, AdamW, the new parameters copied."""
    count = UPDATE_NUMBERS[world.device.type]
    parameter, gradients, published = (torch.zeros(count, device=world.device) for _ in range(3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, fused=world.device.type == "cuda")

    def update() -> None:
        parameter.grad = gradients.clone()
        optimizer.step()
        published.copy_(parameter)
        gradients.zero_()

    # A copy of the gradients, the update, a copy of the parameters, and the clearing.
    numbers = (2 + OPTIMIZER_PASSES[world.device.type] + 2 + 1) * count
    return numbers * STATISTICS_BYTES / seconds_of(world, update) / 1e9


def passes_rate(world: World) -> float:
    """10^9 bytes a second over a norm, an activation and a sum in their elementary operations, as a layer has them."""
    count = PASS_NUMBERS[world.device.type]
    operands = Cold(lambda: [torch.randn(count // 512, 512, device=world.device) for _ in range(2)], world)
    weight = torch.ones(512, device=world.device)

    def passes() -> tuple[Tensor, ...]:
        hidden, other = operands.next()
        half = hidden[:, :256]
        normalised = nn.functional.rms_norm(hidden, (512,)) * weight
        activation = nn.functional.silu(half)
        return normalised, activation, activation * other[:, :256], normalised + other

    # A norm 7 times, an activation with its product 2.5 times (of half the numbers), a sum 3 times.
    numbers = (7 + 0.5 * 5 + 3) * count
    return numbers * STATISTICS_BYTES / seconds_of(world, passes, 4) / 1e9


def links(world: World, local: int) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """The link within a node, and that between nodes where there are several."""
    nodes = world.size // local
    ranks = [list(range(node * local, (node + 1) * local)) for node in range(nodes)]
    groups = [dist.new_group(members) for members in ranks]
    node = measured_link(world, groups[world.rank // local], local) if local > 1 else None
    return node, measured_link(world, dist.group.WORLD, world.size) if nodes > 1 else None


def measured_link(world: World, group: dist.ProcessGroup, size: int) -> dict[str, float]:
    """Rate and latency of a group's all-reduces, as a ring of them would have it."""
    points = []
    for message in MESSAGE_BYTES:
        tensor = torch.zeros(message // 4, device=world.device)
        seconds = seconds_of(world, lambda tensor=tensor: dist.all_reduce(tensor, group=group),
                             max(1, (1 << 20) // message // 16))
        points.append((2 * (size - 1) / size * message, seconds))
    rate = max(size / seconds for size, seconds in points[1:])
    latency = max(0.0, points[0][1] - points[0][0] / rate) / (2 * (size - 1))
    return Link(gb_s=round(rate / 1e9, 4), latency_us=round(latency * 1e6, 2)).model_dump()


# ------------------------------------------------------------------------------------------------------- fixed times
def fixed_times(world: World, grid: Grid) -> tuple[float, float, float]:
    """Microseconds of a layer's forward and backward pass, and milliseconds of a step's rest, with next to no work."""
    few, many = 2, 10
    times = {layers: _times_of(world, grid, layers) for layers in (few, many)}
    layer = [(times[many][way] - times[few][way]) / (many - few) for way in (0, 1)]
    forward = max(0.0, layer[0])
    backward = max(0.0, layer[1] - layer[0])
    step = max(0.0, times[few][1] - few * layer[1])
    return round(forward * 1e6, 1), round(backward * 1e6, 1), round(step * 1e3, 3)


def replayed_time(world: World, grid: Grid, recorder: Recorder) -> float:
    """Microseconds of a layer's forward pass that is replayed, with next to no work."""
    few, many = REPLAYED_LAYERS
    seconds = {}
    for layers in (few, many):
        model = replay_forward(freeze(_small_model(world, grid, layers)), 16, recorder)
        seconds[layers] = seconds_of(world, partial(_forward, world, model), 4)
    return round(max(0.0, (seconds[many] - seconds[few]) / (many - few)) * 1e6, 1)


def _times_of(world: World, grid: Grid, layers: int) -> tuple[float, float]:
    """Seconds of the forward pass alone, and of a whole step, of a model that is hardly more than its calls."""
    model = _small_model(world, grid, layers)
    trainer = make_trainer(model, Optimizer(lr=1e-4), 1000)
    objective = build_objective(SftObjective())
    context = model.loss_context(16, _small_step(world).counts)

    def whole() -> None:
        trainer.zero_grad()
        forward_backward(model, _batches(world, model), None, objective, context)
        trainer.step()

    return seconds_of(world, partial(_forward, world, model), 4), seconds_of(world, whole, 4)


def _small_model(world: World, grid: Grid, layers: int) -> Model:
    precision = Precision(dtype="fp32" if world.device.type == "cpu" else "bf16")
    with tempfile.TemporaryDirectory() as folder:
        architecture = Architecture("llama", 64, layers, 2, 2, 32, 128, 128, 1e-5, 1e4, None, False, False, 64)
        write_random_model(Path(folder), architecture, 0)
        return build_model(Path(folder), architecture, Parallel(), "none", precision, grid, world.device)


def _small_step(world: World) -> Step:
    return Step(tuple(Group(f"row:{rank}", (Sample((3, 4, 5, 6), 2, Kind.CHOSEN),)) for rank in range(world.size)))


def _batches(world: World, model: Model) -> list[Batch]:
    step, grid = _small_step(world), model.grid
    return step.batches(step.table(grid.layout.data, 1)[grid.at.data], pad_id=0, padding=model.padding,
                        device=world.device)


def _forward(world: World, model: Model) -> object:
    return forward_hidden(model, _batches(world, model))


# --------------------------------------------------------------------------------------------------------- the device
def device_memory(world: World) -> float:
    """Bytes of the device, of the machine on a CPU."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpu_name() -> str:
    """The processor's name as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
