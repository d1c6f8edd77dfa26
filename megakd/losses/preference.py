"""Losses over pairs of sequences, from their log-probabilities (replicated numbers: nothing here is sharded).

Legend: P pairs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megakd.errors import LossInputError
from megakd.losses.statistics import check_finite, check_positive, statistics_dtype


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
        ref_chosen_P, ref_rejected_P: the same under the reference; no gradient goes to them.
        beta: scale of the rewards.
        label_smoothing: share of pairs taken to be labelled the wrong way round.

    Returns:
        loss_P, float32 (float64 for float64 log-probabilities). No collectives.

    Raises:
        LossInputError: shapes that do not match, beta not positive, label_smoothing outside [0, 0.5); on CPU tensors
            also log-probabilities that are not finite (elsewhere the loss is then not finite either).
    """
    margins_P = reward_margins(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P, beta=beta)
    return dpo_from_margins(margins_P, label_smoothing=label_smoothing)


def reward_margins(
    chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_rejected_P: Tensor, *, beta: float
) -> Tensor:
    """`beta * [(chosen - ref_chosen) - (rejected - ref_rejected)]`: how much more reward a pair's chosen answer gets.

    Arguments and errors are those of `dpo`.
    """
    check_positive("beta", beta)
    dtype = statistics_dtype(chosen_P)
    chosen_P, rejected_P, ref_chosen_P, ref_rejected_P = _scores(
        chosen_P=chosen_P, rejected_P=rejected_P, ref_chosen_P=ref_chosen_P, ref_rejected_P=ref_rejected_P
    )
    return (beta * ((chosen_P - ref_chosen_P.detach()) - (rejected_P - ref_rejected_P.detach()))).to(dtype)


def dpo_from_margins(margins_P: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The DPO loss of given reward margins, for a caller that also reports them."""
    if not 0.0 <= label_smoothing < 0.5:
        raise LossInputError(f"label_smoothing = {label_smoothing}: it must be in [0, 0.5)")
    loss_P = -F.logsigmoid(margins_P)
    if label_smoothing:
        loss_P = (1.0 - label_smoothing) * loss_P - label_smoothing * F.logsigmoid(-margins_P)
    return loss_P


def dpkd(
    student_t_P: Tensor,
    student_s_P: Tensor,
    teacher_t_P: Tensor,
    teacher_s_P: Tensor,
    len_t_P: Tensor,
    len_s_P: Tensor,
    *,
    beta: float,
    length_normalize: bool = True,
) -> Tensor:
    """Direct preference knowledge distillation: DPO with the teacher as reference, its own answer as the chosen one.

    `-log sigmoid( beta/|t| (log q(t) - log p(t)) - beta/|s| (log q(s) - log p(s)) )`, q the student, p the teacher, t
    the teacher's answer and s the student's. Source: DPKD (arXiv 2406.19774) eq. 9; without length_normalize eq. 8,
    which is `dpo`. The gradient printed in its eq. 11 has the opposite sign inside the sigmoid of the weight, a slip;
    this is the gradient of the loss. The released code trains on something else: `dpkd_token`.

    Args:
        student_t_P, student_s_P: the student's log-probabilities of t and s, sums over their tokens.
        teacher_t_P, teacher_s_P: the teacher's; no gradient goes to them.
        len_t_P, len_s_P: numbers of tokens in these sums, the closing one included.
        beta: scale of the rewards. The paper prints none; 0.1 in its code, but with lengths of many tokens such a value
            leaves the loss next to log 2, and 1 or more is of use.
        length_normalize: divide each answer's log-ratio by its length.

    Returns:
        loss_P, float32 (float64 for float64 log-probabilities). No collectives.

    Raises:
        LossInputError: shapes that do not match, beta not positive; on CPU tensors also a length below 1 and
            log-probabilities that are not finite (elsewhere the loss is then not finite either).
    """
    check_positive("beta", beta)
    dtype = statistics_dtype(student_t_P)
    student_t_P, student_s_P, teacher_t_P, teacher_s_P = _scores(
        student_t_P=student_t_P, student_s_P=student_s_P, teacher_t_P=teacher_t_P, teacher_s_P=teacher_s_P
    )
    _check_lengths(student_t_P, len_t_P=len_t_P, len_s_P=len_s_P)
    reward_t_P, reward_s_P = student_t_P - teacher_t_P.detach(), student_s_P - teacher_s_P.detach()
    if length_normalize:
        reward_t_P, reward_s_P = reward_t_P / len_t_P, reward_s_P / len_s_P
    return -F.logsigmoid(beta * (reward_t_P - reward_s_P)).to(dtype)


def ipo(
    chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_rejected_P: Tensor, *, tau: float
) -> Tensor:
    """Identity preference optimization: the squared distance of the log-ratios' difference from 1 / (2 tau).

    `( (chosen - ref_chosen) - (rejected - ref_rejected) - 1/(2 tau) )^2`. Source: IPO (arXiv 2310.12036) eq. 17, and
    table 2 of DPKD (arXiv 2406.19774), both on sums over tokens. Libraries give it means over tokens instead: for that
    form, give means.

    Args:
        chosen_P, rejected_P: sequence log-probabilities under the policy.
        ref_chosen_P, ref_rejected_P: the same under the reference (DPKD: the teacher); no gradient goes to them.
        tau: strength of the regularization.

    Returns:
        loss_P, float32 (float64 for float64 log-probabilities). No collectives.

    Raises:
        LossInputError: shapes that do not match, tau not positive; on CPU tensors also log-probabilities that are not
            finite (elsewhere the loss is then not finite either).
    """
    check_positive("tau", tau)
    dtype = statistics_dtype(chosen_P)
    chosen_P, rejected_P, ref_chosen_P, ref_rejected_P = _scores(
        chosen_P=chosen_P, rejected_P=rejected_P, ref_chosen_P=ref_chosen_P, ref_rejected_P=ref_rejected_P
    )
    margins_P = (chosen_P - ref_chosen_P.detach()) - (rejected_P - ref_rejected_P.detach())
    return (margins_P - 1.0 / (2.0 * tau)).square().to(dtype)


def cpo(chosen_P: Tensor, rejected_P: Tensor, *, beta: float, nll_weight: float = 1.0) -> Tensor:
    """Contrastive preference optimization: DPO without a reference, and the chosen answer's negative log-likelihood.

    `-log sigmoid( beta (chosen - rejected) ) - nll_weight * chosen`. Source: CPO (arXiv 2401.08417), the sum of its
    preference and NLL terms. The row of this name in table 2 of DPKD (arXiv 2406.19774) is a misprint and not followed.
    Libraries divide the second term by the number of tokens: for that, set nll_weight = 0 and add a mean outside.

    Args:
        chosen_P, rejected_P: sequence log-probabilities (sums over response tokens) under the policy.
        beta: scale of the rewards.
        nll_weight: weight of the second term.

    Returns:
        loss_P, float32 (float64 for float64 log-probabilities). No collectives.

    Raises:
        LossInputError: shapes that do not match, beta not positive, nll_weight negative; on CPU tensors also
            log-probabilities that are not finite (elsewhere the loss is then not finite either).
    """
    check_positive("beta", beta)
    if not nll_weight >= 0:
        raise LossInputError(f"nll_weight = {nll_weight}: it must not be negative")
    dtype = statistics_dtype(chosen_P)
    chosen_P, rejected_P = _scores(chosen_P=chosen_P, rejected_P=rejected_P)
    return (-F.logsigmoid(beta * (chosen_P - rejected_P)) - nll_weight * chosen_P).to(dtype)


def simpo(
    chosen_P: Tensor, rejected_P: Tensor, len_chosen_P: Tensor, len_rejected_P: Tensor, *, beta: float, gamma: float
) -> Tensor:
    """Simple preference optimization: mean log-probabilities as rewards, no reference, a margin that must be won.

    `-log sigmoid( beta/|w| chosen - beta/|l| rejected - gamma )`. Source: SimPO (arXiv 2405.14734) eq. 6. Where a
    library asks for a ratio gamma/beta, gamma here is beta times that.

    Args:
        chosen_P, rejected_P: sequence log-probabilities (sums over response tokens) under the policy.
        len_chosen_P, len_rejected_P: numbers of tokens in these sums, the closing one included.
        beta: scale of the rewards.
        gamma: target margin, at least 0.

    Returns:
        loss_P, float32 (float64 for float64 log-probabilities). No collectives.

    Raises:
        LossInputError: shapes that do not match, beta not positive, gamma negative; on CPU tensors also a length below
            1 and log-probabilities that are not finite (elsewhere the loss is then not finite either).
    """
    check_positive("beta", beta)
    if not gamma >= 0:
        raise LossInputError(f"gamma = {gamma}: it must not be negative")
    dtype = statistics_dtype(chosen_P)
    chosen_P, rejected_P = _scores(chosen_P=chosen_P, rejected_P=rejected_P)
    _check_lengths(chosen_P, len_chosen_P=len_chosen_P, len_rejected_P=len_rejected_P)
    return -F.logsigmoid(beta * (chosen_P / len_chosen_P - rejected_P / len_rejected_P) - gamma).to(dtype)


def _scores(**scores: Tensor) -> list[Tensor]:
    """Checks log-probabilities [P] by their arguments' names and returns them in float64.

    They are few, and the differences that count are small beside sums over thousands of tokens: float64 costs nothing
    here, and a loss in float32 then has no rounding of its own.
    """
    first, pairs = next((name, tensor.shape) for name, tensor in scores.items())
    for name, tensor in scores.items():
        if tensor.dim() != 1 or tensor.shape != pairs or not tensor.is_floating_point():
            found = f"{name} is {tensor.dtype} {list(tensor.shape)} and {first} {list(pairs)}"
            raise LossInputError(f"{found}: all must be floating-point [P], one number a pair")
        check_finite(name, tensor)
    return [tensor.double() for tensor in scores.values()]


def _check_lengths(scores_P: Tensor, **lengths: Tensor) -> None:
    for name, tensor in lengths.items():
        if tensor.shape != scores_P.shape:
            found = f"{name} is {list(tensor.shape)} and the log-probabilities {list(scores_P.shape)}"
            raise LossInputError(f"{found}: both must be [P], one number a pair")
        # NaN is not >= 1 either.
        short = 0 if tensor.device.type != "cpu" else tensor.numel() - int((tensor >= 1).sum())
        if short:
            rule = "an answer has at least its closing token; drop such pairs"
            raise LossInputError(f"{name} holds {short} of {tensor.numel()} lengths below 1: {rule}")
