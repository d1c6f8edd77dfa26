"""Losses over rankings: values and gradients against the float64 reference, what holds for any scores, refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd import losses
from megakd.errors import LossInputError
from tests import score_cases

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
PAD = pytest.mark.parametrize(
    "name, options",
    [("pad_vanilla", {}), ("pad_probabilistic", {"divergence": "jsd"}), ("pad_probabilistic", {"divergence": "am_gm"})],
    ids=["vanilla", "jsd", "am_gm"],
)
SCORES = st.integers(2, 4).flatmap(
    lambda answers: st.lists(st.lists(st.floats(-30, 30), min_size=answers, max_size=answers), min_size=2, max_size=2)
)


def draw(prompts: int, answers: int, dtype: torch.dtype, size: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(answers)
    return [size * torch.randn(prompts, answers, generator=generator, dtype=dtype) for _ in range(2)]


@DTYPES
@pytest.mark.parametrize("answers", [1, 2, 4, 9])
def test_plackett_luce(answers, dtype):
    scores_NG, keys_NG = draw(5, answers, dtype)
    score_cases.check("plackett_luce_log_prob", [scores_NG], [keys_NG.argsort(1)])


@DTYPES
@PAD
@pytest.mark.parametrize("answers, beta", [(2, 10.0), (3, 1.0), (4, 10.0), (4, 2.0), (5, 0.5)])
def test_values_and_gradients(name, options, answers, beta, dtype):
    student_NG, teacher_NG = draw(3, answers, dtype)
    score_cases.check(name, [student_NG], [teacher_NG], beta=beta, **options)


@PAD
def test_six_answers_and_no_prompt(name, options):
    student_NG, teacher_NG = draw(1, 6, torch.float64)
    score_cases.check(name, [student_NG], [teacher_NG], beta=1.0, **options)
    none_NG = torch.zeros(0, 6, requires_grad=True)
    getattr(losses, name)(none_NG, torch.zeros(0, 6), beta=1.0, **options).sum().backward()
    assert none_NG.grad.shape == (0, 6)


@DTYPES
@PAD
@pytest.mark.parametrize("beta", [1.0, 10.0])
def test_scores_of_a_thousand(name, options, beta, dtype):
    rows = [[1e3, -1e3, 999.5, 0.0], [-1e3, -1e3, -1e3, -1e3], [1e3, 1e3, -1e3, 998.0]]
    teacher_rows = [[-1e3, 1e3, 999.5, 0.0], [1e3, -1e3, 0.0, 0.25], [999.75, 1e3, -1e3, 999.0]]
    scores = [torch.tensor(rows, dtype=dtype)], [torch.tensor(teacher_rows, dtype=dtype)]
    score_cases.check(name, *scores, beta=beta, **options)


def test_close_scores_far_from_zero_keep_their_digits():
    near_NG, far_NG = torch.tensor([[0.25, 0.5, 0.0]]), torch.tensor([[1000.25, 1000.5, 1000.0]])
    for options in ({"divergence": "jsd"}, {"divergence": "am_gm"}):
        values = [losses.pad_probabilistic(each, near_NG.flip(1), beta=10.0, **options) for each in (near_NG, far_NG)]
        torch.testing.assert_close(*values, rtol=0, atol=0)


@given(SCORES)
@settings(max_examples=40, deadline=None)
def test_what_holds_for_any_scores(rows):
    student_NG, teacher_NG = (torch.tensor([row], dtype=torch.float64) for row in rows)
    rankings = torch.tensor(list(itertools.permutations(range(student_NG.shape[1]))))
    log_p_R = losses.plackett_luce_log_prob(student_NG.expand(len(rankings), -1), rankings)
    assert log_p_R.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    student_NG.requires_grad_()
    jsd, am_gm = (
        losses.pad_probabilistic(student_NG, teacher_NG, beta=0.7, divergence=kind) for kind in ("jsd", "am_gm")
    )
    vanilla = losses.pad_vanilla(student_NG, teacher_NG, beta=0.7)
    assert -1e-12 <= jsd.item() <= math.log(2) + 1e-12 and jsd.item() <= am_gm.item() + 1e-12 and vanilla.item() >= 0
    for loss in (jsd, am_gm, vanilla):  # a constant added to all scores changes nothing
        (gradient_NG,) = torch.autograd.grad(loss.sum(), student_NG)
        assert abs(gradient_NG.sum().item()) <= 1e-12 * max(1.0, loss.item())
    order = torch.arange(student_NG.shape[1]).roll(1)
    moved = losses.pad_probabilistic(student_NG[:, order], teacher_NG[:, order], beta=0.7, divergence="am_gm")
    assert moved.item() == pytest.approx(am_gm.item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("divergence", ["jsd", "am_gm"])
def test_equal_scores_have_no_loss_and_no_gradient(divergence):
    student_NG = draw(4, 4, torch.float32)[0].requires_grad_()
    shifted_NG = student_NG.detach() + 3.0
    loss_N = losses.pad_probabilistic(student_NG, shifted_NG, beta=2.0, divergence=divergence)
    loss_N.sum().backward()
    assert loss_N.abs().max() < 1e-6 and student_NG.grad.abs().max() < 1e-5


def test_hand_checked_numbers():
    student_NG = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)  # second first: 3/4
    teacher_NG = torch.zeros(1, 2, dtype=torch.float64)  # 1/2 each
    ranking_NG = torch.tensor([[1, 0]])
    assert losses.plackett_luce_log_prob(student_NG, ranking_NG).item() == pytest.approx(math.log(0.75))
    # Equal scores are ranked by place: the first answer is the best.
    assert losses.pad_vanilla(student_NG, teacher_NG, beta=1.0).item() == pytest.approx(-math.log(0.25))
    m = (0.625, 0.375)
    jsd = 0.5 * (0.75 * math.log(0.75 / m[0]) + 0.25 * math.log(0.25 / m[1]))
    jsd += 0.5 * (0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1]))
    assert losses.pad_probabilistic(student_NG, teacher_NG, beta=1.0).item() == pytest.approx(jsd)
    am_gm = m[0] * math.log(m[0] / math.sqrt(0.75 * 0.5)) + m[1] * math.log(m[1] / math.sqrt(0.25 * 0.5))
    found = losses.pad_probabilistic(student_NG, teacher_NG, beta=1.0, divergence="am_gm").item()
    assert found == pytest.approx(am_gm)


def test_two_answers_are_a_pair_of_simpo_without_margin():
    student_NG, teacher_NG = draw(6, 2, torch.float64)
    best_N = teacher_NG.argmax(1)
    chosen_N, rejected_N = student_NG[range(6), best_N], student_NG[range(6), 1 - best_N]
    ones_N = torch.ones(6)
    simpo_N = losses.simpo(chosen_N, rejected_N, ones_N, ones_N, beta=3.0, gamma=0.0)
    torch.testing.assert_close(losses.pad_vanilla(student_NG, teacher_NG, beta=3.0), simpo_N, rtol=1e-12, atol=1e-12)


def test_half_precision_scores_are_computed_in_float32():
    student_NG, teacher_NG = (each.bfloat16() for each in draw(3, 4, torch.float32))
    loss_N = losses.pad_probabilistic(student_NG, teacher_NG, beta=2.0)
    assert torch.equal(loss_N, losses.pad_probabilistic(student_NG.float(), teacher_NG.float(), beta=2.0))


A, SEVEN = torch.zeros(2, 3), torch.zeros(1, 7)
NAN = torch.tensor([[0.0, float("nan"), 1.0], [float("inf"), 0.0, 0.0]])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: losses.plackett_luce_log_prob(A, A), r"ranking_NG is torch.float32 .*torch.int64 \[2, 3\]"),
        (lambda: losses.plackett_luce_log_prob(A, torch.tensor([[0, 1, 2]])), r"ranking_NG is .*\[1, 3\].*\[2, 3\]"),
        (lambda: losses.plackett_luce_log_prob(A, torch.tensor([[0, 1, 2], [0, 0, 2]])), r"1 of 2 rows that are not"),
        (lambda: losses.plackett_luce_log_prob(NAN, torch.tensor([[0, 1, 2]] * 2)), r"scores_NG holds 2 of 6 values"),
        (lambda: losses.pad_vanilla(A[0], A[0], beta=1.0), r"student_score_NG .*\[3\].*matrix"),
        (lambda: losses.pad_vanilla(A, A[:, :2], beta=1.0), r"scores of shapes .*\[2, 3\].*\[2, 2\]"),
        (lambda: losses.pad_vanilla(A, A.long(), beta=1.0), r"teacher_score_NG is torch.int64"),
        (lambda: losses.pad_vanilla(A, NAN, beta=1.0), r"teacher_score_NG holds 2 of 6 values"),
        (lambda: losses.pad_vanilla(A[:, :1], A[:, :1], beta=1.0), r"1 answers .*at least 2"),
        (lambda: losses.pad_vanilla(A, A, beta=0.0), r"beta = 0.0.*positive"),
        (lambda: losses.pad_probabilistic(A, A, beta=-1.0), r"beta = -1.0.*positive"),
        (lambda: losses.pad_probabilistic(A, A, beta=1.0, divergence="js"), r"divergence = 'js'.*jsd, am_gm"),
        (lambda: losses.pad_probabilistic(NAN, A, beta=1.0), r"student_score_NG holds 2 of 6 values"),
        (lambda: losses.pad_probabilistic(SEVEN, SEVEN, beta=1.0), r"7 answers .*7! .*at most 6"),
    ],
)
def test_wrong_inputs_are_refused(call, message):
    with pytest.raises(LossInputError, match=message):
        call()
