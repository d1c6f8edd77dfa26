"""Runs the Triton programs over a chunk's logits; what each reads and writes, and how it is cut into programs.

Bytes a logit's column [C, V], R models of b bytes a logit (4 by default), g bytes a gradient (2 with 16-bit operands):

| function            | reads | writes | which losses                                             |
|---------------------|-------|--------|----------------------------------------------------------|
| `local_statistics`  | R b   | 0      | all, once; that is all for log-probabilities, forward and |
|                     |       |        | reverse KL and expected advantage                        |
| `mixture_sums`      | 2 b   | 0      | jsd: its second pass                                     |
| `bin_masses`        | b     | 0      | akl (and an atomic add of 8 bytes of what is in a bin)   |
| `bin_gaps`          | 2 b   | 0      | akl: its second pass                                     |
| `write_gradient`    | R b   | g      | all                                                      |

`scaled` weighs and rounds d(head) in one pass: 4 bytes read and 2 written a number.

All are bound by memory, but `bin_masses` of a flat teacher: an atomic add is worth several logits' reading, and there
is one for each logit that may belong to the head. That is 1.1 % of SmolLM2-135M's on ordinary text, 11 % of normal
numbers of deviation 3, 61 % of those of deviation 1 (mu 0.5; the latter two of 128,256).

A program takes BLOCK columns at a time with 8 warps: 16 numbers a thread and model, four loads of 16 bytes each, so
that 2 models have 32 KiB on their way from one program and four programs fit on a multiprocessor (of three models
three); an H200 needs some 30 to 40 KiB on the way on each (4.8 TB/s times 0.8 us over 132). Rows are cut into parts
of PART columns rather than a program a row: a chunk of 256 rows would leave multiprocessors idle, and short programs
end together. Parts are combined like the ranks' shares, and do not depend on the device or on the number of rows. No
autotuning: it would run kernels in the middle of a step, and the sums would depend on its outcome.

Legend: C tokens of a chunk, V local vocabulary columns, R models, S numbers, P parts of a row, B bins, K candidates.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megakd.losses.kernels import programs
from megakd.losses.statistics import Chunk

BLOCK = 4096
PART = 4 * BLOCK
WARPS = 8
REGISTERS = {1: 64, 2: 64, 3: 80}
"""Registers a thread of the first pass and of AKL's masses, by models: four programs fit on a Hopper multiprocessor, of
three models three. Left to itself Triton 3.6 takes up to 111, of which two fit. It spills none; 3.9 spills up to 24
bytes, of akl's first pass at odd widths."""
SUMS = {"log_prob": 1, "forward_kl": 3, "reverse_kl": 3, "jsd": 2, "akl": 4, "advantage": 4}
"""Sums of the first pass, without those of the log-probabilities beside it."""


def local_statistics(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """A chunk's maxima [., P, C] and the first pass's sums [S, P, C], each part's relative to its own maxima.

    One more sum at the end where the loss has log-probabilities beside it: the student's at temperature 1. A part
    without a column has the maximum -1e30 and sums of 0.
    """
    form, width = chunk.form, chunk.columns.width
    logits = _three(chunk)
    maxima = 1 if form.kind == "log_prob" else 3 if form.kind in ("akl", "advantage") else 2
    beside = form.log_prob_weights_T is not None
    parts, part, block = _parts(width)
    rows = len(logits[0])
    out_SPC = logits[0].new_empty(maxima + SUMS[form.kind] + beside, parts, rows, dtype=torch.float32)
    if rows:
        programs.statistics_program[(rows, parts)](
            out_SPC, *logits, *(each.stride(0) for each in logits), width, part, form.temperature,
            KIND=form.kind, LOG_PROBS=beside, FILLED=_filled(width, logits), BLOCK=block, num_warps=WARPS,
            maxnreg=REGISTERS[len(chunk.logits)],
        )
    return out_SPC[:maxima], out_SPC[maxima:]


def mixture_sums(chunk: Chunk, numbers_3C: Tensor) -> Tensor:
    """JSD's sums [2, C] of its second pass; `numbers_3C` are both maxima and the shift of x."""
    student_CV, teacher_CV = chunk.logits
    parts, part, block = _parts(chunk.columns.width)
    rows = len(student_CV)
    out_2PC = numbers_3C.new_empty(2, parts, rows)
    if rows:
        programs.mixture_program[(rows, parts)](
            out_2PC, student_CV, teacher_CV, numbers_3C, student_CV.stride(0), teacher_CV.stride(0),
            numbers_3C.stride(0), chunk.columns.width, part, FILLED=_filled(chunk.columns.width, chunk.logits),
            BLOCK=block, num_warps=WARPS,
        )
    return out_2PC.sum(1)


def write_gradient(chunk: Chunk, saved_SC: Tensor) -> None:
    """Writes d value / d student logits to `chunk.gradient_CV`, in its dtype."""
    form, columns, out_CV = chunk.form, chunk.columns, chunk.gradient_CV
    logits = _three(chunk)
    rows, block = len(out_CV), _block(columns.width)
    if not rows or not columns.width:
        return
    saved_SC = saved_SC.contiguous()
    labels_C = weights_2C = saved_SC  # never read where the loss has none
    if form.labels_T is not None:
        labels_C = (form.labels_T[chunk.rows] - columns.first).to(torch.int32)
    beside = form.log_prob_weights_T is not None
    if beside:
        weights_2C = torch.stack([form.inner_weights_T[chunk.rows], form.log_prob_weights_T[chunk.rows]]).float()
    blocks = triton.cdiv(columns.width, block)
    programs.gradient_program[(rows * blocks,)](
        out_CV, *logits, saved_SC, labels_C, weights_2C,
        out_CV.stride(0), *(each.stride(0) for each in logits), rows, len(saved_SC) - 3, rows,
        columns.width, blocks, form.beta, form.temperature, form.cap or 1.0,
        KIND=form.kind, LOG_PROBS=beside, SOFTCAP=form.cap is not None,
        FILLED=_filled(columns.width, [out_CV, *logits]), BLOCK=block, num_warps=WARPS,
    )


def scaled(source: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """out = source * weight, rounded once; `source` is contiguous float32, `weight` 0-d, `out` may be the source."""
    numbers = source.numel()
    if numbers:
        grid = (triton.cdiv(numbers, BLOCK),)
        programs.scale_program[grid](out, source, weight.float(), numbers, BLOCK=BLOCK, num_warps=WARPS)
    return out


def bin_masses(chunk: Chunk, numbers_3C: Tensor, bins: int) -> Tensor:
    """AKL's sums of exp(teacher - max) over the bins' local columns [B, C]; `numbers_3C` as `masses_program` has them.

    Atomic adds of whole numbers: exact, so that runs repeat bit for bit, which those of floating-point numbers do not.
    """
    teacher_CV, width = chunk.logits[1], chunk.columns.width
    mass_CB = torch.zeros(len(teacher_CV), bins, dtype=torch.int64, device=teacher_CV.device)
    block = _block(width)
    blocks = triton.cdiv(width, block)
    if len(teacher_CV) and width:
        programs.masses_program[(len(teacher_CV) * blocks,)](
            mass_CB, teacher_CV, numbers_3C, teacher_CV.stride(0), numbers_3C.stride(0), width, blocks,
            BINS=bins, BLOCK=block, num_warps=WARPS, maxnreg=REGISTERS[1],
        )
    return mass_CB.double().div_(programs.MASS_UNIT.value).to(numbers_3C.dtype).t()


def bin_gaps(chunk: Chunk, numbers_6C: Tensor, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """AKL's gaps [2, C] of all columns and of those before the head's last bin, that bin's tokens, their number [C].

    The tokens are [3, K, C]: logit, id and gap, -inf, 0 and 0 where there is none. `numbers_6C` as `gaps_program` has
    them.
    """
    student_CV, teacher_CV = chunk.logits
    parts, part, block = _parts(chunk.columns.width)
    rows = len(student_CV)
    out_2PC = numbers_6C.new_empty(2, parts, rows)
    held_3KC = numbers_6C.new_zeros(3, candidates, rows)
    held_3KC[0] = float("-inf")
    counts_C = torch.zeros(rows, dtype=torch.int32, device=student_CV.device)
    if rows:
        programs.gaps_program[(rows, parts)](
            out_2PC, held_3KC, counts_C, student_CV, teacher_CV, numbers_6C, student_CV.stride(0),
            teacher_CV.stride(0), numbers_6C.stride(0), chunk.columns.width, part, chunk.columns.first,
            CANDIDATES=candidates, FILLED=_filled(chunk.columns.width, chunk.logits), BLOCK=block, num_warps=WARPS,
        )
    return out_2PC.sum(1), held_3KC, counts_C


def _three(chunk: Chunk) -> list[Tensor]:
    """Three models' logits: the student's stand in for those that the loss has not, and are not read."""
    return chunk.logits + chunk.logits[:1] * (3 - len(chunk.logits))


def _filled(width: int, matrices: list[Tensor]) -> bool:
    """Whether all rows of a width that is no multiple of 16 are followed by memory up to one, as a `Room`'s are."""
    whole = triton.cdiv(width, 16) * 16
    return whole > width and all(
        each.stride(0) >= whole
        and each.storage_offset() + (len(each) - 1) * each.stride(0) + whole <= each.untyped_storage().nbytes()
        // each.element_size() for each in matrices)


def _block(width: int) -> int:
    """Columns that a program takes at a time: all of a narrow row."""
    return min(BLOCK, max(128, triton.next_power_of_2(width)))


def _parts(width: int) -> tuple[int, int, int]:
    """Number of parts of a row, a part's columns, and those of a block."""
    block = _block(width)
    part = max(PART, block)
    return max(1, triton.cdiv(width, part)), part, block
