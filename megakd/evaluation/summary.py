"""`summary.json`: model label -> metric -> number, of all the stages that measure models by label. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megakd.config import Recipe
from megakd.disk import write_json_atomic
from megakd.manifest import Manifest

SUMMARY = "summary.json"
MEASURING = ("eval", "win_rate", "lm_eval")
"""Kinds of stages whose metrics are by model label."""


def write_summary(recipe: Recipe, stage: str, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the run's summary from the manifests of its finished stages and the metrics of one that is finishing.

    Where two stages have the same figure of the same label, the later one's stands.

    Args:
        recipe: the run's.
        stage: name of the stage that is about to finish; it has no manifest yet.
        metrics: its metrics by label.
    """
    summary: dict[str, dict[str, Any]] = {}
    for each in recipe.stages:
        if each.kind not in MEASURING:
            continue
        found: Mapping[str, Mapping[str, Any]] = metrics
        if each.name != stage:
            manifest = Manifest.read(recipe.output / "stages" / each.name)
            found = {} if manifest is None else manifest.metrics
        for label, figures in found.items():
            summary.setdefault(label, {}).update(figures)
    write_json_atomic(recipe.output / SUMMARY, summary)
