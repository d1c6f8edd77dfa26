"""Files of a Hugging Face model directory: finding tensors, writing safetensors in a stream, taking over the rest.

A directory is written beside its final name and renamed when it is complete, so that a directory of the final name is
always whole.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megakd.disk import sync
from megakd.errors import ModelError
from megakd.hf.families import read_config

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
COMPANIONS = (  # patterns of the files that belong to a model besides its weights and config.json
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
)

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32"}


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def tensor_files(directory: str | Path) -> dict[str, Path]:
    """The file of each tensor in a directory with one model.safetensors or with an index.

    Raises:
        ModelError: neither is there, or a file that the index names is missing or cannot be read.
    """
    directory = Path(directory)
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ModelError(f"{index}: not an index of safetensors files ({error!r})") from error
        missing = sorted({name for name in weight_map.values() if not (directory / name).is_file()})
        if missing:
            raise ModelError(f"{index}: names files that are not there: {', '.join(missing)}. Fetch them")
        return {tensor: directory / name for tensor, name in weight_map.items()}
    if single.is_file():
        with open_tensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    raise ModelError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} there. Give a directory that has one")


def open_tensors(path: Path):
    """`safe_open` of a file, with an error that names the file."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read as a safetensors file ({error})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def partial_directory(final: Path) -> Path:
    """The name under which `final` is written until it is complete."""
    return final.with_name(final.name + ".partial")


def start_directory(final: Path) -> Path:
    """Makes the empty folder that will become `final`; what an interrupted run left of it is removed."""
    partial = partial_directory(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_directory(final: Path) -> None:
    """Gives the folder its final name. Its files must be complete."""
    partial = partial_directory(final)
    for path in (*partial.iterdir(), partial):
        sync(path)
    partial.rename(final)
    sync(final.parent)


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterable[Tensor]
) -> None:
    """Writes a safetensors file, holding one tensor at a time.

    Args:
        path: the file.
        shapes: name and shape of each tensor, in the order of `tensors`.
        dtype: float32, bfloat16 or float16.
        tensors: as many tensors, in that dtype, on any device.
    """
    with path.open("wb") as file:
        file.write(safetensors_header({name: (dtype, shape) for name, shape in shapes.items()}))
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            assert tuple(tensor.shape) == shape and tensor.dtype == dtype, (name, tensor.shape, tensor.dtype)
            file.write(bytes_of(tensor))
        file.flush()
        os.fsync(file.fileno())


def safetensors_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """The beginning of a safetensors file whose tensors, by name, follow without gaps in this order.

    The format: 8 bytes with the little-endian length of the header, the header as JSON padded to a multiple of 8
    bytes, then the tensors' bytes (https://github.com/huggingface/safetensors, README "Format").
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + tensor_bytes(shape, dtype)
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes as they stand in a file."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def tensor_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor in a file."""
    return math.prod(shape) * dtype.itemsize


def write_index(directory: Path, names: Mapping[str, Iterable[str]], total_bytes: int) -> None:
    """Writes the index of a directory with several files (file name -> its tensors)."""
    weight_map = {tensor: name for name, tensors in names.items() for tensor in tensors}
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def write_config(source: Path, target: Path, layers: int, dtype: torch.dtype) -> None:
    """Writes config.json as in `source`, with the number of layers and the dtype of what was written."""
    config = read_config(source)
    config["num_hidden_layers"] = layers
    if "layer_types" in config and config["layer_types"] is not None:
        # One entry a layer; `Architecture.read` accepts nothing but full attention.
        config["layer_types"] = ["full_attention"] * layers
    key = "torch_dtype" if "torch_dtype" in config else "dtype"  # before transformers 5, and since
    config[key] = str(dtype).removeprefix("torch.")
    write_json(target / "config.json", config)


def copy_companions(source: Path, target: Path) -> None:
    """Copies the tokenizer's files and generation_config.json, where the source has them."""
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def write_json(path: Path, value: object) -> None:
    """Writes a value as JSON in the style of transformers."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
