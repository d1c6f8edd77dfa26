"""Inputs for the released forms of losses, and the check of values and gradients against the float64 reference.

Used with one process by tests/unit and with several by tests/dist, as loss_cases.py is.

Legend: T tokens, V columns (of all ranks), K stored ids of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megakd import losses
from megakd.losses import reference

LOSSES = ("dpkd_token", "released_topk_advantage", "released_topk_kl")


@dataclass(frozen=True)
class Case:
    """One set of inputs of one loss."""

    loss: str
    tokens: int = 13
    vocab: int | None = 33
    columns: int = 48
    """Columns with the padding, of all ranks. At TP 4, 33 of 48 leaves the last rank without a real column."""
    stored: int = 6
    clamp: bool = True
    beta: float = 0.7
    dtype: torch.dtype = torch.float32
    size: float = 1.0
    """Scale of the logits; from 10 on they are rounded to multiples of a quarter of it, so that many are equal."""
    shift: float = 0.0
    beyond: bool = False
    """Some stored ids are beyond the vocabulary."""
    label: str = ""

    def __str__(self):
        return f"{self.loss}{'-' if self.label else ''}{self.label}"


def variants(loss: str) -> list[Case]:
    """The situations that each loss is tried in."""
    base = Case(loss)
    found = [
        base,
        replace(base, label="unpadded", vocab=None),
        replace(base, label="big", size=80.0),
        replace(base, label="medium", size=12.0),
        replace(base, label="shifted", shift=100.0),
        replace(base, label="one-token", tokens=1),
        replace(base, label="no-token", tokens=0),
        replace(base, label="more-than-a-chunk", tokens=515),
        replace(base, label="bf16", dtype=torch.bfloat16),
        replace(base, label="float64", dtype=torch.float64),
        replace(base, label="float64-medium", dtype=torch.float64, size=12.0),
    ]
    if loss != "dpkd_token":
        found += [replace(case, label=f"{case.label}-unclamped", clamp=False) for case in found]
        found += [replace(base, label=f"{stored}-stored", stored=stored) for stored in (1, 33)]
        found += [replace(base, label="all-stored-unclamped", stored=33, clamp=False)]
    if loss == "released_topk_kl":
        found += [replace(base, label="beyond", beyond=True), replace(base, label="b-u", beyond=True, clamp=False)]
    return found


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """Whole tensors of a case: both models' logits, what is stored of the teacher, and the weights of the tokens."""
    generator = torch.Generator().manual_seed(4321)
    shape = (case.tokens, case.columns)
    student_TV, teacher_TV = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if case.size >= 10:
        student_TV, teacher_TV = ((4 * m.clamp(-1, 1)).round() / 4 * case.size for m in (student_TV, teacher_TV))
    student_TV += case.shift
    probs_TV = teacher_TV[:, : case.vocab].softmax(1)
    probs_TK, ids_TK = probs_TV.topk(case.stored, dim=1)
    advantages_TK = torch.randn(probs_TK.shape, generator=generator, dtype=torch.float64)
    if case.beyond:
        ids_TK[::2, 1] = case.columns + 7
    if case.vocab is not None:  # what stands in the padding is nobody's business
        student_TV[:, case.vocab :] = teacher_TV[:, case.vocab :] = float("nan")
    weights_T = torch.randn(case.tokens, generator=generator, dtype=torch.float64)
    weights_T[1::4] = 0.0  # tokens whose value the caller masks
    tensors = {"student": student_TV, "teacher": teacher_TV, "probs": probs_TK, "advantages": advantages_TK}
    return {name: tensor.to(case.dtype) for name, tensor in tensors.items()} | {"ids": ids_TK, "weights": weights_T}


def value(case: Case, module, data: dict[str, torch.Tensor], **settings) -> torch.Tensor:
    """The loss, of `losses` or of `reference`."""
    function = getattr(module, case.loss)
    match case.loss:
        case "dpkd_token":
            return function(data["student"], data["teacher"], beta=case.beta, **settings)
        case "released_topk_advantage":
            return function(data["student"], data["ids"], data["advantages"], clamp=case.clamp, **settings)
    return function(data["student"], data["ids"], data["probs"], clamp=case.clamp, **settings)


def run(case: Case, group=None) -> dict[str, torch.Tensor]:
    """Value and gradient of sum(weights * value) on this rank, which holds its share of the columns."""
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    data = inputs(case)
    for name in ("student", "teacher"):
        data[name] = data[name].chunk(size, dim=1)[rank].clone()
    for name in ("student", "teacher", "probs", "advantages"):
        data[name].requires_grad_()
    value_T = value(case, losses, data, tp_group=group, vocab_size=case.vocab)
    assert value_T.requires_grad and value_T.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    (value_T * data["weights"].to(value_T.dtype)).sum().backward()
    assert all(data[name].grad is None for name in ("teacher", "probs", "advantages")), "a constant got a gradient"
    return {"value": value_T.detach(), "gradient": data["student"].grad}


def check(case: Case, ranks: list[dict[str, torch.Tensor]]) -> tuple[float, float]:
    """Compares what `run` gave on each rank with the reference; returns the relative errors of value and gradient."""
    data = inputs(case)
    data["student"] = data["student"].double().requires_grad_()
    value_T = value(case, reference, data, vocab_size=case.vocab)
    (value_T * data["weights"]).sum().backward()
    tolerance = 1e-12 if case.dtype == torch.float64 else 1e-5
    value_error = max(_error(rank["value"], value_T.detach()) for rank in ranks)
    assert value_error <= tolerance, f"{case}: value is off by {value_error:.2e}"
    gradient_TV = torch.cat([rank["gradient"] for rank in ranks], dim=1)
    assert gradient_TV.dtype == case.dtype
    gradient_error = _error(gradient_TV, data["student"].grad)
    limit = 2.0**-8 if case.dtype == torch.bfloat16 else tolerance  # gradients come in the inputs' dtype
    assert gradient_error <= limit, f"{case}: the gradient is off by {gradient_error:.2e}"
    assert (gradient_TV[1::4] == 0).all(), f"{case}: a masked token has a gradient"
    assert case.vocab is None or (gradient_TV[:, case.vocab :] == 0).all(), f"{case}: the padding has a gradient"
    return value_error, gradient_error


def _error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference relative to the largest magnitude; inf for a wrong shape or anything that is not finite."""
    if found.shape != right.shape or not found.isfinite().all():
        return float("inf")
    if found.numel() == 0:
        return 0.0
    difference, size = (found.double() - right).abs().max().item(), right.abs().max().item()
    return difference / size if size else (0.0 if difference == 0 else float("inf"))
