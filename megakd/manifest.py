"""What a finished stage was made from, and whether that is still what a recipe asks for. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megakd
from megakd.disk import write_json_atomic
from megakd.errors import ConfigError, DataError

MANIFEST = "manifest.json"
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "safetensors", "lm-eval")
_SAMPLED_ABOVE = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 64, 2**20


# ----------------------------------------------------------------------------------------------------- fingerprints
def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no blanks. Refuses what JSON has no word for (NaN, paths)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of a mapping."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def hash_path(path: Path | str) -> str:
    """sha256 that names the content of a file, or of all the files below a directory with their relative names.

    A file above 64 MiB is named by its size and 64 blocks of 1 MiB spread evenly over it, first and last included: a
    70B model would take minutes to read, and two trainings differ in nearly every block.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return fingerprint({file.relative_to(path).as_posix(): hash_path(file) for file in files})
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        if size <= _SAMPLED_ABOVE:
            while piece := file.read(_SAMPLE_BYTES):
                digest.update(piece)
        else:
            digest.update(str(size).encode())
            for number in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def require_room(path: Path | str, needed: int, what: str) -> None:
    """Refuses to begin what the disk cannot hold.

    Args:
        path: where it will be written; it need not exist yet.
        needed: bytes that `what` takes.
        what: named in the message, such as "4 models and 2 checkpoints".

    Raises:
        ConfigError: the disk of `path` has less free room.
    """
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        rule = f"{what} need {_size(needed)}, and its disk has {_size(free)} free"
        raise ConfigError("output", str(path), rule, "Free some room or choose a folder on another disk")


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


# ---------------------------------------------------------------------------------------------------------- manifests
@dataclass(frozen=True)
class Manifest:
    """A finished stage. Its being there says that everything that the stage makes is complete."""

    stage: str
    """Name of the stage in its recipe."""
    kind: str
    """What it does: dpo, distill, generate, eval, export, ..."""
    fingerprint: str
    """`fingerprint` of kind, config and inputs: what the result depends on."""
    inputs: dict[str, str]
    """Name of each input -> hash of its content."""
    config: dict[str, Any]
    """The resolved settings of the stage."""
    versions: dict[str, str | None]
    """`versions()` when it ran; not part of the fingerprint."""
    layout: dict[str, dict[str, int]]
    """Role -> sizes of its axes (tensor, pipeline, context, data)."""
    ranks: int
    """Processes that it ran on."""
    started: str
    """UTC, ISO 8601."""
    finished: str
    seconds: float
    """Time that it took: of the start that finished it, and of the training steps that earlier starts had saved."""
    tokens: int
    """Tokens that it trained on, scored or made."""
    metrics: dict[str, Any]
    """Its last or summed-up numbers."""

    def write(self, folder: Path | str) -> None:
        """Writes `folder/manifest.json`, the last thing that a stage does."""
        write_json_atomic(Path(folder) / MANIFEST, dataclasses.asdict(self))

    @staticmethod
    def read(folder: Path | str) -> Manifest | None:
        """The manifest of a stage folder; None where the stage has not finished.

        Raises:
            DataError: the file is not a manifest of this version of megakd.
        """
        path = Path(folder) / MANIFEST
        if not path.exists():
            return None
        fix = "Remove the stage's folder to make it again"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(path, None, None, f"is not JSON ({error})", fix) from error
        names = {field.name for field in dataclasses.fields(Manifest)}
        if not isinstance(values, dict) or set(values) != names:
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise DataError(path, None, None, f"has the fields {found}, not {sorted(names)}", fix)
        return Manifest(**values)


def stage_fingerprint(kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The fingerprint of a stage that does `kind` with `config` to `inputs`."""
    return fingerprint({"kind": kind, "config": config, "inputs": inputs})


def finished_stage(folder: Path | str, *, stage: str, kind: str, config: Mapping[str, Any],
                   inputs: Mapping[str, str]) -> Manifest | None:
    """Whether a stage is done: its manifest, or None where it has to run.

    Raises:
        ConfigError: the folder holds this stage made with other settings or inputs.
    """
    manifest = Manifest.read(folder)
    if manifest is None:
        return None
    if manifest.fingerprint == stage_fingerprint(kind, config, inputs):
        return manifest
    changes = differences({"kind": manifest.kind, "config": manifest.config, "inputs": manifest.inputs},
                          {"kind": kind, "config": config, "inputs": inputs})
    raise made_otherwise(folder, stage, changes)


def made_otherwise(folder: Path | str, stage: str, changes: Sequence[str]) -> ConfigError:
    """The refusal of a finished stage whose settings or inputs are no longer the recipe's."""
    return ConfigError(f"stages.{stage}", str(folder), f"was made with other settings ({'; '.join(changes)})",
                       f"Choose another output folder, or make it again with `--redo {stage}`")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The leaves that differ between two nested mappings, as "a.b: old -> new"."""
    before, after = (_leaves(json.loads(canonical_json(value)), "") for value in (old, new))
    absent = dict.fromkeys(before.keys() | after.keys(), "(absent)")
    before, after = {**absent, **before}, {**absent, **after}
    return [f"{name}: {before[name]} -> {after[name]}" for name in sorted(absent) if before[name] != after[name]]


def _leaves(value: Any, prefix: str) -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {name: leaf for key, item in value.items()
                for name, leaf in _leaves(item, f"{prefix}.{key}" if prefix else key).items()}
    return {prefix: canonical_json(value)}


def versions() -> dict[str, str | None]:
    """Versions of what a result may depend on; None for what is not installed. Imports nothing."""
    found: dict[str, str | None] = {"python": platform.python_version(), "megakd": megakd.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
