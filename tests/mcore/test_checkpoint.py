"""Checkpoints: bit for bit on the same layout, the same numbers on any other, and refusals that say what is wrong."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors.torch import load_file, save_file

from megakd.batch import Kind
from megakd.config import Parallel, Precision
from megakd.config_objectives import SftObjective
from megakd.errors import ModelError
from megakd.hf.directory import open_tensors
from megakd.hf.families import Architecture
from megakd.hf.pieces import stage_shards
from megakd.mcore import checkpoint
from megakd.mcore.fp8_layers import amax_states
from megakd.mcore.model import unwrap
from megakd.planning.sizes import shard_parameters
from tests.mcore.cases import Distillation, Job, assemble, world
from tests.mcore.planning_cases import Collectives
from tests.mcore.tiny import make_groups, make_llama
from tests.ranks import run_ranks

FACTS = {"stage": "d41d8cd98f00b204"}
STEPS, SAVED = 5, 2


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> str:
    """6 layers: two stages are alike, four parts are not."""
    return str(make_llama(tmp_path_factory.mktemp("models") / "tied", seed=1, layers=6))


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> str:
    """5 layers: no cut is even."""
    return str(make_llama(tmp_path_factory.mktemp("models") / "untied", seed=2, layers=5, tied=False))


PRECISIONS = {"fp32": Precision(), "bf16": Precision(dtype="bf16"),
              "delayed": Precision(dtype="fp8", fp8_recipe="delayed", amax_history=6, emulate=True)}


def training(student: str, parallel: Parallel, precision: str = "fp32") -> Distillation:
    """An SFT training of 5 steps, whose learning rate rises over 2."""
    return Distillation({"student": student}, {"student": parallel}, {"student": 2}, SftObjective(),
                        tuple(make_groups(24, (Kind.CHOSEN,))), global_batch=8, steps=STEPS, warmup=0.4,
                        weight_decay=0.1, precision=PRECISIONS[precision])


def _draws() -> torch.Tensor:
    """Numbers of both generators that megatron-core's modules draw from."""
    first = torch.rand(3)
    with get_cuda_rng_tracker().fork():
        second = torch.rand(3)
    return torch.cat([first, second])


def _resume(case: Distillation, folder: str) -> dict:
    """Loads the newest checkpoint into a new trainer and goes on to the end."""
    job = Job(case)
    path, number = checkpoint.latest(Path(folder))
    assert checkpoint.load(path, job.trainer, FACTS, dist.group.WORLD) == number
    loaded = {"adam_step": job.trainer.steps_taken, "states": job.states(), "draws": _draws()}
    metrics = [job.step(number) for number in range(number, case.steps)]
    return {**loaded, "metrics": metrics, "kept": job.local_states(), "end": job.trainer.steps_taken}


# ------------------------------------------------------------------------------------------------------- same layout


def _save_and_resume(case: Distillation, folder: str, offloads: str) -> tuple[dict[str, bool], tuple[float, ...]]:
    """An undisturbed training, one that saves, and one that goes on from there: what is the same on this rank, and the
    random numbers drawn after the save. The writer or the reader may keep its states in the host's memory."""
    undisturbed = Job(case)
    expected = [undisturbed.step(number) for number in range(case.steps)]
    saving = Job(replace(case, offload=offloads == "writer"))
    for number in range(SAVED):
        saving.step(number)
    torch.manual_seed(100 + world().rank)
    with get_cuda_rng_tracker().fork():
        torch.rand(world().rank + 1)
    path = checkpoint.save(Path(folder), SAVED, saving.trainer, FACTS, dist.group.WORLD)
    assert path.is_dir(), "save has returned before the checkpoint has its name"
    draws = _draws()
    saved = saving.local_states()
    for number in range(SAVED, case.steps):
        saving.step(number)

    torch.manual_seed(0)
    found = _resume(replace(case, offload=offloads == "reader"), folder)
    kept = undisturbed.local_states()
    return {
        "metrics": found["metrics"] == expected[SAVED:],
        "parameters and moments": _same(found["kept"], kept),
        "of the run that has saved": _same(saving.local_states(), kept),
        "random numbers": torch.equal(found["draws"], draws),
        "steps": (found["adam_step"], found["end"]) == (SAVED, case.steps),
        "it has trained": not _same(saved, kept),
    }, tuple(draws.tolist())


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("ranks, parallel, precision, offloads", [
    (1, Parallel(), "fp32", ""),
    (1, Parallel(), "bf16", ""),
    (1, Parallel(), "delayed", ""),
    (2, Parallel(tensor=2, pad_heads=True, sequence=True), "delayed", ""),
    (2, Parallel(tensor=2, pad_heads=True), "fp32", ""),
    (2, Parallel(pipeline=2), "fp32", ""),
    (2, Parallel(), "fp32", ""),
    (2, Parallel(), "fp32", "reader"),
    (2, Parallel(), "bf16", ""),
    (2, Parallel(), "bf16", "writer"),
    (4, Parallel(tensor=2, pipeline=2, pad_heads=True, sequence=True), "fp32", ""),
    (4, Parallel(tensor=2, pad_heads=True, context=2), "bf16", "reader"),
    (4, Parallel(pipeline=2, virtual_pipeline=2), "fp32", "writer"),
], ids=["1", "1 bf16", "1 delayed", "tp2 sp delayed", "tp2", "pp2", "dp2", "dp2 offloaded", "dp2 bf16",
        "dp2 offloaded bf16", "tp2 sp pp2", "tp2 cp2 offloaded bf16", "pp2 vpp2 dp2 offloaded"])
def test_a_resumed_training_is_the_undisturbed_one_bit_for_bit(tied, tmp_path, ranks, parallel, precision, offloads):
    results = run_ranks(ranks, _save_and_resume, training(tied, parallel, precision), str(tmp_path), offloads)
    for rank, (same, _) in enumerate(results):
        assert all(same.values()), f"rank {rank}: {[name for name, equal in same.items() if not equal]}"
    assert len({draws for _, draws in results}) == ranks, "the ranks' generators do not differ: nothing is tested"


# ------------------------------------------------------------------------------------------------ what a rank asks for


def _files_and_collectives(case: Distillation, folder: str) -> tuple[set[str], int, list[str]]:
    """The collectives of a save; the numbers in this rank's file; the files that it reads to load them again."""
    job, opened = Job(case), []
    job.step(0)
    with Collectives() as collectives:
        path = checkpoint.save(Path(folder), 1, job.trainer, FACTS, dist.group.WORLD)
    mine = load_file(path / f"rank-{world().rank:05}.safetensors")
    real = checkpoint.open_tensors
    checkpoint.open_tensors = lambda file: opened.append(file.name) or real(file)
    try:
        checkpoint.load(path, job.trainer, FACTS, dist.group.WORLD)
    finally:
        checkpoint.open_tensors = real
    numbers = sum(values.numel() for name, values in mine.items() if not name.startswith("random."))
    return {operation for operation, _ in collectives.bytes}, numbers, opened


def test_a_rank_saves_and_loads_its_own_slices_alone(tied, tmp_path):
    case = training(tied, Parallel(tensor=2, pad_heads=True))
    results = run_ranks(4, _files_and_collectives, case, str(tmp_path))
    for rank, (collectives, numbers, opened) in enumerate(results):
        assert collectives == {"all_gather"}, "parameters travel"
        assert opened == [f"rank-{rank:05}.safetensors"]
        # All that the two replicas of a tensor rank hold, each half of it.
        assert numbers == pytest.approx(3 * parameters_of_a_rank(tied) / 2, rel=0.02)


def parameters_of_a_rank(student: str) -> int:
    shard = stage_shards(Architecture.read(student), tensor_rank=0, tensor_size=2, pipeline_rank=0, pipeline_size=1,
                         spec="local")[0]
    return shard_parameters(Architecture.read(student), shard)


# ------------------------------------------------------------------------------------------------------ other layouts


def _save(case: Distillation, folder: str) -> dict:
    job = Job(case)
    for number in range(SAVED):
        job.step(number)
    checkpoint.save(Path(folder), SAVED, job.trainer, FACTS, dist.group.WORLD)
    states = job.states()
    metrics = [job.step(number) for number in range(SAVED, case.steps)]
    return {"states": states, "metrics": metrics}


@pytest.fixture(scope="module")
def saved(tied, untied, tmp_path_factory) -> dict[str, tuple[Path, list[dict]]]:
    """Checkpoints of both models under tensor 2 (padded heads) x pipeline 2, and what the ranks had and did next."""
    made = {}
    for name, student in (("tied", tied), ("untied", untied)):
        folder = tmp_path_factory.mktemp(name)
        case = training(student, Parallel(tensor=2, pipeline=2, pad_heads=True))
        made[name] = folder, run_ranks(4, _save, case, str(folder))
    return made


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("ranks, parallel", [
    (1, Parallel()),
    (2, Parallel()),
    (2, Parallel(tensor=2, pad_heads=True, sequence=True)),
    (2, Parallel(pipeline=2)),
    (4, Parallel(context=2)),
    (4, Parallel(tensor=4, pad_heads=True)),
    (4, Parallel(pipeline=2, virtual_pipeline=2)),
], ids=["1", "dp2", "tp2 sp", "pp2", "cp2 dp2", "tp4", "pp2 vpp2 dp2"])
def test_another_layout_reads_the_same_numbers_and_goes_on(request, saved, model, ranks, parallel):
    folder, writers = saved[model]
    readers = run_ranks(ranks, _resume, training(request.getfixturevalue(model), parallel), str(folder))
    for state in ("param", "exp_avg", "exp_avg_sq"):
        written = assemble([writer["states"][state] for writer in writers])
        read = assemble([reader["states"][state] for reader in readers])
        assert read.keys() == written.keys()
        assert all(torch.equal(read[name], values) for name, values in written.items()), state
    worst = 0.0
    for found, expected in zip(readers[0]["metrics"], writers[0]["metrics"], strict=True):
        for name, value in expected.items():
            worst = max(worst, abs(found[name] - value) / abs(value))
    assert worst < 1e-5
    print(f"{model}, tp2 pp2 -> {request.node.callspec.id}: worst relative error of a metric {worst:.1e}")
    assert {reader["adam_step"] for reader in readers} == {SAVED}


def _random_numbers_after_loading(case: Distillation, folder: str) -> bool:
    job = Job(case)
    torch.manual_seed(7)
    expected = _draws()
    torch.manual_seed(7)
    before = get_cuda_rng_tracker().get_states()
    checkpoint.load(checkpoint.latest(Path(folder))[0], job.trainer, FACTS, dist.group.WORLD)
    after = get_cuda_rng_tracker().get_states()
    return torch.equal(torch.rand(3), expected[:3]) and _same(before, after)


def test_another_layout_keeps_its_random_generators(tied, saved):
    # Of as many ranks: a rank's state belongs to its place in the layout, not to its number.
    assert all(run_ranks(4, _random_numbers_after_loading, training(tied, Parallel()), str(saved["tied"][0])))


def _scales(job: Job) -> set[float]:
    states = amax_states(unwrap(job.student.chunks[0]), job.student.config)
    return {scale for name, values in states.items() if name.endswith("scale_K") for scale in values.tolist()}


def _after_loading(case: Distillation, folder: str) -> tuple[set[float], list[str], str]:
    """Scales after a delayed training's checkpoint was read into a new trainer, what is said of it, and what is said
    where this rank's histories are missing."""
    job, said, handler = Job(case), [], logging.Handler()
    published, publish = [], job.trainer.publish_parameters
    job.trainer.publish_parameters = lambda: published.append(_scales(job)) or publish()
    handler.emit = lambda record: said.append(record.getMessage())
    checkpoint.logger.addHandler(handler)
    path, _ = checkpoint.latest(Path(folder))
    try:
        checkpoint.load(path, job.trainer, FACTS, dist.group.WORLD)
    finally:
        checkpoint.logger.removeHandler(handler)
    scales, refused = _scales(job), ""
    assert published == [scales], "FP8 weights would be rounded with other scales than those of the checkpoint"
    if world().size == 1:
        file = path / "rank-00000.safetensors"
        kept, header = load_file(file), open_tensors(file).metadata()
        save_file({name: values for name, values in kept.items() if not name.startswith("amaxes.")}, file, header)
        with pytest.raises(ModelError) as error:
            checkpoint.load(path, job.trainer, FACTS, dist.group.WORLD)
        refused = str(error.value)
    return scales, said, refused


def test_delayed_scalings_histories_begin_anew_in_another_layout(tied, tmp_path):
    folder = str(tmp_path)
    run_ranks(1, _save, training(tied, Parallel(), "delayed"), folder)
    results = run_ranks(2, _after_loading, training(tied, Parallel(), "delayed"), folder)
    assert [scales for scales, _, _ in results] == [{1.0}, {1.0}]
    [[message], nothing] = [said for _, said, _ in results]
    assert "written in another layout: the histories of FP8's delayed scaling begin anew" in message and not nothing
    [(scales, said, refused)] = run_ranks(1, _after_loading, training(tied, Parallel(), "delayed"), folder)
    assert len(scales) > 10 and not said
    assert "rank-00000.safetensors: lacks amaxes.0.decoder.layers.0." in refused and "Remove the checkpoint" in refused


# ------------------------------------------------------------------------------------------------ what can go wrong


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the tied model's checkpoints, to be damaged."""
    return Path(shutil.copytree(saved["tied"][0], tmp_path / "checkpoints"))


def _load(case: Distillation, folder: str, facts: dict[str, str]) -> str:
    job = Job(case)
    try:
        checkpoint.load(checkpoint.latest(Path(folder))[0], job.trainer, facts, dist.group.WORLD)
    except ModelError as error:
        return str(error)
    return "loaded"


def error_of(folder: Path, student: str, facts: dict[str, str] = FACTS) -> str:
    """The ModelError of loading on one process."""
    return run_ranks(1, _load, training(student, Parallel()), str(folder), facts)[0]


def test_other_facts_are_refused(folder, tied):
    message = error_of(folder, tied, {"stage": "another"})
    assert "stage = 'd41d8cd98f00b204'" in message and "'another'" in message and "output folder" in message
    assert "no data" in error_of(folder, tied, {**FACTS, "data": "1"})
    assert error_of(folder, tied) == "loaded"


def test_another_model_is_refused(folder, tmp_path):
    deeper = make_llama(tmp_path / "deeper", seed=1, layers=8)
    message = error_of(folder, str(deeper))
    assert "is of another model: layers 6 and not 8" in message


def test_a_missing_file_is_named(folder, tied):
    (folder / "step-00000002" / "rank-00002.safetensors").unlink()
    message = error_of(folder, tied)
    assert "rank-00002.safetensors" in message and "Remove the checkpoint" in message


def test_a_truncated_file_is_named(folder, tied):
    file = folder / "step-00000002" / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    message = error_of(folder, tied)
    assert "rank-00001.safetensors" in message and "damaged" in message


def test_a_missing_slice_is_named(folder, tied):
    file = folder / "step-00000002" / "rank-00001.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8:][:size])["__metadata__"]
    group = json.loads(header["group"])
    group[0]["slices"].pop("0.decoder.layers.1.mlp.linear_fc2.weight")
    save_file(load_file(file), file, {**header, "group": json.dumps(group)})
    message = error_of(folder, tied)
    assert "0.decoder.layers.1.mlp.linear_fc2.weight (param)" in message and "holds 0 of " in message
    assert "model.layers.1.mlp.down_proj.weight" in message and "damaged" in message


@pytest.mark.parametrize("text", ['{"step": 2', '{"step": 2}'])
def test_information_that_cannot_be_read_is_named(folder, tied, text):
    (folder / "step-00000002" / "checkpoint.json").write_text(text)
    message = error_of(folder, tied)
    assert "checkpoint.json" in message and "Remove the checkpoint" in message


# ------------------------------------------------------------------------------------------------------- being killed


def _save_twice(case: Distillation, folder: str) -> None:
    job = Job(case)
    for number in range(4):
        job.step(number)
        if number % 2:
            checkpoint.save(Path(folder), number + 1, job.trainer, FACTS, dist.group.WORLD)


def test_leftovers_of_a_killed_run_are_passed_over_and_removed(tied, tmp_path):
    folder = tmp_path / "checkpoints"
    assert checkpoint.latest(folder) is None
    half_written = folder / "partial"
    half_removed = folder / "step-00000001"
    for path in (half_written, half_removed):
        path.mkdir(parents=True)
        (path / "rank-00007.safetensors").write_bytes(b"half")
    assert checkpoint.latest(folder) is None
    run_ranks(1, _save_twice, training(tied, Parallel()), str(folder))
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]
    assert sorted(path.name for path in (folder / "step-00000004").iterdir()) == [
        "checkpoint.json", "rank-00000.safetensors"]
    assert checkpoint.latest(folder) == (folder / "step-00000004", 4)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the program runs after it."""


def _save_and_be_killed(case: Distillation, folder: str, at: str) -> list[int]:
    """Is killed at each call of `os.<at>` in turn, until a save gets through; the steps that could be resumed from."""
    job = Job(case)
    job.step(0)
    real, steps = getattr(os, at), []
    for survives in range(100):
        checkpoints, calls = Path(folder) / str(survives), []
        checkpoint.save(checkpoints, 1, job.trainer, FACTS, dist.group.WORLD)

        def killing(*args, calls=calls, survives=survives, **kwargs):
            if len(calls) == survives:
                raise Killed
            calls.append(args)
            return real(*args, **kwargs)

        setattr(os, at, killing)
        try:
            checkpoint.save(checkpoints, 2, job.trainer, FACTS, dist.group.WORLD)
        except Killed:
            pass
        else:
            return steps
        finally:
            setattr(os, at, real)
        path, step = checkpoint.latest(checkpoints)
        checkpoint.load(path, job.trainer, FACTS, dist.group.WORLD)
        steps.append(step)
        checkpoint.save(checkpoints, 3, job.trainer, FACTS, dist.group.WORLD)
        assert [path.name for path in checkpoints.iterdir()] == ["step-00000003"]
    raise AssertionError("never got through")


@pytest.mark.parametrize("at, steps", [("fsync", {1, 2}), ("rename", {1}), ("unlink", {2}), ("rmdir", {2})])
def test_a_run_killed_while_saving_has_a_whole_checkpoint(tied, tmp_path, at, steps):
    assert set(run_ranks(1, _save_and_be_killed, training(tied, Parallel()), str(tmp_path), at)[0]) == steps
