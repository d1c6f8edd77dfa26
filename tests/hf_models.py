"""Small random Hugging Face model directories for tests, and an independent cut of them into local parameters."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megakd.hf.families import Architecture
from megakd.hf.pieces import Shard


def architecture(**changes: object) -> Architecture:
    """A llama of toy size: 6 query heads in 3 groups, 4 layers, tied embeddings."""
    sizes = {
        "family": "llama", "hidden_size": 12, "layers": 4, "heads": 6, "kv_heads": 3, "head_dim": 4, "ffn_size": 24,
        "vocab_size": 150, "norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "tied_embeddings": True,
        "qkv_bias": False, "max_positions": 64,
    }  # fmt: skip
    return Architecture(**(sizes | changes))


def random_tensors(a: Architecture, seed: int = 0) -> dict[str, Tensor]:
    """All tensors of a model by Hugging Face name, float32, no two elements of a tensor alike."""
    hidden, width, kv_width = a.hidden_size, a.heads * a.head_dim, a.kv_heads * a.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab_size, hidden)}
    for layer in range(a.layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (width, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv_width, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv_width, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, width),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_proj.weight": (a.ffn_size, hidden),
            f"{prefix}.mlp.up_proj.weight": (a.ffn_size, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, a.ffn_size),
        }
        if a.qk_norm:
            shapes |= {
                f"{prefix}.self_attn.q_norm.weight": (a.head_dim,),
                f"{prefix}.self_attn.k_norm.weight": (a.head_dim,),
            }
        if a.qkv_bias:
            shapes |= {
                f"{prefix}.self_attn.q_proj.bias": (width,),
                f"{prefix}.self_attn.k_proj.bias": (kv_width,),
                f"{prefix}.self_attn.v_proj.bias": (kv_width,),
            }
    shapes["model.norm.weight"] = (hidden,)
    if not a.tied_embeddings:
        shapes["lm_head.weight"] = (a.vocab_size, hidden)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def config_json(a: Architecture) -> dict:
    """config.json of an architecture without rope scaling, as transformers wrote it before version 5."""
    config = {
        "model_type": a.family,
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
                           "qwen3": "Qwen3ForCausalLM"}[a.family]],
        "hidden_act": "silu",
        "hidden_size": a.hidden_size,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "intermediate_size": a.ffn_size,
        "vocab_size": a.vocab_size,
        "rms_norm_eps": a.norm_eps,
        "rope_theta": a.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": a.tied_embeddings,
        "max_position_embeddings": a.max_positions,
        "torch_dtype": "float32",
    }
    if a.family == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    return config


def write_model(directory: Path, a: Architecture, tensors: dict[str, Tensor], files: int = 1) -> Path:
    """Writes a model directory with one safetensors file, or several with an index."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_json(a)))
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    if files == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    weight_map = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = dict(list(tensors.items())[number::files])
        save_file(part, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def cut(a: Architecture, tensors: dict[str, Tensor], shard: Shard) -> dict[str, Tensor]:
    """A shard's parameters, cut head by head from the whole tensors: what the table of pieces is tested against."""
    tp, rank, d = shard.tensor_size, shard.tensor_rank, a.head_dim
    per_group = a.heads // a.kv_heads
    groups = -(-a.kv_heads // tp)
    my_groups = range(rank * groups, (rank + 1) * groups)
    ffn = a.ffn_size // tp
    rows = -(-a.vocab_size // (128 * tp)) * 128
    norms = {
        "local": ("input_layernorm.weight", "pre_mlp_layernorm.weight"),
        "te": ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
    }[shard.spec]

    def heads(tensor: Tensor, numbers: range) -> Tensor:
        zeros = torch.zeros(d, *tensor.shape[1:])
        return torch.cat([tensor[n * d : (n + 1) * d] if n * d < tensor.shape[0] else zeros for n in numbers])

    def vocabulary(tensor: Tensor) -> Tensor:
        padded = torch.zeros(rows * tp, a.hidden_size)
        padded[: a.vocab_size] = tensor
        return padded[rank * rows : (rank + 1) * rows].clone()

    local = {}
    if shard.embedding:
        local["embedding.word_embeddings.weight"] = vocabulary(tensors["model.embed_tokens.weight"])
    for index in range(shard.layers):
        hf, mine = f"model.layers.{shard.first_layer + index}", f"decoder.layers.{index}"
        local[f"{mine}.{norms[0]}"] = tensors[f"{hf}.input_layernorm.weight"].clone()
        for kind in ("weight", "bias") if a.qkv_bias else ("weight",):
            q, k, v = (tensors[f"{hf}.self_attn.{name}_proj.{kind}"] for name in "qkv")
            blocks = []
            for g in my_groups:
                blocks += [heads(q, range(g * per_group, (g + 1) * per_group)), heads(k, range(g, g + 1))]
                blocks += [heads(v, range(g, g + 1))]
            local[f"{mine}.self_attention.linear_qkv.{kind}"] = torch.cat(blocks)
        columns = range(my_groups.start * per_group, my_groups.stop * per_group)
        output = heads(tensors[f"{hf}.self_attn.o_proj.weight"].t(), columns).t().contiguous()
        local[f"{mine}.self_attention.linear_proj.weight"] = output
        if a.qk_norm:
            local[f"{mine}.self_attention.q_layernorm.weight"] = tensors[f"{hf}.self_attn.q_norm.weight"].clone()
            local[f"{mine}.self_attention.k_layernorm.weight"] = tensors[f"{hf}.self_attn.k_norm.weight"].clone()
        local[f"{mine}.{norms[1]}"] = tensors[f"{hf}.post_attention_layernorm.weight"].clone()
        part = slice(rank * ffn, (rank + 1) * ffn)
        gate, up = (tensors[f"{hf}.mlp.{name}_proj.weight"][part] for name in ("gate", "up"))
        local[f"{mine}.mlp.linear_fc1.weight"] = torch.cat([gate, up])
        local[f"{mine}.mlp.linear_fc2.weight"] = tensors[f"{hf}.mlp.down_proj.weight"][:, part].contiguous()
    if shard.head:
        local["decoder.final_layernorm.weight"] = tensors["model.norm.weight"].clone()
        if not a.tied_embeddings:
            local["output_layer.weight"] = vocabulary(tensors["lm_head.weight"])
        elif not shard.embedding:
            local["output_layer.weight"] = vocabulary(tensors["model.embed_tokens.weight"])
    return local
