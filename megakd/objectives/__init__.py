"""Objectives: one file a method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.objectives.adpa import Adpa
from megakd.objectives.base import Objective
from megakd.objectives.dckd import Dckd
from megakd.objectives.dpo import Dpo
from megakd.objectives.sft import Sft

if TYPE_CHECKING:
    from megakd.config import AdpaObjective, DckdObjective, DpoObjective, SftObjective


def build_objective(config: SftObjective | DpoObjective | DckdObjective | AdpaObjective) -> Objective:
    """The objective of a config section."""
    match config.kind:
        case "sft":
            return Sft(config)
        case "dpo":
            return Dpo(config)
        case "dckd":
            return Dckd(config)
        case "adpa":
            return Adpa(config)
    raise ValueError(f"objective.kind = {config.kind!r}: no such objective")
