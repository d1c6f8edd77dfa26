"""Numbers that say how good a student is. Pure functions of texts and log-probabilities; no torch, no ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megakd.errors import LossInputError


@dataclass(frozen=True)
class Estimate:
    """A mean over independent examples."""

    value: float
    count: int
    standard_error: float | None
    """Sample standard deviation / sqrt(count); None for a single example."""

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        """The mean of some numbers. Raises LossInputError where there are none or one is not finite."""
        values = [float(value) for value in values]
        count = len(values)
        if count == 0:
            raise LossInputError("a mean over no examples: give at least one")
        if not all(map(math.isfinite, values)):
            bad = sum(not math.isfinite(value) for value in values)
            raise LossInputError(f"{bad} of {count} values are not finite")
        mean = math.fsum(values) / count
        if count == 1:
            return Estimate(mean, 1, None)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        return Estimate(mean, count, math.sqrt(variance / count))
