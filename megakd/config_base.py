"""What every section of a recipe is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

MODEL_OF_RUN = "run:"
"""A model written `run:NAME` is the one that an earlier stage of the same run saved as NAME."""


class Section(BaseModel):
    """Base of every section: frozen, an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Stage(Section):
    """What every stage has."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
