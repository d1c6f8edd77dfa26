"""AdamW on megatron-core's distributed optimizer: gradients and optimizer state are spread over data-parallel ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import megatron.core.optimizer
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from megakd.config_stages import Optimizer as OptimizerSettings
from megakd.hf.importer import exact_parameters
from megakd.hf.pieces import Piece, parameter_shapes
from megakd.mcore.model import Model, unwrap
from megakd.mcore.offload import OffloadedStates

logger = logging.getLogger("megakd")

STATES = ("param", "exp_avg", "exp_avg_sq")
"""What the optimizer keeps of each parameter, in float32: the master weight and Adam's two moments."""


def _with_states(method: Callable) -> Callable:
    """Has a method of `Trainer` find the optimizer's states on the device."""

    @wraps(method)
    def called(trainer: Trainer, *args: object) -> object:
        with trainer.states_at_hand():
            return method(trainer, *args)

    return called


@dataclass
class Trainer:
    """A model made ready to train: wrapped chunks, optimizer and schedule."""

    model: Model
    optimizer: DistributedOptimizer
    scheduler: OptimizerParamScheduler
    tokens: int = 0
    """That the model has worked through, prompts included; kept in checkpoints."""
    offloaded: OffloadedStates | None = None
    """Where the optimizer's states lie in the host's memory between steps."""

    def states_at_hand(self) -> AbstractContextManager[None]:
        """Has the optimizer's states on the device, where `offload` keeps them from it; may be nested."""
        return nullcontext() if self.offloaded is None else self.offloaded.fetched()

    def zero_grad(self) -> None:
        """Clears the gradient buffers; called before each step."""
        self.model.weights_changed()
        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @_with_states
    def step(self) -> float:
        """Clips, updates the parameters, advances the schedule; returns the gradient's norm before clipping.

        Collectives: the norm's sum over the world's shards; an all-gather of parameters over the data group, which
        with `overlap` goes on into the next forward pass.

        Raises:
            RuntimeError: the optimizer refused the step (non-finite gradient).
        """
        done, norm, _ = self.optimizer.step()
        if not done:
            raise RuntimeError("the optimizer refused the step: the gradient is not finite")
        self.scheduler.step(increment=1)
        return float(norm)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the coming step."""
        return self.optimizer.param_groups[0]["lr"]

    def slice_of(self, parameter: nn.Parameter) -> slice | None:
        """The part of a flattened parameter whose gradient and states this rank has; None where it has none."""
        for owner in self._distributed():
            if parameter in owner.model_param_group_index_map:
                where = owner._get_model_param_range_map(parameter)["param"]
                return slice(where.start, where.end)
        return None

    def states_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """This rank's slice (`slice_of`) of the parameter's `STATES`, to read or to copy into, inside of
        `states_at_hand`."""
        tensors = self._tensors_of(parameter)
        return {name: tensors[name] for name in STATES}

    def _master_of(self, parameter: nn.Parameter) -> Tensor:
        """This rank's slice of the master weight, which there is before the first step, too."""
        return self._tensors_of(parameter)["param"]

    def _tensors_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if self.offloaded is not None and not self.offloaded.at_hand:
            # Without memory behind them they end the process of who reads them.
            raise RuntimeError("the optimizer's states are in the host's memory: read them inside of states_at_hand")
        owner = next(owner for owner in self._distributed() if parameter in owner.model_param_group_index_map)
        return owner._get_main_param_and_optimizer_states(parameter)

    @_with_states
    def whole_parameters(self) -> list[dict[str, Tensor]]:
        """Each chunk's parameters as they are to be written, float32: the parameters themselves, or, where these are
        rounded ones, their master weights, in host memory of the ranks that write (data coordinate 0).

        Collectives: a SUM over the data group for each rounded parameter.
        """
        at = self.model.grid.at
        chunks = []
        for chunk in range(len(self.model.chunks)):
            whole: dict[str, Tensor] = dict(self.model.parameters_of(chunk))
            if self.model.dtype != torch.float32:
                for name, parameter in whole.items():
                    master = self._whole(parameter, self._master_of)
                    if at.data == 0 and at.context == 0:
                        whole[name] = master.cpu()
            chunks.append(whole)
        return chunks

    @_with_states
    @torch.no_grad()
    def fill_masters(self, directory: Path) -> None:
        """Has the master weights begin with the numbers of the model's files, which 16-bit parameters have rounded.

        A master that begins where its parameter stands has to be moved by half of the parameter's last place before
        anything changes: with float32 files and small learning rates the first steps would be lost, at every stage.

        Collectives: a broadcast of each parameter over the data group, float32.

        Raises:
            ModelError: the directory does not hold the model. `build_model` has read it, so only one that has changed.
        """
        if self.model.dtype == torch.float32:
            return
        group, architecture = self.model.grid.groups.dp_cp, self.model.architecture
        first = dist.get_rank(group) == 0
        for chunk, shard in enumerate(self.model.shards):
            parameters = self.model.parameters_of(chunk)
            names = ((name, None) for name in parameter_shapes(architecture, shard))
            for name, read in exact_parameters(directory, architecture, shard) if first else names:
                parameter = parameters[name]
                values = torch.empty(parameter.shape, device=parameter.device)
                if first:
                    values.copy_(read)
                dist.broadcast(values, group=group, group_src=0)
                if (owned := self.slice_of(parameter)) is not None:
                    self._master_of(parameter).copy_(values.view(-1)[owned])

    def _whole(self, parameter: nn.Parameter, slice_from: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """Something that each replica has of its own slice of a parameter, put together, float32.

        Collectives: a SUM over the data group.
        """
        full = torch.zeros(parameter.numel(), device=parameter.device)
        if (owned := self.slice_of(parameter)) is not None:
            full[owned] = slice_from(parameter)
        dist.all_reduce(full, group=self.model.grid.groups.dp_cp)
        return full.view(parameter.shape)

    def gradient_boxes(self) -> list[tuple[Piece, Tensor]]:
        """This rank's pieces of the complete gradient, after a forward and backward and before `step`.

        For comparing layouts. Collectives: a SUM over the data group for each parameter.
        """
        boxes = []
        for chunk in range(len(self.model.chunks)):
            whole = {}
            for name, parameter in self.model.parameters_of(chunk).items():
                # The distributed optimizer leaves each replica the sum for its own slice only.
                whole[name] = self._whole(parameter, lambda owner: owner.main_grad.view(-1)[self.slice_of(owner)])
            boxes += [(piece, whole[piece.parameter].view(piece.local_view)[piece.local_index].reshape(piece.hf_size))
                      for piece in self.model.pieces_of(chunk) if piece.primary]
        return boxes

    @property
    def steps_taken(self) -> int:
        """Adam's own step count."""
        for owner in self._distributed():
            for state in owner.optimizer.state.values():
                if "step" in state:  # torch's AdamW keeps it in the state, the fused ones in the group
                    return int(state["step"])
            for group in owner.optimizer.param_groups:
                if "step" in group:
                    return int(group["step"])
        return 0

    @_with_states
    def prepare_states(self, steps: int) -> None:
        """Allocates the moments and sets Adam's step count, so that saved states can be copied in."""
        for owner in self._distributed():
            for group in owner.optimizer.param_groups:
                # An update with rate and decay zero leaves the parameters as they are and makes the moments.
                kept = group["lr"], group["weight_decay"]
                group["lr"], group["weight_decay"] = 0.0, 0.0
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
                group["kept"] = kept
            owner.optimizer.step()
            owner.optimizer.zero_grad()
            for group in owner.optimizer.param_groups:
                group["lr"], group["weight_decay"] = group.pop("kept")
                if "step" in group:
                    group["step"] = steps
            for state in owner.optimizer.state.values():
                if "step" in state:
                    state["step"].fill_(steps)

    def set_schedule(self, steps: int) -> None:
        """Sets the schedule to where it stands after `steps` steps; it counts the coming one already."""
        self.scheduler.step(increment=steps + 1 - self.scheduler.num_steps)

    def gather_parameters(self) -> None:
        """Makes the parameters whole on every rank where `overlap` has left that to the next forward pass.

        For those who read parameters outside of one, and where replicas do not all run forward alike. Collectives: an
        all-gather of parameters over the data group.
        """
        for chunk in self.model.chunks:
            if chunk.ddp_config.overlap_param_gather:
                _gather(chunk)

    @_with_states
    def publish_parameters(self) -> None:
        """Copies the master weights into the model's parameters on every rank (after they were loaded).

        Collectives: an all-gather of parameters over the data group.
        """
        for owner in self._distributed():
            owner._copy_main_params_to_model_params()
        for chunk in self.model.chunks:
            _gather(chunk)

    def _distributed(self) -> list[DistributedOptimizer]:
        return self.optimizer.chained_optimizers


def _gather(chunk: DistributedDataParallel) -> None:
    """Gathers a chunk's parameters over the data group, here and now.

    With overlap megakd's is the only gather that no forward pass waits for, and megatron-core makes what FP8 weights
    have besides their numbers (a transpose, blocks by column) in that wait alone: gradients would be of older weights.
    """
    chunk.start_param_sync(force_sync=True)
    fp8 = [each for each in chunk.parameters() if is_float8tensor(each)]
    if chunk.ddp_config.overlap_param_gather and fp8:
        post_all_gather_processing(fp8)


def _add_up_in_place(chunk: DistributedDataParallel) -> None:
    """Has Transformer Engine's linears add their weights' gradients to megatron-core's sums (`main_grad`) in the
    products that make them: without rounding to 16 bits, nor a pass over the sums. megatron-core's hooks, which would
    add them, see that it has been done (`grad_added_to_main_grad`)."""
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def make_trainer(model: Model, settings: OptimizerSettings, steps: int) -> Trainer:
    """Wraps a model's chunks in DistributedDataParallel and makes its optimizer and cosine schedule of `steps`."""
    device = next(model.chunks[0].parameters()).device
    overlap = device.type == "cuda" if settings.overlap is None else settings.overlap
    wrapped = [
        DistributedDataParallel(
            config=model.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, overlap_param_gather=overlap,
                use_distributed_optimizer=True, fp8_param_gather=model.config.fp8_param,
            ),
            module=unwrap(chunk),
            disable_bucketing=index > 0,
            pg_collection=model.grid.groups,
        )
        for index, chunk in enumerate(model.chunks)
    ]
    for chunk in wrapped:
        _add_up_in_place(chunk)
    # megatron-core has chosen at its import: Transformer Engine's, else NVIDIA's apex's, else torch's.
    adam = megatron.core.optimizer.Adam
    logger.info("optimizer: %s.%s, exchanges between replicas %s%s", adam.__module__, adam.__qualname__,
                "overlapped" if overlap else "not overlapped",
                ", states in the host's memory between steps" if settings.offload else "")
    model.chunks[:] = wrapped
    model.config.finalize_model_grads_func = finalize_model_grads
    if overlap:
        model.config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=settings.lr, min_lr=settings.min_lr, weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1, adam_beta2=settings.beta2, adam_eps=settings.eps, clip_grad=settings.clip,
            bf16=model.dtype == torch.bfloat16, params_dtype=model.dtype, use_distributed_optimizer=True,
            # Blocks of FP8 weights have no flat views: the optimizer goes about them in another way.
            fp8_recipe=model.config.fp8_recipe if model.config.fp8_param else None,
            # Changes no gradient, but only with a loss scale does megatron-core look for gradients that are not finite.
            loss_scale=1.0,
        ),
        wrapped, use_gloo_process_groups=False, pg_collection=model.grid.groups,
    )
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=settings.lr, min_lr=settings.min_lr,
        # The decay ends one step after the last: a step at the final rate of zero would be wasted.
        lr_warmup_steps=round(settings.warmup * steps), lr_decay_steps=steps + 1, lr_decay_style="cosine",
        start_wd=settings.weight_decay, end_wd=settings.weight_decay, wd_incr_steps=steps, wd_incr_style="constant",
    )
    # It counts from 1, as a first step at rate zero would be wasted, too.
    scheduler.step(increment=1)
    offloaded = OffloadedStates(optimizer.chained_optimizers, device) if settings.offload else None
    return Trainer(model, optimizer, scheduler, offloaded=offloaded)
