"""The Triton programs; launch.py says what they are given, and how large they are.

What follows a chunk's size (strides of a few numbers a token, counts of rows) is not compiled for: the last chunk of a
micro-batch has another size each time, and compiling takes a second.

A program works on one row's run of columns in float32, whatever the logits' dtype. Places in a matrix are counted in 64
bits, since rows x columns exceeds 2^31 at T = 8192 and V = 262144. Only features that Triton 3.6 has are used, and no
libdevice functions, so that Triton's interpreter runs all of it on a CPU.

Legend: C tokens of a chunk, V local vocabulary columns, P parts of a row, B bins, K candidates.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(-1e30)
"""In the place of a logit that is not there. Finite, since differences of two must be numbers; its exp is 0."""
MASS_UNIT = tl.constexpr(float(2**40))
"""Masses of bins are added up as whole numbers of 2^-40, whose sum no order of the additions changes."""


@triton.jit
def _softplus_of_minus_abs(x):
    """log(1 + exp(-|x|)), to the last digits where that is small, too.

    log(1 + y) / y over [0, 1] by the polynomial of degree 8 that is nearest to it: its relative error is 3e-8 (found by
    Remez' exchange), and 2.1e-7 with its float32 sums. A logarithm would lose y's digits in 1 + y.
    """
    y = tl.exp(-tl.abs(x))
    quotient = y * 0.0052326943 - 0.029505239
    quotient = quotient * y + 0.078225952
    quotient = quotient * y - 0.13663246
    quotient = quotient * y + 0.19106007
    quotient = quotient * y - 0.24842982
    quotient = quotient * y + 0.33319097
    quotient = quotient * y - 0.49999493
    quotient = quotient * y + 0.99999997
    return quotient * y


@triton.jit
def _readable(last, FILLED: tl.constexpr):
    """Where a row's numbers end that may be read or written. Of a row that is followed by memory of its own (FILLED) a
    multiple of 16: a mask that ends elsewhere would leave single numbers of 4 bytes in the place of 16 bytes at once.
    """
    return tl.cdiv(last, 16) * 16 if FILLED else last


@triton.jit
def _numbers(row_ptr, columns, readable, inside, FILLED: tl.constexpr):
    """A row's logits at some columns in float32, NOTHING in the place of those that are not `inside`."""
    numbers = tl.load(row_ptr + columns, mask=columns < readable, other=NOTHING).to(tl.float32)
    return tl.where(inside, numbers, NOTHING) if FILLED else numbers


@triton.jit
def statistics_program(
    out_ptr, student_ptr, teacher_ptr, reference_ptr, student_stride, teacher_stride, reference_stride,
    width, part_width, temperature, KIND: tl.constexpr, LOG_PROBS: tl.constexpr, FILLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A part's maxima, and its sums relative to these: [maxima and sums, P, C], in the order of the torch form.

    The sums so far are rescaled whenever a block of columns has a higher maximum, so each logit is read once.
    """
    TEACHER: tl.constexpr = KIND != "log_prob"
    row, part = tl.program_id(0), tl.program_id(1)
    first = part * part_width
    last = tl.minimum(first + part_width, width)
    student_ptr += row.to(tl.int64) * student_stride
    teacher_ptr += row.to(tl.int64) * teacher_stride
    reference_ptr += row.to(tl.int64) * reference_stride
    student_max, teacher_max, third_max = -1e30, -1e30, -1e30
    student_sum, teacher_sum, reference_sum, cross, teacher_cross, warm_sum = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    readable = _readable(last, FILLED)
    for start in range(first, last, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < last
        student = _numbers(student_ptr, columns, readable, inside, FILLED)
        if TEACHER:
            teacher = _numbers(teacher_ptr, columns, readable, inside, FILLED)
        if KIND == "advantage":
            reference = _numbers(reference_ptr, columns, readable, inside, FILLED)
        higher = tl.maximum(student_max, tl.max(student, axis=0))
        student_step = student_max - higher
        student_max = higher
        student -= student_max
        student_exp = tl.exp(student)
        student_scale = tl.exp(student_step)
        # The cross sums come before the plain ones, as they need those of the columns before.
        if TEACHER:
            if KIND == "akl":
                third_max = tl.maximum(third_max, tl.max(tl.where(inside, -teacher, NOTHING), axis=0))
            higher = tl.maximum(teacher_max, tl.max(teacher, axis=0))
            teacher_step = teacher_max - higher
            teacher_max = higher
            teacher -= teacher_max
            teacher_exp = tl.exp(teacher)
            teacher_scale = tl.exp(teacher_step)
            if KIND == "forward_kl":
                cross = teacher_scale * (cross + (teacher_step - student_step) * teacher_sum)
                cross += tl.sum(teacher_exp * (teacher - student), axis=0)
            if KIND == "reverse_kl" or KIND == "akl":
                cross = student_scale * (cross + (student_step - teacher_step) * student_sum)
                cross += tl.sum(student_exp * (student - teacher), axis=0)
            if KIND == "akl":
                teacher_cross = teacher_scale * (teacher_cross + (student_step - teacher_step) * teacher_sum)
                teacher_cross += tl.sum(teacher_exp * (student - teacher), axis=0)
            if KIND == "advantage":
                higher = tl.maximum(third_max, tl.max(reference, axis=0))
                reference_step = third_max - higher
                third_max = higher
                reference -= third_max
                cross = student_scale * (cross + (teacher_step - reference_step) * student_sum)
                cross += tl.sum(student_exp * (teacher - reference), axis=0)
                reference_sum = reference_sum * tl.exp(reference_step) + tl.sum(tl.exp(reference), axis=0)
            teacher_sum = teacher_sum * teacher_scale + tl.sum(teacher_exp, axis=0)
        student_sum = student_sum * student_scale + tl.sum(student_exp, axis=0)
        if LOG_PROBS:
            warm_sum = warm_sum * tl.exp(student_step * temperature) + tl.sum(tl.exp(student * temperature), axis=0)

    step = tl.num_programs(1) * tl.num_programs(0)
    out_ptr += part * tl.num_programs(0) + row
    tl.store(out_ptr, student_max)
    if TEACHER:
        out_ptr += step
        tl.store(out_ptr, teacher_max)
    if KIND == "akl" or KIND == "advantage":
        out_ptr += step
        tl.store(out_ptr, third_max)
    out_ptr += step
    tl.store(out_ptr, student_sum)
    if TEACHER:
        out_ptr += step
        tl.store(out_ptr, teacher_sum)
    if KIND == "advantage":
        out_ptr += step
        tl.store(out_ptr, reference_sum)
    if TEACHER and KIND != "jsd":
        out_ptr += step
        tl.store(out_ptr, cross)
    if KIND == "akl":
        out_ptr += step
        tl.store(out_ptr, teacher_cross)
    if LOG_PROBS:
        out_ptr += step
        tl.store(out_ptr, warm_sum)


@triton.jit(do_not_specialize=["numbers_stride"])
def mixture_program(
    out_ptr, student_ptr, teacher_ptr, numbers_ptr, student_stride, teacher_stride, numbers_stride,
    width, part_width, FILLED: tl.constexpr, BLOCK: tl.constexpr,
):
    """A part's sums of JSD's second pass [2, P, C]: of exp(student) softplus(x) and exp(teacher) softplus(-x).

    `numbers` are [3, C]: both maxima, and what x is more than the difference of the logits.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    first = part * part_width
    last = tl.minimum(first + part_width, width)
    student_ptr += row.to(tl.int64) * student_stride
    teacher_ptr += row.to(tl.int64) * teacher_stride
    student_max = tl.load(numbers_ptr + row)
    teacher_max = tl.load(numbers_ptr + numbers_stride + row)
    shift = tl.load(numbers_ptr + 2 * numbers_stride + row)
    student_sum, teacher_sum = 0.0, 0.0
    readable = _readable(last, FILLED)
    for start in range(first, last, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < last
        student = _numbers(student_ptr, columns, readable, inside, FILLED)
        teacher = _numbers(teacher_ptr, columns, readable, inside, FILLED)
        x = teacher - student + shift
        tail = _softplus_of_minus_abs(x)
        student_sum += tl.sum(tl.exp(student - student_max) * (tl.maximum(x, 0.0) + tail), axis=0)
        teacher_sum += tl.sum(tl.exp(teacher - teacher_max) * (tl.maximum(-x, 0.0) + tail), axis=0)
    out_ptr += part * tl.num_programs(0) + row
    tl.store(out_ptr, student_sum)
    tl.store(out_ptr + tl.num_programs(1) * tl.num_programs(0), teacher_sum)


@triton.jit(do_not_specialize=["saved_stride", "lse_place", "rows", "blocks"])
def gradient_program(
    out_ptr, student_ptr, teacher_ptr, reference_ptr, saved_ptr, labels_ptr, weights_ptr,
    out_stride, student_stride, teacher_stride, reference_stride, saved_stride, lse_place, rows,
    width, blocks, beta, temperature, cap,
    KIND: tl.constexpr, LOG_PROBS: tl.constexpr, SOFTCAP: tl.constexpr, FILLED: tl.constexpr, BLOCK: tl.constexpr,
):
    """d value / d student logits of one block of one row; `out` may be the student's logits themselves.

    `saved` are the numbers [., C] that the loss keeps, the one at `lse_place` for the log-probabilities beside it;
    `labels` local columns [C]; `weights` [2, C], of the loss and of the log-probabilities beside it.
    """
    program = tl.program_id(0)
    row = program // blocks
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    # Nothing is summed here: what is written beyond the width is as little read as what was read there.
    inside = columns < _readable(width, FILLED)
    student = tl.load(student_ptr + row.to(tl.int64) * student_stride + columns, mask=inside, other=0.0)
    student = student.to(tl.float32)
    if KIND != "log_prob":
        teacher = tl.load(teacher_ptr + row.to(tl.int64) * teacher_stride + columns, mask=inside, other=0.0)
        teacher = teacher.to(tl.float32)
    if KIND == "advantage":
        reference = tl.load(reference_ptr + row.to(tl.int64) * reference_stride + columns, mask=inside, other=0.0)
        reference = reference.to(tl.float32)
    saved_ptr += row
    prob = tl.exp(student - tl.load(saved_ptr))  # every loss keeps the student's log of the sum of exponentials first
    if KIND == "log_prob":
        gradient = tl.where(columns == tl.load(labels_ptr + row), 1.0, 0.0) - prob
    if KIND == "forward_kl":
        gradient = prob - tl.exp(teacher - tl.load(saved_ptr + saved_stride))
    if KIND == "reverse_kl":
        gradient = prob * (student - teacher - tl.load(saved_ptr + saved_stride))
    if KIND == "advantage":
        gradient = prob * ((teacher - reference - tl.load(saved_ptr + saved_stride)) * beta)
    if KIND == "jsd":
        x = teacher - student + tl.load(saved_ptr + saved_stride)
        part = tl.maximum(x, 0.0) + _softplus_of_minus_abs(x) - tl.load(saved_ptr + 2 * saved_stride)
        gradient = prob * (part * (beta - 1.0))
    if KIND == "akl":
        log_prob, teacher_log_prob = student - tl.load(saved_ptr), teacher - tl.load(saved_ptr + saved_stride)
        reverse, head_share = tl.load(saved_ptr + 2 * saved_stride), tl.load(saved_ptr + 3 * saved_stride)
        gradient = prob * ((log_prob - teacher_log_prob - reverse) * (1.0 - head_share) + head_share)
        gradient -= tl.exp(teacher_log_prob) * head_share
    if LOG_PROBS:
        warm_prob = tl.exp(student * temperature - tl.load(saved_ptr + lse_place * saved_stride))
        of_label = tl.where(columns == tl.load(labels_ptr + row), 1.0, 0.0) - warm_prob
        # The caller divides by the temperature, which the log-probabilities have nothing to do with.
        log_prob_weight = tl.load(weights_ptr + rows + row) * temperature
        gradient = gradient * tl.load(weights_ptr + row) + of_label * log_prob_weight
    if SOFTCAP:
        gradient *= 1.0 - (student / cap) * (student / cap)
    tl.store(out_ptr + row.to(tl.int64) * out_stride + columns, gradient.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_program(out_ptr, source_ptr, weight_ptr, numbers, BLOCK: tl.constexpr):
    """One block of source x weight, both contiguous; `out` may be the source itself."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < numbers
    scaled = tl.load(source_ptr + places, mask=inside) * tl.load(weight_ptr)
    tl.store(out_ptr + places, scaled.to(out_ptr.dtype.element_ty), mask=inside)


# -------------------------------------------------------------------------------------------------------------- AKL
@triton.jit(do_not_specialize=["teacher_stride", "numbers_stride", "blocks"])
def masses_program(
    out_ptr, teacher_ptr, numbers_ptr, teacher_stride, numbers_stride, width, blocks,
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Adds one block's exp(teacher) to its row's bins [C, B], whole numbers of 1 / MASS_UNIT.

    `numbers` are [3, C]: the teacher's maximum, bins a logit, and where the bins end, in bins. Columns beyond that end
    are left out: of a trained teacher's nearly all, and with them their atomic adds.

    It reads 4 bytes a thread: what comes as 16 has to change threads before it can be added up, by way of shared
    memory, 17 bytes a logit. So nothing is said of the stride, whose multiples of 16 would let it.
    """
    program = tl.program_id(0)
    row = program // blocks
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    teacher_ptr += row.to(tl.int64) * teacher_stride
    teacher = tl.load(teacher_ptr + columns, mask=inside, other=NOTHING).to(tl.float32)
    teacher_max = tl.load(numbers_ptr + row)
    place = (teacher_max - teacher) * tl.load(numbers_ptr + numbers_stride + row)
    # What is not finite is in no bin: the sums name it, and no index may follow from it.
    counted = inside & (place >= 0.0) & (place < tl.load(numbers_ptr + 2 * numbers_stride + row))
    bins = tl.where(counted, place, 0.0).to(tl.int32)
    mass = (tl.exp(teacher - teacher_max) * MASS_UNIT + 0.5).to(tl.int64)
    # Relaxed: else each add waits for all that went before, and empties the cache.
    tl.atomic_add(out_ptr + row.to(tl.int64) * BINS + bins, mass, mask=counted, sem="relaxed")


@triton.jit(do_not_specialize=["numbers_stride", "first_id"])
def gaps_program(
    out_ptr, held_ptr, counts_ptr, student_ptr, teacher_ptr, numbers_ptr, student_stride, teacher_stride,
    numbers_stride, width, part_width, first_id, CANDIDATES: tl.constexpr, FILLED: tl.constexpr, BLOCK: tl.constexpr,
):
    """A part's sums [2, P, C] of |P - Q|, over all and over the bins before the head's last one; and that bin's tokens.

    These go to `held` [3, K, C] (logit, id, gap) as long as there is room, in any order; `counts` [C] says how many
    there are. `numbers` are [6, C]: both logs of the sums of exponentials, the teacher's maximum, bins a logit, the
    head's last bin and where it ends.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    rows = tl.num_programs(0)
    first = part * part_width
    last = tl.minimum(first + part_width, width)
    student_ptr += row.to(tl.int64) * student_stride
    teacher_ptr += row.to(tl.int64) * teacher_stride
    lse = tl.load(numbers_ptr + row)
    teacher_lse = tl.load(numbers_ptr + numbers_stride + row)
    teacher_max = tl.load(numbers_ptr + 2 * numbers_stride + row)
    bins_a_logit = tl.load(numbers_ptr + 3 * numbers_stride + row)
    bin_start = tl.load(numbers_ptr + 4 * numbers_stride + row)
    bin_end = tl.load(numbers_ptr + 5 * numbers_stride + row)
    all_gaps, gaps_before = 0.0, 0.0
    readable = _readable(last, FILLED)
    for start in range(first, last, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < last
        student = _numbers(student_ptr, columns, readable, inside, FILLED)
        teacher = _numbers(teacher_ptr, columns, readable, inside, FILLED)
        gap = tl.abs(tl.exp(student - lse) - tl.exp(teacher - teacher_lse))
        place = (teacher_max - teacher) * bins_a_logit
        all_gaps += tl.sum(gap, axis=0)
        gaps_before += tl.sum(tl.where(place < bin_start, gap, 0.0), axis=0)
        in_bin = inside & (place >= bin_start) & (place < bin_end)
        found = tl.sum(in_bin.to(tl.int32), axis=0)
        if found > 0:
            held = tl.atomic_add(counts_ptr + row, found, sem="relaxed") + tl.cumsum(in_bin.to(tl.int32), axis=0) - 1
            fits = in_bin & (held < CANDIDATES)
            slot_ptr = held_ptr + held.to(tl.int64) * rows + row
            tl.store(slot_ptr, teacher, mask=fits)
            tl.store(slot_ptr + CANDIDATES * rows, (columns + first_id).to(tl.float32), mask=fits)
            tl.store(slot_ptr + 2 * CANDIDATES * rows, gap, mask=fits)
    out_ptr += part * rows + row
    tl.store(out_ptr, all_gaps)
    tl.store(out_ptr + tl.num_programs(1) * rows, gaps_before)
