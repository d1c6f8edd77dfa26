"""MiniLLM's rewards, returns and clipped policy gradient against numpy and hand-computed numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megakd.errors import LossInputError
from megakd.losses import behaviour_log_probs, clipped_policy_gradient, returns, reverse_kl_rewards


def test_rewards_are_limited_log_ratios_without_a_gradient():
    student = torch.tensor([-1.0, -2.0, -90.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-2.0, -0.5, -1.0], dtype=torch.float64)
    rewards = reverse_kl_rewards(student, teacher, scale=0.5, limit=100.0)
    assert rewards.tolist() == [-2.0, 3.0, 100.0] and not rewards.requires_grad


def test_behaviour_is_the_mixture():
    student, teacher = torch.tensor([[0.7, 0.1], [0.2, 0.6]], dtype=torch.float64)
    mixed = behaviour_log_probs(student.log(), teacher.log(), teacher_mix=0.2)
    assert mixed.exp().tolist() == pytest.approx([0.8 * 0.7 + 0.2 * 0.2, 0.8 * 0.1 + 0.2 * 0.6], rel=1e-14)
    assert torch.equal(behaviour_log_probs(student.log(), teacher.log(), teacher_mix=0.0), student.log())
    with pytest.raises(LossInputError, match="teacher_mix = 1.0"):
        behaviour_log_probs(student, teacher, teacher_mix=1.0)


def test_returns_by_hand():
    """Two answers: rewards 1, 2, 4 and 8; discount 0.5."""
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0])
    settings = {"discount": 0.5, "length_normalize": False, "whiten": False}
    assert returns(rewards, [3, 1], **settings).tolist() == [3.0, 4.0, 4.0, 8.0]
    assert returns(rewards, [3, 1], **settings | {"length_normalize": True}).tolist() == [1.0, 2.0, 4.0, 8.0]
    white = returns(rewards, [3, 1], **settings | {"whiten": True})
    assert white.tolist() == pytest.approx([(x - 4.75) / math.sqrt(3.6875) for x in (3.0, 4.0, 4.0, 8.0)], rel=1e-14)


def test_returns_against_sums_written_out():
    generator = np.random.default_rng(3)
    lengths = [4, 1, 7, 2]
    rewards = generator.normal(size=sum(lengths))
    expected, start = [], 0
    for length in lengths:
        own = rewards[start : start + length]
        expected += [sum(0.95 ** (s - t) * own[s] for s in range(t, length)) / (length - t) for t in range(length)]
        start += length
    expected = np.array(expected)
    found = returns(torch.tensor(rewards), lengths, discount=0.95, length_normalize=True, whiten=False)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    found = returns(torch.tensor(rewards), lengths, discount=0.95, length_normalize=True, whiten=True)
    np.testing.assert_allclose(found.numpy(), (expected - expected.mean()) / expected.std(), rtol=1e-12)


def test_equal_returns_have_no_variance_to_divide_by():
    assert returns(torch.ones(3), [1, 1, 1], discount=1.0, length_normalize=True, whiten=True).tolist() == [0.0] * 3


def test_clipped_loss_and_gradient():
    """Ratios 1, 1.5, 1.5, 0.5, 0.5: of a ratio outside of the limits only the side that makes the loss worse counts."""
    behaviour = torch.full((5,), -1.0, dtype=torch.float64)
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5], dtype=torch.float64)
    log_probs = (behaviour + ratio.log()).requires_grad_()
    worth = torch.tensor([2.0, 2.0, -2.0, 2.0, -2.0], dtype=torch.float64)
    loss = clipped_policy_gradient(log_probs, behaviour, worth, clip=0.2)
    assert loss.tolist() == pytest.approx([-2.0, -2.4, 3.0, -1.0, 1.6], rel=1e-14)
    loss.sum().backward()
    assert log_probs.grad.tolist() == pytest.approx([-2.0, 0.0, 3.0, -1.0, 0.0], rel=1e-14)


@pytest.mark.parametrize(("change", "match"), [
    ({"clip": 0.0}, "clip = 0.0"),
    ({"behaviour": torch.zeros(2)}, r"behaviour_T is \[2\]"),
    ({"returns": torch.tensor([1.0, math.nan, 0.0])}, "returns_T"),
])
def test_bad_input(change, match):
    given = {"log_probs": torch.zeros(3), "behaviour": torch.zeros(3), "returns": torch.zeros(3), "clip": 0.2} | change
    with pytest.raises(LossInputError, match=match):
        clipped_policy_gradient(given["log_probs"], given["behaviour"], given["returns"], clip=given["clip"])


def test_bad_returns():
    with pytest.raises(LossInputError, match="add up to 4: there are 3"):
        returns(torch.zeros(3), [4], discount=1.0, length_normalize=False, whiten=False)
    with pytest.raises(LossInputError, match="discount = 1.5"):
        returns(torch.zeros(3), [3], discount=1.5, length_normalize=False, whiten=False)
