"""Sums over sequences, losses over pairs and the two passes, against the float64 reference."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd import losses
from megakd.errors import LossInputError
from megakd.losses import reference
from tests import score_cases


def test_sequence_sums():
    values_T = torch.randn(9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rows_T = torch.tensor([0, 0, 1, 1, 1, 3, 3, 3, 3])
    weights_N = torch.tensor([1.0, -2.0, 5.0, 0.5])
    sums_N = losses.sequence_sums(values_T, rows_T, 4)
    torch.testing.assert_close(sums_N, reference.sequence_sums(values_T, rows_T, 4))
    assert sums_N[2] == 0
    (sums_N * weights_N).sum().backward()
    assert torch.equal(values_T.grad, weights_N[rows_T])


def test_sequence_sums_of_nothing_keep_the_graph():
    values_T = torch.zeros(0, requires_grad=True)
    sums_N = losses.sequence_sums(values_T, torch.zeros(0, dtype=torch.int64), 2)
    assert sums_N.tolist() == [0.0, 0.0]
    sums_N.sum().backward()
    assert values_T.grad.shape == (0,)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_dpo(label_smoothing, size):
    scores_4P = size * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    settings = {"beta": 0.3, "label_smoothing": label_smoothing}
    ours, exact = scores_4P.clone().requires_grad_(), scores_4P.double().requires_grad_()
    loss_P, exact_P = losses.dpo(*ours, **settings), reference.dpo(*exact, **settings)
    loss_P.sum().backward()
    exact_P.sum().backward()
    torch.testing.assert_close(loss_P.double(), exact_P, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.grad[:2].double(), exact.grad[:2], rtol=1e-5, atol=1e-7)
    assert not ours.grad[2:].any(), "a reference gets no gradient"
    margins_P = losses.reward_margins(*scores_4P, beta=0.3)
    torch.testing.assert_close(losses.dpo_from_margins(margins_P, label_smoothing=label_smoothing), loss_P.detach())


def test_dpo_at_equal_policies_is_log_two():
    zeros_P = torch.zeros(3)
    torch.testing.assert_close(losses.dpo(zeros_P, zeros_P, zeros_P, zeros_P, beta=0.1), torch.full((3,), 2.0).log())


# ------------------------------------------------------------------------------------------ DPKD, IPO, CPO and SimPO
CASES = {
    "dpkd": (2, 2, True, {"beta": 0.3}),
    "dpkd-long": (2, 2, True, {"beta": 5.0}),
    "dpkd-sums": (2, 2, True, {"beta": 0.3, "length_normalize": False}),
    "ipo": (2, 2, False, {"tau": 0.1}),
    "cpo": (2, 0, False, {"beta": 0.3}),
    "cpo-no-nll": (2, 0, False, {"beta": 0.3, "nll_weight": 0.0}),
    "simpo": (2, 0, True, {"beta": 2.5, "gamma": 1.4}),
    "simpo-no-margin": (2, 0, True, {"beta": 2.5, "gamma": 0.0}),
}
"""Numbers of scores and of constants, whether lengths follow, settings."""
ALL = pytest.mark.parametrize("case", CASES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def arguments(case, dtype, size=20.0):
    """Log-probabilities of 7 pairs, first those that get a gradient, and the lengths that go with them."""
    scores, constants, with_lengths, _ = CASES[case]
    generator = torch.Generator().manual_seed(0)
    tensors = list(-size * torch.rand(scores + constants, 7, generator=generator, dtype=torch.float64).to(dtype))
    lengths = list(torch.randint(1, 300, (2, 7), generator=generator)) if with_lengths else []
    return tensors[:scores], tensors[scores:] + lengths


@DTYPES
@ALL
@pytest.mark.parametrize("size", [20.0, 1e4])
def test_losses_over_pairs(case, dtype, size):
    scores, constants = arguments(case, dtype, size)
    score_cases.check(case.split("-")[0], scores, constants, **CASES[case][3])


@ALL
def test_very_unlikely_answers_are_finite_and_exact(case):
    """All log-probabilities near -1e4, then one of each pair there and the other near 0, both ways round."""
    scores, constants = arguments(case, torch.float32)
    name, options = case.split("-")[0], CASES[case][3]
    low_constants = [each - 1e4 if each.is_floating_point() else each for each in constants]
    score_cases.check(name, [score - 1e4 for score in scores], low_constants, **options)
    for lows in ((0.0, -1e4), (-1e4, 0.0)):
        score_cases.check(name, [score + low for score, low in zip(scores, lows, strict=True)], constants, **options)


@ALL
def test_no_pairs_keep_the_graph_and_half_precision_is_computed_in_float32(case):
    name, options = case.split("-")[0], CASES[case][3]
    scores, constants = arguments(case, torch.bfloat16)
    loss_P = getattr(losses, name)(*scores, *constants, **options)
    wide = [tensor.float() if tensor.is_floating_point() else tensor for tensor in scores + constants]
    assert loss_P.dtype == torch.float32 and torch.equal(loss_P, getattr(losses, name)(*wide, **options))
    none = [tensor[:0].clone().requires_grad_(tensor.is_floating_point()) for tensor in wide]
    getattr(losses, name)(*none, **options).sum().backward()
    assert none[0].grad.shape == (0,)


LOG_PROBS = st.lists(st.floats(-1e4, 0.0), min_size=4, max_size=4)


@given(LOG_PROBS, st.floats(0.01, 10.0), st.integers(1, 4000), st.floats(0.0, 100.0))
@settings(max_examples=60, deadline=None)
def test_what_holds_for_any_pairs(numbers, beta, length, lift):
    a, b, c, d = (torch.tensor([number], dtype=torch.float64) for number in numbers)
    ones, lengths = torch.ones(1), torch.full((1,), length)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-7)
    dpo = losses.dpo(a, b, c, d, beta=beta)
    close(losses.dpkd(a, b, c, d, lengths, ones, beta=beta, length_normalize=False), dpo)
    close(losses.dpkd(a, b, c, d, lengths, lengths, beta=beta * length), dpo)
    # A reference that finds both answers alike might as well not be there.
    close(losses.cpo(a, b, beta=beta, nll_weight=0.0), losses.dpo(a, b, c, c, beta=beta))
    simpo = losses.simpo(a, b, lengths, lengths, beta=beta, gamma=0.0)
    close(simpo, losses.cpo(a, b, beta=beta / length, nll_weight=0.0))
    # A larger margin is harder to reach, a likelier chosen answer nearer to it.
    easy, hard = (losses.simpo(a, b, lengths, ones, beta=beta, gamma=gamma) for gamma in (0.0, lift))
    assert hard >= easy >= losses.simpo(a + lift, b, lengths, ones, beta=beta, gamma=0.0)
    assert losses.ipo(a, b, c, d, tau=beta) >= 0
    at_the_target = c + (b - d) + 1.0 / (2.0 * beta)
    close(losses.ipo(at_the_target, b, c, d, tau=beta), torch.zeros(1, dtype=torch.float64))


def test_hand_checked_numbers():
    t, s, teacher_t, teacher_s = (torch.tensor([number]) for number in (-6.0, -4.0, -3.0, -8.0))
    lengths = torch.tensor([3]), torch.tensor([2])
    right = math.log1p(math.exp(-0.5 * (-3.0 / 3 - 4.0 / 2)))
    assert losses.dpkd(t, s, teacher_t, teacher_s, *lengths, beta=0.5).item() == pytest.approx(right)
    right = math.log1p(math.exp(-0.5 * (-3.0 - 4.0)))
    found = losses.dpkd(t, s, teacher_t, teacher_s, *lengths, beta=0.5, length_normalize=False).item()
    assert found == pytest.approx(right)
    assert losses.ipo(t, s, teacher_t, teacher_s, tau=0.25).item() == pytest.approx((-7.0 - 2.0) ** 2)
    assert losses.cpo(t, s, beta=0.5, nll_weight=0.1).item() == pytest.approx(math.log1p(math.exp(1.0)) + 0.6)
    assert losses.simpo(t, s, *lengths, beta=2.0, gamma=0.5).item() == pytest.approx(math.log1p(math.exp(0.5)))


# ------------------------------------------------------------------------------------------------- one at a time
def answers_of(model, tokens_NGL):
    """Sequences' log-probabilities [N, G] of a small model, and a function of one sequence's with its graph."""
    embedding_VH, head_VH = model

    def one(n, g):
        tokens_L = tokens_NGL[n, g]
        return losses.token_log_probs(torch.tanh(embedding_VH[tokens_L[:-1]]) @ head_VH.t(), tokens_L[1:]).sum()

    rows, columns = (range(size) for size in tokens_NGL.shape[:2])
    return one, lambda: torch.stack([torch.stack([one(n, g) for g in columns]) for n in rows])


def on_pairs(loss):
    return lambda scores_NG: loss(scores_NG[:, 0], scores_NG[:, 1])


REFERENCE_P = torch.tensor([-11.0, -9.0, -14.0], dtype=torch.float64)
LENGTHS_P = torch.tensor([5, 4, 3])
TEACHER_NG = torch.randn(3, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize(
    "loss, answers",
    [
        (on_pairs(lambda a, b: losses.dpo(a, b, REFERENCE_P, REFERENCE_P.flip(0), beta=0.4)), 2),
        (on_pairs(lambda a, b: losses.dpkd(a, b, REFERENCE_P, REFERENCE_P - 1, LENGTHS_P, LENGTHS_P + 1, beta=2.0)), 2),
        (on_pairs(lambda a, b: losses.simpo(a, b, LENGTHS_P, LENGTHS_P + 1, beta=2.0, gamma=0.5)), 2),
        (lambda scores_NG: losses.pad_vanilla(scores_NG / 5, TEACHER_NG, beta=3.0), 4),
        (lambda scores_NG: losses.pad_probabilistic(scores_NG / 5, TEACHER_NG, beta=3.0, divergence="am_gm"), 4),
    ],
    ids=["dpo", "dpkd", "simpo", "pad_vanilla", "pad_probabilistic"],
)
def test_one_sequence_at_a_time_gives_the_gradient_of_all_at_once(loss, answers):
    generator = torch.Generator().manual_seed(0)
    model = [torch.randn(11, 6, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    tokens_NGL = torch.randint(0, 11, (3, answers, 6), generator=generator)
    one, every = answers_of(model, tokens_NGL)
    expected_N = loss(every())
    expected_N.sum().backward()
    at_once = [weight.grad.clone() for weight in model]
    for weight in model:
        weight.grad = None

    with torch.no_grad():
        scores_NG = every()
        loss_N, (weights_NG,) = losses.sequence_weights(loss, scores_NG)
    assert not loss_N.requires_grad and not weights_NG.requires_grad
    torch.testing.assert_close(loss_N, expected_N.detach(), rtol=1e-12, atol=1e-12)
    for n in range(3):
        for g in range(answers):
            (weights_NG[n, g] * one(n, g)).backward()
    for weight, right in zip(model, at_once, strict=True):
        torch.testing.assert_close(weight.grad, right, rtol=1e-12, atol=1e-12)


def test_weights_of_several_scores_come_in_their_order_and_leave_no_trace():
    chosen_P, rejected_P = torch.tensor([-2.0, -3.0], requires_grad=True), torch.tensor([-4.0, -1.0])
    loss_P, (chosen_weight_P, rejected_weight_P) = losses.sequence_weights(
        partial(losses.cpo, beta=0.5, nll_weight=0.0), chosen_P, rejected_P
    )
    torch.testing.assert_close(loss_P, losses.cpo(chosen_P.detach(), rejected_P, beta=0.5, nll_weight=0.0))
    torch.testing.assert_close(chosen_weight_P, -0.5 * torch.sigmoid(torch.tensor([-1.0, 1.0])))
    assert torch.equal(rejected_weight_P, -chosen_weight_P)
    assert chosen_P.grad is None and not rejected_P.requires_grad


# ------------------------------------------------------------------------------------------------------- refusals
A = torch.zeros(3)
ONES = torch.ones(3, dtype=torch.int64)
BAD = torch.tensor([float("nan"), 0.0, float("-inf")])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: losses.dpkd(A, A, A, A[:2], ONES, ONES, beta=1.0), r"teacher_s_P is .*\[2\] and student_t_P \[3\]"),
        (lambda: losses.dpkd(A, A, A, A, ONES[:2], ONES, beta=1.0), r"len_t_P is \[2\] .*\[3\]"),
        (lambda: losses.dpkd(A, A, A, A, ONES, ONES - 1, beta=1.0), r"len_s_P holds 3 of 3 lengths below 1.*drop"),
        (lambda: losses.dpkd(A, BAD, A, A, ONES, ONES, beta=1.0), r"student_s_P holds 2 of 3 values"),
        (lambda: losses.dpkd(A, A, BAD, A, ONES, ONES, beta=1.0), r"teacher_t_P holds 2 of 3 values"),
        (lambda: losses.dpkd(A, A, A, A, ONES, BAD, beta=1.0, length_normalize=False), r"len_s_P holds 3 of 3 lengths"),
        (lambda: losses.dpkd(A, A, A, A, ONES, ONES, beta=0.0), r"beta = 0.0.*positive"),
        (lambda: losses.dpo(A, A, BAD, A, beta=1.0), r"ref_chosen_P holds 2 of 3 values"),
        (lambda: losses.dpo(A, A[:2], A, A, beta=1.0), r"rejected_P is .*\[2\] and chosen_P \[3\]"),
        (lambda: losses.dpo(A, A, A, A, beta=0.0), r"beta = 0.0.*positive"),
        (lambda: losses.dpo(A, A, A, A, beta=1.0, label_smoothing=0.5), r"label_smoothing = 0.5"),
        (lambda: losses.ipo(A, A, A, BAD, tau=1.0), r"ref_rejected_P holds 2 of 3 values"),
        (lambda: losses.ipo(A, A, A, A[None], tau=1.0), r"ref_rejected_P is .*\[1, 3\]"),
        (lambda: losses.ipo(A, A, A, A, tau=0.0), r"tau = 0.0.*positive"),
        (lambda: losses.cpo(A, A.long(), beta=1.0), r"rejected_P is torch.int64"),
        (lambda: losses.cpo(BAD, A, beta=1.0), r"chosen_P holds 2 of 3 values"),
        (lambda: losses.cpo(A, A, beta=float("nan")), r"beta = nan.*positive"),
        (lambda: losses.cpo(A, A, beta=1.0, nll_weight=-1.0), r"nll_weight = -1.0.*negative"),
        (lambda: losses.simpo(A, A, ONES, 0 * ONES, beta=1.0, gamma=0.0), r"len_rejected_P holds 3 of 3 lengths"),
        (lambda: losses.simpo(A, BAD, ONES, ONES, beta=1.0, gamma=0.0), r"rejected_P holds 2 of 3 values"),
        (lambda: losses.simpo(A, A, ONES, ONES, beta=1.0, gamma=-0.1), r"gamma = -0.1.*negative"),
        (lambda: losses.simpo(A, A, ONES, ONES, beta=-1.0, gamma=0.0), r"beta = -1.0.*positive"),
        (lambda: losses.sequence_weights(lambda a, b: losses.cpo(a, a, beta=1.0), A, A), r"scores \[1\].*bind"),
        (lambda: losses.sequence_weights(lambda a: a.detach(), A), r"scores \[0\].*bind"),
    ],
)
def test_wrong_inputs_are_refused(call, message):
    with pytest.raises(LossInputError, match=message):
        call()
