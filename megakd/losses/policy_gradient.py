"""Policy gradient of MiniLLM (arXiv 2306.08543): rewards of sampled tokens, their returns, and the clipped loss.

Legend: T tokens of sampled responses, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megakd.errors import LossInputError
from megakd.losses.statistics import check_finite, check_positive, statistics_dtype

WHITEN_FLOOR = 1e-8
"""Least variance that returns are divided by."""


def reverse_kl_rewards(student_T: Tensor, teacher_T: Tensor, *, scale: float, limit: float) -> Tensor:
    """What the teacher thinks of the student's tokens: `(log p(y) - log q(y)) / scale`, limited to +-`limit`.

    Source: MiniLLM section 2.2 (scale 1, no limit); the released code has scale 0.5 and limit 100.

    Args:
        student_T, teacher_T: log-probabilities of the tokens under the student that drew them and the teacher.

    Returns:
        reward_T, of the student's dtype, without a gradient. No collectives.
    """
    check_positive("scale", scale)
    check_positive("limit", limit)
    return ((teacher_T - student_T) / scale).clamp(-limit, limit).detach()


def behaviour_log_probs(student_T: Tensor, teacher_T: Tensor, *, teacher_mix: float) -> Tensor:
    """Log-probabilities of the tokens under the mixture `(1 - teacher_mix) q + teacher_mix p` that drew them.

    Source: MiniLLM section 2.2, teacher-mixed sampling. No collectives.
    """
    if not 0.0 <= teacher_mix < 1.0:
        raise LossInputError(f"teacher_mix = {teacher_mix}: it must be in [0, 1)")
    if teacher_mix == 0.0:
        return student_T
    return torch.logaddexp(student_T + math.log1p(-teacher_mix), teacher_T + math.log(teacher_mix))


def returns(
    rewards_T: Tensor, lengths: Sequence[int], *, discount: float, length_normalize: bool, whiten: bool
) -> Tensor:
    """What each token is worth: the discounted rewards from it to its response's end.

    `R_t = sum_{s >= t} discount^(s - t) r_s`, divided by the number of its terms where `length_normalize`, then less
    the mean and divided by the standard deviation of all T where `whiten`. Source: the released code of MiniLLM
    (discount 0.95, both); the paper's R starts at t + 1 and has discount 1, as its single-step term has r_t.

    Args:
        rewards_T: responses one after the other.
        lengths: tokens of each response; their sum is T.

    Returns:
        return_T, float64, on the CPU. No collectives.

    Raises:
        LossInputError: lengths that do not add up to T, a discount outside [0, 1].
    """
    if sum(lengths) != len(rewards_T):
        raise LossInputError(f"lengths add up to {sum(lengths)}: there are {len(rewards_T)} rewards")
    if not 0.0 <= discount <= 1.0:
        raise LossInputError(f"discount = {discount}: it must be in [0, 1]")
    rewards, worth, stop = rewards_T.tolist(), [0.0] * len(rewards_T), len(rewards_T)
    for length in reversed(lengths):
        total = 0.0
        for left, place in enumerate(range(stop - 1, stop - length - 1, -1), start=1):
            total = rewards[place] + discount * total
            worth[place] = total / left if length_normalize else total
        stop -= length
    worth_T = torch.tensor(worth, dtype=torch.float64)
    if whiten and len(worth_T):
        worth_T = (worth_T - worth_T.mean()) / worth_T.var(correction=0).clamp(min=WHITEN_FLOOR).sqrt()
    return worth_T


def clipped_policy_gradient(
    log_probs_T: Tensor, behaviour_T: Tensor, returns_T: Tensor, *, clip: float
) -> Tensor:
    """The loss of sampled tokens whose policy has moved since: `-min(ratio R, limited ratio R)`.

    `ratio = exp(log q(y) - behaviour)`, limited to [1 - clip, 1 + clip]. Source: PPO (arXiv 1707.06347) eq. 7. With the
    mixture's log-probabilities for `behaviour`, the ratio has MiniLLM's importance weight in it, as in its code.

    Args:
        log_probs_T: the tokens' log-probabilities under the policy; they alone get a gradient.
        behaviour_T: under the distribution that drew them.
        returns_T: what they are worth.
        clip: greater than 0.

    Returns:
        loss_T, float32 (float64 for float64 log-probabilities). No collectives.

    Raises:
        LossInputError: shapes that do not match, clip not positive; on CPU tensors numbers that are not finite.
    """
    check_positive("clip", clip)
    for name, tensor in (("log_probs_T", log_probs_T), ("behaviour_T", behaviour_T), ("returns_T", returns_T)):
        if tensor.shape != log_probs_T.shape or tensor.dim() != 1:
            raise LossInputError(f"{name} is {list(tensor.shape)}: it must be one number for each token")
        check_finite(name, tensor)
    dtype = statistics_dtype(log_probs_T)
    behaviour_T, returns_T = behaviour_T.detach().to(dtype), returns_T.detach().to(dtype)
    ratio_T = (log_probs_T.to(dtype) - behaviour_T).exp()
    return -torch.minimum(ratio_T * returns_T, ratio_T.clamp(1.0 - clip, 1.0 + clip) * returns_T)
