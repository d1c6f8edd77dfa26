"""Generation on the training model's own weights, in its own layout: `generate(decoder, prompts, sampling, ...)`."""

from megakd.rollout.cache import KVCache
from megakd.rollout.engine import Prompt, Rollout, generate
from megakd.rollout.ring import Decoder
from megakd.rollout.sampling import Sampling

__all__ = ["Decoder", "KVCache", "Prompt", "Rollout", "Sampling", "generate"]
