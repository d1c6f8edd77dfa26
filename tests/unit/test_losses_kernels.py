"""The losses' Triton kernels against the float64 reference: on CUDA where there is a device, else in the interpreter.

tests/conftest.py asks for the interpreter where it is needed. It takes some milliseconds a program, so rows are few;
blocks are small, so that a row has several parts and an uneven end.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from megakd import losses
from megakd.losses import hidden_states, reference, statistics
from megakd.losses.combined import WithLogProbs
from megakd.losses.divergence import AdaptiveKL, row_divergence
from megakd.losses.fused_head import ExpectedAdvantage, LogProb
from megakd.losses.statistics import Chunk, Columns, KernelForm
from tests import loss_cases

pytest.importorskip("triton", reason="Triton is not installed")
launch = importlib.import_module("megakd.losses.kernels.launch")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = 2.0**-8 if DEVICE.type == "cuda" else 2.0**-7
ALL = pytest.mark.parametrize("loss", loss_cases.LOSSES)
# numpy, the interpreter's, tells of what the kernels make of memory beyond a row's end, which is nobody's.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """Small blocks, and kernels on the CPU too."""
    monkeypatch.setattr(launch, "BLOCK", 16)
    monkeypatch.setattr(launch, "PART", 32)
    monkeypatch.setattr(statistics, "KERNEL_DEVICES", {"cuda", "cpu"})


# ------------------------------------------------------------------------------------------------- the kernels alone
def _row_loss(loss, labels_T):
    if loss == "log_probs":
        return LogProb(labels_T)
    return ExpectedAdvantage(0.3) if loss == "advantage" else row_divergence(loss, beta=0.3, mu=0.47)


def _reference(loss, logits, labels_T):
    if loss == "log_probs":
        return reference.token_log_probs(*logits, labels_T)
    if loss == "advantage":
        return reference.expected_advantage(*logits, beta=0.3)
    return reference.divergence(loss, *logits, beta=0.3, mu=0.47)


def _logits(loss, rows, width, dtype, big=False):
    """Random logits of a loss's models, rows that are further apart than they are wide, and labels.

    Big ones are between -80 and 80, and some of all parts close to 80: else no probability differs from 0 and 1.
    """
    generator = torch.Generator().manual_seed(5)
    models = [torch.randn(rows, width + 3, generator=generator, dtype=torch.float64) * 3.0
              for _ in range(loss_cases.SIZES.get(loss, 2))]
    if big:
        for each in models:
            each.mul_(20.0).clamp_(-80.0, 60.0)
            each[:, ::9] = 80.0 - torch.rand(each[:, ::9].shape, generator=generator, dtype=torch.float64)
    labels_T = torch.randint(0, width, (rows,), generator=generator)
    return [each.to(DEVICE, dtype)[:, :width] for each in models], labels_T.to(DEVICE)


def _chunk(row_loss, logits, first=0, vocab=None):
    width = logits[0].shape[1]
    columns = Columns(None, first, width, vocab or width, width)
    out_CV = torch.full_like(logits[0], float("nan"), memory_format=torch.contiguous_format)
    return Chunk(logits, [], slice(0, len(logits[0])), columns, out_CV, row_loss.kernel_form())


@ALL
@pytest.mark.parametrize("dtype, big", [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
                         ids=["float32", "bf16", "big"])
def test_values_and_gradients(loss, dtype, big):
    """Of logits as the kernels are given them, whatever their dtype; a gradient in bf16 is rounded once, or cut off as
    the interpreter does."""
    logits, labels_T = _logits(loss, 3, 53, dtype, big)
    row_loss = _row_loss(loss, labels_T)
    chunk = _chunk(row_loss, logits)
    state_SC = statistics.run_chunk(row_loss, chunk, with_gradient=True)
    exact = [each.double().cpu() for each in logits]
    exact[0].requires_grad_()
    value_T = _reference(loss, exact, labels_T.cpu())
    value_T.sum().backward()
    assert state_SC.dtype == torch.float32 and chunk.gradient_CV.dtype == dtype
    assert loss_cases._error(state_SC[0].cpu(), value_T.detach()) < 1e-5
    tolerance = {torch.float32: 1e-5, torch.bfloat16: BF16}[dtype]
    assert loss_cases._error(chunk.gradient_CV.cpu(), exact[0].grad) < tolerance


@ALL
def test_what_stands_beyond_a_rows_end_is_nobodys(loss):
    """A width that is no multiple of 16: rows are read up to one where they are followed by memory of their own, and to
    their end where they are not."""
    given, labels_T = _logits(loss, 2, 45, torch.float32)
    row_loss = _row_loss(loss, labels_T)
    filled = [torch.full((2, 64), float("nan"), device=DEVICE)[:, :45].copy_(each) for each in given]
    chunks = [_chunk(row_loss, filled), _chunk(row_loss, [each.contiguous() for each in given])]
    chunks[0] = replace(chunks[0], gradient_CV=torch.full((2, 48), float("nan"), device=DEVICE)[:, :45])
    assert [launch._filled(45, each.logits) for each in chunks] == [True, False]
    found, right = (statistics.run_chunk(row_loss, chunk, with_gradient=True) for chunk in chunks)
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(chunks[0].gradient_CV, chunks[1].gradient_CV, rtol=1e-6, atol=1e-7)


@ALL
def test_shares_that_are_put_together_by_hand_are_the_whole(loss):
    """Two ranks' statistics, and a rank without a column: maxima, then sums, as the all-reduces would have them."""
    logits, labels_T = _logits(loss, 2, 45, torch.float32, big=True)
    row_loss = _row_loss(loss, labels_T)
    shares = [slice(0, 27), slice(27, 45), slice(45, 45)]
    chunks = [_chunk(row_loss, [each[:, share] for each in logits], share.start, 45) for share in shares]
    found = [launch.local_statistics(chunk) for chunk in chunks]
    state_RC = torch.stack([maxima.amax(1) for maxima, _ in found]).amax(0)
    whole = _chunk(row_loss, logits)
    torch.testing.assert_close(state_RC, launch.local_statistics(whole)[0].amax(1), rtol=0, atol=0)
    by_rank = [row_loss.from_parts(sums, maxima - state_RC[:, None], chunk, state_RC)
               for chunk, (maxima, sums) in zip(chunks, found, strict=True)]
    assert (by_rank[2] == 0).all()
    # The torch form of the same sums, in float64.
    exact = [each.double().contiguous() for each in logits]
    spares = [torch.empty_like(exact[0]) for _ in range(row_loss.spares)]
    exact_chunk = Chunk(exact, spares, whole.rows, whole.columns, exact[0])
    right_SC = row_loss.local_sums(0, exact_chunk, state_RC.double())
    assert loss_cases._error(sum(by_rank).cpu(), right_SC.cpu()) < 1e-5


def test_offsets_beyond_31_bits():
    """Rows so far apart that the second one's first number is at 2^31: the memory is never touched in between."""
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("10 GiB of free memory on the device")
    storage = torch.empty(2**31 + 16, dtype=torch.bfloat16, device=DEVICE)
    logits_CV = storage.as_strided((2, 16), (2**31, 1))
    logits_CV.copy_(torch.randn(2, 16))
    row_loss = LogProb(torch.tensor([3, 4], device=DEVICE))
    chunk = replace(_chunk(row_loss, [logits_CV]), gradient_CV=logits_CV)
    exact_CV = logits_CV.double().cpu().requires_grad_()
    reference.token_log_probs(exact_CV, torch.tensor([3, 4])).sum().backward()
    statistics.run_chunk(row_loss, chunk, with_gradient=True)
    assert loss_cases._error(logits_CV.cpu(), exact_CV.grad) < BF16


# --------------------------------------------------------------------------------------------------- the whole losses
def _cases(loss):
    """Few enough tokens for the interpreter, several chunks, all that a kernel can be asked for."""
    base = loss_cases.Case(loss, True, tokens=5, chunk=3, equal_weights=True)
    if loss not in loss_cases.DIVERGENCES:
        return [base, replace(base, softcap=2.0, bias=True, scale=1.3, equal_weights=False),
                replace(base, tokens=0)]
    joint = replace(base, with_log_probs=True, equal_weights=False, temperature=2.5)
    return [base, replace(joint, softcap=2.0, bias=True), replace(joint, temperature=1.0, tokens=3)]


@ALL
def test_the_fused_losses(loss):
    for case in _cases(loss):
        loss_cases.check(case, [loss_cases.run(case)])


@pytest.mark.parametrize("loss", ["forward_kl", "akl"])
def test_the_losses_from_logits(loss):
    case = loss_cases.Case(loss, False, tokens=3, temperature=2.5)
    loss_cases.check(case, [loss_cases.run(case)])


def test_akl_with_more_candidates_than_fit(monkeypatch):
    monkeypatch.setattr(AdaptiveKL, "CANDIDATES", 2)
    case = loss_cases.Case("akl", True, tokens=3, big=True, equal_weights=True)
    loss_cases.check(case, [loss_cases.run(case)])


def test_akl_breaks_ties_by_the_lower_id():
    teacher_TV = torch.tensor([[1.0, 2.0, 2.0, 2.0, 2.0, 0.0]])
    student_TV = torch.tensor([[0.0, 3.0, -1.0, 0.5, 2.0, 1.0]])
    for mu in (0.1, 0.5, 0.9):
        value_T = losses.divergence("akl", student_TV, teacher_TV, mu=mu)
        torch.testing.assert_close(value_T.double(), reference.divergence("akl", student_TV, teacher_TV, mu=mu))


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.999])
def test_akl_adds_up_what_may_be_in_the_head_alone(mu, monkeypatch):
    """Its bins are those of a plain histogram down to where they end, which is beyond the head's end."""
    monkeypatch.setattr(launch, "BLOCK", 512)
    found = []

    def bin_masses(chunk, numbers_3C, bins):
        found.append((numbers_3C, launch_masses(chunk, numbers_3C, bins)))
        return found[-1][1]

    launch_masses = launch.bin_masses
    monkeypatch.setattr(importlib.import_module("megakd.losses.kernels"), "bin_masses", bin_masses)
    generator = torch.Generator().manual_seed(7)
    # From hardly any difference to a few tokens that have all of P, at an odd width.
    spreads_T1 = torch.tensor([0.01, 1.0, 3.0, 12.0])[:, None]
    student_TV, teacher_TV = (torch.randn(4, 1999, generator=generator).mul(spreads_T1).to(DEVICE) for _ in range(2))
    value_T = losses.divergence("akl", student_TV, teacher_TV, mu=mu)
    right_T = reference.divergence("akl", student_TV.double().cpu(), teacher_TV.double().cpu(), mu=mu)
    torch.testing.assert_close(value_T.double().cpu(), right_T, rtol=1e-5, atol=1e-6)
    ((numbers_3C, mass_BC),) = found
    (max_C, bins_a_logit_C, ends_C), mass_BC = numbers_3C.double().cpu(), mass_BC.double().cpu()
    places_CV = (max_C[:, None] - teacher_TV.double().cpu()) * bins_a_logit_C[:, None]
    mass_CV = (teacher_TV.double().cpu() - max_C[:, None]).exp()
    for row, end in enumerate(ends_C.tolist()):
        inside_V = places_CV[row] < end
        # A number on the border of two bins is in either: no more than a few are.
        plain_B = torch.histogram(places_CV[row][inside_V], 1024, range=(0.0, 1024.0), weight=mass_CV[row][inside_V])[0]
        assert (mass_BC[:, row].cumsum(0) - plain_B.cumsum(0)).abs().max() < 2e-3 * plain_B.sum()
        torch.testing.assert_close(mass_BC[:, row].sum(), plain_B.sum(), rtol=2e-5, atol=1e-9)
        assert plain_B.sum() / mass_CV[row].sum() > mu
    assert (places_CV[3] < ends_C[3]).sum() < 1999 / 4


# ------------------------------------------------------------------------------------------------------ when they run
@ALL
def test_the_kernels_are_taken_where_they_are_meant_to_be(loss, monkeypatch):
    labels_T = torch.zeros(2, dtype=torch.int64)
    columns, row_loss = Columns(None, 0, 33, 33, 33), _row_loss(loss, labels_T)

    def form(device, dtype=torch.float32):
        return statistics.Room(row_loss, 2, columns, dtype, torch.device(device), gradient_dtype=dtype,
                               gradient_rows=2).form

    assert isinstance(form("cpu"), KernelForm)
    assert form("cpu", torch.float64) is None
    monkeypatch.setattr(statistics, "KERNEL_DEVICES", {"cuda"})
    assert form("cpu") is None
    joint = WithLogProbs(losses.top_k.LikeliestTokens(1), labels_T, labels_T, labels_T, 1.0)
    assert joint.kernel_form() is None


def test_the_memory_of_a_chunk():
    """16-bit operands: gradients of their dtype for several chunks, no scratch; rows begin at multiples of 128 bytes.
    """
    row_loss, columns = row_divergence("jsd", beta=0.3, mu=0.0), Columns(None, 0, 33, 33, 33)
    room = statistics.Room(row_loss, 4, columns, torch.float32, torch.device("cpu"), gradient_dtype=torch.bfloat16,
                           gradient_rows=8)
    chunk = room.chunk(slice(4, 7))
    assert [each.shape for each in chunk.logits] == [(3, 33), (3, 33)] and chunk.spares == []
    assert [each.stride() for each in (*chunk.logits, chunk.gradient_CV)] == [(64, 1), (64, 1), (64, 1)]
    assert chunk.gradient_CV.dtype == torch.bfloat16
    # Where the chunk's gradient lies among the others, from 0 on and again from 8 on.
    both_GV = room.gradients(slice(0, 7))
    assert both_GV[4:].data_ptr() == chunk.gradient_CV.data_ptr() == room.chunk(slice(12, 16)).gradient_CV.data_ptr()


def test_the_benchmark_s_cases():
    """benchmarks/loss_kernels.py: every kernel once, with the bytes that its loss must move."""
    from benchmarks.loss_kernels import cases

    found = {case.name: case for case in cases(2, 40, torch.float32, DEVICE)}
    assert len(found) == 3 * 7
    logits, gradient = 2 * 40 * 4, 2 * 40 * 2
    assert found["log_prob: local_statistics"].bytes == logits
    assert found["advantage: write_gradient"].bytes == 3 * logits + gradient
    assert found["akl: all statistics"].bytes == 5 * logits
    for name in ("jsd: all statistics", "akl: write_gradient", "forward_kl with log_prob: local_statistics"):
        found[name].run()


# ------------------------------------------------------------------------------------------------- 16-bit operands
@pytest.fixture
def products(monkeypatch):
    """CUDA's way of multiplying 16-bit numbers, on any device: the products into float32 as (rows, columns, inner
    numbers, whether they were added). The stand-in takes what torch 2.10's CUDA form of `addmm` with `out_dtype` takes.
    """
    found = []

    def addmm(self, left, right, *, beta, alpha, out_dtype, out):
        assert left.dtype == right.dtype == torch.bfloat16 and self is out and out.dtype == out_dtype == torch.float32
        for matrix in (left, right, out):  # else torch would copy it
            assert 1 in matrix.stride() and max(matrix.stride()) >= min(matrix.shape)
        found.append((len(left), right.shape[1], left.shape[1], beta == 1.0))
        return out.copy_((out * beta if beta else 0.0) + alpha * (left.float() @ right.float()))

    monkeypatch.setattr(hidden_states, "_operands", lambda hidden, head, dtype: (hidden, head))
    monkeypatch.setattr(torch, "addmm", addmm)
    return found


@pytest.mark.parametrize("changes", [{"equal_weights": True}, {}, {"equal_weights": True, "bias": True}],
                         ids=["forward", "backward", "bias"])
def test_gradients_are_made_of_several_chunks_together(products, changes):
    """Eleven tokens in chunks of two: logits chunk by chunk, d(hidden) and d(head) of four chunks and of the rest."""
    case = loss_cases.Case("forward_kl", True, tokens=11, chunk=2, scale=0.7, dtype=torch.bfloat16, **changes)
    found, right = loss_cases.run(case), loss_cases.expected(case)
    assert loss_cases._error(found["value"], right["value"]) < 1e-5
    for name in ("hidden", "head"):
        # Twice rounded: the gradient by the logits, and this one. The interpreter cuts off where a GPU rounds.
        assert found[name].dtype == torch.bfloat16
        assert loss_cases._error(found[name], right[name]) < 2 * BF16, name
    of_head = [(inner, added) for rows, columns, inner, added in products if (rows, columns) == (33, 8)]
    # A bias takes the gradient in float32, which lies over the logits.
    once = [(2, place > 0) for place in range(5)] + [(1, True)] if case.bias else [(8, False), (3, True)]
    assert of_head == once * (1 if case.equal_weights else 2)  # unequal ones are met in the backward pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_weighted_and_rounded_in_one_pass(dtype):
    source = torch.randn(5, 7, device=DEVICE)
    out = source.clone() if dtype == torch.float32 else torch.empty(5, 7, dtype=dtype, device=DEVICE)
    weight = torch.full((3,), -0.3, device=DEVICE)[1]
    assert launch.scaled(out if dtype == torch.float32 else source, weight, out) is out
    torch.testing.assert_close(out.float(), source * -0.3, rtol=BF16 if dtype == torch.bfloat16 else 1e-6, atol=0)
