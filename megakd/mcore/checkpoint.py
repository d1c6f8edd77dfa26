"""Training checkpoints that any layout can read: slices of parameters in safetensors files, no pickle.

A checkpoint is a folder `step-<number>`. Each rank writes `rank-<rank>.safetensors`: its slices of the master weights
and of Adam's moments (float32), as the distributed optimizer has cut them, the states of its random generators, and,
where FP8 is scaled by what earlier micro-batches had, those scales and histories.
The file's header says which part of which parameter each slice is; that of a data group's first rank says it of the
whole group. Rank 0 writes `checkpoint.json` with the step, the model's sizes, the layout and the facts. From these the
table that imports and exports weights (`megakd.hf.pieces`) tells where a box of a Hugging Face tensor lies in the
parameters of the ranks that wrote it; a parameter's moments have its shape. So a checkpoint can be read into any tensor
x pipeline x data layout. In the layout that wrote it a rank reads its own file alone; in another the random generators
and FP8's histories begin anew, which is said in the log.

The folder is written beside its final name and renamed when all of it is on disk.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megakd.comm import all_gather_json
from megakd.disk import sync
from megakd.errors import ModelError
from megakd.hf.directory import open_tensors
from megakd.hf.families import Architecture
from megakd.hf.pieces import Piece, parameter_shapes, pieces, stage_shards
from megakd.layout import Layout
from megakd.mcore.fp8_layers import amax_states
from megakd.mcore.model import unwrap
from megakd.mcore.optimizer import Trainer

INFORMATION = "checkpoint.json"
FORMAT = 3
_PREFIX = "step-"
_PARTIAL = "partial"
_RANDOM = "random."
_AMAXES = "amaxes."
_REMEDY = "Remove the checkpoint to start the stage anew"

logger = logging.getLogger("megakd")


def latest(folder: Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint in `folder` and its step, or None."""
    found = [path for path in folder.glob(f"{_PREFIX}[0-9]*") if (path / INFORMATION).is_file()]
    steps = {int(path.name.removeprefix(_PREFIX)): path for path in found}
    return (steps[max(steps)], max(steps)) if steps else None


@torch.no_grad()
def save(folder: Path, step: int, trainer: Trainer, facts: Mapping[str, str], world_group: dist.ProcessGroup) -> Path:
    """Writes checkpoint `step` and then removes the older ones.

    A rank holds what it writes in host memory: 12 bytes for each number of its slices, besides `offload`'s buffers.

    Args:
        folder: the stage's checkpoint folder, on a file system that every rank sees.
        step: optimizer steps taken, at least one.
        trainer: what is saved.
        facts: what a reader has to agree with (`load` compares them), e.g. the stage's fingerprint.
        world_group: every rank of the run.

    Collectives: two all-gathers over the data group (which rank has which slice); three barriers over the world.
    """
    partial, final = folder / _PARTIAL, folder / f"{_PREFIX}{step:08}"
    rank = dist.get_rank(world_group)
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=world_group)
    tensors, slices = _random_states(), {}
    tensors |= {name: values.to("cpu", copy=True) for name, values in _amax_states(trainer).items()}
    with trainer.states_at_hand():
        for chunk in range(len(trainer.model.chunks)):
            for name, parameter in trainer.model.parameters_of(chunk).items():
                if (owned := trainer.slice_of(parameter)) is not None:
                    slices[f"{chunk}.{name}"] = [owned.start, owned.stop]
                    for state, values in trainer.states_of(parameter).items():
                        tensors[f"{chunk}.{name}.{state}"] = values.detach().to("cpu", torch.float32, copy=True)
    header = {"slices": json.dumps(slices)}
    group = trainer.model.grid.groups.dp_cp
    whole = all_gather_json({"rank": rank, "slices": slices}, group, next(trainer.model.chunks[0].parameters()).device)
    if dist.get_rank(group) == 0:
        header["group"] = json.dumps(whole)
    file = partial / _file_of(rank)
    save_file(tensors, file, header)
    sync(file)
    dist.barrier(group=world_group)
    if rank == 0:
        information = {"format": FORMAT, "step": step, "adam_step": trainer.steps_taken, "tokens": trainer.tokens,
                       "writer": asdict(_writer_of(trainer)), "facts": dict(facts)}
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

    In the layout that wrote it everything continues bit for bit. Another layout keeps the random generators and the
    histories of FP8's delayed scaling as they are, which a new trainer has at their beginning: their number and meaning
    follow the layout.

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
    step, reader, rank = information["step"], _writer_of(trainer), dist.get_rank(world_group)
    writer = Writer.read(path, information["writer"], reader.architecture)
    files = _Files(path)
    own = files.slices(rank) if writer == reader else {}
    index = _Index(path, writer, files)
    amaxes = _amax_states(trainer)
    if writer == reader:
        # Before parameters are published: FP8 weights were rounded with these scales.
        for name, values in amaxes.items():
            values.copy_(files.needed(rank, name))
    elif amaxes and rank == 0:
        logger.warning("%s: was written in another layout: the histories of FP8's delayed scaling begin anew", path)
    with trainer.states_at_hand():
        trainer.prepare_states(information["adam_step"])
        for chunk in range(len(trainer.model.chunks)):
            pieces_of: dict[str, list[Piece]] = defaultdict(list)
            for piece in trainer.model.pieces_of(chunk):
                pieces_of[piece.parameter].append(piece)
            for name, parameter in trainer.model.parameters_of(chunk).items():
                if (owned := trainer.slice_of(parameter)) is None:
                    continue
                key = f"{chunk}.{name}"
                for state, target in trainer.states_of(parameter).items():
                    if own.get(key) == [owned.start, owned.stop]:
                        target.copy_(files.tensor(rank, f"{key}.{state}"))
                    else:
                        target.copy_(index.parameter(parameter.shape, pieces_of[name], state).view(-1)[owned])
        trainer.publish_parameters()
    trainer.set_schedule(step)
    trainer.tokens = information["tokens"]
    if writer == reader:
        _set_random_states(files.random_states(rank))
    return step


def box_of(local: Tensor, piece: Piece) -> Tensor:
    """The part of a local parameter (or its moment) that a piece describes, in the Hugging Face tensor's shape."""
    return local.view(piece.local_view)[piece.local_index].reshape(piece.hf_size)


@dataclass(frozen=True)
class Writer:
    """What decides which part of which Hugging Face tensor a rank's parameters are."""

    architecture: Architecture
    layout: Layout
    virtual_pipeline: int
    spec: str

    @classmethod
    def read(cls, path: Path, told: dict, architecture: Architecture) -> Writer:
        """From `checkpoint.json`. Raises ModelError where it is of another model than `architecture`."""
        wanted = json.loads(json.dumps(asdict(architecture)))
        others = [f"{name} {told['architecture'].get(name)} and not {value}" for name, value in wanted.items()
                  if told["architecture"].get(name) != value]
        if others:
            raise ModelError(f"{path}: is of another model: {', '.join(others)}. {_REMEDY}")
        return cls(architecture, Layout(**told["layout"]), told["virtual_pipeline"], told["spec"])


def _amax_states(trainer: Trainer) -> dict[str, Tensor]:
    """The states of FP8's delayed scaling on this rank by their names in its file; empty under other recipes."""
    model = trainer.model
    return {f"{_AMAXES}{chunk}.{name}": values for chunk, module in enumerate(model.chunks)
            for name, values in amax_states(unwrap(module), model.config).items()}


def _writer_of(trainer: Trainer) -> Writer:
    model = trainer.model
    return Writer(model.architecture, model.grid.layout, len(model.chunks), model.shards[0].spec)


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


class _Files:
    """The open files of a checkpoint."""

    def __init__(self, path: Path):
        self.path = path
        self._open: dict[int, safe_open] = {}

    def of(self, rank: int) -> safe_open:
        """The file that a rank wrote."""
        if rank not in self._open:
            try:
                self._open[rank] = open_tensors(self.path / _file_of(rank))
            except ModelError as error:
                raise ModelError(f"{error}. The checkpoint is damaged. {_REMEDY}") from error
        return self._open[rank]

    def tensor(self, rank: int, key: str) -> Tensor:
        """A tensor of a rank's file."""
        return self.of(rank).get_tensor(key)

    def needed(self, rank: int, key: str) -> Tensor:
        """`tensor`. Raises ModelError where the file lacks it."""
        if key not in self.of(rank).keys():  # noqa: SIM118 (a file is no mapping)
            raise ModelError(f"{self.path / _file_of(rank)}: lacks {key}. The checkpoint is damaged. {_REMEDY}")
        return self.tensor(rank, key)

    def slices(self, rank: int) -> dict[str, list[int]]:
        """"<chunk>.<parameter>" -> first and end place of the slice that a rank has of it."""
        return json.loads(self.of(rank).metadata()["slices"])

    def random_states(self, rank: int) -> dict[str, Tensor]:
        """The states of the generators that a rank saved, by name."""
        keys = [key for key in self.of(rank).keys() if key.startswith(_RANDOM)]  # noqa: SIM118 (a file is no mapping)
        return {key.removeprefix(_RANDOM): self.tensor(rank, key) for key in keys}


@dataclass(frozen=True)
class _Source:
    """A parameter of the ranks that wrote a checkpoint, and a box of a Hugging Face tensor that lies in it."""

    first_rank: int
    """Of the data group that has its slices."""
    key: str
    shape: tuple[int, ...]
    piece: Piece


class _Index:
    """Finds and reads what a wanted box of a Hugging Face tensor overlaps."""

    def __init__(self, path: Path, writer: Writer, files: _Files):
        self.path, self.writer, self.files = path, writer, files
        self._groups: dict[int, list[dict]] = {}
        self._read: tuple[tuple[int, str, str] | None, Tensor] = (None, torch.empty(0))

    def parameter(self, shape: torch.Size, wanted: list[Piece], state: str) -> Tensor:
        """A state of a whole local parameter of the reader, float32; zeros where it is padding."""
        whole = torch.zeros(shape, dtype=torch.float32)
        for piece in wanted:
            view = whole.view(piece.local_view)[piece.local_index]
            view.copy_(self._box(piece, state).reshape(view.shape))
        return whole

    @cached_property
    def _sources(self) -> dict[str, list[_Source]]:
        """Hugging Face tensor -> where its parts are, each once."""
        found, layout = defaultdict(list), self.writer.layout
        for tensor in range(layout.tensor):
            for pipeline in range(layout.pipeline):
                shards = stage_shards(
                    self.writer.architecture, tensor_rank=tensor, tensor_size=layout.tensor, pipeline_rank=pipeline,
                    pipeline_size=layout.pipeline, virtual_pipeline=self.writer.virtual_pipeline, spec=self.writer.spec,
                )
                first = layout.rank(tensor=tensor, pipeline=pipeline)
                for chunk, shard in enumerate(shards):
                    shapes = parameter_shapes(self.writer.architecture, shard)
                    for piece in pieces(self.writer.architecture, shard):
                        if piece.primary:
                            found[piece.hf_name].append(
                                _Source(first, f"{chunk}.{piece.parameter}", shapes[piece.parameter], piece))
        return found

    def _box(self, wanted: Piece, state: str) -> Tensor:
        """The values of a piece's box, float32, in its Hugging Face shape."""
        values = torch.empty(wanted.hf_size, dtype=torch.float32)
        for source in self._sources[wanted.hf_name]:
            box = source.piece
            low = [max(a, b) for a, b in zip(wanted.hf_offset, box.hf_offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in
                    zip(wanted.hf_offset, wanted.hf_size, box.hf_offset, box.hf_size, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, box.hf_offset, strict=True))
            here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, wanted.hf_offset, strict=True))
            values[here] = box_of(self._parameter(source, state), box)[there]
        return values

    def _parameter(self, source: _Source, state: str) -> Tensor:
        """A whole parameter of the writers, put together from its slices. The last one is kept: the boxes of one
        parameter are asked for one after the other."""
        name = (source.first_rank, source.key, state)
        if self._read[0] != name:
            if source.first_rank not in self._groups:
                self._groups[source.first_rank] = json.loads(self.files.of(source.first_rank).metadata()["group"])
            flat, covered = torch.empty(prod(source.shape)), 0
            for member in self._groups[source.first_rank]:
                if source.key in member["slices"]:
                    start, stop = member["slices"][source.key]
                    flat[start:stop] = self.files.tensor(member["rank"], f"{source.key}.{state}")
                    covered += stop - start
            if covered != flat.numel():
                raise ModelError(f"{self.path}: holds {covered} of {flat.numel()} numbers of {source.key} ({state}), "
                                 f"of which {source.piece.hf_name} is a part, so it is damaged. {_REMEDY}")
            self._read = (name, flat.view(source.shape))
        return self._read[1]
