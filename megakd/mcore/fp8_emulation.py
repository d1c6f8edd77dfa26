"""FP8 arithmetic without FP8 hardware: linears whose products take operands that were rounded to FP8.

Each of a linear's three products takes the numbers that Transformer Engine 2.11 would give its kernel, and adds up in
float32; everything else (norms, attention, residual stream, heads, losses) stays as it is. It says what a recipe does
to a training, nothing about speed.

  product                    operands, both with their scales along the side that is summed over
  output_TO = x_TI w_OI'     input and weight
  dx_TI = dy_TO w_OI         output's gradient and weight
  dw_OI = dy_TO' x_TI        output's gradient and input

Formats: input and weight E4M3; gradient E5M2 under tensorwise and delayed ("hybrid"), E4M3 under blockwise and mxfp8
(common/recipe/__init__.py: `Float8CurrentScaling`, `DelayedScaling`, `Float8BlockScaling`, `MXFP8BlockScaling`).

Scales: 448 (E4M3) or 57344 (E5M2) by the largest absolute number, amax. In the order of the recipes:
- tensorwise: amax of the tensor as the product has it (`Float8CurrentScalingQuantizer`). With tensor parallelism an
  input and a gradient are as wide as the rank's product; under sequence parallelism they are the gathered ones:
  module/linear.py, `_customize_quantizers_float8_current_scaling`, reduces the amax of a column-parallel linear's
  input and of a row-parallel linear's output gradient over the tensor group, which is the same. Weights have the amax
  of their own shard, everywhere.
- delayed: see `AmaxHistories`.
- blockwise: a scale for 1 x 128 numbers of input and gradient along the summed side, and for 128 x 128 of the weight,
  rounded down to a power of two (common/recipe/recipe_common.cuh, `compute_scale_from_amax`). No epsilon.
- mxfp8: a scale for 32 numbers along the summed side of each operand, 2 ^ -ceil(log2(amax / 448))
  (common/util/ptx.cuh, `float_to_e8m0`).
The two directions of a block-scaled tensor are rounded apart, each from the unrounded numbers.

What differs from a GPU: the order of sums; a norm's output is bf16 before it is rounded (under some recipes
layernorm_linear.py rounds it as the norm's kernel has it); no row is filled up, so a last block may be a short one;
under sequence parallelism blocks along the rows may span two ranks' rows, which on a GPU are whole blocks
(`check_precision.GATHERED_ROWS`).

Legend: T rows (tokens), I inputs and O outputs of a linear on this rank; R, C rows and columns of any matrix; L length
of a history, K operands in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GRADIENT_FORMATS = {"tensorwise": E5M2, "delayed": E5M2, "blockwise": E4M3, "mxfp8": E4M3}
BLOCKS = {"blockwise": 128, "mxfp8": 32}
"""Numbers that share a scale, of the recipes that have more than one for a tensor."""
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Operand:
    """A matrix of FP8 numbers, in float32."""

    values_RC: Tensor
    """Those of blocks are divided by their scales again, which are powers of two: nothing is rounded by it."""
    inverse: Tensor
    """1 / scale of the whole tensor, float32; 1 where blocks have scales."""


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 numbers as the nearest of an FP8 format, in float32; larger ones than it has become its largest."""
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype).float()


def scale_from(amax: Tensor, dtype: torch.dtype, largest_scale: float = _LARGEST_FLOAT32) -> Tensor:
    """The scale, or scales, that make `amax` (float32) the largest number of a format; 1 for zero and what is not
    finite."""
    scale = (torch.finfo(dtype).max / amax).clamp(max=largest_scale)
    return torch.where((amax > 0) & amax.isfinite(), scale, torch.ones_like(scale))


def whole(values_RC: Tensor, scale: Tensor, dtype: torch.dtype) -> Operand:
    """A matrix with one scale (float32, 0-d)."""
    return Operand(rounded(values_RC.float() * scale, dtype), scale.reciprocal())


def in_blocks(values_RC: Tensor, block: tuple[int, int], recipe: str, dtype: torch.dtype) -> Operand:
    """A matrix with a scale for each block of `block` rows x columns; at the edges a block may be smaller."""
    rows, columns = values_RC.shape
    filled = nn.functional.pad(values_RC.float(), (0, -columns % block[1], 0, -rows % block[0]))
    tiles = filled.view(filled.shape[0] // block[0], block[0], filled.shape[1] // block[1], block[1])
    amax = tiles.abs().amax((1, 3), keepdim=True)
    if recipe == "blockwise":
        scale = _power_of_two(amax, dtype, torch.finfo(values_RC.dtype).max)
    else:
        scale = _e8m0(amax, dtype)
    values = (rounded(tiles * scale, dtype) / scale).view(filled.shape)
    return Operand(values[:rows, :columns], values.new_ones(()))


def _power_of_two(amax: Tensor, dtype: torch.dtype, largest_scale: float) -> Tensor:
    """`scale_from`, rounded down to a power of two."""
    _, exponent = torch.frexp(scale_from(amax, dtype, largest_scale))
    return torch.ldexp(torch.ones_like(amax), exponent - 1)


def _e8m0(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest power of two that keeps `amax` within the format. As the kernel does it: the quotient is rounded to
    float32 before its logarithm is rounded up; 1 for zero."""
    mantissa, exponent = torch.frexp(amax * torch.tensor(1.0 / torch.finfo(dtype).max))
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-126, 127)
    return torch.where(amax > 0, torch.ldexp(torch.ones_like(amax), -exponent), torch.ones_like(amax))


def product(one_RK: Operand, other_KC: Tensor, inverse: Tensor) -> Tensor:
    """one x other -> [R, C] float32, both operands' scales undone after the sum, as the kernels do it."""
    return (one_RK.values_RC @ other_KC) * (one_RK.inverse * inverse)


# ------------------------------------------------------------------------------------------------------------ scaling
class AmaxHistory(nn.Module):
    """Delayed scaling of one linear: scales and histories of its operands (`DelayedScalingRecipeState`).

    Buffers, float32: scale_K and history_LK of the forward pass (K: input, weight) and of the backward pass (K: the
    output's gradient). Row 0 of a history is what is being recorded.
    """

    def __init__(self, length: int):
        super().__init__()
        for name, operands in (("forward", 2), ("backward", 1)):
            self.register_buffer(f"{name}_scale_K", torch.ones(operands))
            self.register_buffer(f"{name}_history_LK", torch.zeros(length, operands))
        self.weight_scale: Tensor | None = None

    def input_scale(self, values: Tensor) -> Tensor:
        """The scale of an input, whose amax is recorded."""
        return self._scale(self.forward_scale_K, self.forward_history_LK, 0, values)

    def scale_of_weight(self, values: Tensor) -> Tensor:
        """The scale of the weight: rounded once for all micro-batches of a step, its amax is recorded once."""
        if self.weight_scale is None:
            self.weight_scale = self._scale(self.forward_scale_K, self.forward_history_LK, 1, values)
        return self.weight_scale

    def gradient_scale(self, values: Tensor) -> Tensor:
        """The scale of an output's gradient, whose amax is recorded."""
        return self._scale(self.backward_scale_K, self.backward_history_LK, 0, values)

    @staticmethod
    def _scale(scale_K: Tensor, history_LK: Tensor, operand: int, values: Tensor) -> Tensor:
        history_LK[0, operand] = torch.maximum(history_LK[0, operand], values.abs().max().float())
        return scale_K[operand].clone()

    def roll(self, name: str, dtype: torch.dtype) -> None:
        """Makes scales of the largest of a pass's histories, drops its oldest row and begins a new one. An operand
        that has not been seen within the history keeps its scale."""
        scale_K, history_LK = getattr(self, f"{name}_scale_K"), getattr(self, f"{name}_history_LK")
        amax_K = history_LK.amax(0)
        seen = (amax_K > 0) & amax_K.isfinite()
        scale_K.copy_(torch.where(seen, scale_from(amax_K, dtype), scale_K))
        history_LK.copy_(history_LK.roll(-1, 0))
        history_LK[0] = 0.0


@dataclass
class AmaxHistories:
    """Delayed scaling of a model's chunks on this rank (quantization.py, `FP8GlobalStateManager`).

    After the forward pass of each micro-batch through a chunk (the outermost `autocast` is left) the forward histories
    of all chunks are rolled on, and after its backward pass (that of the chunk's first linear ends) the backward ones;
    not in passes without gradients. Before that the current amaxes are reduced over the tensor and data group
    (`get_amax_reduction_group`), so that scales are the same on all ranks that have a stage.
    """

    length: int
    group: dist.ProcessGroup
    linears: list[AmaxHistory] = field(default_factory=list)

    def new(self) -> AmaxHistory:
        """The history of one more linear."""
        self.linears.append(AmaxHistory(self.length))
        return self.linears[-1]

    @torch.no_grad()
    def roll(self, name: str) -> None:
        """Rolls the histories of a pass, "forward" or "backward". Collectives: one MAX over the group."""
        current = [getattr(linear, f"{name}_history_LK")[0] for linear in self.linears]
        amaxes = torch.cat(current)
        dist.all_reduce(amaxes, dist.ReduceOp.MAX, group=self.group)
        for row, amax in zip(current, amaxes.split([len(row) for row in current]), strict=True):
            row.copy_(amax)
        for linear in self.linears:
            linear.roll(name, E4M3 if name == "forward" else E5M2)

    def weights_changed(self) -> None:
        """Has the weights rounded anew, with the scales of then. Called before a step and before answers are drawn."""
        for linear in self.linears:
            linear.weight_scale = None

    def follow(self, block: nn.Module) -> None:
        """Rolls the histories on as a chunk's transformer block goes forward and backward."""

        def after_forward(*_: object) -> None:
            if torch.is_grad_enabled():
                self.roll("forward")

        block.register_forward_hook(after_forward)
        block.layers[0].self_attention.linear_qkv.ends_backward = True


@dataclass(frozen=True)
class Emulation:
    """How the linears of a model round."""

    recipe: str
    """Of `Precision.fp8_recipe`."""
    histories: AmaxHistories | None
    """Of delayed scaling; None otherwise."""


# ------------------------------------------------------------------------------------------------------------ linears
class _Products(torch.autograd.Function):
    """The products of a linear on this rank, without any message."""

    @staticmethod
    def forward(ctx, input_: Tensor, weight_OI: Tensor, bias_O: Tensor | None, linear: _Rounding) -> Tensor:
        """input_ [..., I] -> [..., O] in its dtype."""
        input_TI = input_.reshape(-1, input_.shape[-1])
        scales = linear.forward_scales(input_TI, weight_OI)
        x_TI = linear.operand(input_TI, E4M3, scales[0], summed=1)
        w_OI = linear.operand(weight_OI, E4M3, scales[1], summed=1, weight=True)
        output_TO = product(x_TI, w_OI.values_RC.t(), w_OI.inverse)
        if bias_O is not None:
            output_TO = output_TO + bias_O.float()
        ctx.linear = linear
        ctx.save_for_backward(input_, weight_OI, *scales)
        return output_TO.to(input_.dtype).view(*input_.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        """-> gradients of input (its dtype), weight and bias (the weight's)."""
        linear, (input_, weight_OI, *scales) = ctx.linear, ctx.saved_tensors
        dy_TO = gradient.reshape(-1, gradient.shape[-1])
        dtype, scale = GRADIENT_FORMATS[linear.emulation.recipe], linear.backward_scale(dy_TO)
        dx, dw_OI, db_O = None, None, None
        if ctx.needs_input_grad[0]:
            w_OI = linear.operand(weight_OI, E4M3, scales[1], summed=0, weight=True)
            dx_TI = product(linear.operand(dy_TO, dtype, scale, summed=1), w_OI.values_RC, w_OI.inverse)
            dx = dx_TI.to(input_.dtype).view(input_.shape)
        if ctx.needs_input_grad[1]:
            x_TI = linear.operand(input_.reshape(-1, input_.shape[-1]), E4M3, scales[0], summed=0)
            dy = linear.operand(dy_TO, dtype, scale, summed=0)
            dw_OI = product(Operand(dy.values_RC.t(), dy.inverse), x_TI.values_RC, x_TI.inverse).to(weight_OI.dtype)
        if ctx.needs_input_grad[2]:
            db_O = dy_TO.float().sum(0).to(weight_OI.dtype)
        if linear.ends_backward:
            linear.emulation.histories.roll("backward")
        return dx, dw_OI, db_O, None


class _Rounding:
    """What the two linears below share: megatron-core calls `_forward_impl` for their product."""

    emulation: Emulation
    ends_backward = False
    """Whether its backward pass is a chunk's last, after which delayed scaling goes on."""

    def round_by(self, emulation: Emulation) -> None:
        """Says how; called once, when the linear is made."""
        self.emulation = emulation
        self.amaxes = emulation.histories.new() if emulation.histories is not None else None

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, allreduce_dgrad: bool,
                      sequence_parallel: bool, tp_group: dist.ProcessGroup | None, **_: object) -> Tensor:
        """Collectives: those of megatron-core's own products, over `tp_group`: under sequence parallelism the input is
        gathered and its gradient reduce-scattered, otherwise the gradient is summed."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        return _Products.apply(input, weight, bias, self)

    def forward_scales(self, input_TI: Tensor, weight_OI: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Scales of the whole input and weight, or None where blocks have theirs."""
        if self.emulation.recipe in BLOCKS:
            return None, None
        if self.amaxes is not None:
            return self.amaxes.input_scale(input_TI), self.amaxes.scale_of_weight(weight_OI)
        return tuple(scale_from(values.abs().max().float(), E4M3) for values in (input_TI, weight_OI))

    def backward_scale(self, dy_TO: Tensor) -> Tensor | None:
        """The same of the output's gradient."""
        if self.emulation.recipe in BLOCKS:
            return None
        if self.amaxes is not None:
            return self.amaxes.gradient_scale(dy_TO)
        return scale_from(dy_TO.abs().max().float(), GRADIENT_FORMATS[self.emulation.recipe])

    def operand(self, values_RC: Tensor, dtype: torch.dtype, scale: Tensor | None, *, summed: int,
                weight: bool = False) -> Operand:
        """A matrix for a product that sums over its axis `summed`."""
        recipe = self.emulation.recipe
        if scale is not None:
            return whole(values_RC, scale, dtype)
        size = BLOCKS[recipe]
        if weight and recipe == "blockwise":
            return in_blocks(values_RC, (size, size), recipe, dtype)
        return in_blocks(values_RC, (1, size) if summed == 1 else (size, 1), recipe, dtype)


class RoundingColumnParallelLinear(_Rounding, ColumnParallelLinear):
    """megatron-core's linear whose outputs the tensor ranks share out, with FP8 operands."""

    def __init__(self, *arguments: object, emulation: Emulation, **options: object):
        super().__init__(*arguments, **options)
        self.round_by(emulation)


class RoundingRowParallelLinear(_Rounding, RowParallelLinear):
    """megatron-core's linear whose inputs the tensor ranks share out, with FP8 operands."""

    def __init__(self, *arguments: object, emulation: Emulation, **options: object):
        super().__init__(*arguments, **options)
        self.round_by(emulation)
