"""Losses: pure functions of tensors and an explicit tensor-parallel group.

One value a token, a pair or a group of answers; no averages.
"""

from megakd.losses.advantage import expected_advantage
from megakd.losses.divergence import divergence
from megakd.losses.fused_head import (
    fused_distillation,
    fused_divergence,
    fused_dpkd_token,
    fused_expected_advantage,
    fused_token_log_probs,
)
from megakd.losses.likelihood import negative, sequence_sums, sequence_weights, token_log_probs
from megakd.losses.listwise import pad_probabilistic, pad_vanilla, plackett_luce_log_prob
from megakd.losses.policy_gradient import (
    behaviour_log_probs,
    clipped_policy_gradient,
    returns,
    reverse_kl_rewards,
)
from megakd.losses.preference import cpo, dpkd, dpo, dpo_from_margins, ipo, reward_margins, simpo
from megakd.losses.released import dpkd_token, released_topk_advantage, released_topk_kl
from megakd.losses.top_k import (
    TopK,
    fused_log_probs_at,
    fused_top_k,
    fused_topk_advantage,
    fused_topk_distillation,
    released_topk_advantages,
    topk_advantages,
)

__all__ = [
    "TopK",
    "behaviour_log_probs",
    "clipped_policy_gradient",
    "cpo",
    "divergence",
    "dpkd",
    "dpkd_token",
    "dpo",
    "dpo_from_margins",
    "expected_advantage",
    "fused_distillation",
    "fused_divergence",
    "fused_dpkd_token",
    "fused_expected_advantage",
    "fused_log_probs_at",
    "fused_token_log_probs",
    "fused_top_k",
    "fused_topk_advantage",
    "fused_topk_distillation",
    "ipo",
    "negative",
    "pad_probabilistic",
    "pad_vanilla",
    "plackett_luce_log_prob",
    "released_topk_advantage",
    "released_topk_advantages",
    "released_topk_kl",
    "returns",
    "reverse_kl_rewards",
    "reward_margins",
    "sequence_sums",
    "sequence_weights",
    "simpo",
    "token_log_probs",
    "topk_advantages",
]
