"""Sampling over 1, 2 and 4 vocabulary shards: the same tokens, exactly; and the engine over layouts."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megakd.rollout import Prompt, Sampling, generate
from megakd.rollout.ring import Ring
from megakd.rollout.sampling import noise_keys, sample
from tests.ranks import run_ranks, subgroup
from tests.toy_decoder import VOCAB, ToyDecoder

SETTINGS = [  # temperature, top_k, top_p
    (0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 5, 1.0), (1.0, 0, 0.9), (2.0, 0, 0.4), (1.3, 20, 0.8), (1.0, 40, 0.95),
    (1.0, 0, 1e-6), (1.0, 1, 1.0),
]


def _sampling(temperature: float, top_k: int, top_p: float, **changes) -> Sampling:
    settings = {"n": 1, "max_new_tokens": 10, "stop_ids": (3, 8, 21), "seed": 9}
    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, **{**settings, **changes})


def _logits(vocab_size: int, padded: int) -> torch.Tensor:
    """48 rows, padding filled with numbers that would win; a third of the rows are full of ties, some across shards."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits_BV = torch.randn(48, padded, generator=generator) * torch.rand(48, 1, generator=generator) * 8
    logits_BV[::3] = logits_BV[::3].round()
    logits_BV[::9] = 0.0
    logits_BV[:, vocab_size:] = 100.0
    return logits_BV


def _draw_all(vocab_size: int, padded: int, tensor: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """On each rank: every setting's tokens and log-probs from this rank's columns."""
    group, rank = None, 0
    if tensor > 1:
        group = subgroup(tuple(range(tensor)))
        rank = dist.get_rank(group)
    shard_BV = _logits(vocab_size, padded).chunk(tensor, dim=1)[rank]
    ids_B = torch.arange(48)
    keys_B = noise_keys(9, ids_B, ids_B % 3, ids_B % 5)
    return [sample(shard_BV, _sampling(*settings), keys_B, tp_group=group, vocab_size=vocab_size)
            for settings in SETTINGS]


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("vocab_size, padded", [(64, 64), (61, 64), (37, 64), (30, 64), (13, 16)])
def test_the_same_tokens_on_any_number_of_shards(vocab_size, padded, tensor):
    whole = _draw_all(vocab_size, padded, 1)
    for rank, shards in enumerate(run_ranks(tensor, _draw_all, vocab_size, padded, tensor)):
        for settings, (tokens, log_probs), (whole_tokens, whole_log_probs) in zip(
                SETTINGS, shards, whole, strict=True):
            assert torch.equal(tokens, whole_tokens), (settings, rank)
            torch.testing.assert_close(log_probs, whole_log_probs, atol=1e-5, rtol=1e-5)
            assert tokens.max() < vocab_size


def _prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    return [Prompt(number, tuple(torch.randint(VOCAB, (length,), generator=generator).tolist()))
            for number, length in enumerate((5, 1, 9, 3, 14, 2, 7))]


def _generate(tensor: int, pipeline: int, settings: tuple) -> list:
    """Ranks are numbered tensor first, as in `megakd.layout`; every rank makes all groups."""
    tensor_groups = [tuple(range(stage * tensor, (stage + 1) * tensor)) for stage in range(pipeline)]
    pipeline_groups = [tuple(range(place, tensor * pipeline, tensor)) for place in range(tensor)]
    made = {ranks: subgroup(ranks) for ranks in tensor_groups + pipeline_groups}
    stage, place = divmod(dist.get_rank(), tensor)
    decoder = ToyDecoder(layers=4, tp_group=made[tensor_groups[stage]], pp_group=made[pipeline_groups[place]])
    return generate(decoder, _prompts(), _sampling(*settings, n=1 if settings[0] == 0 else 2), slots=3, pad_id=0)


@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2), (2, 2), (1, 4)])
@pytest.mark.parametrize("settings", [(0.0, 0, 1.0), (1.2, 30, 0.9)])
def test_the_engine_gives_every_rank_of_any_layout_the_same_rollouts(settings, tensor, pipeline):
    sampling = _sampling(*settings, n=1 if settings[0] == 0 else 2)
    whole = generate(ToyDecoder(layers=4), _prompts(), sampling, slots=3, pad_id=0)
    everywhere = run_ranks(tensor * pipeline, _generate, tensor, pipeline, settings)
    assert all(rollouts == everywhere[0] for rollouts in everywhere)
    for mine, theirs in zip(everywhere[0], whole, strict=True):
        assert (mine.sample_id, mine.index, mine.tokens, mine.finish_reason) == (
            theirs.sample_id, theirs.index, theirs.tokens, theirs.finish_reason)
        torch.testing.assert_close(torch.tensor(mine.log_probs), torch.tensor(theirs.log_probs), atol=1e-5, rtol=1e-5)


def _ticks(pipeline: int, count: int, slots: int) -> tuple[int, int]:
    """Ticks of a ring while `count` prompts of one token are answered by 12 tokens each, and this stage's passes."""
    decoder = ToyDecoder(layers=4, pp_group=subgroup(tuple(range(pipeline))))
    prompts = [Prompt(number, (number,)) for number in range(count)]
    sampling = _sampling(0.0, 0, 1.0, max_new_tokens=12, stop_ids=())
    with patch.object(Ring, "tick", autospec=True, side_effect=Ring.tick) as tick:
        generate(decoder, prompts, sampling, slots=slots, pad_id=0)
    return tick.call_count, len(decoder.batches)


def test_all_stages_are_at_work_at_a_time():
    """Each of the four stages has another pass; only the first and the last ticks leave some idle."""
    for ticks, passes in run_ranks(4, _ticks, 4, 8, 2):
        assert (ticks, passes) == (4 * 12 + 3, 4 * 12)
    # A company for each answer, where these are fewer than the stages.
    for ticks, passes in run_ranks(4, _ticks, 4, 2, 8):
        assert passes == 2 * 12 and ticks <= 4 * 12 + 1
