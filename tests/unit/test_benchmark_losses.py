"""What benchmarks/losses.py measures with, on tiny shapes and without other packages."""

from __future__ import annotations

from xml.dom import minidom

import pytest
import torch
import torch.distributed as dist

from benchmarks import loss_inputs, losses, measure, peers
from benchmarks.loss_inputs import TEACHERS, Shapes
from benchmarks.loss_table import table, write_plots
from tests.ranks import run_ranks

KIB = 1024
SHAPES = Shapes(tokens=48, vocab=96, hidden=16, teacher_hidden=24, sequence=8, logit_std=2.5, device="cpu",
                dtype=torch.float32)


def test_peak_counts_what_lives_at_the_same_time():
    given = torch.ones(256 * 3)

    def two_of_three():
        first = torch.zeros(256 * 2)  # 2 KiB
        second = given * given  # 3 KiB beside it: the peak
        del first
        return second, torch.zeros(256)  # 1 KiB beside the 3

    peak, _ = measure.peak_extra_bytes(two_of_three, lambda _: [])
    assert peak == 5 * KIB


def test_peak_leaves_out_what_is_kept():
    def keep():
        passing, kept = torch.zeros(256 * 2), torch.zeros(256 * 4)
        return kept + passing[0]  # another 4 KiB, which is the one that stays

    assert measure.peak_extra_bytes(keep, lambda kept: [kept])[0] == 6 * KIB
    assert measure.peak_extra_bytes(keep, lambda kept: [])[0] == 10 * KIB


def test_peak_sees_temporaries_of_operators():
    given_TV = torch.randn(64, 512)
    peak, _ = measure.peak_extra_bytes(lambda: given_TV.logsumexp(1), lambda _: [])
    assert peak >= given_TV.nbytes


def test_rounds_begin_with_another_one_each():
    called = []
    functions = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = measure.interleaved_seconds(functions, repeats=2)
    assert "".join(called) == "abcbca"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_ratios_are_taken_within_rounds():
    limit, slow_later = [1.0, 1.0, 10.0], [2.0, 3.0, 30.0]
    assert measure.paired_ratio(slow_later, limit) == 3.0
    assert measure.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)
    assert measure.quartiles([2.0]) == (2.0, 2.0, 2.0)


def test_error_is_relative_to_the_largest():
    assert measure.largest_relative_error(torch.tensor([1.0, 3.5]), torch.tensor([1.0, 4.0])) == 0.125
    assert measure.largest_relative_error(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")


@pytest.mark.parametrize("loss", [loss for loss in TEACHERS if loss != "dpo"])
def test_sliced_peer_is_the_same_loss(loss):
    inputs = loss_inputs.make_inputs(loss, SHAPES)
    right = loss_inputs.reference_outcome(inputs)
    contestants = [loss_inputs.megakd(10), *peers.peers_of(loss, ["torch"], compiled=False)[0]]
    for contestant in contestants:
        for setting in (10, 64):
            for found, expected in zip(contestant.prepare(inputs, setting)(), right, strict=True):
                assert measure.largest_relative_error(found, expected) < 1e-5, (contestant.name, setting)


def test_bare_gemms_make_every_product():
    inputs = loss_inputs.make_inputs("advantage", SHAPES)
    counted = {}

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name().split("::")[1].split(".")[0]
            counted[name] = counted.get(name, 0) + 1
            return func(*args, **(kwargs or {}))

    run = loss_inputs.bare_gemms().prepare(inputs, 32)
    with Products():
        run()
    # Of each of two chunks: three models' logits and d(hidden), and d(head).
    assert counted["mm"] == 8 and counted["addmm_"] == 2


def _count():
    counter = measure.CollectiveCounter()
    with counter:
        dist.all_reduce(torch.zeros(10))
        dist.all_reduce(torch.zeros(5, dtype=torch.float64), op=dist.ReduceOp.MAX)
        dist.all_gather_into_tensor(torch.zeros(6), torch.zeros(3))
        dist.barrier()
    dist.all_reduce(torch.zeros(1000))
    return counter.found.calls, counter.found.bytes


def test_collectives_are_counted():
    for calls, number in run_ranks(2, _count):
        assert sum(calls.values()) == 3 and calls["allreduce"] == 2
        assert number == 40 + 40 + 24


def _measure(arguments):
    options = losses.parse(arguments)
    shapes = Shapes(options.tokens, options.vocab, options.hidden, options.teacher_hidden, options.sequence, 2.5,
                    options.device, torch.float32)
    rows = [losses.measure_loss(loss, shapes, options, dist.get_rank(), 2) for loss in options.only]
    return [row for part in rows for row in part]


def test_table_and_plots_of_two_ranks(tmp_path):
    arguments = ["--tokens", "32", "--vocab", "64", "--hidden", "8", "--sequence", "8", "--sweep-tokens", "16",
                 "--repeats", "2", "--tp", "2", "--chunk", "16", "--only", "log_probs", "jsd", "dpo",
                 "--peers", "torch"]
    rows = run_ranks(2, _measure, arguments)[0]
    names = ["bare GEMMs", "megakd", "torch, sliced"]
    assert [row["name"] for row in rows] == [*names, *names, "bare GEMMs", "megakd"]
    for row in rows:
        if row["name"] == "bare GEMMs":
            assert row["over_limit"] == 1.0
        elif row["name"] == "megakd":
            assert row["over_megakd"] == 1.0 and max(row["errors"].values()) < 1e-5
            assert row["peak_extra_bytes"] > 16 * 32 * 4  # at least a chunk's logits of one model on one rank
    # Two chunks: MAX, SUM (and another for jsd) and d(hidden) of each; dpo has two models, and a gradient for one.
    calls = {row["loss"]: sum(row["collectives"]["calls"].values()) for row in rows if row["name"] == "megakd"}
    assert calls == {"log_probs": 6, "jsd": 8, "dpo": 10}

    options = vars(losses.parse(arguments))
    record = {"results": rows, "options": options, "machine": {"cpu": "any & all", "cores": 8}}
    text = table(record)
    assert "Not run at TP 2: torch, sliced: works on the whole vocabulary only." in text
    assert sum("megakd  " in line for line in text.splitlines()[1:]) == 3
    written = write_plots(record, tmp_path / "name.json")
    metrics = ("time", "memory", "collectives", "error")
    assert [path.name for path in written] == [f"name_{metric}.svg" for metric in metrics]
    for path in written:
        minidom.parse(str(path))


def test_a_loss_that_fails_leaves_the_others(tmp_path, monkeypatch):
    """One rank alone goes on; what it has found of each loss is told when it has it."""
    def measure_loss(loss, *_):
        if loss == "jsd":
            raise RuntimeError("no such kernel\nand more")
        return [{"loss": loss, "tp": 1, "name": "megakd", "setting": None}]

    class Pipe(list):
        send = list.append

    monkeypatch.setattr(losses, "measure_loss", measure_loss)
    told = Pipe()
    losses.run_rank(0, 1, str(tmp_path), losses.parse(["--only", "jsd", "log_probs", "--no-peers"]), told)
    (failed,), (done,) = told
    assert failed == {"loss": "jsd", "tp": 1, "name": "megakd", "unavailable": "RuntimeError: no such kernel"}
    assert done["loss"] == "log_probs"
