"""The engine on a toy decoder, against decoding that recomputes everything from the start for each token."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from megakd.errors import ConfigError, ModelError
from megakd.rollout import Prompt, Sampling, engine, generate
from megakd.rollout.sampling import noise_keys, sample
from tests.toy_decoder import VOCAB, ToyDecoder


def _sampling(**changes) -> Sampling:
    settings = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "n": 1, "max_new_tokens": 12, "stop_ids": (), "seed": 11}
    return Sampling(**{**settings, **changes})


SAMPLED = {"temperature": 1.2, "top_k": 30, "top_p": 0.95, "stop_ids": (3, 8, 21)}


def _prompts(lengths=(5, 1, 9, 3, 14, 2, 7, 7, 4, 11)) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    return [Prompt(100 + number, tuple(torch.randint(VOCAB, (length,), generator=generator).tolist()))
            for number, length in enumerate(lengths)]


def _recompute(decoder: ToyDecoder, prompt: Prompt, index: int, sampling: Sampling):
    """One response without a cache: tokens, log_probs, finish_reason."""
    tokens, log_probs = [], []
    while len(tokens) < sampling.max_new_tokens and len(prompt.tokens) + len(tokens) < decoder.context_length:
        logits_V = decoder.logits([*prompt.tokens, *tokens])[-1]
        if sampling.temperature == 0:
            token = int(logits_V.argmax())
        else:
            keys = noise_keys(sampling.seed, *torch.tensor([prompt.sample_id, index, len(tokens)])[:, None])
            token = int(sample(logits_V[None], sampling, keys, tp_group=None, vocab_size=VOCAB)[0])
        tokens.append(token)
        log_probs.append(float(logits_V.log_softmax(0)[token]))
        if token in sampling.stop_ids:
            return tokens, log_probs, "stop"
    return tokens, log_probs, "length"


def _assert_equal_rollouts(one, other):
    assert [(r.sample_id, r.index, r.tokens, r.finish_reason) for r in one] == [
        (r.sample_id, r.index, r.tokens, r.finish_reason) for r in other]
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(torch.tensor(mine.log_probs), torch.tensor(theirs.log_probs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, SAMPLED, {**SAMPLED, "n": 3}])
@pytest.mark.parametrize("slots", [4, 64])
def test_equal_to_full_recomputation(changes, slots):
    decoder, sampling, prompts = ToyDecoder(), _sampling(**changes), _prompts()
    rollouts = generate(decoder, prompts, sampling, slots=slots, pad_id=0)
    order = [(prompt, index) for prompt in prompts for index in range(sampling.n)]
    assert [(r.sample_id, r.index) for r in rollouts] == [(prompt.sample_id, index) for prompt, index in order]
    for rollout, (prompt, index) in zip(rollouts, order, strict=True):
        tokens, log_probs, finish_reason = _recompute(decoder, prompt, index, sampling)
        assert (list(rollout.tokens), rollout.finish_reason) == (tokens, finish_reason)
        torch.testing.assert_close(torch.tensor(rollout.log_probs), torch.tensor(log_probs), atol=1e-5, rtol=1e-5)


def test_both_finish_reasons_occur_and_the_stop_token_closes_the_response():
    rollouts = generate(ToyDecoder(), _prompts(), _sampling(**SAMPLED), slots=4, pad_id=0)
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        stops = [token in SAMPLED["stop_ids"] for token in r.tokens]
        assert not any(stops[:-1])
        assert stops[-1] == (r.finish_reason == "stop")
        assert (len(r.tokens) == 12) or r.finish_reason == "stop"
        assert len(r.log_probs) == len(r.tokens)


@pytest.mark.parametrize("n", [1, 3])
def test_slots_order_and_company_do_not_matter(n):
    prompts, sampling = _prompts(), _sampling(**SAMPLED, n=n)
    together = generate(ToyDecoder(), prompts, sampling, slots=100, pad_id=0)
    for slots in (1, 2, 3, 7):
        _assert_equal_rollouts(generate(ToyDecoder(), prompts, sampling, slots=slots, pad_id=0), together)
    backwards = generate(ToyDecoder(), prompts[::-1], sampling, slots=3, pad_id=5)
    _assert_equal_rollouts(sorted(backwards, key=lambda r: (r.sample_id, r.index)), together)
    alone = [r for prompt in prompts for r in generate(ToyDecoder(), [prompt], sampling, slots=2, pad_id=0)]
    _assert_equal_rollouts(alone, together)


def test_small_prefill_batches_change_nothing(monkeypatch):
    sampling = _sampling(**SAMPLED, n=2)
    whole = generate(ToyDecoder(), _prompts(), sampling, slots=6, pad_id=0)
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 10)
    decoder = ToyDecoder()
    _assert_equal_rollouts(generate(decoder, _prompts(), sampling, slots=6, pad_id=0), whole)
    assert all(rows * columns <= 10 or rows == 1 for rows, columns in decoder.batches if columns > 1)


def test_responses_to_one_prompt_differ_and_share_its_prefill():
    decoder = ToyDecoder()
    rollouts = generate(decoder, _prompts((6,)), _sampling(temperature=1.5, n=8), slots=8, pad_id=0)
    assert len({r.tokens for r in rollouts}) == 8
    assert decoder.batches[0] == (1, 6)


def test_first_response_is_the_same_whatever_n():
    one = generate(ToyDecoder(), _prompts(), _sampling(**SAMPLED), slots=4, pad_id=0)
    three = generate(ToyDecoder(), _prompts(), _sampling(**SAMPLED, n=3), slots=4, pad_id=0)
    _assert_equal_rollouts([r for r in three if r.index == 0], one)


def test_no_forward_pass_has_a_dead_row():
    decoder = ToyDecoder()
    rollouts = generate(decoder, _prompts(), _sampling(**SAMPLED), slots=4, pad_id=0)
    decoded = sum(rows for rows, columns in decoder.batches if columns == 1)
    one_token_prompts = 1
    # The first token of a response comes from the prefill, each other one from one row of a decoding pass.
    assert decoded - one_token_prompts == sum(len(r.tokens) - 1 for r in rollouts)
    assert max(rows for rows, _ in decoder.batches) <= 4


def test_limits_of_a_single_token_and_of_the_context():
    decoder = ToyDecoder(context_length=16)
    rollouts = generate(decoder, _prompts((15, 14, 3)), _sampling(max_new_tokens=5), slots=2, pad_id=0)
    assert [len(r.tokens) for r in rollouts] == [1, 2, 5]
    assert {r.finish_reason for r in rollouts} == {"length"}
    single = generate(decoder, _prompts(), _sampling(max_new_tokens=1), slots=3, pad_id=0)
    assert [len(r.tokens) for r in single] == [1] * 10
    assert all(columns > 1 or rows <= 3 for rows, columns in decoder.batches)


def test_seed_changes_the_draws():
    first, same, other = (
        generate(ToyDecoder(), _prompts(), _sampling(temperature=1.0, seed=seed), slots=4, pad_id=0)
        for seed in (1, 1, 2))
    assert first == same
    assert all(mine.tokens != theirs.tokens for mine, theirs in zip(first, other, strict=True))


def test_first_tokens_follow_the_models_distribution():
    decoder, prompt = ToyDecoder(), _prompts((6,))[0]
    n = 4000
    rollouts = generate(decoder, [prompt], _sampling(temperature=1.0, max_new_tokens=1, n=n), slots=500, pad_id=0)
    exact_V = decoder.logits(list(prompt.tokens))[-1].double().softmax(0)
    counts = Counter(r.tokens[0] for r in rollouts)
    often = [token for token in range(VOCAB) if n * exact_V[token] >= 5]
    statistic = sum((counts[token] - n * exact_V[token]) ** 2 / (n * exact_V[token]) for token in often)
    freedom = len(often) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 8


def test_progress_counts_up_to_the_end():
    calls = []
    rollouts = generate(ToyDecoder(), _prompts(), _sampling(**SAMPLED), slots=4, pad_id=0,
                        progress=lambda *numbers: calls.append(numbers))
    assert calls == sorted(calls)
    assert calls[-1] == (10, 10, sum(len(r.tokens) for r in rollouts))


def test_nothing_to_do():
    assert generate(ToyDecoder(), [], _sampling(), slots=4, pad_id=0) == []


@pytest.mark.parametrize("prompts, changes, arguments, message", [
    (_prompts((48,)), {}, {}, "prompt of sample 100 = '48 tokens': must have 1 to 47 tokens .context length 48"),
    (_prompts((0,)), {}, {}, "prompt of sample 100 = '0 tokens'"),
    ([Prompt(1, (2,)), Prompt(1, (3,))], {}, {}, "two prompts have this sample id"),
    ([Prompt(1, (2, VOCAB))], {}, {}, "prompt of sample 1 = 50: must be a token id of the model, 0 to 49"),
    (_prompts(), {}, {"slots": 0}, "slots = 0"),
    (_prompts(), {}, {"pad_id": VOCAB}, "pad_id = 50"),
    (_prompts(), {"stop_ids": (VOCAB,)}, {}, "sampling.stop_ids = 50"),
])
def test_what_cannot_be_generated_is_refused_before_any_forward_pass(prompts, changes, arguments, message):
    decoder = ToyDecoder()
    with pytest.raises(ConfigError, match=message):
        generate(decoder, prompts, _sampling(**changes), **{"slots": 4, "pad_id": 0, **arguments})
    assert decoder.batches == []


def test_non_finite_weights_are_named():
    decoder = ToyDecoder()
    decoder.head_VH[9] = math.nan
    with pytest.raises(ModelError, match="non-finite logits at token 0 of response 0 to sample 104"):
        generate(decoder, _prompts(), _sampling(), slots=4, pad_id=0)


def test_logits_of_a_bfloat16_model_are_not_rounded():
    hidden_BH, head_VH = torch.randn(3, 64).bfloat16(), torch.randn(40, 64).bfloat16()
    logits_BV = engine.logits(hidden_BH, head_VH)
    assert logits_BV.dtype == torch.float32
    torch.testing.assert_close(logits_BV.double(), hidden_BH.double() @ head_VH.double().T, atol=1e-5, rtol=1e-5)


def test_no_graph_is_kept():
    decoder = ToyDecoder()
    decoder.head_VH.requires_grad_()
    generate(decoder, _prompts((3,)), _sampling(), slots=1, pad_id=0)
