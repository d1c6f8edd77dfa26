"""Small plain values between ranks: JSON as bytes, so that nothing is unpickled."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.errors import MegakdError

HEARTBEAT = 20.0
"""Seconds between two signs of life of a rank that the others wait for."""


def broadcast_json(value: Any, source: int, group: dist.ProcessGroup, device: torch.device) -> Any:
    """Tells `value` of the group's rank `source` to the others; the others' own argument is not looked at.

    Collectives: two broadcasts over `group` (length, bytes).
    """
    data = (
        _encode(value, device) if dist.get_rank(group) == source else torch.empty(0, dtype=torch.uint8, device=device)
    )
    length = torch.tensor([data.numel()], dtype=torch.int64, device=device)
    dist.broadcast(length, group=group, group_src=source)
    if dist.get_rank(group) != source:
        data = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(data, group=group, group_src=source)
    return _decode(data)


def all_gather_json(value: Any, group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """The values of all ranks of `group`, in the order of its ranks.

    Collectives: two all-gathers over `group` (lengths, bytes padded to the longest).
    """
    data = _encode(value, device)
    lengths = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(lengths, torch.tensor([data.numel()], dtype=torch.int64, device=device), group=group)
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    gathered = torch.empty(len(lengths) * longest, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(gathered, padded, group=group)
    rows = gathered.view(len(lengths), longest)
    return [_decode(row[:length]) for row, length in zip(rows, lengths.tolist(), strict=True)]


def on_one_rank(work: Callable[[], Any], source: int, group: dist.ProcessGroup, device: torch.device) -> Any:
    """Lets the group's rank `source` do something that takes as long as it takes, and tells all what came of it.

    A rank that waits in one collective gives up after half an hour, so the others hear every HEARTBEAT seconds that the
    work goes on. `work` runs in a thread of its own, and uses no collectives; what it returns is plain (JSON).

    Collectives: two broadcasts over `group` every HEARTBEAT seconds, and at the end.

    Raises:
        BaseException: on `source` what `work` raised.
        MegakdError: on the other ranks, in its place.
    """
    if dist.get_rank(group) != source:
        while not (report := broadcast_json(None, source, group, device))["done"]:
            pass
        if report["error"] is not None:
            raise MegakdError(report["error"])
        return report["value"]
    found: dict[str, Any] = {"value": None, "error": None}

    def body() -> None:
        try:
            found["value"] = work()
        except BaseException as error:  # it is raised below, in the caller's thread
            found["error"] = error

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    while True:
        thread.join(HEARTBEAT)
        done, error = not thread.is_alive(), found["error"]
        text = None if error is None else f"rank {source}: {error}"
        broadcast_json({"done": done, "error": text, "value": found["value"] if done else None}, source, group, device)
        if done and error is not None:
            raise error
        if done:
            return found["value"]


def _encode(value: Any, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)


def _decode(data: Tensor) -> Any:
    return json.loads(bytes(data.cpu().numpy()))
