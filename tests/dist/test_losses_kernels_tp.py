"""The losses' Triton kernels in the interpreter, with the vocabulary cut over two ranks: values, gradients, collectives."""

from __future__ import annotations

from unittest import mock

import pytest
import torch.distributed as dist

from megakd.losses import statistics
from tests import loss_cases
from tests.ranks import run_ranks, subgroup

pytest.importorskip("triton", reason="Triton is not installed")


def _run(cases):
    calls, real = [], dist.all_reduce

    def counting(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        calls.append("max" if op == dist.ReduceOp.MAX else "sum")
        return real(tensor, op=op, group=group, async_op=async_op)

    results = []
    with mock.patch.object(statistics, "KERNEL_DEVICES", {"cpu"}), mock.patch.object(dist, "all_reduce", counting):
        for case in cases:
            results.append((loss_cases.run(case, group=subgroup((0, 1))), calls.copy()))
            calls.clear()
    return results


def test_values_gradients_and_collectives():
    """One MAX and one SUM a chunk (two SUMs for jsd and akl), and one SUM of d(hidden); a rank without a column too."""
    cases = [loss_cases.Case(loss, True, tokens=4, equal_weights=True, label="ranks") for loss in loss_cases.LOSSES]
    cases.append(loss_cases.Case("akl", True, tokens=4, vocab=23, with_log_probs=True, temperature=2.5))
    by_rank = run_ranks(2, _run, cases)
    for case, ranks in zip(cases, zip(*by_rank, strict=True), strict=True):
        loss_cases.check(case, [result for result, _ in ranks])
        passes = 2 if case.loss in ("jsd", "akl") else 1
        assert all(calls == ["max"] + ["sum"] * (passes + 1) for _, calls in ranks)
