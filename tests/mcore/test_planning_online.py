"""The planner's memory and messages of trainings that draw their own answers, against what real ones take and send."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megakd.check import tokenizer_of
from megakd.config import load
from megakd.data.dataset import prompts, read_rows
from megakd.planning.memory import GATHERED
from megakd.planning.online import draw_calls, memory_with_draws
from megakd.planning.recipe import setup_of_stage
from megakd.planning.work import Lengths
from tests.mcore.planning_cases import counted, measured_online
from tests.ranks import run_ranks
from tests.recipes import write_recipe, write_rows, write_tiny_model

GKD = {"kind": "kd", "on_policy": 1.0}
MINILLM = {"kind": "minillm", "lm_weight": 0}
CASES = {
    # name: (world, student, teacher, the stage)
    "one rank": (1, {}, {}, {"objective": GKD, "global_batch": 8, "online": {"slots": 8, "max_new_tokens": 6}}),
    "tp2 sp, offloaded | dp2": (
        2, {"tensor": 2, "sequence": True}, {},
        {"objective": GKD, "global_batch": 8, "optimizer": {"offload": True},
         "online": {"slots": 8, "max_new_tokens": 2}}),
    "pp2 | tp2, both draw": (
        2, {"pipeline": 2}, {"tensor": 2},
        {"objective": {"kind": "dpkd", "lm_weight": 0}, "global_batch": 12,
         "online": {"slots": 6, "max_new_tokens": 2}}),
    # Two turns.
    "dp2 | pp2, mixed": (
        2, {}, {"pipeline": 2},
        {"objective": MINILLM, "global_batch": 8, "online": {"slots": 2, "max_new_tokens": 3, "teacher_mix": 0.3}}),
}
PROMPT = "How many apples are seven and two and a third of eight and all the rest of the house?" + " And pears?" * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models whose passes and caches outweigh what the formulas leave out, and rows that are all alike."""
    made = tmp_path_factory.mktemp("online")
    sizes = {"hidden_size": 128, "heads": 8, "kv_heads": 4, "head_dim": 16, "ffn_size": 256, "max_positions": 256}
    for seed, (role, layers) in enumerate({"student": 4, "teacher": 4}.items()):
        write_tiny_model(made / role, seed=seed, layers=layers, **sizes)
    # A number that every batch divides, so that no step takes a row twice.
    write_rows(made / "train.jsonl", [{"prompt": PROMPT, "chosen": "There are nine.", "rejected": "No."}] * 96)
    return made


def written(folder: Path, name: str) -> Path:
    world, student, teacher, stage = CASES[name]
    models = {role: str(folder / role) for role in ("student", "teacher")}
    return write_recipe(folder, {
        "name": "online", "output": str(folder / "run"), "processes": world,
        "student": {"model": models["student"], "parallel": student, "micro_batch": 1, "recompute": "full"},
        "teacher": {"model": models["teacher"], "parallel": teacher, "micro_batch": 2},
        "reference": {"model": models["teacher"]},
        "data": {"train": [str(folder / "train.jsonl")], "max_length": 250},
        "stages": [{"name": "train", "kind": "distill", "init": models["student"], "save_as": "trained", "steps": 99,
                    "chunk_tokens": 16, "checkpoint_every": 1, **stage}]})


@pytest.mark.parametrize("name", CASES)
def test_memory_and_messages_of_a_training_that_draws(folder, name):
    world = CASES[name][0]
    file = written(folder, name)
    recipe = load(file)
    [prompt] = {len(each.tokens) for each in prompts(
        read_rows(recipe.data.train, None, 0, "chosen"), tokenizer_of(recipe), 200, too_long="error")[0]}
    answer = recipe.stages[0].online.max_new_tokens
    lengths = Lengths(prompt, answer)
    setup = setup_of_stage(recipe, recipe.stages[0], world, lengths)
    setup = replace(setup, draws=replace(setup.draws, mean=lengths, longest=lengths))
    for rank, measured in enumerate(run_ranks(world, measured_online, str(file))):
        memory = memory_with_draws(setup, setup.trained.layout.coordinates(rank).pipeline)
        kept = sum(memory.kept.values()) - memory.kept.get(GATHERED, 0)  # which the first step makes
        print(f"{name}, rank {rank}: kept {kept / measured['kept']:.4f}, peak {memory.total / measured['peak']:.4f} "
              f"of the measured; fullest: {memory.fullest}")
        assert kept == pytest.approx(measured["kept"], rel=0.01)
        assert memory.total == pytest.approx(measured["peak"], rel=0.03)
        assert "answers" in memory.fullest or "draws" in memory.fullest
        assert set(measured["lengths"]) == {answer}
        assert counted(call for _, call in draw_calls(setup, rank)) == measured["calls"]
