"""One rank works, the others wait: results, errors and signs of life reach every rank."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from megakd import comm
from megakd.errors import ConfigError, MegakdError
from tests.ranks import run_ranks

WORLD, SOURCE = 3, 1


def wait(seconds: float) -> tuple:
    """What a rank gets, and how many broadcasts it heard."""
    heard, own = [], comm.broadcast_json
    comm.HEARTBEAT = 0.05

    def counting(*args):
        heard.append(own(*args))
        return heard[-1]

    comm.broadcast_json = counting
    try:
        def work():
            assert dist.get_rank() == SOURCE  # nobody else works
            time.sleep(seconds)
            return {"answer": [1, "two"]}

        found = comm.on_one_rank(work, SOURCE, dist.group.WORLD, torch.device("cpu"))
    finally:
        comm.broadcast_json, comm.HEARTBEAT = own, 20.0
    return found, len(heard), [report["done"] for report in heard]


def fail() -> tuple[str, str]:
    def work():
        raise ConfigError("judge", "x", "is broken", "Mend it")

    try:
        comm.on_one_rank(work, SOURCE, dist.group.WORLD, torch.device("cpu"))
    except MegakdError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def test_the_result_reaches_all_after_signs_of_life():
    results = run_ranks(WORLD, wait, 0.6)
    assert [found for found, _, _ in results] == [{"answer": [1, "two"]}] * WORLD
    assert len({count for _, count, _ in results}) == 1 and results[0][1] > 1
    assert all(done == [False] * (count - 1) + [True] for _, count, done in results)


def test_an_error_reaches_all():
    own, *others = sorted(run_ranks(WORLD, fail), key=lambda pair: pair[0])
    assert own == ("ConfigError", "judge = 'x': is broken. Mend it")
    assert others == [("MegakdError", "rank 1: judge = 'x': is broken. Mend it")] * 2


@pytest.mark.parametrize("value", [None, 0, [], "text"])
def test_values(value):
    assert run_ranks(WORLD, give, value) == [value] * WORLD


def give(value):
    return comm.on_one_rank(lambda: value, SOURCE, dist.group.WORLD, torch.device("cpu"))
