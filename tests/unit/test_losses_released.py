"""Released forms of losses in one process: values and gradients against the float64 reference, limits, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd import losses
from megakd.errors import LossInputError
from tests import released_cases


@pytest.mark.parametrize("loss", released_cases.LOSSES)
def test_values_and_gradients(loss):
    for case in released_cases.variants(loss):
        released_cases.check(case, [released_cases.run(case)])


# ---------------------------------------------------------------------------------------------------------------- DPKD
def test_dpkd_token_moves_two_logits_alone():
    student_TV = torch.tensor([[0.0, 1.0, 3.0, 3.0], [5.0, 0.0, 0.0, 1.0]], requires_grad=True)
    teacher_TV = torch.tensor([[2.0, 2.0, 0.0, 1.0], [9.0, 0.0, 0.0, 9.0]])
    loss_T = losses.dpkd_token(student_TV, teacher_TV, beta=0.5)
    loss_T.sum().backward()
    # Token 0: a = 0, b = 2, the lowest ids of those that tie; token 1: a = b = 0.
    margin = 0.5 * ((0.0 - 3.0) - (2.0 - 0.0))
    slope = 0.5 / (1.0 + math.exp(margin))
    assert loss_T.tolist() == pytest.approx([math.log1p(math.exp(-margin)), math.log(2)])
    assert student_TV.grad[0].tolist() == pytest.approx([-slope, 0.0, slope, 0.0])
    assert student_TV.grad[1].tolist() == [0.0, 0.0, 0.0, 0.0]


@given(st.integers(0, 10**6), st.floats(0.01, 20.0), st.sampled_from([1.0, 5.0, 80.0]))
@settings(max_examples=30, deadline=None)
def test_dpkd_token_is_the_dpo_loss_of_both_likeliest_tokens(seed, beta, size):
    generator = torch.Generator().manual_seed(seed)
    student_TV, teacher_TV = size * torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    a_T, b_T = teacher_TV.argmax(1), student_TV.argmax(1)
    scores = [losses.token_log_probs(m_TV, ids_T) for m_TV in (student_TV, teacher_TV) for ids_T in (a_T, b_T)]
    loss_T = losses.dpkd_token(student_TV, teacher_TV, beta=beta)
    # DPO's softplus is linear from 20 on, which is 2e-9 off there.
    torch.testing.assert_close(loss_T, losses.dpo(*scores, beta=beta), rtol=1e-9, atol=1e-9)
    assert (loss_T >= math.log(2) - 1e-15).all()


# ---------------------------------------------------------------------------------------------------------------- ADPA
def test_advantages_of_every_token_without_the_limit_are_the_expected_advantage():
    student_TV, teacher_TV, reference_TV = torch.randn(3, 5, 9, dtype=torch.float64)
    advantages_TV = teacher_TV.log_softmax(1) - reference_TV.log_softmax(1)
    ids_TK = torch.arange(9).flip(0).expand(5, -1)
    value_T = losses.released_topk_advantage(student_TV, ids_TK, advantages_TV.flip(1), clamp=False)
    exact_T = losses.expected_advantage(student_TV, teacher_TV, reference_TV)
    torch.testing.assert_close(value_T, exact_T, rtol=1e-12, atol=1e-12)


def test_the_limit_loses_negative_advantages_and_gives_the_rest_almost_nothing():
    student_TV = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)  # 1/4 each
    advantages_TK = torch.tensor([[-3.0, 2.0]], dtype=torch.float64)
    ids_TK = torch.tensor([[3, 0]])
    value = losses.released_topk_advantage(student_TV, ids_TK, advantages_TK, clamp=True)
    assert value.item() == pytest.approx(0.25 * (1.0 - 1e-8) + 0.75 * 1e-8, rel=1e-12)
    value.sum().backward()
    assert student_TV.grad[0].tolist() == pytest.approx([0.1875, -0.0625, -0.0625, -0.0625], rel=1e-7)
    signed = losses.released_topk_advantage(student_TV.detach(), ids_TK, advantages_TK, clamp=False)
    assert signed.item() == pytest.approx(-0.25)


# ---------------------------------------------------------------------------------------------------------------- DCKD
@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([1.0, 8.0, 40.0]))
@settings(max_examples=40, deadline=None)
def test_topk_kl_lies_between_zero_and_the_whole_kl(seed, stored, size):
    generator = torch.Generator().manual_seed(seed)
    student_TV, teacher_TV = size * torch.randn(2, 4, 9, generator=generator, dtype=torch.float64)
    probs_TK, ids_TK = teacher_TV.softmax(1).topk(stored, dim=1)
    student_TV.requires_grad_()
    value_T = losses.released_topk_kl(student_TV, ids_TK, probs_TK, clamp=False)
    whole_T = losses.divergence("forward_kl", student_TV, teacher_TV)
    slack_T = 1e-12 * (1.0 + whole_T)
    assert (value_T >= -slack_T).all() and (value_T <= whole_T + slack_T).all()
    if stored >= 8:  # eight stored of nine leave one
        torch.testing.assert_close(value_T, whole_T, rtol=1e-9, atol=1e-12)
    value_T.sum().backward()
    assert student_TV.grad.sum(1).abs().max() < 1e-14


def test_both_passes_agree_on_which_probabilities_are_limited():
    """The gradient of each row sums to 0 only if they do: at the limit, rounding decides."""
    steps_T = torch.arange(-200, 200, dtype=torch.float64) * 2e-8
    student_TV = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)) + 30.0
    others_T = student_TV[:, 1:].double().logsumexp(1)
    student_TV[:, 0] = others_T + math.log(1e-7) * (1.0 + steps_T)
    student_TV.requires_grad_()
    ids_TK, probs_TK = torch.tensor([[0, 3]]).expand(400, -1), torch.tensor([[0.6, 0.3]]).expand(400, -1)
    losses.released_topk_kl(student_TV, ids_TK, probs_TK, clamp=True).sum().backward()
    gradient_T = student_TV.grad[:, 0]
    assert (gradient_T < -0.5).any() and (gradient_T > -0.1).any(), "the limit does not bite both ways"
    assert student_TV.grad.sum(1).abs().max() < 1e-5


def test_a_rest_that_underflows_is_finite():
    student_TV = torch.tensor([[1e3, -1e3, -999.0]], requires_grad=True)
    ids_TK, probs_TK = torch.tensor([[0]]), torch.tensor([[0.5]])
    for clamp in (False, True):
        value_T = losses.released_topk_kl(student_TV, ids_TK, probs_TK, clamp=clamp)
        (gradient_TV,) = torch.autograd.grad(value_T.sum(), student_TV)
        assert value_T.isfinite().all() and gradient_TV.isfinite().all()
        right = [0.5, -0.5 * 0.268941, -0.5 * 0.731059] if not clamp else [0.0, 0.0, 0.0]
        assert gradient_TV[0].tolist() == pytest.approx(right, abs=3e-5)  # float32 at 1e3


def test_half_precision_probabilities_of_more_than_one_in_all():
    probs_TK = torch.tensor([[0.70, 0.3007]], dtype=torch.float16)
    value_T = losses.released_topk_kl(torch.zeros(1, 4), torch.tensor([[2, 1]]), probs_TK, clamp=True)
    p = probs_TK[0].double().tolist()
    right = sum(each * math.log(4 * each) for each in p) + 1e-8 * math.log(1e-8 / 0.5)
    assert sum(p) > 1.0 and value_T.item() == pytest.approx(right, rel=1e-5)


A = torch.zeros(2, 8)
IDS = torch.tensor([[0, 1], [7, 2]])
HALF = torch.full((2, 2), 0.5)
NAN = torch.tensor([[0.1, float("nan")], [float("inf"), 0.0]])


def advantage(ids=IDS, values=HALF, logits=A, **options):
    return losses.released_topk_advantage(logits, ids, values, clamp=True, **options)


def topk_kl(ids=IDS, values=HALF, logits=A, **options):
    return losses.released_topk_kl(logits, ids, values, clamp=True, **options)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: losses.dpkd_token(A, A, beta=0.0), r"beta = 0.0.*positive"),
        (lambda: losses.dpkd_token(A, A[:1], beta=1.0), r"teacher_TV has 1 rows.*2"),
        (lambda: losses.dpkd_token(A, A[:, :7], beta=1.0), r"teacher_TV has 7 local columns"),
        (lambda: losses.dpkd_token(A, A, beta=1.0, vocab_size=9), r"vocab_size = 9"),
        (lambda: advantage(logits=A[0]), r"student_TV .*\[8\].*matrix"),
        (lambda: advantage(ids=IDS[:1]), r"token_ids_TK is torch.int64 \[1, 2\].*\[2, K\]"),
        (lambda: advantage(ids=IDS.int()), r"token_ids_TK is torch.int32"),
        (lambda: advantage(ids=IDS[:, :0], values=HALF[:, :0]), r"token_ids_TK is .*K at least 1"),
        (lambda: advantage(values=HALF[:, :1]), r"advantages_TK is torch.float32 \[2, 1\].*\[2, 2\]"),
        (lambda: advantage(values=IDS), r"advantages_TK is torch.int64"),
        (lambda: advantage(values=NAN), r"advantages_TK holds 2 of 4 values that are NaN or infinite"),
        (lambda: advantage(vocab_size=7), r"token_ids_TK holds 7: ids must be in \[0, 7\)"),
        (lambda: advantage(ids=IDS - 1), r"token_ids_TK holds -1"),
        (lambda: advantage(ids=IDS * 0), r"2 of 2 rows with an id twice"),
        (lambda: topk_kl(ids=IDS - 1), r"token_ids_TK holds -1: ids must not be negative"),
        (lambda: topk_kl(ids=IDS * 0), r"2 of 2 rows with an id twice"),
        (lambda: topk_kl(values=NAN), r"teacher_probs_TK holds 2 of 4 values that are NaN"),
        (lambda: topk_kl(values=HALF - 1), r"teacher_probs_TK holds 4 values outside \[0, 1\]"),
        (lambda: topk_kl(vocab_size=0), r"vocab_size = 0"),
    ],
)
def test_wrong_inputs_are_refused(call, message):
    with pytest.raises(LossInputError, match=message):
        call()
