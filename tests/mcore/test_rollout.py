"""The rollout engine on real megatron-core models: against transformers, and the same over layouts.

`test_parity.py` has a model of real size.
"""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor

from megakd.config import Parallel
from megakd.mcore import graphs
from megakd.mcore.decoder import PipelineDecoder
from megakd.mcore.model import Model, evaluating, freeze
from megakd.rollout import KVCache, Prompt, Rollout, Sampling, generate
from tests.hf_models import architecture, random_tensors, write_model
from tests.mcore import cases
from tests.mcore.engine_stand_in import transformer_engine
from tests.ranks import run_ranks

LENGTHS = (5, 1, 9, 3, 14, 2, 7)
LAYOUTS = [Parallel(), Parallel(tensor=2, pad_heads=True, sequence=True), Parallel(pipeline=2),
           Parallel(pipeline=2, virtual_pipeline=2), Parallel(tensor=2, pipeline=2, pad_heads=True)]
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, n=1, max_new_tokens=8, stop_ids=(), seed=3)
SAMPLED = Sampling(temperature=1.1, top_k=60, top_p=0.9, n=2, max_new_tokens=8, stop_ids=tuple(range(0, 150, 12)),
                   seed=3)


def _prompts(vocab_size: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    return [Prompt(number, tuple(torch.randint(vocab_size, (length,), generator=generator).tolist()))
            for number, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    # Large weights, so that no two tokens are near a tie; an odd number of groups, so that TP 2 pads them.
    # Five layers: stages and their parts have unequally many.
    toy = architecture(layers=5)
    tensors = {name: tensor * 6 if tensor.ndim == 2 else 1 + tensor for name, tensor in random_tensors(toy).items()}
    return str(write_model(tmp_path_factory.mktemp("rollout") / "model", toy, tensors))


def _generate(
    directory: str, parallel: Parallel, prompts: list[Prompt], sampling: Sampling, slots: int
) -> list[Rollout]:
    """On each rank: its replica's share of the prompts."""
    model = cases.build(directory, parallel)
    mine = prompts[model.grid.at.data :: model.grid.layout.data]
    return generate(PipelineDecoder(model, 64), mine, sampling, slots=slots, pad_id=0)


def _transformers_greedy(directory: str, prompts: list[Prompt], sampling: Sampling) -> list[tuple[list, list]]:
    """Tokens and log-probs of each prompt, everything computed afresh for each token."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        tokens, log_probs = list(prompt.tokens), []
        for _ in range(sampling.max_new_tokens):
            with torch.no_grad():
                log_probs_V = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(0)
            tokens.append(int(log_probs_V.argmax()))
            log_probs.append(float(log_probs_V.max()))
        answers.append((tokens[len(prompt.tokens) :], log_probs))
    return answers


def _name(parallel: Parallel) -> str:
    return f"tp{parallel.tensor}-pp{parallel.pipeline}-vpp{parallel.virtual_pipeline}"


def _ranks(parallel: Parallel) -> int:
    return parallel.tensor * parallel.pipeline


def _assert_equal(mine: list[Rollout], theirs: list[Rollout]):
    for one, other in zip(mine, theirs, strict=True):
        assert (one.sample_id, one.index, one.tokens, one.finish_reason) == (
            other.sample_id, other.index, other.tokens, other.finish_reason)
        torch.testing.assert_close(torch.tensor(one.log_probs), torch.tensor(other.log_probs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("parallel", LAYOUTS, ids=_name)
def test_greedy_equals_transformers_on_every_rank(directory, parallel):
    prompts = _prompts(150)
    expected = _transformers_greedy(directory, prompts, GREEDY)
    for rollouts in run_ranks(_ranks(parallel), _generate, directory, parallel, prompts, GREEDY, 3):
        for rollout, (tokens, log_probs) in zip(rollouts, expected, strict=True):
            assert list(rollout.tokens) == tokens
            torch.testing.assert_close(torch.tensor(rollout.log_probs), torch.tensor(log_probs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("parallel", LAYOUTS[1:], ids=_name)
def test_draws_are_the_same_in_every_layout(directory, parallel):
    prompts = _prompts(150)
    whole = run_ranks(1, _generate, directory, Parallel(), prompts, SAMPLED, 64)[0]
    assert {rollout.finish_reason for rollout in whole} == {"stop", "length"}
    for rollouts in run_ranks(_ranks(parallel), _generate, directory, parallel, prompts, SAMPLED, 3):
        _assert_equal(rollouts, whole)


def test_replicas_share_the_prompts_out(directory):
    prompts = _prompts(150)
    whole = run_ranks(1, _generate, directory, Parallel(), prompts, SAMPLED, 64)[0]
    first, first_too, second, second_too = run_ranks(
        4, _generate, directory, Parallel(tensor=2, pad_heads=True), prompts, SAMPLED, 2)
    assert first == first_too and second == second_too
    _assert_equal(sorted(first + second, key=lambda rollout: (rollout.sample_id, rollout.index)), whole)


FILLED_ROWS = {1: 1, 2: 2, 3: 4, 4: 4, 5: 5}
"""Of 5 slots."""


class _Sizes(PipelineDecoder):
    """Writes down which recording each pass should take."""

    def __init__(self, model: Model, longest: int):
        super().__init__(model, longest)
        self.sizes: list[tuple[int, ...]] = []

    def run(self, part: int, tokens_BS: Tensor, position_ids_BS: Tensor, cache: KVCache,
            hidden_SBH: Tensor | None) -> Tensor:
        rows, columns = tokens_BS.shape
        if columns == 1 and position_ids_BS.max() > 0:
            filled = min(-(-int(position_ids_BS.max() + 1) // 8) * 8, cache.max_length)
            self.sizes.append((id(cache), part, rows, FILLED_ROWS[rows], filled))
        return super().run(part, tokens_BS, position_ids_BS, cache, hidden_SBH)


def _recorded(directory: str, parallel: Parallel, spec: str, prompts: list[Prompt]) -> dict[str, object]:
    recorder = cases.KeptCalls()
    with transformer_engine() if spec == "te" else nullcontext(), mock.patch.object(graphs, "LENGTHS", 8):
        model = freeze(cases.build(directory, parallel, trained=False))
        model.decode_recorder, decoder = recorder, _Sizes(model, 64)
        with evaluating(model):
            answers = generate(decoder, prompts, SAMPLED, slots=5, pad_id=0)
    taken = [(cache, part, rows, length) for cache, part, _, rows, length in decoder.sizes]
    first_seen = {size: number for number, size in enumerate(dict.fromkeys(taken))}
    assert recorder.recorded == len(first_seen) > 4
    assert recorder.replayed == [first_seen[size] for size in taken]
    return {"answers": answers, "sizes": decoder.sizes}


@pytest.mark.parametrize("parallel, spec", [
    (Parallel(), "local"), (Parallel(tensor=2, pad_heads=True, sequence=True), "te"),
    (Parallel(pipeline=2, virtual_pipeline=2), "local"),
], ids=["one rank", "tp2 sp, te", "pp2 vpp2"])
def test_recorded_passes_draw_the_same(directory, parallel, spec):
    prompts = _prompts(150)
    whole = run_ranks(1, _generate, directory, Parallel(), prompts, SAMPLED, 64)[0]
    for found in run_ranks(_ranks(parallel), _recorded, directory, parallel, spec, prompts):
        assert any(rows < filled for _, _, rows, filled, _ in found["sizes"]) or parallel.pipeline > 1
        assert len({length for *_, length in found["sizes"]}) > 1
        _assert_equal(found["answers"], whole)
