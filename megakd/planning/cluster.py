"""A cluster as the planner sees it: what its devices and links can do, and where these figures come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from megakd.config_base import Section
from megakd.config_errors import as_config_error
from megakd.errors import ConfigError


class Rates(Section):
    """Rate of matrix products: peak x efficiency x side / (side + half_side), of the shortest side of a product."""

    peak_tflops: float = Field(gt=0)
    """Dense products, 10^12 operations a second: what the maker says, or the best of what was measured and fitted."""
    efficiency: float = Field(gt=0, le=1)
    """Share of the peak that very large products reach."""
    half_side: float = Field(ge=0)
    """Shortest side at which a product reaches half of that."""
    measured: tuple[tuple[int, int, int, float], ...] = ()
    """Rows, inner numbers and columns of products, and the 10^12 operations a second that they reached."""

    def seconds(self, operations: float, side: float) -> float:
        """Of products with `operations` operations whose shortest side is `side`."""
        rate = self.peak_tflops * 1e12 * self.efficiency * side / (side + self.half_side)
        return operations / rate


class Device(Section):
    """One GPU, or one CPU process."""

    kind: str
    memory_gib: float = Field(gt=0)
    reserved_gib: float = Field(ge=0)
    """Taken by the driver's context, the network's buffers and blocks that the allocator cannot use."""
    memory_gb_s: float = Field(gt=0)
    """Rate of its memory, 10^9 bytes a second, as the optimizer and the reading of weights reach it."""
    passes_gb_s: float = Field(gt=0)
    """The same of norms and activations, whose tensors have the size of a micro-batch."""
    rates: dict[Literal["fp32", "bf16", "fp8"], Rates]
    attention: Rates
    """Of the attention kernel over the pairs that a causal mask leaves; a sequence's length is the side."""
    layer_forward_us: float = Field(ge=0)
    """That a layer's forward pass takes however little it does: Python, and the calls of its kernels."""
    layer_replayed_us: float | None = Field(None, ge=0)
    """The same of a forward pass that is replayed from a CUDA graph: what its kernels wait for each other."""
    layer_backward_us: float = Field(ge=0)
    """The same of its backward pass."""
    step_ms: float = Field(ge=0)
    """That a step takes besides its layers, however little it does: batches, reports, the optimizer's calls."""


class Link(Section):
    """What a device can send over one kind of link, in one direction."""

    gb_s: float = Field(gt=0)
    """10^9 bytes a second, as large collectives reach it."""
    latency_us: float = Field(ge=0)
    """Of a message of no size."""


class Overlap(Section):
    """Shares of messages that go on beside other work."""

    tensor: float = Field(ge=0, le=1)
    """Of a layer's collectives over its tensor group."""
    data: float = Field(ge=0, le=1)
    """Of the gradients' sums over the replicas, beside the backward pass."""
    pipeline: float = Field(ge=0, le=1)
    """Of the activations between pipeline stages, where the schedule is interleaved (virtual_pipeline above 1)."""


class Cluster(Section):
    """Nodes of one kind and the network between them."""

    name: str
    device_type: Literal["cpu", "cuda"]
    devices_per_node: int = Field(ge=1)
    device: Device
    node_link: Link | None
    """Between devices of a node; null where it has one."""
    network_link: Link | None
    """Between nodes, for each device; null where there is one node."""
    overlap: Overlap
    sources: dict[str, str]
    """Field -> where its figure comes from."""

    def link(self, span: int) -> Link:
        """The slowest link among `span` neighbouring devices.

        Raises:
            ConfigError: the description has no such link.
        """
        field = "node_link" if span <= self.devices_per_node else "network_link"
        found = self.node_link if field == "node_link" else self.network_link
        if found is None:
            rule = f"{span} neighbouring devices of {self.name}, {self.devices_per_node} a node, talk over it"
            raise ConfigError(field, None, rule, "Add it to the description, or calibrate on so many devices")
        return found

    @model_validator(mode="after")
    def _says_where_from(self) -> Cluster:
        for field in self.sources:
            place: Any = self.model_dump()
            for part in field.split("."):
                if not isinstance(place, dict) or part not in place:
                    raise ValueError(f"sources names {field!r}, which is no field")
                place = place[part]
        return self


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
        raise ConfigError("cluster", str(file), f"cannot be read: {' '.join(str(error).split())}", "Mend the file") \
            from error
    if not isinstance(raw, dict):
        raise ConfigError("cluster", str(file), "holds no mapping of keys", "Start from a file of slurm/clusters/")
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
