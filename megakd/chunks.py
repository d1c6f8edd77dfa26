"""How many tokens' logits the fused losses hold at a time, and of how many they make d(hidden) and d(head) together.

Imported by the configuration and the planner, so without torch.
"""

from __future__ import annotations

CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}
"""Tokens of a chunk where nobody sets them, by the type of device. On a CPU 256 is the fewest at which the products run
at full speed (measured). On a GPU a chunk has to fill its multiprocessors, and the head is read once for each: 2,048 x
128,256 float32 logits are 1.05 GB a model. docs/decisions.md has the arithmetic."""
GRADIENT_CHUNKS = 4
"""Chunks whose gradients by the logits are kept, where they have 16-bit memory of their own, until d(hidden) and
d(head) are made of all of them: each product reads and writes all of d(head) in float32."""


def chunk_tokens_on(device: str, given: int | None) -> int:
    """Tokens of a chunk: as given, else the device's own number. `device` is a type: "cpu" or "cuda"."""
    return CHUNK_TOKENS[device] if given is None else given
