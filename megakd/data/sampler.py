"""The order of the groups in a run."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from megakd.errors import ConfigError


class StepSampler:
    """Which groups each optimizer step takes: a pure function of (seed, step).

    Every epoch is a permutation of all groups, and epochs follow each other without a break: a step may end one epoch
    and begin the next, so none is short and no group is left out. Resuming needs the step's number and nothing else.

    An epoch's permutation sorts the groups by the 64-bit numbers that Philox gives for the key (seed, epoch), equal
    numbers by index. Philox's stream is fixed by its paper (Salmon et al., SC 2011) and NumPy promises not to change
    it, which it does not promise of `Generator.permutation`, nor Python of `random.shuffle`.

    Args:
        count: number of groups.
        global_batch: groups in a step, over all ranks.
        seed: not negative.

    Raises:
        ConfigError: no groups, a global batch larger than their number, a negative seed.
    """

    def __init__(self, count: int, global_batch: int, seed: int):
        if not 1 <= global_batch <= count:
            raise ConfigError("global_batch", global_batch,
                              f"must be at least 1 and at most the number of groups in the data, {count}",
                              "Lower global_batch, or give more data")
        if not 0 <= seed < 2**64:
            raise ConfigError("seed", seed, "must be between 0 and 2**64 - 1", "Give another seed")
        self.count, self.global_batch, self.seed = count, global_batch, seed

    def indices(self, step: int) -> list[int]:
        """The groups of step number `step` (from 0), `global_batch` of them."""
        start = step * self.global_batch
        places = (divmod(place, self.count) for place in range(start, start + self.global_batch))
        return [int(_permutation(self.count, self.seed, epoch)[place]) for epoch, place in places]


@lru_cache(maxsize=4)  # a step touches two epochs at most; training and evaluation may take turns
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    numbers = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    return np.argsort(numbers, kind="stable")
