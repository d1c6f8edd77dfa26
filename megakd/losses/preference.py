"""Losses over pairs of sequences, from their log-probabilities (replicated numbers: nothing here is sharded).

Legend: P pairs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megakd.errors import LossInputError


def dpo(
    chosen_P: Tensor,
    rejected_P: Tensor,
    ref_chosen_P: Tensor,
    ref_rejected_P: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimization: `-log sigmoid` of the reward margin.

    Source: DPO (arXiv 2305.18290) eq. 7. With label smoothing e, `-(1-e) log sigmoid(m) - e log sigmoid(-m)` (the
    "conservative DPO" of the same authors' code).

    Args:
        chosen_P, rejected_P: sequence log-probabilities (sums over response tokens) under the policy.
        ref_chosen_P, ref_rejected_P: the same under the reference.
        beta: scale of the rewards.
        label_smoothing: share of pairs taken to be labelled the wrong way round.

    Returns:
        loss_P. No collectives.

    Raises:
        LossInputError: shapes that do not match, label_smoothing outside [0, 0.5).
    """
    margins_P = reward_margins(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P, beta=beta)
    return dpo_from_margins(margins_P, label_smoothing=label_smoothing)


def reward_margins(
    chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_rejected_P: Tensor, *, beta: float
) -> Tensor:
    """`beta * [(chosen - ref_chosen) - (rejected - ref_rejected)]`: how much more reward a pair's chosen answer gets.

    Arguments and errors are those of `dpo`.
    """
    others = {"rejected_P": rejected_P, "ref_chosen_P": ref_chosen_P, "ref_rejected_P": ref_rejected_P}
    for name, tensor in others.items():
        if tensor.shape != chosen_P.shape or tensor.dim() != 1:
            shapes = f"{list(tensor.shape)} and chosen_P {list(chosen_P.shape)}"
            raise LossInputError(f"{name} is {shapes}: all must be [P], one number a pair")
    return beta * ((chosen_P - ref_chosen_P) - (rejected_P - ref_rejected_P))


def dpo_from_margins(margins_P: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The DPO loss of given reward margins, for a caller that also reports them."""
    if not 0.0 <= label_smoothing < 0.5:
        raise LossInputError(f"label_smoothing = {label_smoothing}: it must be in [0, 0.5)")
    loss_P = F.softplus(-margins_P)
    if label_smoothing:
        loss_P = (1.0 - label_smoothing) * loss_P + label_smoothing * F.softplus(margins_P)
    return loss_P
