"""Where a role's model lives: the pure arithmetic between ranks and coordinates. Imports no torch.

A layout places `tensor x context x data x pipeline` coordinates on consecutive ranks, tensor fastest and pipeline
slowest, which is megatron-core's default order (`tp-cp-ep-dp-pp`): the ranks of one tensor group are neighbours and
share a node's fast links.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coordinates:
    """A rank's place in a layout."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Layout:
    """Sizes of a role's axes over `world` ranks; `data` is what is left over."""

    world: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1

    def __post_init__(self):
        if self.world % self.model_ranks != 0:
            raise ValueError(
                f"world {self.world} is not a multiple of tensor x pipeline x context = {self.model_ranks}"
            )

    @property
    def model_ranks(self) -> int:
        """Ranks of one replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Number of replicas, each of which works on sequences of its own."""
        return self.world // self.model_ranks

    @property
    def copies(self) -> int:
        """Number of copies of the model; a replica has one for each of its context ranks."""
        return self.data * self.context

    def copy(self, at: Coordinates) -> int:
        """Which of the copies a rank belongs to: its place along the data and context axes together."""
        return at.data * self.context + at.context

    def coordinates(self, rank: int) -> Coordinates:
        """The coordinates of `rank` (0 <= rank < world)."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(tensor, context, data, pipeline)

    def rank(self, *, tensor: int = 0, context: int = 0, data: int = 0, pipeline: int = 0) -> int:
        """The rank at the given coordinates."""
        return ((pipeline * self.data + data) * self.context + context) * self.tensor + tensor
