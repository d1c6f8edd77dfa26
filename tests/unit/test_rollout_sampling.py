"""The draw on one rank: noise, greedy, truncation and statistics. tests/dist/test_sampling_tp.py shards it."""

from __future__ import annotations

import math

import pytest
import torch

from megakd.errors import ConfigError
from megakd.rollout import Sampling
from megakd.rollout import sampling as module
from megakd.rollout.sampling import _GOLDEN, gumbel_noise, mix64, noise_keys, sample


def _sampling(**changes) -> Sampling:
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "n": 1, "max_new_tokens": 8, "stop_ids": (), "seed": 0}
    return Sampling(**{**settings, **changes})


def _keys(count: int, *, seed: int = 5, step: int = 0) -> torch.Tensor:
    ids_B = torch.arange(count)
    return noise_keys(seed, ids_B, torch.zeros_like(ids_B), torch.full_like(ids_B, step))


def _kept(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The tokens that transformers keeps (temperature, top_k, top_p in this order), ties kept; float64, by sorting."""
    tempered_V = logits_V.double() / sampling.temperature
    kept_V = torch.ones_like(tempered_V, dtype=torch.bool)
    if sampling.top_k:
        kept_V &= tempered_V >= tempered_V.sort(descending=True).values[: sampling.top_k].min()
    probabilities_V = tempered_V.masked_fill(~kept_V, -math.inf).softmax(0)
    above_V = torch.stack([probabilities_V[probabilities_V > p].sum() for p in probabilities_V])
    return kept_V & (above_V < sampling.top_p)


def _critical_chi_square(freedom: int, z: float = 4.0) -> float:
    """Wilson and Hilferty's approximation of the quantile at z standard deviations (3e-5 at z = 4)."""
    return freedom * (1 - 2 / (9 * freedom) + z * (2 / (9 * freedom)) ** 0.5) ** 3


def _chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, int]:
    expected = probabilities.double() * counts.sum()
    large = expected >= 5
    counts = torch.cat([counts[large].double(), counts[~large].double().sum()[None]])
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    if expected[-1] < 1:
        counts, expected = counts[:-1], expected[:-1]
    return float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1


# --- noise ------------------------------------------------------------------------------------------------------------


def test_mix64_is_splitmix64():
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]  # seed 0
    assert [value % 2**64 for value in mix64(torch.arange(1, 5) * _GOLDEN).tolist()] == published


def test_hash_bits_are_fair_and_flip_by_halves():
    bits_BV = mix64(_keys(64)[:, None] + torch.arange(512) * _GOLDEN)
    ones = torch.stack([((bits_BV >> bit) & 1).double().mean() for bit in range(64)])
    assert (ones - 0.5).abs().max() < 5 * 0.5 / bits_BV.numel() ** 0.5
    ids, zeros = torch.arange(2048), torch.zeros(2048, dtype=torch.int64)
    keys = noise_keys(3, ids, zeros, zeros)
    neighbours = {
        "sample": noise_keys(3, ids + 1, zeros, zeros), "index": noise_keys(3, ids, zeros + 1, zeros),
        "step": noise_keys(3, ids, zeros, zeros + 1), "seed": noise_keys(4, ids, zeros, zeros)}
    for name, others in neighbours.items():
        flipped = keys ^ others
        share = torch.stack([((flipped >> bit) & 1).double().mean() for bit in range(64)])
        assert (share - 0.5).abs().max() < 5 * 0.5 / 2048**0.5, name


def test_keys_of_different_places_differ():
    ids, indices, steps = (x.flatten() for x in torch.meshgrid(*[torch.arange(20)] * 3, indexing="ij"))
    keys = torch.cat([noise_keys(seed, ids, indices, steps) for seed in (0, 1, 2**63 - 1)])
    assert keys.unique().numel() == keys.numel()


def test_noise_is_uniform_and_independent():
    gumbel_BV = gumbel_noise(_keys(200), 0, 1000).double()
    assert gumbel_BV.isfinite().all()
    uniform_BV = (-(-gumbel_BV).exp()).exp()
    bins = (uniform_BV * 100).long().clamp(max=99)
    statistic, freedom = _chi_square(torch.bincount(bins.flatten(), minlength=100), torch.full((100,), 0.01))
    assert statistic < _critical_chi_square(freedom)
    # Pairs: neighbouring columns, neighbouring samples, consecutive steps, two responses to a prompt.
    ids = torch.arange(200)
    next_step, next_index = (
        (-(-gumbel_noise(keys, 0, 1000).double()).exp()).exp()
        for keys in (_keys(200, step=1), noise_keys(5, ids, torch.ones_like(ids), torch.zeros_like(ids))))
    pairs = [(uniform_BV[:, :-1], uniform_BV[:, 1:]), (uniform_BV[:-1], uniform_BV[1:]), (uniform_BV, next_step),
             (uniform_BV, next_index)]
    for one, other in pairs:
        joint = (one * 10).long().clamp(max=9) * 10 + (other * 10).long().clamp(max=9)
        statistic, freedom = _chi_square(torch.bincount(joint.flatten(), minlength=100), torch.full((100,), 0.01))
        assert statistic < _critical_chi_square(freedom)


def test_noise_is_gumbel_with_a_fine_tail():
    gumbel = gumbel_noise(_keys(400), 0, 5000).double().flatten()
    assert abs(gumbel.mean() - 0.57722) < 0.005
    assert abs(gumbel.var() - math.pi**2 / 6) < 0.01
    # The largest of 5000 is Gumbel again, shifted by log 5000.
    largest = gumbel.view(400, 5000).max(dim=1).values - math.log(5000)
    assert abs(largest.mean() - 0.57722) < 4 * (math.pi**2 / 6 / 400) ** 0.5


def test_noise_of_a_shard_is_a_slice_of_the_whole():
    keys = _keys(3)
    assert torch.equal(gumbel_noise(keys, 0, 96)[:, 40:77], gumbel_noise(keys, 40, 37))


# --- the draw ---------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_of_equals_and_never_padding():
    logits_BV = torch.tensor([[0.0, 3.0, 3.0, 9.0], [1.0, 0.0, 1.0, 9.0], [-5.0, -6.0, -7.0, 9.0]])
    tokens_B, log_probs_B = sample(logits_BV, _sampling(temperature=0.0), _keys(3), tp_group=None, vocab_size=3)
    assert tokens_B.tolist() == [1, 0, 0]
    expected_B = logits_BV[:, :3].log_softmax(1)[torch.arange(3), tokens_B]
    torch.testing.assert_close(log_probs_B, expected_B)
    assert logits_BV[0, 3] == 9, "the caller's logits are not written to"


def test_log_probs_are_of_the_model_not_of_the_truncated_distribution():
    logits_BV = 4 * torch.randn(300, 40, generator=torch.Generator().manual_seed(1))
    sampling = _sampling(temperature=2.5, top_k=6, top_p=0.7)
    tokens_B, log_probs_B = sample(logits_BV, sampling, _keys(300), tp_group=None, vocab_size=37)
    expected_B = logits_BV[:, :37].log_softmax(1)[torch.arange(300), tokens_B]
    torch.testing.assert_close(log_probs_B, expected_B, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.9), (1.7, 0, 0.3), (1.5, 12, 0.8),
    (1.0, 5, 0.2),
])
def test_draws_follow_the_truncated_distribution(temperature, top_k, top_p):
    logits_V = 2 * torch.randn(40, generator=torch.Generator().manual_seed(2))
    logits_V[7] = logits_V[11] = logits_V.sort().values[-4]  # ties
    sampling = _sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    draws = 20_000
    tokens_B, _ = sample(logits_V.expand(draws, 40), sampling, _keys(draws), tp_group=None, vocab_size=40)
    kept_V = _kept(logits_V, sampling)
    counts_V = torch.bincount(tokens_B, minlength=40)
    assert not counts_V[~kept_V].any()
    exact_V = (logits_V.double() / temperature).masked_fill(~kept_V, -math.inf).softmax(0)
    statistic, freedom = _chi_square(counts_V, exact_V)
    if freedom:
        assert statistic < _critical_chi_square(freedom)


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (9, 1.0), (0, 0.95), (0, 0.5), (0, 0.01), (9, 0.7), (200, 0.3)])
def test_draw_is_the_best_of_noise_and_logits_among_the_kept(top_k, top_p):
    generator = torch.Generator().manual_seed(3)
    logits_BV = torch.randn(200, 64, generator=generator) * torch.rand(200, 1, generator=generator) * 6
    logits_BV[::3] = logits_BV[::3].round()  # many ties
    sampling, keys_B = _sampling(temperature=1.3, top_k=top_k, top_p=top_p), _keys(200)
    tokens_B, _ = sample(logits_BV, sampling, keys_B, tp_group=None, vocab_size=60)
    scores_BV = gumbel_noise(keys_B, 0, 60).double() + logits_BV[:, :60].double() / 1.3
    kept_BV = torch.stack([_kept(logits_V, sampling) for logits_V in logits_BV[:, :60]])
    assert torch.equal(tokens_B, scores_BV.masked_fill(~kept_BV, -math.inf).argmax(1))


@pytest.mark.parametrize("changes", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}])
def test_limits_are_greedy(changes):
    logits_BV = torch.randn(100, 50, generator=torch.Generator().manual_seed(4))
    arguments = {"tp_group": None, "vocab_size": 47}
    greedy = sample(logits_BV, _sampling(temperature=0.0), _keys(100), **arguments)
    drawn = sample(logits_BV, _sampling(**changes), _keys(100), **arguments)
    assert torch.equal(drawn[0], greedy[0])
    assert torch.equal(drawn[1], greedy[1])


def test_a_flat_distribution_under_a_small_top_p_takes_few_rounds(monkeypatch):
    rounds, real = [], module._winner
    monkeypatch.setattr(module, "_winner", lambda *arguments: rounds.append(1) or real(*arguments))
    logits_BV = torch.linspace(0, 1e-3, 20_000).expand(4, 20_000)
    tokens_B, _ = sample(logits_BV, _sampling(top_p=1e-9), _keys(4), tp_group=None, vocab_size=20_000)
    assert tokens_B.tolist() == [19_999] * 4
    assert len(rounds) < 40


def test_a_row_depends_on_its_own_key_and_logits_only():
    logits_BV = 3 * torch.randn(16, 40, generator=torch.Generator().manual_seed(5))
    keys_B = _keys(16)
    sampling, arguments = _sampling(top_k=20, top_p=0.9), {"tp_group": None, "vocab_size": 40}
    together, _ = sample(logits_BV, sampling, keys_B, **arguments)
    alone = [int(sample(logits_BV[b : b + 1], sampling, keys_B[b : b + 1], **arguments)[0]) for b in range(16)]
    assert together.tolist() == alone


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5},
                                     {"top_k": 3, "top_p": 0.5}])
def test_non_finite_logits_give_a_non_finite_log_prob(value, changes):
    logits_BV = torch.zeros(2, 8)
    logits_BV[0, 3] = value
    tokens_B, log_probs_B = sample(logits_BV, _sampling(**changes), _keys(2), tp_group=None, vocab_size=8)
    assert not log_probs_B[0].isfinite()
    assert log_probs_B[1] == pytest.approx(-math.log(8))
    assert ((tokens_B >= 0) & (tokens_B < 8)).all()


def test_bfloat16_logits_are_taken_in_float32():
    logits_BV = torch.randn(4, 50, generator=torch.Generator().manual_seed(6)).bfloat16()
    arguments = {"tp_group": None, "vocab_size": 50}
    narrow = sample(logits_BV, _sampling(top_p=0.9), _keys(4), **arguments)
    wide = sample(logits_BV.float(), _sampling(top_p=0.9), _keys(4), **arguments)
    assert narrow[1].dtype == torch.float32
    assert torch.equal(narrow[0], wide[0]) and torch.equal(narrow[1], wide[1])


@pytest.mark.parametrize("changes, field", [
    ({"temperature": -0.1}, "temperature"), ({"temperature": math.nan}, "temperature"), ({"top_k": -1}, "top_k"),
    ({"top_p": 0.0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"n": 0}, "n"), ({"n": 2, "temperature": 0.0}, "n"),
    ({"max_new_tokens": 0}, "max_new_tokens"), ({"stop_ids": (-1,)}, "stop_ids"), ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
])
def test_settings_that_cannot_be_used_are_refused(changes, field):
    with pytest.raises(ConfigError, match=f"sampling.{field} = "):
        _sampling(**changes)
