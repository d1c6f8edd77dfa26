"""What the planner's tests share: a small cluster, published sizes, models of which only the config.json is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from megakd.hf.families import Architecture
from megakd.planning.cluster import Cluster


def architecture(hidden, layers, heads, kv_heads, head_dim, ffn, vocabulary, tied=False,
                 family="llama") -> Architecture:
    """A model without the features that change no count."""
    return Architecture(family, hidden, layers, heads, kv_heads, head_dim, ffn, vocabulary, 1e-5, 1e4, None, tied,
                        False, 8192)


LLAMA_1B = architecture(2048, 16, 32, 8, 64, 8192, 128256, tied=True)
LLAMA_8B = architecture(4096, 32, 32, 8, 128, 14336, 128256)
LLAMA_70B = architecture(8192, 80, 64, 8, 128, 28672, 128256)
LLAMA_405B = architecture(16384, 126, 128, 8, 128, 53248, 128256)


def write_config(directory: Path, model: Architecture) -> Path:
    """Writes a model's config.json alone, which is all that a plan needs."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({
        "model_type": model.family, "hidden_size": model.hidden_size, "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim,
        "intermediate_size": model.ffn_size, "vocab_size": model.vocab_size, "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta, "tie_word_embeddings": model.tied_embeddings,
        "max_position_embeddings": model.max_positions}))
    return directory


def cluster_fields(**changes: Any) -> dict[str, Any]:
    """A description of made-up nodes of 4 processes, as plain values."""
    fields = {
        "name": "four", "device_type": "cpu", "devices_per_node": 4,
        "device": {"kind": "process", "memory_gib": 2.0, "reserved_gib": 0.0, "memory_gb_s": 10.0, "passes_gb_s": 10.0,
                   "rates": {"fp32": {"peak_tflops": 0.1, "efficiency": 0.5, "half_side": 20.0}},
                   "attention": {"peak_tflops": 0.1, "efficiency": 0.2, "half_side": 0.0},
                   "layer_forward_us": 500.0, "layer_backward_us": 1000.0, "step_ms": 5.0},
        "node_link": {"gb_s": 2.0, "latency_us": 20.0}, "network_link": {"gb_s": 0.5, "latency_us": 50.0},
        "overlap": {"tensor": 0.0, "data": 0.0, "pipeline": 0.0}, "sources": {},
    }
    fields["device"] |= changes.pop("device", {})
    return fields | changes


def small_cluster(**changes: Any) -> Cluster:
    """`cluster_fields` as a cluster."""
    return Cluster.model_validate(cluster_fields(**changes))


def write_cluster(file: Path, **changes: Any) -> Path:
    """`cluster_fields` as a file."""
    file.write_text(yaml.safe_dump(cluster_fields(**changes)))
    return file
