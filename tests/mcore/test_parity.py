"""A real model in several layouts against transformers: log-probs, greedy answers, and the weights written back.

The environment variable MEGAKD_TEST_MODEL names the Hugging Face directory of the model (float32 weights).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from megakd.batch import Group, Kind
from megakd.config import Parallel
from megakd.data.dataset import preference_groups, read_rows
from megakd.data.tokenizers import load_tokenizer
from megakd.hf.directory import tensor_files
from megakd.rollout import Prompt, Sampling
from tests.mcore import cases
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif("MEGAKD_TEST_MODEL" not in os.environ,
                                reason="MEGAKD_TEST_MODEL names no model directory")

ROWS, PROMPTS, MICRO_BATCH, SLOTS = 16, 8, 8, 5
DATA = Path(__file__).parents[2] / "examples" / "data" / "instructions.jsonl"
LAYOUTS = {"tp1": Parallel(),
           "tp2 pp2 vpp2": Parallel(tensor=2, pipeline=2, virtual_pipeline=2, pad_heads=True)}
"""One process and everything at once, SmolLM2's 30 layers in parts of 7, 8, 8 and 7; those between are tested on tiny
models (test_gradients.py, test_rollout.py)."""
EXPORTING = "tp2 pp2 vpp2"
TIE = 1e-4
"""Two logits that are nearer may swap: sums are taken in another order."""


@pytest.fixture(scope="module")
def directory() -> str:
    return os.environ["MEGAKD_TEST_MODEL"]


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(Path(directory))


@pytest.fixture(scope="module")
def groups(tokenizer) -> tuple[Group, ...]:
    """The chosen answers of some rows: the shortest, for the time's sake."""
    rows = read_rows((DATA,), None, seed=1, answer="chosen")
    everything = preference_groups(rows, tokenizer, (Kind.CHOSEN,), max_length=512, too_long="error")
    return tuple(sorted(everything, key=lambda group: group.total_length)[:ROWS])


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[Prompt]:
    """Those of some rows, whatever their length."""
    rows = read_rows((DATA,), PROMPTS, seed=2, answer="chosen")
    return [Prompt(number, tuple(tokenizer.encode(row.prompt, None, close=False)[0]))
            for number, row in enumerate(rows)]


@pytest.fixture(scope="module")
def greedy(tokenizer) -> Sampling:
    return Sampling(temperature=0.0, top_k=0, top_p=1.0, n=1, max_new_tokens=16, stop_ids=tokenizer.stop_ids, seed=0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("parity") / "exported"


# ----------------------------------------------------------------------------------------------------- megatron-core


@pytest.fixture(scope="module", params=LAYOUTS)
def measured(request, directory, groups, prompts, greedy, exported):
    """A layout's name, and what all of its ranks have found."""
    parallel = LAYOUTS[request.param]
    written = exported if request.param == EXPORTING else None
    results = run_ranks(parallel.tensor * parallel.pipeline, cases.log_probs_and_answers, directory, parallel, groups,
                        MICRO_BATCH, prompts, greedy, SLOTS, written, timeout=600)
    return request.param, results


# ------------------------------------------------------------------------------------------------------ transformers


@pytest.fixture(scope="module")
def transformers_model(directory) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def their_log_probs(transformers_model, groups) -> list[torch.Tensor]:
    """The log-probs of each response's tokens."""
    samples = [group.samples[0] for group in groups]
    found: list[torch.Tensor] = [torch.empty(0)] * len(samples)
    order = sorted(range(len(samples)), key=lambda number: len(samples[number].tokens))
    with torch.no_grad():
        for start in range(0, len(order), MICRO_BATCH):
            numbers = order[start : start + MICRO_BATCH]
            lengths = [len(samples[number].tokens) for number in numbers]
            padding = [[0] * (max(lengths) - length) for length in lengths]
            tokens = torch.tensor([[*samples[n].tokens, *zeros] for n, zeros in zip(numbers, padding, strict=True)])
            attended = torch.tensor([[1] * n + zeros for n, zeros in zip(lengths, padding, strict=True)])
            hidden = transformers_model.model(tokens, attention_mask=attended).last_hidden_state
            for row, number in enumerate(numbers):
                sample = samples[number]
                places = slice(sample.prompt_length - 1, len(sample.tokens) - 1)
                log_probs = transformers_model.lm_head(hidden[row, places]).log_softmax(-1)
                labels = torch.tensor(sample.tokens[sample.prompt_length :])
                found[number] = log_probs.gather(1, labels[:, None])[:, 0]
    return found


@pytest.fixture(scope="module")
def their_answers(transformers_model, prompts, greedy) -> list[list[int]]:
    """Greedy answers by `generate`, each up to its stop token."""
    width = max(len(prompt.tokens) for prompt in prompts)
    tokens = torch.tensor([[*[0] * (width - len(prompt.tokens)), *prompt.tokens] for prompt in prompts])
    attended = torch.tensor([[0] * (width - len(p.tokens)) + [1] * len(p.tokens) for p in prompts])
    with torch.no_grad():
        output = transformers_model.generate(
            tokens, attention_mask=attended, do_sample=False, max_new_tokens=greedy.max_new_tokens,
            eos_token_id=list(greedy.stop_ids), pad_token_id=greedy.stop_ids[0])
    answers = []
    for row in output[:, width:].tolist():
        stops = [place for place, token in enumerate(row) if token in greedy.stop_ids]
        answers.append(row[: stops[0] + 1] if stops else row)
    return answers


# ------------------------------------------------------------------------------------------------------------- tests


def test_log_probs_are_those_of_transformers(measured, groups, their_log_probs):
    layout, results = measured
    found = [log_probs for log_probs, _ in results if log_probs is not None]
    assert len(found) == LAYOUTS[layout].tensor
    worst = 0.0
    for log_probs in found:
        assert sorted(log_probs) == list(range(len(groups)))
        for number, expected in enumerate(their_log_probs):
            worst = max(worst, (torch.tensor(log_probs[number]) - expected).abs().max().item())
    tokens = sum(len(log_probs) for log_probs in their_log_probs)
    print(f"{layout}: largest difference of {tokens} log-probs {worst:.1e}")
    assert worst < 1e-4


def test_greedy_answers_are_those_of_transformers(measured, prompts, their_answers, transformers_model):
    layout, results = measured
    ties = 0
    for _, answers in results:
        assert answers == results[0][1], "the ranks do not agree"
    for prompt, mine, theirs in zip(prompts, results[0][1], their_answers, strict=True):
        if list(mine) == theirs:
            continue
        place = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b)
        with torch.no_grad():
            logits = transformers_model(torch.tensor([[*prompt.tokens, *theirs[:place]]])).logits[0, -1]
        best = logits.topk(2)
        gap = (best.values[0] - best.values[1]).item()
        assert {mine[place], theirs[place]} == set(best.indices.tolist()) and gap < TIE, (
            f"prompt {prompt.sample_id}, token {place}: {mine[place]} instead of {theirs[place]}, {gap:.1e} ahead")
        ties += 1
    tokens = sum(len(answer) for answer in their_answers)
    print(f"{layout}: {len(prompts) - ties} of {len(prompts)} answers equal, {ties} differ at a tie; {tokens} tokens")


def test_the_weights_come_back_byte_for_byte(measured, directory, exported):
    layout, _ = measured
    if layout != EXPORTING:
        return
    source, written = tensor_files(directory), tensor_files(exported)
    assert source.keys() == written.keys()
    for name in source:
        with safe_open(source[name], "pt") as theirs, safe_open(written[name], "pt") as mine:
            one, other = theirs.get_tensor(name), mine.get_tensor(name)
        assert one.dtype == other.dtype == torch.float32
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name
    print(f"{layout}: {len(source)} tensors in {len(set(written.values()))} files")
