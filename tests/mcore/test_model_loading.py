"""One replica reads a model's files and the others get it from there; an error is told on all of them."""

from __future__ import annotations

import pytest
import torch

from megakd.config import Parallel
from megakd.errors import ModelError
from megakd.mcore import model as module
from megakd.mcore import runtime
from megakd.mcore.model import unwrap
from tests.mcore.cases import build, grid
from tests.mcore.tiny import make_llama
from tests.ranks import run_ranks


def _load(directory: str, parallel: Parallel) -> tuple[int, dict[str, torch.Tensor] | str]:
    """How often this rank reads files, and its parameters or what went wrong."""
    reads, real = [], module.load_parameters
    module.load_parameters = lambda *arguments: reads.append(arguments) or real(*arguments)
    try:
        model = build(directory, parallel)
    except ModelError as error:
        return len(reads), str(error)
    finally:
        module.load_parameters = real
    return len(reads), {name: value.detach().clone() for chunk in range(len(model.chunks))
                        for name, value in model.parameters_of(chunk).items()}


@pytest.mark.parametrize("parallel, readers", [
    (Parallel(), 1), (Parallel(tensor=2, pad_heads=True), 2), (Parallel(pipeline=2, virtual_pipeline=2), 2)])
def test_the_first_replica_reads_for_all(tmp_path, parallel, readers):
    directory = str(make_llama(tmp_path / "model", seed=3))
    results = run_ranks(4, _load, directory, parallel)
    assert sum(count > 0 for count, _ in results) == readers
    # Ranks of equal places: tensor fastest, pipeline slowest, replicas between.
    one, other = (0, 3) if readers == 1 else (0, 2) if parallel.tensor == 2 else (0, 1)
    first, second = results[one][1], results[other][1]
    assert results[other][0] == 0 and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_error_is_told_on_all_ranks(tmp_path):
    directory = make_llama(tmp_path / "model", seed=3)
    (directory / "model.safetensors").unlink()
    results = run_ranks(2, _load, str(directory), Parallel())
    assert [count for count, _ in results] == [1, 0]
    assert results[0][1] == results[1][1] and str(directory) in results[0][1]


def _layer_numbers(directory: str) -> list[list[int]]:
    """Numbers by which megatron-core knows the layers of each chunk (its FP8 asks for the first and the last), of a
    teacher in two stages whose student, in its global state, has one."""
    parallel = Parallel(pipeline=2, virtual_pipeline=2)
    grid(parallel.tensor, parallel.pipeline)
    runtime.set_global_state(grid(1, 1).groups)
    chunks = build(directory, parallel).chunks
    return [[layer.layer_number for layer in unwrap(chunk).decoder.layers] for chunk in chunks]


def test_layers_are_numbered_by_their_own_models_cut(tmp_path):
    directory = str(make_llama(tmp_path / "model", seed=3, layers=5))
    assert run_ranks(2, _layer_numbers, directory) == [[[1], [3, 4]], [[2], [5]]]
