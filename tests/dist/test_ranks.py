"""The pool of ranks itself: results, groups, failures, hangs and restarts."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Killed, RankError, run_ranks, subgroup


def _process(offset):
    total = torch.full((2,), float(dist.get_rank()))
    dist.all_reduce(total, group=dist.group.WORLD)
    return os.getpid(), dist.get_rank() + offset, total, torch.get_num_threads()


def _pair_sums():
    pairs = [subgroup((0, 1)), subgroup((2, 3))]
    mine = pairs[dist.get_rank() // 2]
    value = torch.tensor(10.0 ** dist.get_rank())
    dist.all_reduce(value, group=mine)
    return value.item(), mine is subgroup(((0, 1), (2, 3))[dist.get_rank() // 2]), dist.get_rank(mine)


def _fail_on_one():
    if dist.get_rank() == 1:
        raise KeyError("the answer")
    dist.barrier(group=dist.group.WORLD)  # never ends: rank 1 does not come


def _die_on_one():
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier(group=dist.group.WORLD)


def _sleep():
    time.sleep(60)


def test_results_come_by_rank_from_processes_that_are_kept():
    first = run_ranks(2, _process, 5)
    second = run_ranks(2, _process, 7)
    assert [answer[1] for answer in first] == [5, 6] and [answer[1] for answer in second] == [7, 8]
    assert [answer[0] for answer in first] == [answer[0] for answer in second]
    assert len({os.getpid(), *(answer[0] for answer in first)}) == 3
    for _, _, total, threads in first:
        assert total.tolist() == [1.0, 1.0] and threads == 1


def test_subgroups_are_made_once():
    assert run_ranks(4, _pair_sums) == [(11.0, True, 0), (11.0, True, 1), (1100.0, True, 0), (1100.0, True, 1)]


@pytest.mark.parametrize(
    "function, message",
    [
        (_fail_on_one, r"rank 1 of 2 failed[\s\S]*_fail_on_one[\s\S]*KeyError: 'the answer'"),
        (_die_on_one, r"rank 1 of 2 failed[\s\S]*exit code 7|closed by peer"),
    ],
)
def test_a_failure_names_its_rank_and_the_pool_starts_afresh(function, message):
    before = run_ranks(2, _process, 0)
    with pytest.raises(RankError, match=message):
        run_ranks(2, function)
    after = run_ranks(2, _process, 0)
    assert not {answer[0] for answer in before} & {answer[0] for answer in after}


@pytest.mark.parametrize("asked, error, message", [
    ({"timeout": 0.5}, TimeoutError, r"ranks \[0, 1\] of 2"),
    ({"kill_when": lambda: True}, Killed, None),
])
def test_a_pool_that_hangs_or_is_to_be_killed_is_gone(asked, error, message):
    pids = [answer[0] for answer in run_ranks(2, _process, 0)]
    start = time.monotonic()
    with pytest.raises(error, match=message):
        run_ranks(2, _sleep, **asked)
    assert time.monotonic() - start < 30
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
