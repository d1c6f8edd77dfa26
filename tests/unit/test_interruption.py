"""Signals that ask a run to leave: heard while it runs, agreed upon by all ranks."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from megakd.cli import main
from megakd.interruption import INTERRUPTED, SIGNALS, Interrupted, asked, heard
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def _asked_where(signalled: tuple[int, ...], number: int) -> tuple[bool, bool, bool]:
    """What a rank hears before, after and once more after a signal to some of the ranks; afterwards nothing."""
    with heard():
        before = asked(dist.group.WORLD, CPU)
        if dist.get_rank() in signalled:
            os.kill(os.getpid(), number)
        answers = before, asked(dist.group.WORLD, CPU), asked(dist.group.WORLD, CPU)
    assert not asked(dist.group.WORLD, CPU)
    return answers


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("signalled", [(), (1,), (0, 1)])
def test_one_signalled_rank_is_enough_for_all(signalled, number):
    asked_at_all = bool(signalled)
    assert run_ranks(2, _asked_where, signalled, number) == [(False, asked_at_all, asked_at_all)] * 2


def test_what_signals_do_otherwise_is_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(RuntimeError), heard():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_other_signals_do_what_they_did():
    # Looked up and not sent: a shell that starts this in the background has it ignore some of them.
    others = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in others]
    with heard():
        assert [signal.getsignal(number) for number in others] == before


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_command_says_what_to_do_and_has_a_status_of_its_own(monkeypatch, tmp_path, capsys, rank):
    def leave(*_):
        raise Interrupted("after step 3 of stage dckd, checkpoint saved")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("megakd.cli.run_command", leave)
    assert main(["run", str(tmp_path / "recipe.yaml")]) == INTERRUPTED == 75
    told = "megakd: interrupted after step 3 of stage dckd, checkpoint saved; run the same command to go on\n"
    assert capsys.readouterr() == ("", told if rank == "0" else "")
