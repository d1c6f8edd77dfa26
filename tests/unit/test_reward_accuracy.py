"""Reward accuracy against NumPy, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megakd.errors import LossInputError
from megakd.evaluation.reward_accuracy import relative_reward_accuracy, reward_accuracy


def test_by_hand():
    # means -1 > -2; -3 < -1; -2 == -2 (different lengths): one, none, a half
    found = reward_accuracy([-4.0, -3.0, -8.0], [-4.0, -2.0, -2.0], [4, 1, 4], [2, 2, 1])
    assert (found.value, found.count) == (0.5, 3)
    assert found.standard_error == pytest.approx(0.5 / np.sqrt(3))
    assert reward_accuracy([-1.0], [-2.0], [1], [1]).standard_error is None


@pytest.mark.parametrize("kind", [list, np.asarray, lambda values: torch.tensor(np.asarray(values))])
def test_against_numpy(kind):
    rng = np.random.default_rng(0)
    chosen, rejected, start_chosen, start_rejected = -rng.gamma(4.0, 10.0, (4, 500))
    rejected[:7], start_rejected[:7], chosen[:7], start_chosen[:7] = -5.0, -3.0, -5.0, -3.0
    len_chosen, len_rejected = rng.integers(1, 60, (2, 500))
    len_chosen[:7] = len_rejected[:7] = 3
    for found, margin in [
        (reward_accuracy(*map(kind, (chosen, rejected, len_chosen, len_rejected))),
         chosen / len_chosen - rejected / len_rejected),
        (relative_reward_accuracy(*map(kind, (chosen, rejected, start_chosen, start_rejected))),
         chosen - start_chosen - rejected + start_rejected),
    ]:
        score = (margin > 0) + 0.5 * (margin == 0)
        assert found.value == pytest.approx(score.mean()) and found.count == 500
        assert found.standard_error == pytest.approx(score.std(ddof=1) / np.sqrt(500))
        assert (margin == 0).sum() >= 7


def test_a_model_against_itself_is_even():
    values = [-3.0, -4.5, -1.0]
    assert relative_reward_accuracy(values, values[::-1], values, values[::-1]).value == 0.5


def test_refuses_bad_columns():
    with pytest.raises(LossInputError, match=r"columns of \[2, 1, 2, 2\]"):
        reward_accuracy([0, 0], [0], [1, 1], [1, 1])
    with pytest.raises(LossInputError, match="no tokens"):
        reward_accuracy([0.0], [0.0], [0], [1])
    with pytest.raises(LossInputError, match="1 of 1 pairs have a reward that is not a number"):
        relative_reward_accuracy([float("nan")], [0.0], [0.0], [0.0])
    with pytest.raises(LossInputError, match="no examples"):
        reward_accuracy([], [], [], [])
