"""A recipe's stages on disk: which are done, which were made with other settings, and what each depends on.

A stage is done when its folder has a manifest. The manifest names everything that the stage's result depends on (its
settings, the models and data that it read), but not what only decides how it is computed (layouts, micro-batches, chunk
sizes), so that a run can go on with another number of ranks.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import torch.distributed as dist

from megakd import interruption
from megakd.comm import broadcast_json
from megakd.config import Recipe, dump
from megakd.config_checks import roles_of, trains
from megakd.config_stages import AnyStage
from megakd.disk import write_text_atomic
from megakd.errors import MegakdError
from megakd.gpus import TRACES
from megakd.manifest import Manifest, finished_stage, stage_fingerprint, versions
from megakd.mcore import runtime
from megakd.mcore.runtime import World
from megakd.provenance import stage_config, stage_inputs
from megakd.run import Run
from megakd.stages import run_stage

logger = logging.getLogger("megakd")

def run_recipe(recipe: Recipe, only: Sequence[str] = (), redo: Sequence[str] = ()) -> None:
    """Runs a recipe's stages on this rank (all ranks call it): those that are not done, or just those in `only`.

    The folders of the stages in `redo` are removed first.

    Raises:
        MegakdError: a stage cannot run as asked. ConfigErrors that can be found beforehand have been (`check.py`).
        Interrupted: the run was asked to leave (megakd/interruption.py).
    """
    with interruption.heard():
        timeout = timedelta(minutes=recipe.timeout_minutes)
        world = runtime.start(recipe.device, timeout=timeout, traces=recipe.output / TRACES)
        try:
            run_stages(recipe, world, only, redo)
        finally:
            runtime.stop()


def run_stages(recipe: Recipe, world: World, only: Sequence[str] = (), redo: Sequence[str] = ()) -> None:
    """`run_recipe` in a process that has joined the others already."""
    run = Run(recipe, world)
    stages = [stage for stage in recipe.stages if not only or stage.name in only]
    trained = any(trains(stage, "student") for stage in stages)
    runtime.seed(recipe.seed, run.grid("student", trained=trained))
    if run.is_root:
        recipe.output.mkdir(parents=True, exist_ok=True)
        for name in redo:
            shutil.rmtree(run.folder(name), ignore_errors=True)
        write_text_atomic(recipe.output / "recipe.yaml", dump(recipe))
    for stage in stages:
        _run_or_skip(run, stage)


def _run_or_skip(run: Run, stage: AnyStage) -> None:
    config = stage_config(run.recipe, stage)
    # Rank 0 reads the files; all the others hear of it, so that all take the same way.
    plan = broadcast_json(_plan(run, stage, config) if run.is_root else None, 0, dist.group.WORLD, run.world.device)
    if plan["refused"] is not None:
        raise MegakdError(plan["refused"])
    if plan["done"]:
        _say(run, f"{stage.name}: already done")
        return
    if interruption.asked(dist.group.WORLD, run.world.device):
        raise interruption.Interrupted(f"before stage {stage.name}")
    fingerprint = stage_fingerprint(stage.kind, config, plan["inputs"])
    _say(run, f"{stage.name}: {stage.kind} on {run.world.size} ranks")
    started, clock = datetime.now(UTC), time.perf_counter()
    if run.is_root:
        run.folder(stage.name).mkdir(parents=True, exist_ok=True)
    dist.barrier(group=dist.group.WORLD)
    result = run_stage(run, stage, fingerprint)
    if run.is_root:
        seconds = result.seconds_before + time.perf_counter() - clock
        Manifest(
            stage=stage.name, kind=stage.kind, fingerprint=fingerprint, inputs=plan["inputs"], config=config,
            versions=versions(), layout={role: _sizes(run, stage, role) for role in roles_of(stage)},
            ranks=run.world.size, started=started.isoformat(timespec="seconds"),
            finished=datetime.now(UTC).isoformat(timespec="seconds"), seconds=round(seconds, 2), tokens=result.tokens,
            metrics=dict(result.metrics),
        ).write(run.folder(stage.name))
        _say(run, f"{stage.name}: done in {seconds:.1f} s")
    dist.barrier(group=dist.group.WORLD)


def _plan(run: Run, stage: AnyStage, config: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 finds in the stage's folder. An error is told, not raised: the other ranks wait to hear."""
    try:
        inputs = stage_inputs(run.recipe, stage)
        done = finished_stage(run.folder(stage.name), stage=stage.name, kind=stage.kind, config=config, inputs=inputs)
    except MegakdError as error:
        return {"refused": str(error)}
    # A report is always written anew: it costs nothing and depends on all the others.
    return {"refused": None, "inputs": inputs, "done": done is not None and stage.kind != "report"}


def _sizes(run: Run, stage: AnyStage, role: str) -> dict[str, int]:
    layout = run.layout(role, trained=trains(stage, role))
    return {"tensor": layout.tensor, "pipeline": layout.pipeline, "context": layout.context, "data": layout.data}


def _say(run: Run, text: str) -> None:
    if run.is_root:
        logger.info(text)
