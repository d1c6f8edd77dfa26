"""Small random Llama directories for the real-model tests, and groups of random sequences."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
