"""The specification of the losses: naive, one process, float64. Gradients are autograd's. Slow; used by tests only.

Models are given as whole logits [T, V]; those made from hidden states are `hidden @ head^T`. `vocab_size` cuts columns
off.

Legend: T tokens, V vocabulary, P pairs, N sequences.
"""

from __future__ import annotations

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
