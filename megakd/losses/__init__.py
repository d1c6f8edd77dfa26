"""Losses: pure functions of tensors and an explicit tensor-parallel group; one value a token or a pair, no averages."""

from megakd.losses.advantage import expected_advantage
from megakd.losses.divergence import divergence
from megakd.losses.fused_head import (
    fused_distillation,
    fused_divergence,
    fused_expected_advantage,
    fused_token_log_probs,
)
from megakd.losses.likelihood import sequence_sums, token_log_probs
from megakd.losses.preference import dpo, dpo_from_margins, reward_margins

__all__ = [
    "divergence",
    "dpo",
    "dpo_from_margins",
    "expected_advantage",
    "fused_distillation",
    "fused_divergence",
    "fused_expected_advantage",
    "fused_token_log_probs",
    "reward_margins",
    "sequence_sums",
    "token_log_probs",
]
