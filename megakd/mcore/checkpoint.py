"""Training checkpoints that any layout can read: boxes of Hugging Face tensors in safetensors files, no pickle.

A checkpoint is a folder `step-<number>`. Each rank that owns something writes `rank-<rank>.safetensors` with the boxes
of the master weights and Adam's moments (float32) that it owns, and `rank-<rank>.json` that says which box of which
Hugging Face tensor each one is; rank 0 writes `checkpoint.json` with the step and the facts. A parameter's moments have
its shape, so the table that imports and exports weights (`megakd.hf.pieces`) describes them too, and a checkpoint can
be read into any tensor x pipeline x data layout.

The folder is written beside its final name and renamed when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megakd.errors import ModelError
from megakd.hf.pieces import Piece
from megakd.mcore.optimizer import STATES, Trainer

INFORMATION = "checkpoint.json"
_PREFIX = "step-"
_PARTIAL = "partial"


def latest(folder: Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint in `folder` and its step, or None."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if (path / INFORMATION).is_file()]
    steps = {int(path.name.removeprefix(_PREFIX)): path for path in found}
    return (steps[max(steps)], max(steps)) if steps else None


def save(folder: Path, step: int, trainer: Trainer, facts: Mapping[str, str], world_group: dist.ProcessGroup) -> Path:
    """Writes checkpoint `step` and then removes the older ones.

    Args:
        folder: the stage's checkpoint folder, on a file system that every rank sees.
        step: optimizer steps taken.
        trainer: what is saved.
        facts: what a reader has to agree with (`load` compares them), e.g. the stage's fingerprint.
        world_group: every rank of the run.

    Collectives: a reduce over the data group for each parameter; two barriers over the world.
    """
    partial = folder / _PARTIAL
    rank = dist.get_rank(world_group)
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=world_group)
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    boxes: list[dict] = []
    for name, piece, states in _owned_pieces(trainer):
        for state, local in states.items():
            key = f"{name}.{state}"
            tensors[key] = box_of(local, piece).contiguous().cpu()
            boxes.append({"key": key, "tensor": piece.hf_name, "state": state, "offset": piece.hf_offset,
                          "size": piece.hf_size})
    save_file(tensors, partial / f"rank-{rank:05}.safetensors")
    (partial / f"rank-{rank:05}.json").write_text(json.dumps(boxes))
    if rank == 0:
        information = {"step": step, "adam_step": trainer.steps_taken, "world": dist.get_world_size(world_group),
                       "facts": dict(facts)}
        (partial / INFORMATION).write_text(json.dumps(information, indent=1))
    dist.barrier(group=world_group)
    final = folder / f"{_PREFIX}{step:08}"
    if rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for older in folder.glob(f"{_PREFIX}*"):
            if older != final:
                shutil.rmtree(older)
    return final


def load(path: Path, trainer: Trainer, facts: Mapping[str, str], world_group: dist.ProcessGroup) -> int:
    """Reads a checkpoint into a trainer of any layout; returns the number of steps taken.

    Collectives: an all-gather of parameters over the data group.

    Raises:
        ModelError: the checkpoint's facts differ from `facts`, or it misses part of a tensor.
    """
    information = json.loads((path / INFORMATION).read_text())
    for name, value in facts.items():
        if information["facts"].get(name) != value:
            raise ModelError(f"{path}: was written with {name} = {information['facts'].get(name)!r}, this run has {value!r}. "
                             "Choose another output folder, or remove the checkpoint to start the stage anew")
    step = information["step"]
    trainer.prepare_states(information["adam_step"])
    index = _read_index(path)
    for chunk in range(len(trainer.model.chunks)):
        parameters = trainer.model.parameters_of(chunk)
        pieces_of: dict[str, list[Piece]] = {}
        for piece in trainer.model.pieces_of(chunk):
            pieces_of.setdefault(piece.parameter, []).append(piece)
        for name, parameter in parameters.items():
            if (owned := trainer.slice_of(parameter)) is None:
                continue
            for state, target in trainer.states_of(parameter).items():
                whole = torch.zeros(parameter.shape, dtype=torch.float32)
                for piece in pieces_of[name]:
                    view = whole.view(piece.local_view)[piece.local_index]
                    view.copy_(index.read(piece, state).reshape(view.shape))
                target.copy_(whole.view(-1)[owned])
    trainer.publish_parameters()
    trainer.scheduler.step(increment=step)
    if information["world"] == dist.get_world_size(world_group):
        torch.set_rng_state(index.random_state(dist.get_rank(world_group)))
    return step


def box_of(local: Tensor, piece: Piece) -> Tensor:
    """The part of a local parameter (or its moment) that a piece describes, in the Hugging Face tensor's shape."""
    return local.view(piece.local_view)[piece.local_index].reshape(piece.hf_size)


def _owned_pieces(trainer: Trainer):
    """This rank's pieces to write: (unique key, piece, {state: whole local tensor}).

    A parameter's slices are brought together on one data-parallel rank, in turn, so that all of them write.
    """
    group = trainer.model.grid.groups.dp_cp
    size, me = dist.get_world_size(group), dist.get_rank(group)
    for chunk in range(len(trainer.model.chunks)):
        pieces = trainer.model.pieces_of(chunk)
        for number, (name, parameter) in enumerate(trainer.model.parameters_of(chunk).items()):
            writer = number % size
            whole = {state: torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device) for state in STATES}
            if (owned := trainer.slice_of(parameter)) is not None:
                for state, values in trainer.states_of(parameter).items():
                    whole[state][owned] = values
            if size > 1:
                for tensor in whole.values():
                    dist.reduce(tensor, group=group, group_dst=writer)
            if me != writer:
                continue
            for count, piece in enumerate(pieces):
                if piece.parameter == name and piece.primary:
                    yield f"{chunk}.{name}.{count}", piece, {state: t.view(parameter.shape) for state, t in whole.items()}


@dataclass(frozen=True)
class _Box:
    file: Path
    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]


class _Index:
    """Finds and reads the stored boxes that a wanted box overlaps."""

    def __init__(self, path: Path, boxes: dict[tuple[str, str], list[_Box]]):
        self.path = path
        self.boxes = boxes
        self.files: dict[Path, safe_open] = {}

    def read(self, piece: Piece, state: str) -> Tensor:
        """The values of a piece's box, float32, in its Hugging Face shape."""
        wanted = torch.empty(piece.hf_size, dtype=torch.float32)
        covered = 0
        for box in self.boxes.get((piece.hf_name, state), ()):
            low = [max(a, b) for a, b in zip(piece.hf_offset, box.offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in
                    zip(piece.hf_offset, piece.hf_size, box.offset, box.size, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, box.offset, strict=True))
            target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, piece.hf_offset, strict=True))
            wanted[target] = self._open(box.file).get_slice(box.key)[source]
            covered += wanted[target].numel()
        if covered != wanted.numel():
            raise ModelError(f"{self.path}: holds {covered} of {wanted.numel()} values of {piece.hf_name} ({state}). "
                             "The checkpoint is of another model or incomplete; remove it to start the stage anew")
        return wanted

    def random_state(self, rank: int) -> Tensor:
        """The generator's state that a rank saved."""
        return self._open(self.path / f"rank-{rank:05}.safetensors").get_tensor("rng")

    def _open(self, file: Path) -> safe_open:
        if file not in self.files:
            self.files[file] = safe_open(file, framework="pt")
        return self.files[file]


def _read_index(path: Path) -> _Index:
    boxes: dict[tuple[str, str], list[_Box]] = {}
    for listing in sorted(path.glob("rank-*.json")):
        for entry in json.loads(listing.read_text()):
            box = _Box(listing.with_suffix(".safetensors"), entry["key"], tuple(entry["offset"]), tuple(entry["size"]))
            boxes.setdefault((entry["tensor"], entry["state"]), []).append(box)
    return _Index(path, boxes)
