"""Sums over sequences and the DPO loss, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from megakd import losses
from megakd.losses import reference


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
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)
    margins_P = losses.reward_margins(*scores_4P, beta=0.3)
    torch.testing.assert_close(losses.dpo_from_margins(margins_P, label_smoothing=label_smoothing), loss_P.detach())


def test_dpo_at_equal_policies_is_log_two():
    zeros_P = torch.zeros(3)
    torch.testing.assert_close(losses.dpo(zeros_P, zeros_P, zeros_P, zeros_P, beta=0.1), torch.full((3,), 2.0).log())
