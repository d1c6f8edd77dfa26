"""Released forms of losses with the vocabulary cut over 2 and 4 ranks: values, gradients, ties, collectives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megakd import losses
from megakd.errors import LossInputError
from tests import released_cases
from tests.ranks import run_ranks, subgroup

WORLDS = pytest.mark.parametrize("world", [2, 4])
ALL = pytest.mark.parametrize("loss", released_cases.LOSSES)


def _run_all(cases):
    group = subgroup(tuple(range(dist.get_world_size())))
    return [released_cases.run(case, group) for case in cases]


@WORLDS
@ALL
def test_values_and_gradients(world, loss):
    cases = released_cases.variants(loss)
    by_rank = run_ranks(world, _run_all, cases)
    for case, ranks in zip(cases, zip(*by_rank, strict=True), strict=True):
        released_cases.check(case, list(ranks))
        for rank in ranks[1:]:
            assert torch.equal(rank["value"], ranks[0]["value"]), f"{case}: ranks have different values"


def _run_in_pairs(case):
    groups = [subgroup((0, 1)), subgroup((2, 3))]
    return released_cases.run(case, groups[dist.get_rank() // 2])


@ALL
def test_two_groups_side_by_side(loss):
    case = released_cases.Case(loss)
    ranks = run_ranks(4, _run_in_pairs, case)
    released_cases.check(case, ranks[:2])
    released_cases.check(case, ranks[2:])


# ------------------------------------------------------------------------------------------------------------- ties
def _flat_logits(columns, beta):
    """Both models' largest logits lie in every rank's share, and in several columns of it."""
    group, world, rank = subgroup(tuple(range(dist.get_world_size()))), dist.get_world_size(), dist.get_rank()
    student_TV, teacher_TV = torch.zeros(3, columns), torch.zeros(3, columns)
    teacher_TV[0, : columns // 2] = -4.0  # its first likeliest token is the one in the middle
    student_TV[1, : columns // 2 + 1] = -2.0
    student_TV = student_TV.chunk(world, dim=1)[rank].clone().requires_grad_()
    loss_T = losses.dpkd_token(student_TV, teacher_TV.chunk(world, dim=1)[rank].clone(), beta=beta, tp_group=group)
    loss_T.sum().backward()
    return loss_T.detach(), student_TV.grad


@WORLDS
def test_of_equal_logits_the_lowest_id_counts_on_every_rank(world):
    columns, beta = 16, 0.5
    ranks = run_ranks(world, _flat_logits, columns, beta)
    # Row 0: a = 8, b = 0. Row 1: a = 0, b = 9. Row 2: a = b = 0.
    margins = [0.5 * -4.0, 0.5 * -2.0, 0.0]
    for loss_T, _ in ranks:
        assert loss_T.tolist() == pytest.approx([math.log1p(math.exp(-margin)) for margin in margins])
    gradient_TV = torch.cat([gradient for _, gradient in ranks], dim=1)
    slopes = [0.5 / (1.0 + math.exp(margin)) for margin in margins]
    right_TV = torch.zeros(3, columns)
    right_TV[0, 8], right_TV[0, 0] = -slopes[0], slopes[0]
    right_TV[1, 0], right_TV[1, 9] = -slopes[1], slopes[1]
    torch.testing.assert_close(gradient_TV, right_TV)
    assert (gradient_TV[2] == 0).all()


# ------------------------------------------------------------------------------------------------------ collectives
def _count_collectives(case):
    group, calls, real = subgroup((0, 1)), [], dist.all_reduce

    def counting(tensor, op=dist.ReduceOp.SUM, group=None):
        assert group is not None, "a collective without its group"
        calls.append(("max" if op == dist.ReduceOp.MAX else "sum", tensor.numel()))
        real(tensor, op=op, group=group)

    data = released_cases.inputs(case)
    for name in ("student", "teacher"):
        data[name] = data[name].chunk(2, dim=1)[dist.get_rank()].clone()
    data["student"].requires_grad_()
    dist.all_reduce = counting
    try:
        value_T = released_cases.value(case, losses, data, tp_group=group, vocab_size=case.vocab)
        forward = list(calls)
        calls.clear()
        value_T.sum().backward()
    finally:
        dist.all_reduce = real
    return forward, list(calls)


@pytest.mark.parametrize("tokens", [13, 0])
@pytest.mark.parametrize(
    "loss, maxima, sums", [("dpkd_token", 2, 12), ("released_topk_advantage", 1, 3), ("released_topk_kl", 2, 7)]
)
def test_collectives(loss, maxima, sums, tokens):
    for forward, backward in run_ranks(2, _count_collectives, released_cases.Case(loss, tokens=tokens)):
        assert forward == [("max", maxima * tokens), ("sum", sums * tokens)]
        assert backward == []


# -------------------------------------------------------------------------------------------------------- refusals
def _other_width():
    group = subgroup((0, 1))
    try:
        losses.dpkd_token(torch.zeros(2, 8), torch.zeros(2, 7), beta=1.0, tp_group=group, vocab_size=13)
    except LossInputError as error:
        return str(error)
    return ""


def test_a_teacher_that_is_cut_elsewhere_is_refused():
    right = "teacher_TV has 7 local columns and student_TV 8: they must be padded alike when cut over 2 ranks"
    assert run_ranks(2, _other_width) == [right, right]
