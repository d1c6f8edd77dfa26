"""The Triton program of a token's draw, which runs on CUDA in place of torch's operations (sampling.py says what of).

torch's would read and write a column's numbers some twenty times, most of them in 64 bits, for the noise: 350 bytes a
column of a row, beside the 4 that this program reads. Places are counted in 64 bits; no libdevice functions, so that
Triton's interpreter runs it on a CPU.

Legend: B rows, V local vocabulary columns, P parts of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd.rollout import sampling

BLOCK = sampling.KERNEL_PART
WARPS = 8
NUMBERS = 6
"""Of a part (`sampling.own_parts`)."""
NOTHING = tl.constexpr(-1e30)
"""In the place of a logit that is not there: finite, and its exp is 0."""
GOLDEN = tl.constexpr(sampling._GOLDEN)
MULTIPLY_1, MULTIPLY_2 = tl.constexpr(sampling._MULTIPLY_1), tl.constexpr(sampling._MULTIPLY_2)


@triton.jit
def gumbel(key, columns):
    """`sampling.gumbel_noise` of vocabulary columns, up to the rounding of its logarithms."""
    x = key + (columns + 1) * GOLDEN
    # `>>` copies the sign bit down; the masks make the shifts logical.
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * MULTIPLY_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * MULTIPLY_2
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    uniform = (((x >> 11) & ((1 << 53) - 1)).to(tl.float32) + 0.5) * (1.0 / 9007199254740992.0)  # 2^-53
    uniform = tl.minimum(uniform, 1.0 - 1.0 / 16777216.0)  # 1 - 2^-24
    # -log(1 - u) to the last digits of small u, too: what rounding takes from 1 - u is put back by the quotient.
    rest = 1.0 - uniform
    taken = 1.0 - rest
    exponential = tl.where(taken == 0.0, uniform, -tl.log(rest) * (uniform / tl.where(taken == 0.0, 1.0, taken)))
    return -tl.log(exponential)


@triton.jit(do_not_specialize=["rows", "first", "vocab_size"])  # rows finish one by one: no compiling for their number
def _draw_program(
    out_ptr, logits_ptr, keys_ptr, lowest_ptr, row_stride, width, first, vocab_size, rows, temperature,
    DRAWN: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr, NUMBERS: tl.constexpr,
):
    """A part's numbers of one row. LEAST: tokens below the row's lowest logit are not drawn."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    local = part * BLOCK + tl.arange(0, BLOCK)
    inside = (local < width) & (first + local < vocab_size)
    logits = tl.load(logits_ptr + row * row_stride + local, mask=inside, other=NOTHING).to(tl.float32)
    highest, column = tl.max(logits, 0, return_indices=True)
    total = tl.sum(tl.where(inside, tl.exp(logits - highest), 0.0), 0)
    out_ptr += (part.to(tl.int64) * rows + row) * NUMBERS
    begin = first + part * BLOCK
    tl.store(out_ptr, highest.to(tl.float64))
    tl.store(out_ptr + 1, total.to(tl.float64))
    tl.store(out_ptr + 2, (begin + column).to(tl.float64))
    if DRAWN:
        drawn = inside
        if LEAST:
            drawn = drawn & (logits >= tl.load(lowest_ptr + row))
        scores = logits.to(tl.float64) / temperature + gumbel(tl.load(keys_ptr + row), (first + local).to(tl.int64))
        score, place = tl.max(tl.where(drawn, scores, float("-inf")), 0, return_indices=True)
        tl.store(out_ptr + 3, score)
        tl.store(out_ptr + 4, tl.sum(tl.where(tl.arange(0, BLOCK) == place, logits, 0.0), 0).to(tl.float64))
        tl.store(out_ptr + 5, (begin + place).to(tl.float64))


def own_parts(
    logits_BV: Tensor, keys_B: Tensor | None, lowest_B: Tensor | None, temperature: float, first: int, vocab_size: int
) -> Tensor:
    """`sampling.own_parts` with a part for every BLOCK columns; rows of `logits_BV` are contiguous."""
    rows, width = logits_BV.shape
    parts = triton.cdiv(width, BLOCK)
    out_PBN = torch.zeros(parts, rows, NUMBERS, dtype=torch.float64, device=logits_BV.device)
    if rows:
        _draw_program[(rows, parts)](
            out_PBN, logits_BV, logits_BV if keys_B is None else keys_B.contiguous(),
            logits_BV if lowest_B is None else lowest_B.contiguous(),
            logits_BV.stride(0), width, first, vocab_size, rows, temperature,
            DRAWN=keys_B is not None, LEAST=lowest_B is not None, BLOCK=BLOCK, NUMBERS=NUMBERS, num_warps=WARPS,
        )
    return out_PBN
