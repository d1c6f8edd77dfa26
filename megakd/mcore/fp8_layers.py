"""What FP8 asks of a model besides its layers: quantizers, whole blocks of rows, weights in FP8, and delayed scaling's
state.

Of Transformer Engine's modules it names nothing that could not be imported without it. Not yet run on a GPU.

Legend: S positions, B rows, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from megatron.core import fp8_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megakd.mcore.fp8_emulation import AmaxHistory

OPERANDS = {"forward": "scaling_fwd", "backward": "scaling_bwd"}
"""Passes and where a Transformer Engine module keeps their scales and histories (module/base.py, `fp8_meta`)."""
_UNFILLED = "_unfilled_shapes"


# ---------------------------------------------------------------------------------------------------------- quantizers
def make_quantizers(chunk: nn.Module, config: TransformerConfig) -> None:
    """Has Transformer Engine's linears make their quantizers, scales and histories now.

    They would in their first forward pass, and read then, never again, whether they are under sequence parallelism
    (`set_meta_tensor`). Where that pass is a rollout's, which runs without it, tensor ranks would later gather rows
    that each has scaled by itself, and multiply all of them by one rank's scale.
    """
    for layer in chunk.decoder.layers:
        # Without gradients leaving the region moves no history on.
        with torch.no_grad(), fp8_utils.get_fp8_context(config, layer.layer_number - 1):
            for module in _linears(layer):
                module.init_fp8_metadata()


def forget_delayed_scaling(config: TransformerConfig) -> None:
    """Has Transformer Engine let go of trained models that are no more, where scales follow from histories.

    It keeps the scales and histories of all linears that it has met, in the whole process, and reduces all of them,
    each over its own group, whenever a model's forward pass ends. Those of an earlier stage's layout would be waited
    for by ranks that never come.
    """
    if config.fp8 is not None and config.fp8_recipe == "delayed":
        fp8_utils.FP8GlobalStateManager.reset()


def quantizers_of(chunk: nn.Module) -> Iterator[object]:
    """The quantizers of Transformer Engine's linears in a chunk; none where none is in FP8."""
    for module in _linears(chunk):
        for quantizers in module.quantizers.values():
            yield from quantizers


def _linears(module: nn.Module) -> Iterator[nn.Module]:
    """Transformer Engine's linears in a module."""
    return (each for each in module.modules() if isinstance(each, fp8_utils.TE_LINEAR_TYPES))


# ---------------------------------------------------------------------------------------------------------------- rows
def fill_rows(linear: nn.Module, multiple: int) -> None:
    """Has a linear take any number of rows in passes without gradients, by zero rows up to a multiple.

    A training's micro-batches are filled up as a whole (`Model.padding`); a rollout decodes as many rows as it has
    slots in use. megatron-core's `prepare_model_for_fp8_inference` fills up S alone, which for one token a row is as
    many rows again as the block has. Zeros change no amax and no other row.
    """
    setattr(linear, _UNFILLED, [])

    def before(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        hidden_SBH, *others = arguments
        rows = hidden_SBH.shape[:-1].numel()
        if torch.is_grad_enabled() or rows % multiple == 0:
            return None
        getattr(module, _UNFILLED).append(hidden_SBH.shape[:-1])
        flat = hidden_SBH.reshape(rows, 1, hidden_SBH.shape[-1])
        return nn.functional.pad(flat, (0, 0, 0, 0, 0, -rows % multiple)), *others

    def after(module: nn.Module, _: object, result: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        if not getattr(module, _UNFILLED):
            return result
        shape = getattr(module, _UNFILLED).pop()
        output, bias = result
        return output[: shape.numel()].reshape(*shape, output.shape[-1]), bias

    linear.register_forward_pre_hook(before)
    linear.register_forward_hook(after)


def fill_rows_of(chunk: nn.Module, multiple: int) -> None:
    """`fill_rows` for Transformer Engine's linears in a chunk."""
    for module in _linears(chunk):
        fill_rows(module, multiple)


# ------------------------------------------------------------------------------------------------------------- weights
def readable(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model's files are read into: a tensor in host memory for each parameter that is held in FP8, as views of
    such a one do not write through; the parameters themselves otherwise."""
    return {name: torch.empty(parameter.shape, dtype=parameter.dtype) if fp8_utils.is_float8tensor(parameter)
            else parameter for name, parameter in parameters.items()}


@torch.no_grad()
def share(parameters: Mapping[str, Tensor], read: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Tells a data group what its first rank has read (`readable`); parameters in FP8 are rounded from it.

    What their modules have made of them so far comes from memory that nobody had written: delayed scaling's history
    would remember its largest number, and megatron-core would begin master weights with it.

    Collectives: a broadcast of each parameter over `group`.
    """
    first = dist.get_rank(group) == 0
    for name, parameter in parameters.items():
        if not fp8_utils.is_float8tensor(parameter):
            dist.broadcast(parameter.data, group=group, group_src=0)
            continue
        # One after the other: the device never holds a second copy of the model.
        plain = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        if first:
            plain.copy_(read[name])
        dist.broadcast(plain, group=group, group_src=0)
        if hasattr(parameter._quantizer, "amax"):
            parameter._quantizer.amax.zero_()  # a view of the newest row of the history; rounding raises it only
        parameter.copy_(plain)
        if hasattr(parameter, "_high_precision_init_val"):
            parameter._high_precision_init_val.copy_(plain)


# -------------------------------------------------------------------------------------------------------- amax history
def amax_states(chunk: nn.Module, config: TransformerConfig) -> dict[str, Tensor]:
    """Scales and histories of delayed scaling in a chunk by name, to read or to copy into; empty for other recipes.

    They are part of what a training is: without them a resumed one would round otherwise.
    """
    # "delayed" is also what megatron-core's configuration says where there is no FP8.
    delayed = config.fp8 is not None and config.fp8_recipe == "delayed"
    states: dict[str, Tensor] = {}
    for name, module in chunk.named_modules():
        if isinstance(module, AmaxHistory):
            states |= {f"{name}.{buffer}": values for buffer, values in module.named_buffers()}
        elif delayed and isinstance(module, fp8_utils.TE_LINEAR_TYPES):
            for operands, key in OPERANDS.items():
                states[f"{name}.{operands}_scale"] = module.fp8_meta[key].scale
                states[f"{name}.{operands}_history"] = module.fp8_meta[key].amax_history
    return states
