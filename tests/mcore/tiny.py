"""Small random Llama directories for the real-model tests, and groups of random sequences."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megakd.batch import Group, Kind, Sample

VOCABULARY = 307  # no multiple of anything: the padded columns are at work


def make_llama(directory: Path, *, seed: int, hidden: int = 48, layers: int = 4, heads: int = 6, kv_heads: int = 3,
               tied: bool = True, std: float = 0.15) -> Path:
    """Writes a random model. Weights are larger than at initialisation, so that its distributions are not flat."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads, max_position_embeddings=128,
        tie_word_embeddings=tied, initializer_range=std, bos_token_id=1, eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def make_qwen2(directory: Path, *, seed: int) -> Path:
    """Writes a random model with biases on query, key and value, and a head of its own."""
    torch.manual_seed(seed)
    qwen2 = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.15,
        use_sliding_window=False, bos_token_id=1, eos_token_id=2))
    for layer in qwen2.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.normal_(linear.bias, std=0.3)
    qwen2.save_pretrained(directory)
    return directory


def make_qwen3(directory: Path, *, seed: int, hidden: int = 48, layers: int = 4, heads: int = 6, kv_heads: int = 3,
               head_dim: int = 16, tied: bool = True, std: float = 0.15) -> Path:
    """Writes a random model with norms of queries and keys, whose heads together are wider than its hidden states."""
    torch.manual_seed(seed)
    qwen3 = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=128,
        tie_word_embeddings=tied, initializer_range=std, use_sliding_window=False, bos_token_id=1, eos_token_id=2))
    for layer in qwen3.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)  # at first they are all one
    qwen3.save_pretrained(directory)
    return directory


def make_groups(count: int, kinds: tuple[Kind, ...], seed: int = 0) -> list[Group]:
    """Random prompts with one random response of each kind; lengths differ."""
    draw = random.Random(seed)
    groups = []
    for number in range(count):
        prompt = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(2, 7))]
        samples = []
        for kind in kinds:
            response = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 9))]
            samples.append(Sample(tuple(prompt + response), len(prompt), kind))
        groups.append(Group(f"row:{number}", tuple(samples)))
    return groups
