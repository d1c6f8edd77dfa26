"""Teacher-mixed sampling on real models: against transformers, in any two layouts, and its frequencies."""

from __future__ import annotations

from collections import Counter
from unittest.mock import patch
from weakref import WeakSet

import pytest
import torch
import torch.distributed as dist

from megakd.config import Parallel
from megakd.mcore.decoder import PipelineDecoder
from megakd.rollout import Prompt, Rollout, Sampling
from megakd.rollout.cache import KVCache
from megakd.rollout.mixed import COIN, STUDENT, TEACHER, generate_mixed
from megakd.rollout.sampling import gumbel_noise, noise_keys, uniform
from tests.hf_models import architecture, random_tensors, write_model
from tests.mcore import cases
from tests.ranks import RankError, run_ranks

VOCAB = 150
LENGTHS = (5, 1, 9, 3, 7)
SAMPLING = Sampling(temperature=1.0, top_k=0, top_p=1.0, n=2, max_new_tokens=7, stop_ids=tuple(range(0, 150, 12)),
                    seed=3)
MIX = 0.4
LAYOUTS = {
    "tp2-pp2": (2, Parallel(tensor=2, pad_heads=True), Parallel(pipeline=2)),
    "dp2-tp2": (2, Parallel(), Parallel(tensor=2, pad_heads=True)),
    "tp2dp2-tp2pp2": (4, Parallel(tensor=2, pad_heads=True), Parallel(tensor=2, pipeline=2, pad_heads=True)),
    "vpp2dp2-dp4": (4, Parallel(pipeline=2, virtual_pipeline=2), Parallel()),
}


def _prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    return [Prompt(10 + number, tuple(torch.randint(VOCAB, (length,), generator=generator).tolist()))
            for number, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> tuple[str, str]:
    """Student and teacher; weights so large that no two tokens are near a tie."""
    folder, found = tmp_path_factory.mktemp("mixed"), []
    for seed, layers in ((1, 4), (2, 2)):
        toy = architecture(layers=layers) if layers != 4 else architecture()
        tensors = {name: tensor * 6 if tensor.ndim == 2 else 1 + tensor
                   for name, tensor in random_tensors(toy, seed).items()}
        found.append(str(write_model(folder / str(seed), toy, tensors)))
    return tuple(found)


def _generate(
    directories, student: Parallel, teacher: Parallel, prompts: list[Prompt], sampling: Sampling, mix: float, slots: int
) -> list[Rollout]:
    models = [cases.build(directory, parallel)
              for directory, parallel in zip(directories, (student, teacher), strict=True)]
    return generate_mixed(*models, prompts, sampling, teacher_mix=mix, slots=slots, longest=64, pad_id=0,
                          world_group=dist.group.WORLD)


def _most_caches(directories, prompts: list[Prompt], slots: int) -> int:
    """How many caches there were at a time while two models answered."""
    there, counts, made = WeakSet(), [], PipelineDecoder.new_cache

    def new_cache(*args) -> KVCache:
        cache = made(*args)
        there.add(cache)
        counts.append(len(there))
        return cache

    with patch.object(PipelineDecoder, "new_cache", new_cache):
        _generate(directories, Parallel(), Parallel(), prompts, SAMPLING, MIX, slots)
    assert len(counts) > 2, "there was one turn alone"
    return max(counts)


def test_caches_of_a_turn_are_gone_before_the_next(directories):
    assert run_ranks(1, _most_caches, directories, _prompts(), 4) == [2]


def _naive(directories, prompts: list[Prompt], sampling: Sampling, mix: float) -> list[tuple[list[int], list[bool]]]:
    """Tokens of each response and whether the teacher drew them; everything computed afresh for each token."""
    transformers = pytest.importorskip("transformers")
    models = [transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
              for directory in directories]
    answers = []
    for prompt in prompts:
        for index in range(sampling.n):
            tokens: list[int] = []
            by_teacher: list[bool] = []
            while len(tokens) < sampling.max_new_tokens and not (tokens and tokens[-1] in sampling.stop_ids):
                keys = [noise_keys(sampling.seed + stream * 2**60, *torch.tensor([[prompt.sample_id], [index],
                                                                                  [len(tokens)]]))
                        for stream in (STUDENT, TEACHER, COIN)]
                source = TEACHER if float(uniform(keys[COIN])) < mix else STUDENT
                with torch.no_grad():
                    logits_V = models[source](torch.tensor([[*prompt.tokens, *tokens]])).logits[0, -1]
                tokens.append(int((logits_V + gumbel_noise(keys[source], 0, VOCAB)[0]).argmax()))
                by_teacher.append(source == TEACHER)
            answers.append((tokens, by_teacher))
    return answers


def test_equals_transformers_token_by_token(directories):
    prompts = _prompts()
    [found] = run_ranks(1, _generate, directories, Parallel(), Parallel(), prompts, SAMPLING, MIX, 3)
    expected = _naive(directories, prompts, SAMPLING, MIX)
    assert {rollout.finish_reason for rollout in found} == {"stop", "length"}
    assert len({source for _, by_teacher in expected for source in by_teacher}) == 2
    for rollout, (tokens, by_teacher) in zip(found, expected, strict=True):
        assert list(rollout.tokens) == tokens
        assert [log_prob != log_prob for log_prob in rollout.log_probs] == by_teacher


@pytest.mark.parametrize("name", LAYOUTS)
def test_draws_are_the_same_in_every_pair_of_layouts(directories, name):
    world, student, teacher = LAYOUTS[name]
    prompts = _prompts()
    [whole] = run_ranks(1, _generate, directories, Parallel(), Parallel(), prompts, SAMPLING, MIX, 64)
    for found in run_ranks(world, _generate, directories, student, teacher, prompts, SAMPLING, MIX, 2):
        assert [(r.sample_id, r.index, r.tokens, r.finish_reason) for r in found] == [
            (r.sample_id, r.index, r.tokens, r.finish_reason) for r in whole]


def test_without_a_teacher_s_share_it_is_the_engine_s_own_answer(directories):
    prompts = _prompts()
    [mixed] = run_ranks(1, _generate, directories, Parallel(), Parallel(), prompts, SAMPLING, 0.0, 4)
    [alone] = run_ranks(1, _engine, directories[0], prompts, SAMPLING)
    assert [r.tokens for r in mixed] == [r.tokens for r in alone]


def _engine(directory: str, prompts: list[Prompt], sampling: Sampling) -> list[Rollout]:
    from megakd.rollout import generate

    return generate(PipelineDecoder(cases.build(directory, Parallel()), 64), prompts, sampling, slots=4, pad_id=0)


def test_frequencies_are_the_mixture_s(directories):
    """The first token of 3,000 draws: chi-squared over the ten likeliest tokens and the rest, at a fixed seed."""
    transformers = pytest.importorskip("transformers")
    prompt, draws = _prompts()[0].tokens, 3000
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, n=draws, max_new_tokens=1, stop_ids=(), seed=8)
    [found] = run_ranks(1, _generate, directories, Parallel(), Parallel(), [Prompt(1, prompt)], sampling, MIX, 500)
    probabilities = []
    for directory in directories:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.no_grad():
            probabilities.append(model(torch.tensor([prompt])).logits[0, -1].double().softmax(0))
    mixed_V = (1 - MIX) * probabilities[0] + MIX * probabilities[1]
    counts = Counter(rollout.tokens[0] for rollout in found)
    top = mixed_V.topk(10).indices.tolist()
    expected = [draws * float(mixed_V[token]) for token in top]
    observed = [counts[token] for token in top]
    expected.append(draws - sum(expected))
    observed.append(draws - sum(observed))
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    assert min(expected) > 5 and statistic < 29.6  # 10 degrees of freedom, one in a thousand


def test_logits_that_are_not_finite_are_told_on_every_rank(directories, tmp_path):
    toy = architecture(layers=2)
    tensors = {name: tensor * float("nan") if name.endswith("norm.weight") else tensor
               for name, tensor in random_tensors(toy, 2).items()}
    broken = str(write_model(tmp_path / "broken", toy, tensors))
    with pytest.raises(RankError, match="non-finite logits of the teacher"):
        run_ranks(2, _generate, (directories[0], broken), Parallel(), Parallel(pipeline=2), _prompts(), SAMPLING, 0.9,
                  4)
