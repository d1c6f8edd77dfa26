"""One replica reads a model's files and the others get it from there; an error is told on all of them. A model with
norms of queries and keys is what transformers makes of its files (`test_parity.py` has a real model, of another make).
"""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megakd.batch import Kind
from megakd.config import Parallel
from megakd.errors import ModelError
from megakd.mcore import model as module
from megakd.mcore import runtime
from megakd.mcore.model import unwrap
from megakd.rollout import Prompt, Sampling
from tests.mcore.cases import build, grid, log_probs_and_answers
from tests.mcore.tiny import VOCABULARY, make_groups, make_llama, make_qwen3
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


@pytest.mark.parametrize("parallel, tied", [
    (Parallel(), True), (Parallel(), False),
    (Parallel(tensor=2, sequence=True, pipeline=2, virtual_pipeline=2, pad_heads=True), True),
    (Parallel(tensor=2, sequence=True, pipeline=2, pad_heads=True), False),
], ids=["one rank, tied", "one rank", "tp2 sp pp2 vpp2, tied", "tp2 sp pp2"])
def test_norms_of_queries_and_keys_are_those_of_transformers(tmp_path, parallel, tied):
    """Log-probabilities, likeliest answers by kept keys and values, and the files that come back."""
    directory, written = make_qwen3(tmp_path / "model", seed=3, tied=tied), tmp_path / "written"
    groups, draw, answer = make_groups(8, (Kind.CHOSEN,)), random.Random(1), 6
    prompts = [Prompt(number, tuple(draw.choices(range(VOCABULARY), k=length)))
               for number, length in enumerate((5, 1, 9, 3))]
    greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0, n=1, max_new_tokens=answer, stop_ids=(), seed=0)
    results = run_ranks(parallel.tensor * parallel.pipeline, log_probs_and_answers, str(directory), parallel, groups, 4,
                        prompts, greedy, 3, written)

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    worst = 0.0
    for number, sample in enumerate(group.samples[0] for group in groups):
        with torch.no_grad():
            rows = model(torch.tensor([sample.tokens])).logits[0, sample.prompt_length - 1 : -1].log_softmax(-1)
        expected = rows.gather(1, torch.tensor(sample.tokens[sample.prompt_length :])[:, None])[:, 0]
        found = [log_probs[number] for log_probs, _ in results if log_probs is not None]
        worst = max(worst, *((torch.tensor(each) - expected).abs().max().item() for each in found))
    assert len(found) == parallel.tensor and worst < 2e-5
    print(f"largest difference of log-probs {worst:.1e}")
    for prompt, mine in zip(prompts, results[0][1], strict=True):
        tokens = list(prompt.tokens)
        for _ in range(answer):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        assert list(mine) == tokens[len(prompt.tokens) :]
    assert all(answers == results[0][1] for _, answers in results)

    source, back = load_file(directory / "model.safetensors"), {}
    for file in written.glob("*.safetensors"):
        back |= load_file(file)
    assert back.keys() == source.keys() and all(torch.equal(back[name], values) for name, values in source.items())
    assert json.loads((written / "config.json").read_text()) == json.loads((directory / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], values) for name, values in model.state_dict().items())
