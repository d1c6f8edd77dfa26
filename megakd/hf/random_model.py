"""Hugging Face directories of random models, for measurements of what does not depend on what a model has learned."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor

from megakd.hf.directory import write_json, write_safetensors
from megakd.hf.families import FAMILIES, Architecture
from megakd.hf.pieces import Shard, pieces


def write_random_model(directory: Path, architecture: Architecture, seed: int, dtype: torch.dtype = torch.float32,
                       device: str = "cpu") -> None:
    """Writes config.json and weights ~ N(0, 0.02), those of norms being 1; makes the folder if need be.

    Args:
        directory: the folder.
        architecture: its family and sizes, without a scaling of the rotary frequencies.
        seed: of the weights.
        dtype: of the weights.
        device: where they are drawn; a GPU takes seconds for billions, and draws others than a CPU.
    """
    a, family = architecture, FAMILIES[architecture.family]
    # What every family has so is left out.
    features = {field: value for field, value in family.required.items()
                if field not in ("partial_rotary_factor", "quantization_config")}
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", {
        "model_type": a.family, "architectures": [family.model_class], **features,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "hidden_size": a.hidden_size, "num_hidden_layers": a.layers, "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads, "head_dim": a.head_dim, "intermediate_size": a.ffn_size,
        "vocab_size": a.vocab_size, "rms_norm_eps": a.norm_eps, "rope_theta": a.rope_theta, "rope_scaling": None,
        "tie_word_embeddings": a.tied_embeddings, "max_position_embeddings": a.max_positions,
    })
    whole = Shard(0, 1, 0, a.layers, embedding=True, head=True, spec="local")
    shapes = {piece.hf_name: piece.hf_shape for piece in pieces(a, whole)}
    draw = torch.Generator(device).manual_seed(seed)

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype)
        return torch.randn(shape, generator=draw, device=device).mul_(0.02).to("cpu", dtype)

    write_safetensors(directory / "model.safetensors", shapes, dtype, itertools.starmap(weight, shapes.items()))
