"""Objectives: one file a method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.objectives.adpa import Adpa
from megakd.objectives.base import Objective
from megakd.objectives.dckd import Dckd
from megakd.objectives.dpkd_token import DpkdToken
from megakd.objectives.kd import Kd
from megakd.objectives.minillm import MiniLlm
from megakd.objectives.pad import Pad
from megakd.objectives.preference import Preference
from megakd.objectives.sft import Sft

if TYPE_CHECKING:
    from megakd.config_objectives import ObjectiveSection


def build_objective(config: ObjectiveSection) -> Objective:
    """The objective of a config section."""
    match config.kind:
        case "sft":
            return Sft(config)
        case "kd":
            return Kd(config)
        case "dpo" | "ipo" | "cpo" | "simpo" | "dpkd":
            return Preference(config)
        case "dckd":
            return Dckd(config)
        case "adpa":
            return Adpa(config)
        case "dpkd_token":
            return DpkdToken(config)
        case "minillm":
            return MiniLlm(config)
        case "pad":
            return Pad(config)
    raise ValueError(f"objective.kind = {config.kind!r}: no such objective")
