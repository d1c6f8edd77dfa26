"""Per-token losses with the vocabulary cut over 2 and 4 ranks: values, gradients and the collectives that are spent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megakd import losses
from megakd.errors import LossInputError
from megakd.losses.divergence import AdaptiveKL
from tests import loss_cases
from tests.ranks import run_ranks, subgroup

WORLDS = pytest.mark.parametrize("world", [2, 4])
FORMS = pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
ALL = pytest.mark.parametrize("loss", loss_cases.LOSSES)


def _run_all(cases, implementation=loss_cases.ours, candidates=None):
    group = subgroup(tuple(range(dist.get_world_size())))
    before = AdaptiveKL.CANDIDATES
    AdaptiveKL.CANDIDATES = before if candidates is None else candidates
    try:
        return [loss_cases.run(case, implementation, group) for case in cases]
    finally:
        AdaptiveKL.CANDIDATES = before


def _check_all(world, cases, *args):
    by_rank = run_ranks(world, _run_all, cases, *args)
    return [loss_cases.check(case, list(ranks)) for case, ranks in zip(cases, zip(*by_rank))]


@WORLDS
@FORMS
@ALL
def test_values_and_gradients(world, fused, loss):
    _check_all(world, loss_cases.variants(loss, fused))


@WORLDS
@FORMS
def test_akl_is_exact_when_the_exchanged_candidates_do_not_hold_the_head(world, fused):
    cases = [loss_cases.Case("akl", fused, mu=mu, big=big) for mu in (0.0, 0.2, 0.9, 0.99) for big in (False, True)]
    for candidates in (1, 4):
        _check_all(world, cases, loss_cases.ours, candidates)


def _run_in_pairs(case):
    groups = [subgroup((0, 1)), subgroup((2, 3))]
    group = groups[dist.get_rank() // 2]
    # The two groups work on different data; rank 0 of the second is not rank 0 of the world.
    return loss_cases.run(replace(case, temperature=1.0 + dist.get_rank() // 2), loss_cases.ours, group)


@FORMS
def test_two_groups_side_by_side(fused):
    case = loss_cases.Case("forward_kl", fused)
    ranks = run_ranks(4, _run_in_pairs, case)
    loss_cases.check(case, ranks[:2])
    loss_cases.check(replace(case, temperature=2.0), ranks[2:])


# ------------------------------------------------------------------------------------------------- negative control
def _plain_all_reduce(case, data, group):
    """Vocabulary-parallel log-softmax and sums with all-reduces in autograd's graph: must be refused."""
    models = data["models"]
    logits = [model[0] @ model[1].t() if case.fused else model[0] for model in models]
    log_probs = []
    for place, logits_TV in enumerate(logits):
        logits_TV = logits_TV if place == 0 else logits_TV.detach()
        max_T1 = logits_TV.detach().amax(1, keepdim=True)
        dist.all_reduce(max_T1, op=dist.ReduceOp.MAX, group=group)
        sum_T1 = (logits_TV - max_T1).exp().sum(1, keepdim=True)
        dist.all_reduce(sum_T1, group=group)
        log_probs.append(logits_TV - max_T1 - sum_T1.log())
    if case.loss == "forward_kl":
        value_T = (log_probs[1].exp() * (log_probs[1] - log_probs[0])).sum(1)
    else:
        value_T = case.beta * (log_probs[0].exp() * (log_probs[1] - log_probs[2])).sum(1)
    dist.all_reduce(value_T, group=group)
    return value_T


@WORLDS
@FORMS
@pytest.mark.parametrize("loss", ["forward_kl", "advantage"])
def test_the_check_rejects_a_plain_all_reduce_in_the_graph(world, fused, loss):
    case = loss_cases.Case(loss, fused, vocab=None, dtype=torch.float64)
    # "the gradient of": the value has passed.
    with pytest.raises(AssertionError, match=f"{case}: the gradient of {'hidden' if fused else 'logits'} is off"):
        _check_all(world, [case], _plain_all_reduce)


def test_the_check_accepts_the_same_code_where_nothing_is_cut():
    case = loss_cases.Case("forward_kl", True, vocab=None, dtype=torch.float64)
    _check_all(1, [case], _plain_all_reduce)


# ------------------------------------------------------------------------------------------------------ collectives
def _count_collectives(case):
    group = subgroup((0, 1))
    calls, real = [], dist.all_reduce

    def counting(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        assert group is not None, "a collective without its group"
        calls.append(("max" if op == dist.ReduceOp.MAX else "sum", tensor.numel()))
        return real(tensor, op=op, group=group, async_op=async_op)

    data = loss_cases.local_inputs(case, group)
    for tensor in data["models"][0]:
        tensor.requires_grad_()
    dist.all_reduce = counting
    try:
        value_T = loss_cases.ours(case, data, group)
        forward = list(calls)
        calls.clear()
        value_T.sum().backward()
    finally:
        dist.all_reduce = real
    return forward, list(calls)


@pytest.mark.parametrize("tokens, chunks", [(13, 3), (0, 1)])
@pytest.mark.parametrize("form", ["logits", "fused", "recompute"])
@ALL
def test_collectives(loss, form, tokens, chunks):
    case = loss_cases.Case(loss, form != "logits", tokens=tokens, recompute=form == "recompute")
    sizes = [(min(case.chunk, tokens - start)) * loss_cases.WIDTHS[0] for start in range(0, max(tokens, 1), case.chunk)]
    of_hidden = [("sum", size) for size in sizes]
    for forward, backward in run_ranks(2, _count_collectives, case):
        a_chunk = ["max", "sum"] + (["sum"] if loss in ("jsd", "akl") else [])
        a_chunk += ["sum"] if form == "fused" else []
        assert [name for name, _ in forward] == a_chunk * (1 if form == "logits" else chunks)
        if form == "fused":  # d(hidden) is complete when the forward pass is over
            assert forward[len(a_chunk) - 1 :: len(a_chunk)] == of_hidden
        assert backward == (of_hidden if form == "recompute" else [])


def _sequence_parallel(case):
    group = subgroup((0, 1))
    rank, data = dist.get_rank(), loss_cases.local_inputs(case, group)
    results = []
    for shared in (False, True):
        models = [[tensor.clone() for tensor in model] for model in data["models"]]
        if shared:
            for model in models:
                model[0] = model[0].chunk(2)[rank].clone()
        for tensor in models[0]:
            tensor.requires_grad_()
        flat = [tensor for model in models for tensor in model]
        settings = {"tp_group": group, "vocab_size": case.vocab, "chunk_tokens": 3, "sequence_parallel": shared}
        if case.loss == "log_probs":
            value_T = losses.fused_token_log_probs(*flat, data["labels_T"], recompute=case.recompute, **settings)
        elif case.loss == "advantage":
            value_T = losses.fused_expected_advantage(*flat, recompute=case.recompute, **settings)
        else:
            value_T = losses.fused_divergence(case.loss, *flat, recompute=case.recompute, **settings)
        value_T.sum().backward()
        hidden = models[0][0].grad
        results.append((value_T.detach(), hidden if shared else hidden.chunk(2)[rank], models[0][1].grad))
    return results


@ALL
@pytest.mark.parametrize("recompute", [False, True])
def test_sequence_parallel_gives_each_rank_its_share(loss, recompute):
    case = loss_cases.Case(loss, True, tokens=8, recompute=recompute)
    for whole, shared in run_ranks(2, _sequence_parallel, case):
        for ours, theirs in zip(whole, shared, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


# --------------------------------------------------------------------------------------------------------- refusals
def _other_width():
    group = subgroup((0, 1))
    student_TV, teacher_TV = torch.zeros(2, 8), torch.zeros(2, 7)
    try:
        losses.divergence("forward_kl", student_TV, teacher_TV, tp_group=group, vocab_size=13)
    except LossInputError as error:
        return str(error)
    return ""


def test_a_teacher_that_is_cut_elsewhere_is_refused():
    right = "teacher_TV has 7 local columns and student_TV 8: they must be padded alike when cut over 2 ranks"
    assert run_ranks(2, _other_width) == [right, right]


def _uneven_shares():
    group = subgroup((0, 1))
    hidden_TH, head_VH = torch.zeros(4, 3), torch.zeros(5, 3)
    labels_T = torch.zeros(7, dtype=torch.int64)
    try:
        losses.fused_token_log_probs(hidden_TH, head_VH, labels_T, tp_group=group, sequence_parallel=True)
    except LossInputError as error:
        return str(error)
    return ""


def test_tokens_that_do_not_divide_by_the_group_are_refused_under_sequence_parallelism():
    found = "hidden has 4 rows on each of 2 ranks, and labels_T is [7]"
    right = f"{found}: with sequence_parallel T must be 2 equal shares; fill T up to a multiple of 2"
    assert run_ranks(2, _uneven_shares) == [right, right]
