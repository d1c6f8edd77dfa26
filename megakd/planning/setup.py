"""A training stage as the planner sees it: who takes part, in which layout, and how the loss uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from megakd.batch import Kind
from megakd.chunks import GRADIENT_CHUNKS
from megakd.config import Parallel
from megakd.hf.families import Architecture
from megakd.hf.pieces import Shard, chunk_layers, spec_of, stage_shards
from megakd.layout import Layout
from megakd.planning.work import Lengths, StepWork

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

    def layers_under_way(self, pipeline_rank: int, micro_batches: int) -> int:
        """Layer passes whose activations a stage holds at most: those of `warmup` chunk passes.

        Where its chunks differ, the schedule is followed for a round: `pipeline` micro-batches through each chunk,
        forward from the first and backward from the last; each backward pass frees a chunk's for the next forward pass.
        """
        passes, cut = self.warmup(pipeline_rank, micro_batches), self.layers_of(pipeline_rank)
        if min(cut) == max(cut):
            return passes * cut[0]
        stages, chunks = self.parallel.pipeline, self.parallel.virtual_pipeline
        held = [sum(cut[number // stages % chunks] for number in range(passes))]
        for back in range(min(micro_batches * chunks - passes, stages * chunks)):
            held.append(held[-1] - cut[-1 - back // stages % chunks] + cut[(passes + back) // stages % chunks])
        return max(held)

    def layers_of(self, pipeline_rank: int) -> tuple[int, ...]:
        """Layers of a stage's chunks."""
        stages = self.parallel.pipeline
        return chunk_layers(self.architecture.layers, stages, self.parallel.virtual_pipeline)[pipeline_rank::stages]

    @cached_property
    def alike(self) -> tuple[int, ...]:
        """For each stage the first one that has the same layers, and an embedding or a head as it does."""
        last, first = self.parallel.pipeline - 1, {}
        return tuple(first.setdefault((stage == 0, stage == last, self.layers_of(stage)), stage)
                     for stage in range(last + 1))

    @cached_property
    def fullest(self) -> tuple[int, ...]:
        """The stages that can need most memory in a training: the first and the last, and of those between one of each
        kind that has other layers than the first. Those alike hold less the later they stand."""
        ends = {0, self.parallel.pipeline - 1}
        return tuple(stage for stage in sorted(set(self.alike))
                     if stage in ends or self.layers_of(stage) != self.layers_of(0))


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
class Draws:
    """Answers that a training draws between its steps (`online`), whatever the layouts."""

    every: int
    """Steps between two draws."""
    own_prompts: int
    """That the trained model answers in a draw, over all replicas."""
    teacher_prompts: int
    """That the teacher answers in a draw."""
    n: int
    """Answers to each."""
    slots: int
    mean: Lengths
    longest: Lengths
    """The longest prompt, and the tokens that an answer may have."""
    sampled: bool
    """False: greedy."""
    top_k: int
    """0 keeps all tokens."""
    top_p: bool
    """Whether one is set."""
    mixed: bool
    """Whether the teacher draws some of the tokens of the trained model's answers: both then decode them in step."""
    valued: bool
    """Whether both models are asked afterwards how likely each token was."""
    replayed: tuple[str, ...] = ()
    """Of `student` and `teacher` those whose passes of one token a row are replayed (`decode_graphs`)."""
    teacher: RoleSetup | None = None
    """The teacher's layout where it answers and is none of `TrainingSetup.teachers`."""


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
    draws: Draws | None = None
    """What is drawn between the steps."""

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
