"""Optimizer states that come and go: which, as the same tensors, and in which order on CUDA. In a training they are in
test_training.py."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from megakd.mcore.offload import OffloadedStates
from tests.mcore.cases import CPU, memory_of


def an_optimizer(masters: list[torch.Tensor], moments: bool) -> SimpleNamespace:
    """What `OffloadedStates` reads of a distributed optimizer."""
    names = ("exp_avg", "exp_avg_sq") if moments else ()
    state = {each: {name: torch.rand_like(each) for name in names} | {"step": torch.tensor(3.0)} for each in masters}
    return SimpleNamespace(shard_fp32_from_float16_groups=[masters, []], optimizer=SimpleNamespace(state=state))


def test_states_come_and_go_as_the_same_tensors():
    whole = torch.rand(9)
    view, own = whole[2:6], torch.rand(3)
    optimizer = an_optimizer([view, own], moments=True)
    states = OffloadedStates([optimizer], CPU)
    right = whole[2:6].clone()
    tensors, step = states.states(), optimizer.optimizer.state[own]["step"]
    assert len(tensors) == 6 and tensors[0] is view and not any(step is each for each in tensors)
    assert memory_of(tensors) == 0 and step == 3 and len(whole) == whole.untyped_storage().nbytes() // 4 == 9
    with states.fetched():
        assert torch.equal(view, right) and memory_of([view]) == 16, "the view has taken more than its own part"
        with states.fetched():
            own.add_(1)
        assert memory_of(tensors) == sum(each.nbytes for each in tensors)
        changed = own.clone()
    with pytest.raises(ZeroDivisionError), states.fetched():
        assert torch.equal(own, changed)
        raise ZeroDivisionError
    assert memory_of(tensors) == 0 and not states.at_hand


def test_on_cuda_memory_is_freed_after_its_copy_and_read_after_it(monkeypatch):
    """The order of what CUDA is asked for, with stand-ins that write it down."""
    said: list[str] = []

    class Stream:
        device = torch.device("cuda", 0)

        def __init__(self, place):
            self.name = "copies" if isinstance(place, torch.device) else place

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

    copy, empty_like = torch.Tensor.copy_, torch.empty_like
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: said.append(f"on {stream.name}") or nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: said.append(
        f"memory of {tensor.untyped_storage().nbytes()} bytes is used on {stream.name}"))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda tensor, other, non_blocking: said.append(
        "a copy" if non_blocking else "a copy that is waited for") or copy(tensor, other))
    monkeypatch.setattr(torch, "empty_like", lambda tensor, device, pin_memory: said.append(
        f"{'pinned' if pin_memory else 'plain'} buffer") or empty_like(tensor, device=device))
    states = OffloadedStates([an_optimizer([torch.rand(3)], moments=False)], torch.device("cuda", 0))
    assert said == ["pinned buffer", "copies waits for current", "on copies", "a copy",
                    "memory of 12 bytes is used on copies"]
    said.clear()
    with states.fetched():
        assert said == ["copies waits for current", "on copies", "a copy", "current waits for copies"]
        said.clear()
    assert said == ["copies waits for current", "on copies", "a copy", "memory of 12 bytes is used on copies"]
