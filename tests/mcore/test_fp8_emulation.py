"""FP8 arithmetic on a CPU: rounding and products against a reference that goes number by number, trainings against
float32's, and delayed scaling's histories."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megakd.batch import Kind
from megakd.config import Parallel, Precision
from megakd.config_objectives import SftObjective
from megakd.mcore.fp8_emulation import (
    E4M3,
    E5M2,
    AmaxHistories,
    RoundingColumnParallelLinear,
    in_blocks,
    scale_from,
    whole,
)
from megakd.mcore.fp8_layers import amax_states
from megakd.mcore.model import unwrap
from tests.mcore.cases import Distillation, Job, assemble, build, world
from tests.mcore.tiny import make_groups, make_llama
from tests.ranks import run_ranks

RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")


# ------------------------------------------------------------------------------------------------- the naive reference
def numbers_of(mantissa_bits: int, least_exponent: int, largest: float) -> np.ndarray:
    """The numbers of an FP8 format that are not negative, in order: subnormal, then binade by binade."""
    steps = 2**mantissa_bits
    numbers = [step / steps * 2.0**least_exponent for step in range(steps)]
    exponent = least_exponent
    while (1 + (steps - 1) / steps) * 2.0**exponent < 2 * largest:
        numbers += [(1 + step / steps) * 2.0**exponent for step in range(steps)]
        exponent += 1
    return np.array([number for number in numbers if number <= largest])


FORMATS = {E4M3: (448.0, numbers_of(3, -6, 448.0)), E5M2: (57344.0, numbers_of(2, -14, 57344.0))}


def nearest(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The nearest number of a format, the even one of two that are as near; the largest for what is larger still."""
    magnitudes = np.abs(values.astype(np.float64))
    above = np.clip(np.searchsorted(numbers, magnitudes), 1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    middle = (low + high) / 2
    upper = (magnitudes > middle) | (magnitudes == middle) & (above % 2 == 0)
    return np.copysign(np.where(upper, high, low), values)


def scale_of(amax: float, recipe: str, largest: float) -> np.float32:
    if amax == 0:
        return np.float32(1)
    if recipe == "mxfp8":
        quotient = np.float32(amax) * np.float32(1 / largest)
        return np.float32(2.0 ** -math.ceil(math.log2(float(quotient))))
    scale = np.float32(largest) / np.float32(amax)
    return np.float32(2.0 ** math.floor(math.log2(float(scale)))) if recipe == "blockwise" else scale


def naive(values: torch.Tensor, recipe: str, dtype: torch.dtype, summed: int, weight: bool = False) -> torch.Tensor:
    """A matrix rounded to FP8 and back, block by block, float64."""
    largest, numbers = FORMATS[dtype]
    rows, columns = values.shape
    size = {"tensorwise": None, "blockwise": 128, "mxfp8": 32}[recipe]
    high, wide = (rows, columns) if size is None else (1, size) if summed == 1 else (size, 1)
    if weight and recipe == "blockwise":
        high, wide = size, size
    given, made = values.float().numpy(), np.empty((rows, columns))
    for row in range(0, rows, high):
        for column in range(0, columns, wide):
            place = np.s_[row : row + high, column : column + wide]
            scale = scale_of(float(np.abs(given[place]).max()), recipe, largest)
            # The kernel multiplies in float32, and so does what undoes it.
            made[place] = nearest(given[place] * scale, numbers).astype(np.float32) * np.float32(1 / scale)
    return torch.from_numpy(made)


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    """bf16 numbers of many sizes, a zero block, and one that is far larger."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, columns, generator=generator) * torch.randn(rows, 1, generator=generator).mul(4).exp2()
    made[:, : min(32, columns // 2)] = 0.0
    made[0, -1] = 3000.0
    return made.bfloat16()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("recipe, summed, weight", [
    ("tensorwise", 1, False), ("blockwise", 0, False), ("blockwise", 1, False), ("blockwise", 1, True),
    ("mxfp8", 0, False), ("mxfp8", 1, False)])
def test_rounding_is_the_reference_number_by_number(recipe, summed, weight, dtype):
    values = matrix(136, 130, 1)  # neither side is a number of whole blocks
    if recipe == "tensorwise":
        operand = whole(values, scale_from(values.abs().max().float(), dtype), dtype)
    else:
        size = 128 if recipe == "blockwise" else 32
        block = (size, size) if weight else (1, size) if summed == 1 else (size, 1)
        operand = in_blocks(values, block, recipe, dtype)
    found = operand.values_RC * operand.inverse
    assert torch.equal(found.double(), naive(values, recipe, dtype, summed, weight))


def test_scales_of_what_has_none_and_of_powers_of_two():
    amax = torch.tensor([0.0, torch.inf, torch.nan, 448.0, 1e-44])
    assert scale_from(amax, E4M3).tolist() == [1.0, 1.0, 1.0, 1.0, torch.finfo(torch.float32).max]
    # In a block of its own 450 has half the scale, and so the spacing of 32 above 256: it becomes 448.
    values = torch.tensor([[448.0, 450.0, 0.875, 0.0]]).t().bfloat16()
    for recipe in ("blockwise", "mxfp8"):
        assert in_blocks(values, (1, 1), recipe, E4M3).values_RC[:, 0].tolist() == [448.0, 448.0, 0.875, 0.0]


def emulated(recipe: str, **settings: object) -> Precision:
    return Precision(dtype="fp8", fp8_recipe=recipe, emulate=True, **settings)


def products(directory: str, recipe: str) -> dict[str, torch.Tensor]:
    """Operands of a linear of a model, its output and its gradients."""
    model = build(directory, Parallel(), emulated(recipe))
    linear = unwrap(model.chunks[0]).decoder.layers[0].mlp.linear_fc2
    x = matrix(24, linear.weight.shape[1], 2)[:, None].requires_grad_()
    output, _ = linear(x)
    dy = matrix(24, output.shape[-1], 3)[:, None]
    output.backward(dy)
    return {"x": x.detach()[:, 0], "w": linear.weight.detach(), "dy": dy[:, 0], "output": output.detach()[:, 0],
            "dx": x.grad[:, 0], "dw": linear.weight.grad}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    """A model whose widths every recipe takes, on one tensor rank and on two."""
    return str(make_llama(tmp_path_factory.mktemp("models") / "model", seed=5, hidden=64, heads=8, kv_heads=4))


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_all_three_products_take_the_rounded_operands(directory, recipe):
    [found] = run_ranks(1, products, directory, recipe)
    x, w, dy = (found[name] for name in ("x", "w", "dy"))
    dtype = E5M2 if recipe == "tensorwise" else E4M3
    pairs = {
        "output": (naive(x, recipe, E4M3, 1), naive(w, recipe, E4M3, 1, weight=True).t()),
        "dx": (naive(dy, recipe, dtype, 1), naive(w, recipe, E4M3, 0, weight=True)),
        "dw": (naive(dy, recipe, dtype, 0).t(), naive(x, recipe, E4M3, 0)),
    }
    for name, (one, other) in pairs.items():
        # Of what is exact: the sum's own rounding in float32, and the one of the result to bf16.
        allowed = 2.0**-8 * (one @ other).abs() + 1e-5 * one.abs() @ other.abs()
        assert ((found[name].double() - one @ other).abs() <= allowed).all(), name


# ----------------------------------------------------------------------------------------------------- delayed scaling
def histories(amaxes: list[list[list[float]]], length: int) -> list[list[float]]:
    """Forward scales of input and weight after each of some micro-batches, of which each rank has its own amaxes."""
    kept = AmaxHistories(length, dist.group.WORLD)
    linear, scales = kept.new(), []
    world()
    for input_amax, weight_amax in (step[dist.get_rank(dist.group.WORLD)] for step in amaxes):
        linear.input_scale(torch.tensor([0.5 * input_amax, -input_amax]))
        linear.scale_of_weight(torch.tensor([weight_amax]))
        kept.roll("forward")
        scales.append(linear.forward_scale_K.tolist())
    return scales


def test_delayed_scales_are_of_the_largest_amax_of_all_ranks_and_the_last_micro_batches():
    # The weight is seen once in a step; an operand that was not seen for the whole history keeps its scale.
    amaxes = [[[1.0, 7.0], [2.0, 3.5]], [[4.0, 9.0], [1.0, 9.0]], [[0.5, 9.0], [0.25, 9.0]], [[0.5, 9.0], [0.25, 9.0]]]
    expected = [[2.0, 7.0], [4.0, 7.0], [4.0, 7.0], [0.5, 7.0]]
    for scales in run_ranks(2, histories, amaxes, 2):
        assert scales == [[448 / amax for amax in step] for step in expected]


def own_amaxes(directory: str) -> dict[str, object]:
    """What a training leaves in the histories of a model's first linear, step by step, and what it has in all."""
    case = training(directory, Parallel(), emulated("delayed", amax_history=3))
    job = Job(case)
    seen: list[list[float]] = []
    linear = unwrap(job.student.chunks[0]).decoder.layers[0].self_attention.linear_qkv
    linear.register_forward_pre_hook(lambda module, arguments: seen.append(
        [float(values.detach().abs().max()) for values in (arguments[0], module.weight)]))
    scales = []
    for number in range(2):
        job.forward_backward(number)
        scales.append(linear.amaxes.forward_scale_K.tolist())
    states = amax_states(unwrap(job.student.chunks[0]), job.student.config)
    teacher = build(directory, Parallel(), case.precision, trained=False)
    return {"seen": seen, "scales": scales, "states": {name: tuple(values.shape) for name, values in states.items()},
            "teacher": (teacher.amaxes, unwrap(teacher.chunks[0]).decoder.layers[0].mlp.linear_fc1.emulation.recipe)}


def test_delayed_scaling_follows_micro_batches_and_is_the_trained_models_alone(directory):
    [found] = run_ranks(1, own_amaxes, directory)
    seen, per_step = found["seen"], 4
    assert len(seen) == 2 * per_step
    for step, (input_scale, weight_scale) in enumerate(found["scales"]):
        last = seen[: (step + 1) * per_step][-3:]
        assert input_scale == np.float32(448) / np.float32(max(input_amax for input_amax, _ in last))
        # Three micro-batches ago the weight was rounded, at the step's first one: the scale of then is kept.
        assert weight_scale == np.float32(448) / np.float32(seen[step * per_step][1])
    assert len(found["states"]) == 4 * 4 * 4  # layers, linears, scale and history of both passes
    assert set(found["states"].values()) == {(2,), (3, 2), (1,), (3, 1)}
    assert found["teacher"] == (None, "tensorwise")


# ----------------------------------------------------------------------------------------------------------- trainings
def training(directory: str, parallel: Parallel, precision: Precision) -> Distillation:
    return Distillation({"student": directory}, {"student": parallel}, {"student": 2}, SftObjective(),
                        tuple(make_groups(16, (Kind.CHOSEN,))), global_batch=8, steps=2, precision=precision)


def second_gradients(case: Distillation) -> tuple[float, list]:
    """Loss and gradients of a step that is done a second time: delayed scaling has its first scales by then."""
    job = Job(case)
    job.forward_backward(0)
    return job.forward_backward(0)["loss"], job.gradients()


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, by the norm of the expected ones."""
    off = sum(float((found[name] - expected[name]).norm()) ** 2 for name in expected)
    return math.sqrt(off / sum(float(values.norm()) ** 2 for values in expected.values()))


@pytest.fixture(scope="module")
def exact(directory) -> tuple[float, dict[str, torch.Tensor]]:
    [(loss, boxes)] = run_ranks(1, second_gradients, training(directory, Parallel(), Precision()))
    return loss, assemble([boxes])


DISTANCE = 0.65
"""Twice what was measured: 0.307 to 0.326. The model is random, so that a gradient is mostly noise to begin with."""


@pytest.mark.parametrize("ranks, parallel", [(1, Parallel()), (2, Parallel(tensor=2, sequence=True))],
                         ids=["tp1", "tp2 sp"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_near_float32s(directory, exact, recipe, ranks, parallel):
    results = run_ranks(ranks, second_gradients, training(directory, parallel, emulated(recipe)))
    off = distance(assemble([boxes for _, boxes in results]), exact[1])
    print(f"{recipe}, {ranks} ranks: gradient off by {off:.4f}, loss by {results[0][0] / exact[0] - 1:+.5f}")
    assert 0.01 < off < DISTANCE
    assert results[0][0] == pytest.approx(exact[0], rel=0.02)


def makes_of_linears(directory: str, precision: Precision, pipeline: int) -> list[str]:
    model = build(directory, Parallel(pipeline=pipeline), precision)
    return [type(layer.mlp.linear_fc1).__name__ for layer in unwrap(model.chunks[0]).decoder.layers]


def test_layers_at_both_ends_can_stay_bf16(directory):
    plain, rounding = "ColumnParallelLinear", RoundingColumnParallelLinear.__name__
    precision = emulated("tensorwise", first_last_bf16=1)
    assert run_ranks(1, makes_of_linears, directory, precision, 1) == [[plain, rounding, rounding, plain]]
    assert run_ranks(2, makes_of_linears, directory, precision, 2) == [[plain, rounding], [rounding, plain]]
