"""The check of losses over sequences' scores against the float64 reference: values, gradients, constants."""

from __future__ import annotations

import torch
from torch import Tensor

from megakd import losses
from megakd.losses import reference

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


def check(name: str, scores: list[Tensor], constants: list[Tensor], **settings) -> tuple[float, float]:
    """Compares `losses.<name>(*scores, *constants, **settings)` with the reference on the same inputs.

    Args:
        name: of the function, alike in both modules.
        scores: tensors of one dtype that get a gradient. The tolerance is that of their dtype: for values relative to
            each value or 1, for gradients relative to each score's largest one.
        constants: tensors that get none, though floating-point ones ask for it here.

    Returns:
        The largest errors of values and gradients.
    """
    dtype = scores[0].dtype
    ours = [score.clone().requires_grad_() for score in scores]
    fixed = [constant.clone().requires_grad_(constant.is_floating_point()) for constant in constants]
    exact = [score.double().requires_grad_() for score in scores]
    value = getattr(losses, name)(*ours, *fixed, **settings)
    right = getattr(reference, name)(*exact, *constants, **settings)
    assert value.dtype == dtype and value.shape == right.shape
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).view(value.shape)
    (value * weights.to(dtype)).sum().backward()
    (right * weights).sum().backward()
    assert all(constant.grad is None or not constant.grad.any() for constant in fixed), "a constant got a gradient"
    value_error = _error(value.detach(), right.detach(), right.detach().abs().clamp(min=1.0))
    gradient_error = max(
        _error(mine.grad, theirs.grad, theirs.grad.abs().max().clamp(min=1e-30))  # float32 underflows
        for mine, theirs in zip(ours, exact, strict=True)
    )
    assert value_error <= TOLERANCES[dtype], f"{name}: value is off by {value_error:.2e}"
    assert gradient_error <= TOLERANCES[dtype], f"{name}: the gradient is off by {gradient_error:.2e}"
    return value_error, gradient_error


def _error(found: Tensor, right: Tensor, size: Tensor) -> float:
    assert found.shape == right.shape and found.isfinite().all()
    return ((found.double() - right).abs() / size).max().item()
