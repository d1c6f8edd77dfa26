"""A training stage as the planner sees it: who takes part, in which layout, and how the loss uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megakd.batch import Kind
from megakd.chunks import GRADIENT_CHUNKS
from megakd.config import Parallel
from megakd.hf.families import Architecture
from megakd.hf.pieces import Shard, spec_of, stage_shards
from megakd.layout import Layout
from megakd.planning.work import StepWork

STATISTICS_BYTES = 4
"""Of a number in losses, gradients and optimizer states: they are float32."""


@dataclass(frozen=True)
class RoleSetup:
    """One model and its layout."""

    architecture: Architecture
    parallel: Parallel
    world: int
    micro_batch: int
    recompute: str = "none"
    fp8_weights: bool = False
    """Whether its layers' weights are held in FP8 alone."""

    @property
    def layout(self) -> Layout:
        """Sizes of the axes over the world."""
        return Layout(self.world, self.parallel.tensor, self.parallel.pipeline, self.parallel.context)

    def shards(self, pipeline_rank: int, spec: str) -> list[Shard]:
        """The chunks of the first tensor rank of a pipeline stage, which has as much as any other."""
        return stage_shards(
            self.architecture, tensor_rank=0, tensor_size=self.parallel.tensor, pipeline_rank=pipeline_rank,
            pipeline_size=self.parallel.pipeline, virtual_pipeline=self.parallel.virtual_pipeline, spec=spec,
        )

    def warmup(self, pipeline_rank: int, micro_batches: int) -> int:
        """Chunk passes whose activations a stage holds at most, in megatron-core's 1F1B and interleaved schedules."""
        stages, chunks = self.parallel.pipeline, self.parallel.virtual_pipeline
        behind = stages - pipeline_rank - 1
        ahead = behind if chunks == 1 else 2 * behind + (chunks - 1) * stages
        return min(ahead + 1, micro_batches * chunks)


@dataclass(frozen=True)
class LossCall:
    """One call of a loss from hidden states."""

    models: int
    """Models whose logits of a chunk are held together."""
    sums: int
    """Numbers a token that are added up over the tensor ranks, besides one maximum for each model."""
    kinds: tuple[Kind, ...]
    """Kinds of the sequences at whose positions it is made."""
    gradient: str
    """When the student's gradient is made: with the `forward` pass, in the `backward` pass (for which the student's
    logits are made a second time), or `none`."""


@dataclass(frozen=True)
class TrainingSetup:
    """A training stage on a number of ranks."""

    trained: RoleSetup
    teachers: Mapping[str, RoleSetup]
    """Those that run beside the trained model."""
    losses: tuple[LossCall, ...]
    work: StepWork
    chunk_tokens: int
    dtype: str
    """Of `Precision`: fp32, bf16 or fp8."""
    device: str
    stored: Mapping[str, Architecture] = field(default_factory=dict)
    """Roles whose hidden states are read from disk: they run nowhere, but the loss has their heads."""
    overlap: bool = True
    """Gradients travel beside the backward pass, as far as the cluster's description says that they can. New
    parameters are counted as if nothing hid them. Buffers are the same with and without."""
    offload: bool = False
    """The optimizer's states are on the device during its step alone."""

    @property
    def heads(self) -> dict[str, Architecture]:
        """The models whose heads and hidden states the loss is given besides the trained one's."""
        return {role: teacher.architecture for role, teacher in self.teachers.items()} | dict(self.stored)

    @property
    def spec(self) -> str:
        """Layer modules, as `build_model` chooses them."""
        return spec_of(self.device, emulated=False)

    @property
    def parameter_bytes(self) -> int:
        """Of a model's parameters and activations."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def gradient_apart(self) -> bool:
        """Whether the gradient by the logits has memory of its own, in 16 bits: with CUDA's kernels."""
        return self.device != "cpu" and self.parameter_bytes == 2

    @property
    def gradient_tokens(self) -> int:
        """Tokens of which d(hidden) and d(head) are made together."""
        return self.chunk_tokens * (GRADIENT_CHUNKS if self.gradient_apart else 1)
