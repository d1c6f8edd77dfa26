"""A recipe that runs in seconds: random models of two and four layers, a small tokenizer, a few rows."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from megakd.check import check_recipe
from megakd.config import load
from megakd.mcore import runtime
from megakd.pipeline import run_stages
from tests.hf_models import architecture, random_tensors, write_model
from tests.ranks import run_ranks
from tests.tiny_tokenizer import CHATML, write_tokenizer

CONTEXT = 128
"""Tokens that the models can take."""
VOCABULARY = 411
"""Tokens of tiny_tokenizer's tokenizer of bytes."""
SIZES = {"hidden_size": 48, "head_dim": 8, "ffn_size": 96, "vocab_size": VOCABULARY, "max_positions": CONTEXT}
"""Of every tiny model; 6 query heads in 3 key/value groups, 4 layers and tied embeddings are hf_models' own."""
THINGS = ("apples", "boats", "cats", "drums", "eggs", "foxes", "goats", "hats", "ideas", "jars", "kites", "lamps")


def write_tiny_model(directory: Path, *, seed: int, template: str = CHATML, **sizes: Any) -> Path:
    """Writes a random model with a tokenizer.

    Args:
        directory: must not be there yet.
        seed: of the weights.
        template: the chat template.
        sizes: other fields of the architecture, such as `layers=2`.
    """
    a = architecture(**(SIZES | sizes))
    tensors = random_tensors(a, seed)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor += 1.0
    write_model(directory, a, tensors)
    return write_tokenizer(directory, template=template)


def tiny_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """Preference rows, all different: row n of any call is the same."""
    return [
        {"prompt": f"How many {THINGS[n % len(THINGS)]} are {n} and {n + 2}?", "chosen": f"There are {2 * n + 2}.",
         "rejected": f"I can't say no{' no' * (n % 4)}!"}
        for n in range(start, start + count)
    ]


def write_rows(file: Path, rows: list[dict[str, str]]) -> Path:
    """Writes rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_recipe(folder: Path, raw: dict[str, Any]) -> Path:
    """Writes `folder/recipe.yaml`."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return file


def tiny_recipe(folder: Path, *, context: int = CONTEXT) -> dict[str, Any]:
    """The whole chain of the quickstart in small; its models and data are written into `folder`.

    Two ranks, three layouts: the student at TP=2 (with a padded head), the teacher at PP=2, the reference at DP=2. The
    run's folder is `folder/run`, which is not made here.

    Args:
        folder: where.
        context: tokens that the models can take.

    Returns:
        The recipe as plain values, to change and to give to `config.parse` or `write_recipe`.
    """
    reference = str(write_tiny_model(folder / "reference", seed=1, max_positions=context))
    start = str(write_tiny_model(folder / "student_start", seed=2, layers=2, max_positions=context))
    training = {"steps": 2, "global_batch": 4, "chunk_tokens": 16}
    return {
        "name": "tiny",
        "output": str(folder / "run"),
        "processes": 2,
        "student": {"model": start, "parallel": {"tensor": 2, "pad_heads": True}, "micro_batch": 2},
        "teacher": {"model": "run:teacher", "parallel": {"pipeline": 2}, "micro_batch": 2},
        "reference": {"model": reference, "micro_batch": 2},
        "data": {
            "train": [str(write_rows(folder / "train.jsonl", tiny_rows(10)))],
            "eval": [str(write_rows(folder / "eval.jsonl", tiny_rows(4, start=100)))],
            "max_length": 96,
        },
        "stages": [
            {"name": "dpo", "kind": "dpo", "trains": "teacher", "init": reference, "save_as": "teacher",
             "objective": {"kind": "dpo", "beta": 0.1}, "optimizer": {"lr": 1e-3}, **training},
            {"name": "dckd", "kind": "distill", "init": start, "save_as": "student_dckd",
             "objective": {"kind": "dckd"}, "optimizer": {"lr": 1e-3}, **training},
            {"name": "generate", "kind": "generate", "model": "run:student_dckd", "max_new_tokens": 8, "slots": 8},
            {"name": "adpa", "kind": "distill", "init": "run:student_dckd", "save_as": "student_adpa",
             "objective": {"kind": "adpa"}, "rollouts": "generate", "optimizer": {"lr": 1e-3}, **training},
            {"name": "eval", "kind": "eval", "prompts": 4, "max_new_tokens": 8, "slots": 8, "chunk_tokens": 16,
             "models": {"start": start, "dckd": "run:student_dckd", "final": "run:student_adpa"}},
            {"name": "export", "kind": "export", "model": "run:student_adpa", "save_as": "student"},
            {"name": "report", "kind": "report"},
        ],
    }


def run_here(recipe: Path, *overrides: str, only: Sequence[str] = (), redo: Sequence[str] = ()) -> str:
    """Runs a recipe as `megakd run` does, on the ranks of a pool (`tests.ranks.run_ranks`).

    Returns:
        What this rank told.
    """
    told = io.StringIO()
    logger, handler = logging.getLogger("megakd"), logging.StreamHandler(told)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        loaded = load(recipe, overrides)
        world = runtime.adopt(torch.device(loaded.device))
        check_recipe(loaded, world.size, redo)
        dist.barrier()  # no rank may write before all have checked
        run_stages(loaded, world, only, redo)
    finally:
        logger.removeHandler(handler)
    return told.getvalue()


def run_in_pool(recipe: Path, *overrides: str, only: Sequence[str] = (), redo: Sequence[str] = (),
                kill_when: Callable[[], bool] | None = None) -> str:
    """Runs a recipe of two ranks in a pool, which starts in no time; returns what rank 0 told.

    Raises:
        RankError: the run ended with an error.
        Killed: `kill_when` said so (`tests.ranks.run_ranks`).
    """
    told, _ = run_ranks(2, partial(run_here, only=only, redo=redo), recipe, *overrides, timeout=600,
                        kill_when=kill_when)
    return told


def stage(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """A stage of a recipe by its name."""
    return next(stage for stage in raw["stages"] if stage["name"] == name)
