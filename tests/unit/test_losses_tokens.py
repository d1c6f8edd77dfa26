"""Per-token losses in one process: values and gradients against the float64 reference, extremes, refusals, memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd import losses
from megakd.errors import LossInputError
from megakd.losses import hidden_states, reference
from megakd.losses.divergence import AdaptiveKL
from megakd.objectives.sft import nll_term
from tests import loss_cases

FORMS = pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])


@FORMS
@pytest.mark.parametrize("loss", loss_cases.LOSSES)
def test_values_and_gradients(loss, fused):
    for case in loss_cases.variants(loss, fused):
        loss_cases.check(case, [loss_cases.run(case)])
        for chunk in (1, 4, 13, 1000) if fused and not case.label else ():
            loss_cases.check(replace(case, chunk=chunk), [loss_cases.run(replace(case, chunk=chunk))])


@pytest.mark.parametrize("loss", loss_cases.LOSSES)
def test_a_vocabulary_of_128_256(loss):
    case = loss_cases.wide(loss, tokens=8, chunk=4)
    loss_cases.check(case, [loss_cases.run(case)])


@st.composite
def cases(draw):
    """Any shapes, masks, chunks, temperatures and ways to make logits."""
    loss, fused = draw(st.sampled_from(loss_cases.LOSSES)), draw(st.booleans())
    columns = draw(st.integers(2, 90))
    case = loss_cases.Case(
        loss, fused, tokens=draw(st.integers(0, 12)), columns=columns, chunk=draw(st.integers(1, 15)),
        vocab=draw(st.none() | st.integers(2, columns)), beta=draw(st.floats(0.05, 0.95)),
        mu=draw(st.floats(0.0, 0.99)), equal_weights=draw(st.booleans()), label="drawn",
    )
    if loss in loss_cases.DIVERGENCES:
        case = replace(case, temperature=draw(st.floats(0.5, 3.0)))
    if fused:
        softcap = draw(st.none() | st.floats(1.0, 20.0))
        case = replace(case, bias=draw(st.booleans()), scale=draw(st.floats(0.3, 2.0)), softcap=softcap,
                       recompute=draw(st.booleans()))
        case = replace(case, with_log_probs=loss in loss_cases.DIVERGENCES and draw(st.booleans()))
    return case


@settings(max_examples=150, deadline=None)
@given(cases())
def test_any_shapes_masks_and_settings(case):
    """In float64, where no rounding stands between a wrong formula and its discovery."""
    case = replace(case, dtype=torch.float64)
    if case.with_log_probs:
        case = replace(case, equal_weights=False)
    loss_cases.check(case, [loss_cases.run(case)], tolerance=1e-9)


@FORMS
@pytest.mark.parametrize("loss", loss_cases.LOSSES[1:])
@pytest.mark.parametrize("teacher_columns", [33, 40, 64])
def test_a_teacher_of_another_padded_width(loss, fused, teacher_columns):
    case = loss_cases.Case(loss, fused, teacher_columns=teacher_columns)
    loss_cases.check(case, [loss_cases.run(case)])


@FORMS
@pytest.mark.parametrize("candidates", [1, 3, 7])
def test_akl_is_exact_when_the_exchanged_candidates_do_not_hold_the_head(fused, candidates, monkeypatch):
    monkeypatch.setattr(AdaptiveKL, "CANDIDATES", candidates)
    for mu in (0.0, 0.2, 0.47, 0.9, 0.99):
        for big in (False, True):
            case = loss_cases.Case("akl", fused, mu=mu, big=big)
            loss_cases.check(case, [loss_cases.run(case)])


def test_akl_breaks_ties_by_the_lower_id():
    teacher_TV = torch.tensor([[1.0, 2.0, 2.0, 2.0, 2.0, 0.0]])
    student_TV = torch.tensor([[0.0, 3.0, -1.0, 0.5, 2.0, 1.0]])
    for mu in (0.1, 0.3, 0.5, 0.8, 0.9):
        value_T = losses.divergence("akl", student_TV, teacher_TV, mu=mu)
        torch.testing.assert_close(value_T.double(), reference.divergence("akl", student_TV, teacher_TV, mu=mu))


@pytest.mark.parametrize("loss", loss_cases.LOSSES[1:])
def test_equal_distributions(loss):
    logits_TV = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    student_TV = logits_TV.clone().requires_grad_()
    if loss == "advantage":
        value_T = losses.expected_advantage(student_TV, logits_TV, logits_TV)
    else:
        value_T = losses.divergence(loss, student_TV, logits_TV)
    value_T.sum().backward()
    assert value_T.abs().max() < 1e-6 and student_TV.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_teacher_probability_of_exactly_zero(kind):
    generator = torch.Generator().manual_seed(0)
    student_TV = torch.randn(4, 7, generator=generator).requires_grad_()
    teacher_TV = torch.randn(4, 7, generator=generator)
    teacher_TV[:, 2] = float("-inf")
    value_T = losses.divergence(kind, student_TV, teacher_TV, beta=0.3)
    value_T.sum().backward()
    exact_TV = student_TV.detach().double().requires_grad_()
    exact_T = reference.divergence(kind, exact_TV, teacher_TV.masked_fill(teacher_TV.isinf(), -1e9), beta=0.3)
    exact_T.sum().backward()
    torch.testing.assert_close(value_T.double(), exact_T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student_TV.grad.double(), exact_TV.grad, rtol=1e-5, atol=1e-6)


def test_a_token_that_both_teachers_rule_out():
    generator = torch.Generator().manual_seed(0)
    student_TV = torch.randn(4, 7, generator=generator).requires_grad_()
    teacher_TV, reference_TV = torch.randn(2, 4, 7, generator=generator)
    teacher_TV[:, 2] = reference_TV[:, 2] = float("-inf")
    value_T = losses.expected_advantage(student_TV, teacher_TV, reference_TV)
    value_T.sum().backward()
    # Both count as one finite number there, so only the normalisers tell the teachers apart.
    exact_TV = student_TV.detach().double().requires_grad_()
    finite = [logits_TV.double().nan_to_num(neginf=-1e3) for logits_TV in (teacher_TV, reference_TV)]
    exact_T = reference.expected_advantage(exact_TV, *finite)
    exact_T.sum().backward()
    torch.testing.assert_close(value_T.double(), exact_T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(student_TV.grad.double(), exact_TV.grad, rtol=1e-4, atol=1e-4)


def test_hand_checked_numbers():
    student_TV = torch.tensor([[0.0, math.log(3.0)]])  # Q = 1/4, 3/4
    teacher_TV = torch.tensor([[0.0, 0.0]])  # P = 1/2, 1/2
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    reverse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    jsd = 0.1 * (0.5 * math.log(0.5 / 0.275) + 0.5 * math.log(0.5 / 0.725))
    jsd += 0.9 * (0.25 * math.log(0.25 / 0.275) + 0.75 * math.log(0.75 / 0.725))
    assert losses.divergence("forward_kl", student_TV, teacher_TV).item() == pytest.approx(forward)
    assert losses.divergence("reverse_kl", student_TV, teacher_TV).item() == pytest.approx(reverse)
    assert losses.divergence("jsd", student_TV, teacher_TV, beta=0.1).item() == pytest.approx(jsd, rel=1e-5)
    # Head: token 0 of P (the tie goes to the lower id), with half of the gap: the mean of both KLs.
    assert losses.divergence("akl", student_TV, teacher_TV).item() == pytest.approx((forward + reverse) / 2)
    # A = beta (log P - log R) with R = Q: E = beta * sum Q (log P - log Q) = -beta * reverse.
    value = losses.expected_advantage(student_TV, teacher_TV, student_TV, beta=2.0).item()
    assert value == pytest.approx(-2 * reverse)
    assert losses.token_log_probs(student_TV, torch.tensor([1])).item() == pytest.approx(math.log(0.75))


@pytest.mark.parametrize("loss", loss_cases.LOSSES)
def test_the_fused_forms_keep_a_few_numbers_a_token_and_nothing_of_the_vocabulary(loss):
    case = loss_cases.Case(loss, True, tokens=40, vocab=None, columns=64)
    data = loss_cases.inputs(case)
    for tensor in data["models"][0]:
        tensor.requires_grad_()
    given = {tensor.data_ptr() for model in data["models"] for tensor in model}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        value_T = loss_cases.ours(case, data, None)
    assert sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in given) <= 4 * case.tokens
    # What the node itself holds are the gradients that it will return.
    made = [tensor for tensor in value_T.grad_fn.gradients if tensor is not None]
    assert [tensor.shape for tensor in made] == [tensor.shape for tensor in data["models"][0]]
    recomputed = loss_cases.ours(replace(case, recompute=True), data, None)
    assert recomputed.grad_fn.gradients is None


@pytest.mark.parametrize("loss", loss_cases.LOSSES)
def test_a_second_backward_pass_through_the_same_graph_gives_the_same(loss):
    case = loss_cases.Case(loss, True)
    data = loss_cases.inputs(case)
    student = [tensor.requires_grad_() for tensor in data["models"][0]]
    total = loss_cases.ours(case, data, None).sum()
    first = torch.autograd.grad(total, student, retain_graph=True)
    second = torch.autograd.grad(total, student)
    for mine, other in zip(first, second, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_numbers_that_are_not_finite_are_named(fused):
    head_VH, hidden_TH = torch.randn(9, 4), torch.randn(6, 4, requires_grad=True)
    bad_TH = hidden_TH.detach().clone()
    bad_TH[2, 1] = bad_TH[4, 0] = float("nan")
    if fused:
        with pytest.raises(LossInputError, match="2 of 6 values .* teacher_hidden holds 2 of 24"):
            losses.fused_divergence("forward_kl", hidden_TH, head_VH, bad_TH, head_VH)
        with pytest.raises(LossInputError, match="hidden holds 2 of 24"):
            losses.fused_token_log_probs(bad_TH, head_VH, torch.arange(6))
    else:
        with pytest.raises(LossInputError, match="2 of 6 values .* teacher_TV holds 18 of 54"):
            losses.divergence("forward_kl", hidden_TH @ head_VH.t(), bad_TH @ head_VH.t())


def test_no_gradient_is_made_where_none_is_asked_for():
    hidden_TH, head_VH = torch.randn(6, 4), torch.randn(9, 4, requires_grad=True)
    labels_T = torch.arange(6)
    losses.fused_token_log_probs(hidden_TH, head_VH, labels_T).sum().backward()
    assert hidden_TH.grad is None and head_VH.grad is not None
    with torch.no_grad():
        assert not losses.fused_token_log_probs(hidden_TH, head_VH, labels_T).requires_grad


A = torch.zeros(3, 8)
LABELS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: losses.token_log_probs(A, LABELS[:2]), r"labels_T .*\[2\].* \[3\]"),
        (lambda: losses.token_log_probs(A, LABELS.float()), r"labels_T .*float32.*int64"),
        (lambda: losses.token_log_probs(A, LABELS + 8), r"labels_T holds 8.*\[0, 8\)"),
        (lambda: losses.token_log_probs(A, LABELS - 100), r"labels_T holds -100"),
        (lambda: losses.token_log_probs(A, LABELS + 7, vocab_size=7), r"labels_T holds 7.*\[0, 7\)"),
        (lambda: losses.token_log_probs(A[0], LABELS), r"logits_TV .*\[8\].*matrix"),
        (lambda: losses.token_log_probs(A, LABELS, vocab_size=9), r"vocab_size = 9.*1 x 8 columns of logits_TV"),
        (lambda: losses.token_log_probs(A, LABELS, vocab_size=0), r"vocab_size = 0"),
        (lambda: losses.divergence("kl", A, A), r"kind = 'kl'.*forward_kl, reverse_kl, jsd, akl"),
        (lambda: losses.divergence("forward_kl", A, A[:2]), r"teacher_TV has 2 rows.*3"),
        (lambda: losses.divergence("forward_kl", A, A[:, :7]), r"teacher_TV has 7 .*student_TV 8.*equal"),
        (lambda: losses.divergence("forward_kl", A, A[:, :7], vocab_size=8), r"vocab_size = 8.*1 x 7 .*teacher_TV"),
        (lambda: losses.divergence("forward_kl", A, A.long()), r"teacher_TV is torch.int64"),
        (lambda: losses.divergence("forward_kl", A, A, temperature=0.0), r"temperature = 0.0.*positive"),
        (lambda: losses.divergence("jsd", A, A, beta=1.0), r"beta = 1.0.*reverse_kl"),
        (lambda: losses.divergence("akl", A, A, mu=1.0), r"mu = 1.0"),
        (lambda: losses.expected_advantage(A, A, A[:1]), r"reference_TV has 1 rows"),
        (lambda: losses.fused_token_log_probs(A, A[:, :5], LABELS), r"hidden has width 8 and head 5"),
        (lambda: losses.fused_divergence("akl", A, A, A[:, :4], A), r"teacher_hidden has width 4 and teacher_head 8"),
        (lambda: losses.fused_token_log_probs(A, A, LABELS, chunk_tokens=0), r"chunk_tokens = 0"),
        (lambda: losses.fused_expected_advantage(A, A, A, A, A[:2], A), r"reference_hidden has 2 rows.*3"),
        (lambda: losses.fused_token_log_probs(A, A, LABELS, bias_V=A[0, :2]), r"bias is \[2\] and head \[3, 8\]"),
        (lambda: losses.fused_token_log_probs(A, A, LABELS, logit_softcap=0.0), r"logit_softcap .* = 0.0.*positive"),
        (lambda: losses.fused_divergence("jsd", A, A, A, A, logit_scale=(1.0,)), r"logit_scale has 1 .*2"),
        (lambda: losses.fused_divergence("jsd", A, A, A, A, temperature=-1.0), r"temperature = -1.0"),
        (lambda: losses.fused_distillation("jsd", A, A, A, A, LABELS, divergence_weights_T=A[:, 0],
                                           log_prob_weights_T=A[0]), r"log_prob_weights_T is .*\[8\]"),
        (lambda: losses.sequence_sums(A[0], LABELS, 2), r"values_T is \[8\] and rows_T \[3\]"),
        (lambda: losses.dpo(A[0], A[0], A[0], A[0, :2], beta=1.0), r"ref_rejected_P is .*\[2\] and chosen_P \[8\]"),
        (lambda: losses.dpo(A[0], A[0], A[0], A[0], beta=1.0, label_smoothing=0.5), r"label_smoothing = 0.5"),
    ],
)
def test_wrong_inputs_are_refused(call, message):
    with pytest.raises(LossInputError, match=message):
        call()


def test_one_weight_for_all_tokens_stays_one_number(monkeypatch):
    """What a sum hands back of the NLL's values is one number seen T times: else an accelerator has to be waited for to
    find them equal, as after a mean."""
    strides = []
    equal = hidden_states._equal_weights
    monkeypatch.setattr(hidden_states, "_equal_weights", lambda upstream_T: strides.append(upstream_T.stride())
                        or equal(upstream_T))
    hidden_TH, head_VH = torch.randn(3, 4), torch.randn(7, 4)
    labels_T = torch.tensor([1, 0, 6])
    gradients = []
    for loss in (lambda values_T: 2.0 * nll_term(values_T, weight=1.0).values_N.sum(),
                 lambda values_T: -6.0 * values_T.mean(),
                 lambda values_T: (losses.negative(values_T) * torch.tensor([2.0, 2.0, 2.0])).sum()):
        leaf_TH = hidden_TH.clone().requires_grad_()
        loss(losses.fused_token_log_probs(leaf_TH, head_VH, labels_T)).backward()
        gradients.append(leaf_TH.grad)
    assert strides == [(0,), (1,), (1,)]
    for gradient_TH in gradients[1:]:
        torch.testing.assert_close(gradient_TH, gradients[0])
