"""A cluster as the planner sees it: what its devices and links can do, and where these figures come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from megakd.config_base import Section
from megakd.config_errors import as_config_error
from megakd.errors import ConfigError


class Rates(Section):
    """Rates of one arithmetic: what the maker says, and the share of it that work like ours reaches."""

    peak_tflops: float = Field(gt=0)
    """Dense matrix products, 10^12 operations a second."""
    efficiency: float = Field(gt=0, le=1)
    """Share of the peak in large products, in the middle of a training."""


class Device(Section):
    """One GPU, or one CPU process."""

    kind: str
    memory_gib: float = Field(gt=0)
    reserved_gib: float = Field(ge=0)
    """Taken by the driver's context, the network's buffers and blocks that the allocator cannot use."""
    memory_gb_s: float = Field(gt=0)
    """Rate of its memory, 10^9 bytes a second, as passes over large tensors reach it."""
    rates: dict[Literal["fp32", "bf16", "fp8"], Rates]
    attention: Rates
    """Of the attention kernel, forward and backward together."""
    call_us: float = Field(ge=0)
    """Time that a call to a kernel takes however little it does, where it is not hidden behind others."""


class Link(Section):
    """What a device can send over one kind of link, in one direction."""

    gb_s: float = Field(gt=0)
    """10^9 bytes a second, as large collectives reach it."""
    latency_us: float = Field(ge=0)
    """Of a message of no size."""


class Cluster(Section):
    """Nodes of one kind and the network between them."""

    name: str
    device_type: Literal["cpu", "cuda"]
    devices_per_node: int = Field(ge=1)
    device: Device
    node_link: Link
    """Between devices of a node."""
    network_link: Link
    """Between nodes, for each device."""
    sources: dict[str, str]
    """Field -> where its figure comes from."""


def load_cluster(path: Path | str) -> Cluster:
    """Reads a cluster's description.

    Raises:
        ConfigError: no such file, no YAML mapping, an unknown field or a value that cannot be.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError("cluster", str(path), "there is no such file",
                          "Give a description such as those in slurm/clusters/")
    try:
        raw: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("cluster", str(path), f"cannot be read: {' '.join(str(error).split())}", "Mend the file") \
            from error
    if not isinstance(raw, dict):
        raise ConfigError("cluster", str(path), "holds no mapping of keys", "Start from a file of slurm/clusters/")
    try:
        return Cluster.model_validate(raw)
    except ValidationError as error:
        found = as_config_error(error, Cluster, raw, "the file")
        raise ConfigError(f"{path}: {found.field}", found.value, found.rule, found.fix) from error


DESCRIPTIONS = Path(__file__).parents[2] / "slurm" / "clusters"


def cluster_named(name: str) -> Cluster:
    """The cluster of a file, or of a file in slurm/clusters/ by its bare name, such as `h100`.

    Raises:
        ConfigError: as `load_cluster`; no such file, with the names that there are.
    """
    described = {file.stem: file for file in sorted(DESCRIPTIONS.glob("*.yaml"))}
    if name in described:
        return load_cluster(described[name])
    if not Path(name).is_file():
        known = f"one of {', '.join(described)} or the path of a file" if described else "the path of a file"
        raise ConfigError("--cluster", name, "there is no such file", f"Give {known} (docs/cluster.md)")
    return load_cluster(name)
