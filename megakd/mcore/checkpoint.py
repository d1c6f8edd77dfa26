"""Training checkpoints that any layout can read: boxes of Hugging Face tensors in safetensors files, no pickle.

A checkpoint is a folder `step-<number>`. Each rank writes `rank-<rank>.safetensors`: its share of the master weights
and of Adam's moments (float32) in boxes, and the states of its random generators. The file's header says which box of
which Hugging Face tensor each tensor is. Rank 0 writes `checkpoint.json` with the step, the layout and the facts. A
parameter's moments have its shape, so the table that imports and exports weights (`megakd.hf.pieces`) describes them
too, and a checkpoint can be read into any tensor x pipeline x data layout.

The folder is written beside its final name and renamed when all of it is on disk.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megakd.disk import sync
from megakd.errors import ModelError
from megakd.hf.directory import open_tensors
from megakd.hf.pieces import Piece
from megakd.mcore.optimizer import STATES, Trainer

INFORMATION = "checkpoint.json"
FORMAT = 2
_PREFIX = "step-"
_PARTIAL = "partial"
_RANDOM = "random."
_REMEDY = "Remove the checkpoint to start the stage anew"


def latest(folder: Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint in `folder` and its step, or None."""
    found = [path for path in folder.glob(f"{_PREFIX}[0-9]*") if (path / INFORMATION).is_file()]
    steps = {int(path.name.removeprefix(_PREFIX)): path for path in found}
    return (steps[max(steps)], max(steps)) if steps else None


@torch.no_grad()
def save(folder: Path, step: int, trainer: Trainer, facts: Mapping[str, str], world_group: dist.ProcessGroup) -> Path:
    """Writes checkpoint `step` and then removes the older ones.

    A rank holds what it writes in host memory: 12 bytes for each parameter of its model chunks, divided by the number
    of data-parallel ranks.

    Args:
        folder: the stage's checkpoint folder, on a file system that every rank sees.
        step: optimizer steps taken, at least one.
        trainer: what is saved.
        facts: what a reader has to agree with (`load` compares them), e.g. the stage's fingerprint.
        world_group: every rank of the run.

    Collectives: three reduces over the data group for each parameter; three barriers over the world.
    """
    partial, final = folder / _PARTIAL, folder / f"{_PREFIX}{step:08}"
    rank = dist.get_rank(world_group)
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=world_group)
    tensors, boxes = _random_states(), []
    for name, piece, states in _owned_pieces(trainer):
        for state, local in states.items():
            key = f"{name}.{state}"
            tensors[key] = box_of(local, piece).contiguous().cpu()
            boxes.append({"key": key, "tensor": piece.hf_name, "state": state, "offset": piece.hf_offset,
                          "size": piece.hf_size})
    file = partial / _file_of(rank)
    save_file(tensors, file, {"boxes": json.dumps(boxes)})
    sync(file)
    dist.barrier(group=world_group)
    if rank == 0:
        information = {"format": FORMAT, "step": step, "adam_step": trainer.steps_taken, "tokens": trainer.tokens,
                       "layout": asdict(trainer.model.grid.layout), "facts": dict(facts)}
        (partial / INFORMATION).write_text(json.dumps(information, indent=1))
        sync(partial / INFORMATION)
        sync(partial)
        if final.exists():
            _remove(final)
        partial.rename(final)
        sync(folder)
        for older in folder.glob(f"{_PREFIX}*"):
            if older != final:
                _remove(older)
    dist.barrier(group=world_group)
    return final


@torch.no_grad()
def load(path: Path, trainer: Trainer, facts: Mapping[str, str], world_group: dist.ProcessGroup) -> int:
    """Reads a checkpoint into a trainer of any layout; returns the number of steps taken.

    In the layout that wrote it everything continues bit for bit. Another layout keeps the random generators as they
    are: their number and meaning follow the layout.

    Collectives: an all-gather of parameters over the data group.

    Raises:
        ModelError: the checkpoint's facts differ from `facts`, a file of it cannot be read, or it misses part of a
            tensor.
    """
    information = _read_information(path)
    for name, value in facts.items():
        if name not in information["facts"] or information["facts"][name] != value:
            written = f"{name} = {information['facts'][name]!r}" if name in information["facts"] else f"no {name}"
            raise ModelError(f"{path}: was written with {written}, this run has {value!r}. Choose another output "
                             "folder, or remove the checkpoint to start the stage anew")
    step, layout = information["step"], information["layout"]
    index = _Index(path, layout["world"])
    trainer.prepare_states(information["adam_step"])
    for chunk in range(len(trainer.model.chunks)):
        parameters = trainer.model.parameters_of(chunk)
        pieces_of: dict[str, list[Piece]] = {name: [] for name in parameters}
        for piece in trainer.model.pieces_of(chunk):
            pieces_of[piece.parameter].append(piece)
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
    trainer.set_schedule(step)
    trainer.tokens = information["tokens"]
    if layout == asdict(trainer.model.grid.layout):
        _set_random_states(index.random_states(dist.get_rank(world_group)))
    return step


def box_of(local: Tensor, piece: Piece) -> Tensor:
    """The part of a local parameter (or its moment) that a piece describes, in the Hugging Face tensor's shape."""
    return local.view(piece.local_view)[piece.local_index].reshape(piece.hf_size)


def _owned_pieces(trainer: Trainer) -> Iterator[tuple[str, Piece, dict[str, Tensor]]]:
    """This rank's pieces to write: (unique key, piece, {state: whole local tensor}).

    A parameter's slices are brought together on one data-parallel rank, in turn, so that all of them write.
    """
    group = trainer.model.grid.groups.dp_cp
    size, me = dist.get_world_size(group), dist.get_rank(group)
    for chunk in range(len(trainer.model.chunks)):
        pieces = trainer.model.pieces_of(chunk)
        for number, (name, parameter) in enumerate(trainer.model.parameters_of(chunk).items()):
            writer = number % size
            whole = {state: torch.zeros_like(parameter, dtype=torch.float32).view(-1) for state in STATES}
            if (owned := trainer.slice_of(parameter)) is not None:
                for state, values in trainer.states_of(parameter).items():
                    whole[state][owned] = values
            if size > 1:
                for tensor in whole.values():
                    dist.reduce(tensor, group=group, group_dst=writer)
            if me != writer:
                continue
            states = {state: tensor.view(parameter.shape) for state, tensor in whole.items()}
            for count, piece in enumerate(pieces):
                if piece.parameter == name and piece.primary:
                    yield f"{chunk}.{name}.{count}", piece, states


def _random_states() -> dict[str, Tensor]:
    """The states of this process' generators: torch's on the host, torch's on the device, megatron-core's own."""
    tracked = get_cuda_rng_tracker().get_states()
    states = {"cpu": torch.get_rng_state(), "device": torch.cuda.get_rng_state()}
    states |= {f"tracked.{name}": state for name, state in tracked.items()}
    return {f"{_RANDOM}{name}": state.clone() for name, state in states.items()}


def _set_random_states(states: Mapping[str, Tensor]) -> None:
    """Puts back what `_random_states` gave, without its prefix."""
    torch.set_rng_state(states["cpu"])
    torch.cuda.set_rng_state(states["device"])
    prefix = "tracked."
    get_cuda_rng_tracker().set_states(
        {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    )


def _file_of(rank: int) -> str:
    return f"rank-{rank:05}.safetensors"


def _remove(path: Path) -> None:
    """Removes a checkpoint; one that is killed at it leaves a folder that `latest` does not take for whole."""
    (path / INFORMATION).unlink(missing_ok=True)
    shutil.rmtree(path)


def _read_information(path: Path) -> dict:
    """What `checkpoint.json` says. Raises ModelError where it cannot be read, or is of another format."""
    file = path / INFORMATION
    try:
        information = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ModelError(f"{file}: cannot be read ({error}). {_REMEDY}") from error
    if "format" not in information or information["format"] != FORMAT:
        raise ModelError(f"{file}: is not of format {FORMAT}, which this version reads. {_REMEDY}")
    return information


@dataclass(frozen=True)
class _Box:
    file: Path
    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]


class _Index:
    """Finds and reads the stored boxes that a wanted box overlaps."""

    def __init__(self, path: Path, world: int):
        self.path = path
        self.files: dict[Path, safe_open] = {}
        self.boxes: defaultdict[tuple[str, str], list[_Box]] = defaultdict(list)
        for rank in range(world):
            file = path / _file_of(rank)
            for entry in json.loads(self._open(file).metadata()["boxes"]):
                box = _Box(file, entry["key"], tuple(entry["offset"]), tuple(entry["size"]))
                self.boxes[entry["tensor"], entry["state"]].append(box)

    def read(self, piece: Piece, state: str) -> Tensor:
        """The values of a piece's box, float32, in its Hugging Face shape."""
        wanted = torch.empty(piece.hf_size, dtype=torch.float32)
        covered = 0
        for box in self.boxes[piece.hf_name, state]:
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
            raise ModelError(f"{self.path}: holds {covered} of {wanted.numel()} values of {piece.hf_name} ({state}), "
                             f"so it is of another model. {_REMEDY}")
        return wanted

    def random_states(self, rank: int) -> dict[str, Tensor]:
        """The states of the generators that a rank saved, by name."""
        file = self._open(self.path / _file_of(rank))
        keys = [key for key in file.keys() if key.startswith(_RANDOM)]  # noqa: SIM118 (a file is not iterable)
        return {key.removeprefix(_RANDOM): file.get_tensor(key) for key in keys}

    def _open(self, file: Path) -> safe_open:
        if file not in self.files:
            try:
                self.files[file] = open_tensors(file)
            except ModelError as error:
                raise ModelError(f"{error}. The checkpoint is damaged. {_REMEDY}") from error
        return self.files[file]
