"""Writes a model that is spread over ranks as a Hugging Face directory, one tensor at a time.

The first tensor rank of each pipeline stage gathers the stage's tensors and writes files of its own. Which tensor goes
into which file follows from the architecture and the pipeline alone, so every rank knows all file names without asking.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.errors import ModelError
from megakd.hf.directory import (
    SINGLE_FILE,
    copy_companions,
    finish_directory,
    partial_directory,
    start_directory,
    tensor_bytes,
    write_config,
    write_index,
    write_safetensors,
)
from megakd.hf.families import Architecture
from megakd.hf.importer import check_parameters
from megakd.hf.pieces import Piece, Shard, pieces, stage_shards
from megakd.layout import Coordinates, Layout

MAX_SHARD_BYTES = 5 * 2**30


@dataclass(frozen=True)
class ExportTarget:
    """What is written, and where."""

    directory: Path
    """Must not exist yet. Its parent is a folder that all ranks see."""
    source: Path
    """The Hugging Face directory whose config.json, tokenizer and generation settings are taken over."""
    dtype: torch.dtype
    """float32, bfloat16 or float16."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """Largest safetensors file; a tensor that is larger gets a file of its own."""


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file: its name, the pipeline stage that writes it, and its tensors in their order."""

    name: str
    stage: int
    shapes: Mapping[str, tuple[int, ...]]


def plan_files(
    architecture: Architecture, pipeline: int, virtual_pipeline: int, dtype: torch.dtype, max_shard_bytes: int
) -> list[PlannedFile]:
    """The files of a model, the same on every rank: each stage fills files of at most `max_shard_bytes`."""
    contents: list[tuple[int, dict[str, tuple[int, ...]]]] = []
    for stage in range(pipeline):
        shards = stage_shards(
            architecture,
            tensor_rank=0,
            tensor_size=1,
            pipeline_rank=stage,
            pipeline_size=pipeline,
            virtual_pipeline=virtual_pipeline,
            spec="local",
        )
        filled = None
        for piece in (piece for shard in shards for piece in pieces(architecture, shard) if piece.primary):
            size = tensor_bytes(piece.hf_shape, dtype)
            if filled is None or filled + size > max_shard_bytes:
                contents.append((stage, {}))
                filled = 0
            contents[-1][1][piece.hf_name] = piece.hf_shape
            filled += size
    if len(contents) == 1:
        return [PlannedFile(SINGLE_FILE, *contents[0])]
    count = len(contents)
    return [
        PlannedFile(f"model-{number:05d}-of-{count:05d}.safetensors", stage, shapes)
        for number, (stage, shapes) in enumerate(contents, start=1)
    ]


@torch.no_grad()
def export_model(
    target: ExportTarget,
    architecture: Architecture,
    shards: Sequence[Shard],
    parameters_per_chunk: Sequence[Mapping[str, Tensor]],
    *,
    layout: Layout,
    at: Coordinates,
    tp_group: dist.ProcessGroup | None,
    barrier_group: dist.ProcessGroup | None,
) -> None:
    """Writes the model and returns when the directory has its final name.

    The ranks with data and context coordinate 0 write; the others hold the same parameters and only wait. A writer
    holds one Hugging Face tensor in host memory at a time. Vocabulary and head padding is left out.

    Args:
        target: where to and how.
        architecture: the model as trained; config.json gets its number of layers.
        shards: this rank's chunks.
        parameters_per_chunk: all parameters of each chunk by megatron-core name, in host memory or on this rank's
            device.
        layout: the role's layout.
        at: this rank's place in it.
        tp_group: this rank's tensor group, in the order of tensor ranks; None where the tensor size is 1.
        barrier_group: all ranks that call, the ranks of one copy of the model at least; None for a single process.

    Collectives: one send a box to the first rank of `tp_group`; three barriers of `barrier_group`.

    Raises:
        ModelError: the directory is there already, or the parameters are not those of the shards.
    """
    if target.directory.exists():
        raise ModelError(f"{target.directory} is there already, and is not replaced. Remove it or choose another name")
    for shard, parameters in zip(shards, parameters_per_chunk, strict=True):
        check_parameters(architecture, shard, parameters)
    files = plan_files(architecture, layout.pipeline, len(shards), target.dtype, target.max_shard_bytes)
    writes = at.data == 0 and at.context == 0
    is_root = writes and at.tensor == 0 and at.pipeline == 0

    if is_root:
        start_directory(target.directory)
    _barrier(barrier_group)
    if writes:
        _write_stage(target, architecture, shards, parameters_per_chunk, files, layout, at, tp_group)
    _barrier(barrier_group)
    if is_root:
        partial = partial_directory(target.directory)
        if len(files) > 1:
            total = sum(tensor_bytes(shape, target.dtype) for file in files for shape in file.shapes.values())
            write_index(partial, {file.name: file.shapes for file in files}, total)
        write_config(target.source, partial, architecture.layers, target.dtype)
        copy_companions(target.source, partial)
        finish_directory(target.directory)
    _barrier(barrier_group)


def _write_stage(
    target: ExportTarget,
    architecture: Architecture,
    shards: Sequence[Shard],
    parameters_per_chunk: Sequence[Mapping[str, Tensor]],
    files: list[PlannedFile],
    layout: Layout,
    at: Coordinates,
    tp_group: dist.ProcessGroup | None,
) -> None:
    """Writes this stage's files on its first tensor rank; the other tensor ranks send their boxes in the same order."""
    # Box of each tensor rank in each tensor, with the chunk that holds it: every tensor rank computes all of them.
    boxes: dict[str, list[tuple[int, int, Piece]]] = {}
    for tensor_rank in range(layout.tensor):
        their_shards = stage_shards(
            architecture,
            tensor_rank=tensor_rank,
            tensor_size=layout.tensor,
            pipeline_rank=at.pipeline,
            pipeline_size=layout.pipeline,
            virtual_pipeline=len(shards),
            spec=shards[0].spec,
        )
        for chunk, shard in enumerate(their_shards):
            for piece in pieces(architecture, shard):
                if piece.primary:
                    boxes.setdefault(piece.hf_name, []).append((tensor_rank, chunk, piece))

    def local_box(chunk: int, piece: Piece) -> Tensor:
        parameter = parameters_per_chunk[chunk][piece.parameter].detach()
        box = parameter.view(piece.local_view)[piece.local_index].to(target.dtype)
        return box.reshape(piece.hf_size).contiguous()

    def gathered(names: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
        for name, shape in names.items():
            whole = torch.empty(shape, dtype=target.dtype)
            for tensor_rank, chunk, piece in boxes[name]:
                if tensor_rank == 0:
                    whole[piece.hf_index] = local_box(chunk, piece).cpu()
                else:
                    whole[piece.hf_index] = _receive(piece, target.dtype, tensor_rank, tp_group).cpu()
            yield whole

    for file in files:
        if file.stage != at.pipeline:
            continue
        if at.tensor == 0:
            path = partial_directory(target.directory) / file.name
            write_safetensors(path, file.shapes, target.dtype, gathered(file.shapes))
        else:
            for name in file.shapes:
                for tensor_rank, chunk, piece in boxes[name]:
                    if tensor_rank == at.tensor:
                        _send(local_box(chunk, piece), tp_group)


def _send(box: Tensor, group: dist.ProcessGroup) -> None:
    # As bytes: no backend has to know the dtype.
    dist.send(box.flatten().view(torch.uint8).to(_memory_of(group)), group=group, group_dst=0)


def _memory_of(group: dist.ProcessGroup) -> str:
    """What a group sends from: host memory under gloo, this rank's GPU under NCCL. Parameters may lie in either."""
    return "cpu" if dist.get_backend(group) == "gloo" else "cuda"


def _receive(piece: Piece, dtype: torch.dtype, source: int, group: dist.ProcessGroup) -> Tensor:
    data = torch.empty(piece.elements * dtype.itemsize, dtype=torch.uint8, device=_memory_of(group))
    dist.recv(data, group=group, group_src=source)
    return data.view(dtype).view(piece.hf_size)


def _barrier(group: dist.ProcessGroup | None) -> None:
    if group is not None:
        dist.barrier(group=group)
