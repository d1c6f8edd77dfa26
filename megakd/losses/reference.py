"""The specification of the losses: naive, one process, float64. Gradients are autograd's. Slow; used by tests only.

Models are given as whole logits [T, V]; those made from hidden states are `hidden @ head^T`. `vocab_size` cuts columns
off.

Legend: T tokens, V vocabulary, P pairs, N sequences or prompts, G answers to a prompt, K stored ids of a token.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def head_logits(
    hidden_TH: Tensor,
    head_VH: Tensor,
    bias_V: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """softcap(scale * (hidden @ head^T + bias)) with softcap(x) = cap tanh(x / cap) (Gemma 2, arXiv 2408.00118)."""
    logits_TV = hidden_TH.double() @ head_VH.double().t()
    logits_TV = scale * (logits_TV if bias_V is None else logits_TV + bias_V.double())
    return logits_TV if softcap is None else softcap * torch.tanh(logits_TV / softcap)


def log_probs(logits_TV: Tensor, *, vocab_size: int | None = None, temperature: float = 1.0) -> Tensor:
    """log softmax over the real columns, in float64."""
    return torch.log_softmax(logits_TV.double()[:, :vocab_size] / temperature, dim=1)


def token_log_probs(logits_TV: Tensor, labels_T: Tensor, *, vocab_size: int | None = None) -> Tensor:
    """log Q(label) (the SFT loss without its sign)."""
    return log_probs(logits_TV, vocab_size=vocab_size)[torch.arange(len(labels_T)), labels_T]


def kl(log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q), where p = 0 adds nothing."""
    p_TV = log_p_TV.exp()
    ratio_TV = torch.where(p_TV > 0, log_p_TV - log_q_TV, 0.0)
    return (p_TV * ratio_TV).sum(1)


def divergence(
    kind: str,
    student_TV: Tensor,
    teacher_TV: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    mu: float = 0.5,
    vocab_size: int | None = None,
) -> Tensor:
    """Divergences of P (teacher) and Q (student).

    forward_kl: DCKD (arXiv 2502.17927); reverse_kl: MiniLLM (arXiv 2306.08543); jsd: GKD (arXiv 2306.13649) eq. 1;
    akl: AKL (arXiv 2404.02657).
    """
    log_q_TV = log_probs(student_TV, vocab_size=vocab_size, temperature=temperature)
    log_p_TV = log_probs(teacher_TV.detach(), vocab_size=vocab_size, temperature=temperature)
    match kind:
        case "forward_kl":
            return kl(log_p_TV, log_q_TV)
        case "reverse_kl":
            return kl(log_q_TV, log_p_TV)
        case "jsd":
            log_m_TV = torch.log(beta * log_p_TV.exp() + (1 - beta) * log_q_TV.exp())
            return beta * kl(log_p_TV, log_m_TV) + (1 - beta) * kl(log_q_TV, log_m_TV)
        case "akl":
            head_T = akl_head_share(log_p_TV.exp(), log_q_TV.exp().detach(), mu)
            return head_T * kl(log_p_TV, log_q_TV) + (1 - head_T) * kl(log_q_TV, log_p_TV)
    raise ValueError(kind)


def akl_head_share(p_TV: Tensor, q_TV: Tensor, mu: float) -> Tensor:
    """AKL's weight of the forward KL: the head's share of sum |P - Q|.

    The head is the prefix, by falling teacher probability, whose cumulative probability is at most mu; the first token
    is always in it.
    """
    shares = []
    for p_V, q_V in zip(p_TV.tolist(), q_TV.tolist(), strict=False):
        order = sorted(range(len(p_V)), key=lambda token: (-p_V[token], token))
        total, head, gap = 0.0, 0.0, 0.0
        for place, token in enumerate(order):
            total += p_V[token]
            difference = abs(p_V[token] - q_V[token])
            gap += difference
            head += difference if place == 0 or total <= mu else 0.0
        shares.append(head / gap if gap > 0 else 0.0)
    return torch.tensor(shares, dtype=torch.float64)


def expected_advantage(
    student_TV: Tensor,
    teacher_TV: Tensor,
    reference_TV: Tensor,
    *,
    beta: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """sum_a Q(a) beta (log P(a) - log R(a)) (ADPA, arXiv 2502.17927, eq. 9-10)."""
    advantage_TV = log_probs(teacher_TV.detach(), vocab_size=vocab_size)
    advantage_TV = beta * (advantage_TV - log_probs(reference_TV.detach(), vocab_size=vocab_size))
    return (log_probs(student_TV, vocab_size=vocab_size).exp() * advantage_TV).sum(1)


def sequence_sums(values_T: Tensor, rows_T: Tensor, rows: int) -> Tensor:
    """Sum of the values of each sequence."""
    return torch.stack([values_T[rows_T == row].sum() for row in range(rows)])


def dpo(
    chosen_P: Tensor,
    rejected_P: Tensor,
    ref_chosen_P: Tensor,
    ref_rejected_P: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid(beta [(chosen - ref_chosen) - (rejected - ref_rejected)]) (DPO, arXiv 2305.18290, eq. 7)."""
    margins_P = beta * ((chosen_P - ref_chosen_P) - (rejected_P - ref_rejected_P)).double()
    log_right_P, log_wrong_P = torch.log_softmax(torch.stack([margins_P, torch.zeros_like(margins_P)]), dim=0)
    return -(1 - label_smoothing) * log_right_P - label_smoothing * log_wrong_P


def log_sigmoid(margins: Tensor) -> Tensor:
    """log( 1 / (1 + exp(-m)) ), in float64."""
    margins = margins.double()
    return torch.log_softmax(torch.stack([margins, torch.zeros_like(margins)]), dim=0)[0]


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
    """-log sigmoid(beta/|t| log q(t)/p(t) - beta/|s| log q(s)/p(s)) (DPKD, arXiv 2406.19774, eq. 9; or 8)."""
    losses = []
    for pair in range(len(student_t_P)):
        t = beta / len_t_P[pair].item() if length_normalize else beta
        s = beta / len_s_P[pair].item() if length_normalize else beta
        log_ratio_t = student_t_P[pair].double() - teacher_t_P[pair].double().item()
        log_ratio_s = student_s_P[pair].double() - teacher_s_P[pair].double().item()
        losses.append(-log_sigmoid(t * log_ratio_t - s * log_ratio_s))
    return torch.stack(losses)


def ipo(
    chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_rejected_P: Tensor, *, tau: float
) -> Tensor:
    """(log of the ratio of ratios - 1 / (2 tau))^2 (IPO, arXiv 2310.12036, eq. 17; DPKD, arXiv 2406.19774, table 2)."""
    log_ratio_P = chosen_P.double() - rejected_P.double()
    ref_log_ratio_P = ref_chosen_P.detach().double() - ref_rejected_P.detach().double()
    return (log_ratio_P - ref_log_ratio_P - 1 / (2 * tau)) ** 2


def cpo(chosen_P: Tensor, rejected_P: Tensor, *, beta: float, nll_weight: float = 1.0) -> Tensor:
    """-log sigmoid(beta chosen - beta rejected) - nll_weight chosen (CPO, arXiv 2401.08417)."""
    return -log_sigmoid(beta * chosen_P.double() - beta * rejected_P.double()) - nll_weight * chosen_P.double()


def simpo(
    chosen_P: Tensor, rejected_P: Tensor, len_chosen_P: Tensor, len_rejected_P: Tensor, *, beta: float, gamma: float
) -> Tensor:
    """-log sigmoid(beta/|w| chosen - beta/|l| rejected - gamma) (SimPO, arXiv 2405.14734, eq. 6)."""
    chosen_P = beta / len_chosen_P.double() * chosen_P.double()
    return -log_sigmoid(chosen_P - beta / len_rejected_P.double() * rejected_P.double() - gamma)


def plackett_luce_log_prob(scores_NG: Tensor, ranking_NG: Tensor) -> Tensor:
    """log of prod_k softmax(scores of those left at place k)[the one at place k] (Plackett 1975, Luce 1959)."""
    values = []
    for scores_G, ranking in zip(scores_NG.double(), ranking_NG.tolist(), strict=True):
        value = torch.zeros((), dtype=torch.float64)
        for place in range(len(ranking)):
            value = value + torch.log_softmax(scores_G[ranking[place:]], dim=0)[0]
        values.append(value)
    return torch.stack(values)


def pad_vanilla(student_score_NG: Tensor, teacher_score_NG: Tensor, *, beta: float) -> Tensor:
    """-log PL(teacher's ranking) under beta times the student's scores (PAD, arXiv 2502.14272, eq. 11)."""
    rankings = [sorted(range(len(row)), key=lambda answer, row=row: -row[answer]) for row in teacher_score_NG.tolist()]
    return -plackett_luce_log_prob(beta * student_score_NG.double(), torch.tensor(rankings))


def pad_probabilistic(
    student_score_NG: Tensor, teacher_score_NG: Tensor, *, beta: float, divergence: str = "jsd"
) -> Tensor:
    """Divergence of the distributions over all rankings.

    jsd: PAD (arXiv 2502.14272) eq. 12; am_gm: the released code, with the arguments of both KL exchanged.
    """
    logs = []
    for scores_NG in (student_score_NG, teacher_score_NG.detach()):
        columns = []
        for ranking in itertools.permutations(range(scores_NG.shape[1])):
            ranking_NG = torch.tensor([ranking] * len(scores_NG))
            columns.append(plackett_luce_log_prob(beta * scores_NG.double(), ranking_NG))
        logs.append(torch.stack(columns, dim=1))
    log_s, log_t = logs
    log_m = torch.logsumexp(torch.stack(logs), dim=0) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    if divergence == "jsd":
        return 0.5 * kl(log_s, log_m) + 0.5 * kl(log_t, log_m)
    return 0.5 * kl(log_m, log_s) + 0.5 * kl(log_m, log_t)


def dpkd_token(student_TV: Tensor, teacher_TV: Tensor, *, beta: float, vocab_size: int | None = None) -> Tensor:
    """DPO loss of the teacher's likeliest token over the student's (released code of DPKD, arXiv 2406.19774)."""
    log_q_TV = log_probs(student_TV, vocab_size=vocab_size)
    log_p_TV = log_probs(teacher_TV.detach(), vocab_size=vocab_size)
    losses = []
    for log_q_V, log_p_V in zip(log_q_TV, log_p_TV, strict=True):
        # The first of equal numbers, as logits: normalising may make neighbours equal.
        place = len(losses)
        a, b = (row.index(max(row)) for row in (m[place, :vocab_size].tolist() for m in (teacher_TV, student_TV)))
        losses.append(-log_sigmoid(beta * ((log_q_V[a] - log_q_V[b]) - (log_p_V[a] - log_p_V[b]))))
    return torch.stack(losses) if losses else log_q_TV.sum(1)


def released_topk_advantage(
    student_TV: Tensor, token_ids_TK: Tensor, advantages_TK: Tensor, *, clamp: bool, vocab_size: int | None = None
) -> Tensor:
    """sum_a Q(a) A(a), A of tokens that are not stored being 0, all limited with clamp (released code of ADPA)."""
    q_TV = log_probs(student_TV, vocab_size=vocab_size).exp()
    advantage_TV = torch.zeros_like(q_TV).scatter(1, token_ids_TK, advantages_TK.detach().double())
    if clamp:
        advantage_TV = advantage_TV.clamp(1e-8, 1 - 1e-8)
    return (q_TV * advantage_TV).sum(1)


def released_topk_kl(
    student_TV: Tensor, token_ids_TK: Tensor, teacher_probs_TK: Tensor, *, clamp: bool, vocab_size: int | None = None
) -> Tensor:
    """KL between the stored tokens and one rest of both (released code of DCKD, arXiv 2502.17927)."""
    values = []
    log_q_TV = log_probs(student_TV, vocab_size=vocab_size)
    width = log_q_TV.shape[1]
    for log_q_V, ids, p in zip(log_q_TV, token_ids_TK.tolist(), teacher_probs_TK.double().tolist(), strict=True):
        p = [each if token < width else 0.0 for token, each in zip(ids, p, strict=True)]
        p.append(max(1.0 - sum(p), 0.0))
        others = [token for token in range(width) if token not in ids]
        zero = torch.tensor(float("-inf"), dtype=torch.float64)
        log_q = [log_q_V[token] if token < width else zero for token in ids]
        log_q.append(torch.logsumexp(log_q_V[others], dim=0) if others else zero)
        value = log_q_V.sum() * 0.0
        for p_i, log_q_i in zip(p, log_q, strict=True):
            if clamp:
                p_i = min(max(p_i, 1e-8), 1 - 1e-8)
                log_q_i = log_q_i.clamp(min=torch.log(torch.tensor(1e-7, dtype=torch.float64)))
            if p_i > 0 and not log_q_i.isneginf():
                value = value + p_i * (torch.log(torch.tensor(p_i, dtype=torch.float64)) - log_q_i)
        values.append(value)
    return torch.stack(values) if values else log_q_TV.sum(1)
