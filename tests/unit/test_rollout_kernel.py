"""The draw's Triton kernel against torch's form of it: on CUDA where there is a device, else in the interpreter, which
takes tens of milliseconds a program; hence few rows."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from megakd.rollout import Sampling, kernel, sampling  # noqa: E402
from megakd.rollout.kernel import gumbel  # noqa: E402
from megakd.rollout.sampling import gumbel_noise, noise_keys, own_parts, sample  # noqa: E402

# numpy, the interpreter's, tells of what the kernel makes of infinite logits.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _keys(count: int) -> torch.Tensor:
    ids_B = torch.arange(count, device=DEVICE)
    return noise_keys(5, ids_B, ids_B % 3, ids_B % 4)


def _logits(rows: int, width: int) -> torch.Tensor:
    """Rows that lie apart in memory; every second full of ties."""
    logits_BV = 3 * torch.randn(rows, width + 3, generator=torch.Generator().manual_seed(7)).to(DEVICE)[:, :width]
    logits_BV[::2] = logits_BV[::2].round()
    return logits_BV


@triton.jit
def _noise_program(out_ptr, key_ptr, first, BLOCK: tl.constexpr):
    columns = first + tl.arange(0, BLOCK).to(tl.int64)
    tl.store(out_ptr + tl.arange(0, BLOCK), gumbel(tl.load(key_ptr), columns))


@pytest.mark.parametrize("first", [0, 128_000])
def test_noise(first):
    key_1, found_V = _keys(8)[7:], torch.empty(1 << 16, device=DEVICE)
    _noise_program[(1,)](found_V, key_1, first, BLOCK=len(found_V))
    right_V = gumbel_noise(key_1, first, len(found_V))[0]
    assert right_V.min() < -2 and right_V.max() > 9
    torch.testing.assert_close(found_V, right_V, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width, first, vocab_size, temperature, lowest", [
    (9000, 18_000, 24_003, 0.7, None), (9000, 0, 9000, 1.0, 0.5), (100, 300, 350, 1.3, 0.5), (40, 80, 60, 1.0, None)],
    ids=["a part of padding alone", "three parts", "less than a part", "padding alone"])
def test_parts(width, first, vocab_size, temperature, lowest):
    logits_BV, keys_B = _logits(4, width), _keys(4)
    lowest_B = None if lowest is None else torch.full((4, 2), lowest, device=DEVICE)[:, 1]
    begins = range(0, width, kernel.BLOCK)
    right_PBN = torch.cat([own_parts(logits_BV[:, begin : begin + kernel.BLOCK], keys_B, lowest_B, temperature,
                                     first + begin, vocab_size) for begin in begins])
    found_PBN = kernel.own_parts(logits_BV, keys_B, lowest_B, temperature, first, vocab_size)
    there = torch.tensor([first + begin < vocab_size for begin in begins])  # the others are padding
    assert torch.equal(found_PBN[..., 0], right_PBN[..., 0])
    torch.testing.assert_close(found_PBN[..., 1], right_PBN[..., 1], rtol=1e-6, atol=0)
    assert torch.equal(found_PBN[there][..., [2, 4, 5]], right_PBN[there][..., [2, 4, 5]])
    torch.testing.assert_close(found_PBN[there][..., 3], right_PBN[there][..., 3], rtol=1e-6, atol=1e-6)
    assert (found_PBN[~there][..., 3] == -math.inf).all()


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {}, {"temperature": 0.6, "top_k": 7}, {"top_p": 0.8}])
def test_a_draw_is_torch_s(monkeypatch, changes):
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "n": 1, "max_new_tokens": 8, "stop_ids": (), "seed": 0}
    how, logits_BV = Sampling(**settings | changes), _logits(8, 300)
    logits_BV[2, 17], logits_BV[3, 18] = math.nan, math.inf
    right = sample(logits_BV.cpu(), how, _keys(8).cpu(), tp_group=None, vocab_size=290)
    monkeypatch.setattr(sampling, "own_parts", kernel.own_parts)
    monkeypatch.setattr(kernel, "BLOCK", 128)  # three parts
    tokens_B, log_probs_B = (each.cpu() for each in sample(logits_BV, how, _keys(8), tp_group=None, vocab_size=290))
    finite = torch.tensor([0, 1, 4, 5, 6, 7])
    assert torch.equal(tokens_B[finite], right[0][finite]) and ((tokens_B >= 0) & (tokens_B < 290)).all()
    torch.testing.assert_close(log_probs_B[finite], right[1][finite], rtol=1e-6, atol=1e-6)
    assert not log_probs_B[[2, 3]].isfinite().any()
