"""Losses over rankings of a prompt's answers (PAD), from their scores (replicated numbers: nothing here is sharded).

Under Plackett and Luce, the best answer is drawn with probabilities softmax(scores), then the next best from those that
are left, and so on.

Legend: N prompts, G answers to a prompt, R rankings of G answers (R = G!); the place that comes twice is G2.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megakd.errors import LossInputError
from megakd.losses.statistics import check_finite, check_matrix, check_positive, statistics_dtype

DIVERGENCES = ("jsd", "am_gm")
MOST_ANSWERS = 6
"""Answers whose rankings are all counted: 6! = 720 of them; every further answer would multiply memory and time."""


def plackett_luce_log_prob(scores_NG: Tensor, ranking_NG: Tensor) -> Tensor:
    """Log-probability of a ranking: `sum_k [ s_k - logsumexp_{j >= k} s_j ]`, s the scores in the ranking's order.

    Source: Plackett (1975) and Luce (1959), as used by PAD (arXiv 2502.14272).

    Args:
        scores_NG: scores, any floating dtype, finite.
        ranking_NG: int64; each row holds the answers 0 to G - 1, the best first.

    Returns:
        logp_N, float32 (float64 for float64 scores). No collectives.

    Raises:
        LossInputError: shapes or dtypes that do not match; on CPU tensors also scores that are not finite and rows that
            are not rankings.
    """
    _check_scores(scores_NG=scores_NG)
    if ranking_NG.dtype != torch.int64 or ranking_NG.shape != scores_NG.shape:
        found = f"ranking_NG is {ranking_NG.dtype} {list(ranking_NG.shape)}"
        raise LossInputError(f"{found}: it must be torch.int64 {list(scores_NG.shape)}")
    if ranking_NG.device.type == "cpu":
        wrong = int((ranking_NG.sort(1).values != torch.arange(scores_NG.shape[1])).any(1).sum())
        if wrong:
            rule = f"a row holds each of 0 to {scores_NG.shape[1] - 1} once"
            raise LossInputError(f"ranking_NG has {wrong} of {len(ranking_NG)} rows that are not rankings: {rule}")
    return _log_prob(_leads(scores_NG, 1.0), ranking_NG[:, None])[:, 0].to(statistics_dtype(scores_NG))


def pad_vanilla(student_score_NG: Tensor, teacher_score_NG: Tensor, *, beta: float) -> Tensor:
    """`-log PL(teacher's ranking)` under the student's scores: PAD's vanilla preference loss.

    Source: PAD (arXiv 2502.14272) eq. 11; loss type "rd" of the released code. Answers that the teacher scores alike
    are ranked by their place, the earlier one first.

    Args:
        student_score_NG: the student's rewards (mean log-probabilities a token), any floating dtype, finite.
        teacher_score_NG: the teacher's; only their order matters, and no gradient goes to them.
        beta: both scores are multiplied by it; 10 in the released code.

    Returns:
        loss_N, float32 (float64 for float64 student scores). No collectives.

    Raises:
        LossInputError: shapes that do not match, fewer than 2 answers, beta not positive; on CPU tensors also scores
            that are not finite.
    """
    check_positive("beta", beta)
    _check_scores(student_score_NG=student_score_NG, teacher_score_NG=teacher_score_NG)
    _check_answers(student_score_NG, most=None)
    ranking_NG = teacher_score_NG.detach().argsort(dim=1, descending=True, stable=True)
    logp_N = _log_prob(_leads(student_score_NG, beta), ranking_NG[:, None])[:, 0]
    return -logp_N.to(statistics_dtype(student_score_NG))


def pad_probabilistic(
    student_score_NG: Tensor, teacher_score_NG: Tensor, *, beta: float, divergence: str = "jsd"
) -> Tensor:
    """Divergence between the student's and the teacher's distributions over all rankings: PAD's probabilistic loss.

    With S and T their probabilities of a ranking and M = (S + T) / 2:
        jsd     1/2 KL(S || M) + 1/2 KL(T || M), at most log 2: PAD (arXiv 2502.14272) eq. 12
        am_gm   1/2 KL(M || S) + 1/2 KL(M || T) = sum M log( M / sqrt(S T) ), unbounded: what the released code computes
                (loss type "pd"), as its KL has the arguments the other way round; the paper's figures belong to it
    M is that of one prompt; the released code mixes the prompts of a micro-batch, which is the same for one prompt.
    At beta = 10 jsd saturates where the rankings disagree, and its gradient with it: try about 2.

    Args:
        student_score_NG: the student's rewards (mean log-probabilities a token), any floating dtype, finite.
        teacher_score_NG: the teacher's; no gradient goes to them.
        beta: both scores are multiplied by it; 10 in the released code.
        divergence: one of DIVERGENCES.

    Returns:
        loss_N, float32 (float64 for float64 student scores). No collectives.

    Raises:
        LossInputError: shapes that do not match, fewer than 2 or more than MOST_ANSWERS answers (all G! rankings are
            counted), beta not positive, an unknown divergence; on CPU tensors also scores that are not finite.
    """
    check_positive("beta", beta)
    if divergence not in DIVERGENCES:
        raise LossInputError(f"divergence = {divergence!r}: it must be one of {', '.join(DIVERGENCES)}")
    _check_scores(student_score_NG=student_score_NG, teacher_score_NG=teacher_score_NG)
    _check_answers(student_score_NG, most=MOST_ANSWERS)
    answers = range(student_score_NG.shape[1])
    rankings_RG = torch.tensor(list(itertools.permutations(answers)), device=student_score_NG.device)
    rankings_NRG = rankings_RG.expand(len(student_score_NG), -1, -1)
    student_NR = _log_prob(_leads(student_score_NG, beta), rankings_NRG)
    teacher_NR = _log_prob(_leads(teacher_score_NG.detach(), beta), rankings_NRG)
    # With x = log T - log S: log M = log S + softplus(x) - log 2 = log T + softplus(-x) - log 2, which holds however
    # far apart S and T are, and whatever underflows.
    x_NR = teacher_NR - student_NR
    student_over_m_NR = F.logsigmoid(-x_NR) + math.log(2.0)
    teacher_over_m_NR = F.logsigmoid(x_NR) + math.log(2.0)
    if divergence == "jsd":
        value_NR = student_NR.exp() * student_over_m_NR + teacher_NR.exp() * teacher_over_m_NR
    else:
        value_NR = -0.5 * (student_NR.exp() + teacher_NR.exp()) * (student_over_m_NR + teacher_over_m_NR)
    return 0.5 * value_NR.sum(1).to(statistics_dtype(student_score_NG))


def _leads(scores_NG: Tensor, beta: float) -> Tensor:
    """beta (score of the second - score of the first) of all pairs of answers [N, G, G2], in float64.

    A ranking's probability depends on nothing else. These are few numbers, and where the losses saturate their
    gradients are small differences of large terms: float64 costs nothing here and keeps all digits of float32.
    """
    scores_NG = scores_NG.double()
    return beta * (scores_NG[:, None, :] - scores_NG[:, :, None])


def _log_prob(leads_NGG: Tensor, rankings_NRG: Tensor) -> Tensor:
    """Log-probabilities [N, R] of rankings: `sum_k log sigmoid( -logsumexp_{j > k} (s_j - s_k) )`.

    The last place adds nothing and is left out, so that at least one answer follows each.
    """
    answers = rankings_NRG.shape[2]
    pairs_NRGG = rankings_NRG[..., :-1, None] * answers + rankings_NRG[..., None, :]
    ordered_NRGG = leads_NGG.flatten(1).gather(1, pairs_NRGG.flatten(1)).view(pairs_NRGG.shape)
    gone_GG = torch.ones(pairs_NRGG.shape[2:], dtype=torch.bool, device=leads_NGG.device).tril()
    return F.logsigmoid(-ordered_NRGG.masked_fill(gone_GG, float("-inf")).logsumexp(3)).sum(2)


def _check_scores(**scores: Tensor) -> None:
    """Raises LossInputError unless scores are floating-point [N, G], alike in shape and, on the CPU, finite."""
    shapes = {name: list(tensor.shape) for name, tensor in scores.items()}
    for name, tensor in scores.items():
        check_matrix(name, tensor)
        check_finite(name, tensor)
    if len(set(map(tuple, shapes.values()))) > 1:
        raise LossInputError(f"scores of shapes {shapes}: they must be alike, [prompts, answers]")


def _check_answers(scores_NG: Tensor, *, most: int | None) -> None:
    answers = scores_NG.shape[1]
    if answers < 2:
        raise LossInputError(f"{answers} answers to a prompt: a ranking needs at least 2")
    if most is not None and answers > most:
        rule = f"all {answers}! rankings would be counted, at most {most} are possible"
        raise LossInputError(f"{answers} answers to a prompt: {rule}; give fewer, or use pad_vanilla")
