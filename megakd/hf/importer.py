"""Fills a model chunk's parameters from a Hugging Face directory. Each rank reads only what it holds; no collective.

Legend: V local vocabulary rows, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megakd.errors import ModelError
from megakd.hf.directory import open_tensors, tensor_files
from megakd.hf.families import Architecture
from megakd.hf.pieces import Piece, Shard, head_pieces, padded_vocab, parameter_shapes, pieces

_FLOATING = ("F64", "F32", "F16", "BF16")
_COMPARED_ROWS = 8192
"""Of two vocabularies, at a time."""


@torch.no_grad()
def load_parameters(
    directory: str | Path, architecture: Architecture, shard: Shard, parameters: Mapping[str, Tensor]
) -> None:
    """Fills the parameters of one chunk in place, casting to their dtype and zeroing padded rows and heads.

    Args:
        directory: Hugging Face directory with safetensors files.
        architecture: what its config.json says.
        shard: the part that the chunk holds.
        parameters: all of the chunk's parameters by megatron-core name, contiguous, on any device.

    Raises:
        ModelError: the parameters are not those of the shard, or the directory lacks a tensor, has one of another
            shape, or holds quantised ones.
    """
    check_parameters(architecture, shard, parameters)
    boxes = pieces(architecture, shard)
    covered = dict.fromkeys(parameters, 0)
    for box in boxes:
        covered[box.parameter] += box.elements
    for name, parameter in parameters.items():
        if covered[name] < parameter.numel():
            parameter.zero_()  # the rest is padding: vocabulary rows or heads
    _read(Path(directory), boxes, parameters)


def exact_parameters(directory: Path, architecture: Architecture, shard: Shard) -> Iterator[tuple[str, Tensor]]:
    """A chunk's parameters one after the other, in the table's order: name and values, float32 in host memory.

    Raises:
        ModelError: as `load_parameters`.
    """
    boxes: dict[str, list[Piece]] = {}
    for box in pieces(architecture, shard):
        boxes.setdefault(box.parameter, []).append(box)
    for name, shape in parameter_shapes(architecture, shard).items():
        values = torch.zeros(shape)
        _read(directory, boxes.get(name, []), {name: values})
        yield name, values


@torch.no_grad()
def load_head(
    directory: str | Path,
    architecture: Architecture,
    tensor_rank: int,
    tensor_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """One tensor rank's rows of the LM head (of the embedding, where tied) -> head_VH, padded rows zero.

    Raises:
        ModelError: as `load_parameters`.
    """
    rows = padded_vocab(architecture.vocab_size, tensor_size) // tensor_size
    head_VH = torch.zeros(rows, architecture.hidden_size, dtype=dtype, device=device)
    boxes = head_pieces(architecture, tensor_rank, tensor_size)
    _read(Path(directory), boxes, {box.parameter: head_VH for box in boxes})
    return head_VH


def check_parameters(architecture: Architecture, shard: Shard, parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are not exactly those of a shard.

    Raises:
        ModelError: naming the first parameters that are missing, unknown or of another shape.
    """
    expected = parameter_shapes(architecture, shard)
    missing = [name for name in expected if name not in parameters]
    unknown = [name for name in parameters if name not in expected]
    if missing or unknown:
        raise ModelError(
            f"the model's parameters are not those of {shard}: missing {_listed(missing)}; unknown {_listed(unknown)}"
        )
    for name, shape in expected.items():
        if tuple(parameters[name].shape) != shape:
            raise ModelError(f"parameter {name} has shape {tuple(parameters[name].shape)}; {shard} has {shape}")


def check_tied_head(directory: Path) -> None:
    """Refuses a tied model whose files hold a head that is not its embedding: nothing says which of the two it was
    trained with, and `load_parameters` reads the embedding alone. Files of Qwen3's smallest models hold the same twice.

    Raises:
        ModelError: the two differ.
    """
    files, names = tensor_files(directory), ("model.embed_tokens.weight", "lm_head.weight")
    if any(name not in files for name in names):
        return
    with open_tensors(files[names[0]]) as one, open_tensors(files[names[1]]) as other:
        embedding, head = one.get_slice(names[0]), other.get_slice(names[1])
        same, rows = embedding.get_shape() == head.get_shape(), embedding.get_shape()[0]
        parts = (slice(start, start + _COMPARED_ROWS) for start in range(0, rows, _COMPARED_ROWS))
        if not (same and all(torch.equal(embedding[part], head[part]) for part in parts)):
            raise ModelError(f"{directory}/config.json: tie_word_embeddings = True, but {names[1]} in its files is not "
                             f"{names[0]}. Write false in config.json, or take {names[1]} out of the files")


def _read(directory: Path, boxes: list[Piece], parameters: Mapping[str, Tensor]) -> None:
    files = tensor_files(directory)
    missing = sorted({box.hf_name for box in boxes if box.hf_name not in files})
    if missing:
        raise ModelError(f"{directory}: its files lack {_listed(missing)}. Give a directory with the whole model")
    by_file: dict[Path, list[Piece]] = {}
    for box in boxes:
        by_file.setdefault(files[box.hf_name], []).append(box)
    for path, its_boxes in by_file.items():
        with open_tensors(path) as file:
            stored = set(file.keys())
            for box in its_boxes:
                if box.hf_name not in stored:
                    raise ModelError(f"{path}: lacks {box.hf_name}, which the index puts there. Fetch the file again")
                tensor = file.get_slice(box.hf_name)
                shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                if shape != box.hf_shape:
                    raise ModelError(f"{path}: {box.hf_name} has shape {shape}; config.json means {box.hf_shape}")
                if dtype not in _FLOATING:
                    raise ModelError(f"{path}: {box.hf_name} has dtype {dtype}. Supported: {', '.join(_FLOATING)}")
                local = parameters[box.parameter].view(box.local_view)[box.local_index]
                local.copy_(tensor[box.hf_index].reshape(local.shape))


def _listed(names: list[str]) -> str:
    """A few of the names."""
    if not names:
        return "none"
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
