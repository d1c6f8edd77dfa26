"""The per-token losses from hidden states: LM heads are applied inside, a chunk of tokens at a time.

No [T, V] tensor lives between forward and backward. Peak memory is a chunk's logits for each model, a few rows of
scratch (on CUDA a few chunks' gradients in 16 bits), and the gradients of hidden and head; see hidden_states.py.

Legend: T tokens, V local vocabulary columns, H student width, K teacher width, J reference width.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megakd.errors import LossInputError
from megakd.losses.advantage import ExpectedAdvantage
from megakd.losses.combined import WithLogProbs
from megakd.losses.divergence import row_divergence
from megakd.losses.hidden_states import HeadInput, Settings, all_tokens, check_models, hidden_row_loss
from megakd.losses.likelihood import LogProb, check_labels, check_weights
from megakd.losses.released import ArgmaxPreference
from megakd.losses.statistics import check_positive


def fused_token_log_probs(
    hidden_TH: Tensor,
    head_VH: Tensor,
    labels_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    recompute: bool = False,
    sequence_parallel: bool = False,
) -> Tensor:
    """log softmax(logits)[label] of each token, without the whole logits.

    logits = softcap(logit_scale * (hidden @ head^T + bias)) / temperature, softcap(x) = logit_softcap tanh(x /
    logit_softcap).

    Args:
        hidden_TH: last hidden states at the loss positions, complete on every rank; any floating dtype.
        head_VH: local rows of the LM head.
        labels_T: global token ids (int64) of all T tokens, the same on all ranks.
        bias_V: local part of the head's bias.
        logit_scale, logit_softcap, temperature: as above; the softcap is left out where it is None.
        tp_group: ranks over which V is cut; None means not cut.
        vocab_size: real vocabulary; columns at or above it get no probability and no gradient.
        chunk_tokens: tokens whose logits are held at a time; None takes what suits the device (chunks.py).
        recompute: False makes the gradient in the forward pass, the least work where the backward pass weighs all
            tokens alike (a sum or a mean). True makes logits again in the backward pass: for a caller that weighs
            tokens one by one, as preference losses do. The result is the same.
        sequence_parallel: `hidden_TH` is this rank's share [T / TP, H] of the tokens, equally large on every rank; its
            gradient is, too.

    Returns:
        logp_T, float32 (float64 for float64 hidden states). d(hidden) is complete on every rank (this rank's share
        under sequence parallelism), d(head) and d(bias) are the local rows'.

    Collectives: one MAX and one SUM all-reduce of a few numbers a token for each chunk; one SUM of d(hidden) for each
    chunk (for GRADIENT_CHUNKS together on CUDA), which runs beside the next products. Under sequence parallelism one
    all-gather of hidden and one reduce-scatter of d(hidden) instead of these.

    Raises:
        LossInputError: shapes that do not match, T that does not divide by the group's size under sequence parallelism,
            labels out of range or numbers that are not finite (on CPU tensors; a NaN value on others), vocab_size
            beyond the head.
    """
    models = [HeadInput("", hidden_TH, head_VH, bias_V, logit_scale, logit_softcap)]
    columns = check_models(models, tp_group, vocab_size)
    tokens = all_tokens(models[0], labels_T, columns, sequence_parallel)
    check_labels(labels_T, tokens, columns.vocab_size)
    settings = Settings(chunk_tokens, temperature, recompute, sequence_parallel)
    return hidden_row_loss(LogProb(labels_T), models, columns, settings)[0]


def fused_divergence(
    kind: str,
    student_hidden_TH: Tensor,
    student_head_VH: Tensor,
    teacher_hidden_TK: Tensor,
    teacher_head_VK: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    mu: float = 0.5,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    logit_scale: float | tuple[float, ...] = 1.0,
    logit_softcap: float | tuple[float | None, ...] | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    recompute: bool = False,
    sequence_parallel: bool = False,
) -> Tensor:
    """`divergence` of logits that are made from hidden states, a chunk at a time; a gradient for the student only.

    Args:
        kind, beta, temperature, mu: as `divergence` has them.
        student_hidden_TH, teacher_hidden_TK: last hidden states at the loss positions, complete on every rank.
        student_head_VH, teacher_head_VK: local rows of the LM heads, cut alike.
        student_bias_V, teacher_bias_V: local parts of the heads' biases.
        logit_scale, logit_softcap: of all models, or a tuple with one of each, the student's first.
        tp_group, vocab_size, chunk_tokens, recompute, sequence_parallel: as `fused_token_log_probs` has them.

    Returns:
        loss_T, float32 (float64 for float64 hidden states); gradients as `fused_token_log_probs` has them.

    Collectives: those of `divergence` for each chunk, and those of `fused_token_log_probs` for d(hidden).

    Raises:
        LossInputError: an unknown kind, shapes that do not match, a setting or vocab_size out of range, numbers that
            are not finite (on CPU tensors).
    """
    loss = row_divergence(kind, beta=beta, mu=mu)
    models = _models(
        {
            "student_": (student_hidden_TH, student_head_VH, student_bias_V),
            "teacher_": (teacher_hidden_TK, teacher_head_VK, teacher_bias_V),
        },
        logit_scale,
        logit_softcap,
    )
    columns = check_models(models, tp_group, vocab_size)
    settings = Settings(chunk_tokens, temperature, recompute, sequence_parallel)
    return hidden_row_loss(loss, models, columns, settings)[0]


def fused_expected_advantage(
    student_hidden_TH: Tensor,
    student_head_VH: Tensor,
    teacher_hidden_TK: Tensor,
    teacher_head_VK: Tensor,
    reference_hidden_TJ: Tensor,
    reference_head_VJ: Tensor,
    *,
    beta: float = 1.0,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    reference_bias_V: Tensor | None = None,
    logit_scale: float | tuple[float, ...] = 1.0,
    logit_softcap: float | tuple[float | None, ...] | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    recompute: bool = False,
    sequence_parallel: bool = False,
) -> Tensor:
    """`expected_advantage` of logits that are made from hidden states; a gradient for the student only.

    Args:
        student_hidden_TH, teacher_hidden_TK, reference_hidden_TJ: last hidden states at the loss positions, complete on
            every rank.
        student_head_VH, teacher_head_VK, reference_head_VJ: local rows of the LM heads, cut alike.
        beta: scale of the advantage.
        student_bias_V, teacher_bias_V, reference_bias_V: local parts of the heads' biases.
        logit_scale, logit_softcap: of all models, or a tuple with one of each, the student's first.
        tp_group, vocab_size, chunk_tokens, recompute, sequence_parallel: as `fused_token_log_probs` has them.

    Returns:
        value_T, float32 (float64 for float64 hidden states); gradients as `fused_token_log_probs` has them.

    Collectives: those of `fused_token_log_probs`.

    Raises:
        LossInputError: shapes that do not match, vocab_size beyond a head, numbers that are not finite (CPU tensors).
    """
    models = _models(
        {
            "student_": (student_hidden_TH, student_head_VH, student_bias_V),
            "teacher_": (teacher_hidden_TK, teacher_head_VK, teacher_bias_V),
            "reference_": (reference_hidden_TJ, reference_head_VJ, reference_bias_V),
        },
        logit_scale,
        logit_softcap,
    )
    columns = check_models(models, tp_group, vocab_size)
    settings = Settings(chunk_tokens, 1.0, recompute, sequence_parallel)
    return hidden_row_loss(ExpectedAdvantage(beta), models, columns, settings)[0]


def fused_dpkd_token(
    student_hidden_TH: Tensor,
    student_head_VH: Tensor,
    teacher_hidden_TK: Tensor,
    teacher_head_VK: Tensor,
    *,
    beta: float,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    logit_scale: float | tuple[float, ...] = 1.0,
    logit_softcap: float | tuple[float | None, ...] | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    recompute: bool = False,
    sequence_parallel: bool = False,
) -> Tensor:
    """`dpkd_token` (the released code of DPKD) of logits that are made from hidden states.

    The arguments, gradients, collectives and errors are those of `fused_divergence`; beta that of `dpkd_token`.
    """
    check_positive("beta", beta)
    models = _models(
        {
            "student_": (student_hidden_TH, student_head_VH, student_bias_V),
            "teacher_": (teacher_hidden_TK, teacher_head_VK, teacher_bias_V),
        },
        logit_scale,
        logit_softcap,
    )
    columns = check_models(models, tp_group, vocab_size)
    settings = Settings(chunk_tokens, 1.0, recompute, sequence_parallel)
    return hidden_row_loss(ArgmaxPreference(beta), models, columns, settings)[0]


def fused_distillation(
    kind: str,
    student_hidden_TH: Tensor,
    student_head_VH: Tensor,
    teacher_hidden_TK: Tensor,
    teacher_head_VK: Tensor,
    labels_T: Tensor,
    *,
    divergence_weights_T: Tensor,
    log_prob_weights_T: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    mu: float = 0.5,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    logit_scale: float | tuple[float, ...] = 1.0,
    logit_softcap: float | tuple[float | None, ...] | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    sequence_parallel: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence to the teacher and log-probabilities of labels, weighted token by token, with one pass of the heads.

    What KD and DCKD need: the student's head is applied once to each position though it has two terms there, and all
    gradients are made in the forward pass though the tokens' weights differ.

    Args:
        kind, beta, mu: as `divergence` has them.
        temperature: of the divergence; the log-probabilities are those at temperature 1.
        labels_T: global token ids (int64) of all T tokens, the same on all ranks.
        divergence_weights_T, log_prob_weights_T: the tokens' weights in the loss, the same on all ranks; a term with
            weight 0 has no gradient. To lower -log Q(label), give a negative weight.
        The other arguments: as `fused_divergence` has them.

    Returns:
        loss: sum of divergence_weights_T * divergence_T + log_prob_weights_T * logp_T, 0-d, with the gradients.
        divergence_T, logp_T: without a gradient.

    Collectives: those of `fused_divergence`.

    Raises:
        LossInputError: as `fused_divergence`, and labels or weights that do not match.
    """
    models = _models(
        {
            "student_": (student_hidden_TH, student_head_VH, student_bias_V),
            "teacher_": (teacher_hidden_TK, teacher_head_VK, teacher_bias_V),
        },
        logit_scale,
        logit_softcap,
    )
    columns = check_models(models, tp_group, vocab_size)
    tokens = all_tokens(models[0], labels_T, columns, sequence_parallel)
    check_labels(labels_T, tokens, columns.vocab_size)
    check_weights(tokens, divergence=divergence_weights_T, log_prob=log_prob_weights_T)
    weights = divergence_weights_T.detach(), log_prob_weights_T.detach()
    loss = WithLogProbs(row_divergence(kind, beta=beta, mu=mu), labels_T, *weights, temperature)
    settings = Settings(chunk_tokens, temperature, False, sequence_parallel)
    values_T, reported_ST = hidden_row_loss(loss, models, columns, settings)
    return values_T.sum(), reported_ST[0], reported_ST[1]


def _models(
    tensors: dict[str, tuple[Tensor, Tensor, Tensor | None]],
    scale: float | tuple[float, ...],
    softcap: float | tuple[float | None, ...] | None,
) -> list[HeadInput]:
    """The models by the prefixes of their arguments' names, each with its own scale and softcap."""
    scales = scale if isinstance(scale, tuple) else (scale,) * len(tensors)
    softcaps = softcap if isinstance(softcap, tuple) else (softcap,) * len(tensors)
    for name, values in (("logit_scale", scales), ("logit_softcap", softcaps)):
        if len(values) != len(tensors):
            raise LossInputError(f"{name} has {len(values)} numbers: it must have one a model, {len(tensors)}")
    return [
        HeadInput(name, *model, scale, softcap)
        for (name, model), scale, softcap in zip(tensors.items(), scales, softcaps, strict=True)
    ]
