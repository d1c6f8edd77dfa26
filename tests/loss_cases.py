"""Inputs for the per-token losses, and the check of values and gradients against the float64 reference.

Used with one process by tests/unit and with several by tests/dist: an implementation is run on a rank's share of the
vocabulary, and the shares of the gradients are put together again before they are compared.

Legend: T tokens, V columns (of all ranks), H student width, K teacher width, J reference width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megakd import losses
from megakd.losses import reference
from megakd.losses.statistics import statistics_dtype

LOSSES = ("log_probs", "forward_kl", "reverse_kl", "jsd", "akl", "advantage")
DIVERGENCES = LOSSES[1:5]
WIDTHS = (8, 5, 10)
SIZES = {"log_probs": 1, "advantage": 3}


@dataclass(frozen=True)
class Case:
    """One set of inputs of one loss."""

    loss: str
    fused: bool
    tokens: int = 13
    vocab: int | None = 33
    columns: int = 48
    """Columns with the padding, of all ranks. At TP 4, 33 of 48 leaves the last rank without a real column."""
    chunk: int = 5
    temperature: float = 1.0
    beta: float = 0.3
    mu: float = 0.47
    dtype: torch.dtype = torch.float32
    big: bool = False
    """Logits between -80 and 80, exact in float32, with many ties."""
    teacher_columns: int | None = None
    """Padded width of the teachers where it is not the student's."""
    equal_weights: bool = False
    """All tokens count alike in what is differentiated: the case in which gradients are made in the forward pass."""
    recompute: bool = False
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    with_log_probs: bool = False
    """`fused_distillation` of the divergence."""
    device: str = "cpu"
    """Where the loss is taken; the reference is taken on the CPU."""
    widths: tuple[int, ...] = WIDTHS
    """Of the models' hidden states, where `fused`."""
    label: str = ""

    def __str__(self):
        return f"{self.loss}{'-fused' if self.fused else ''}{'-' if self.label else ''}{self.label}"


def variants(loss: str, fused: bool) -> list[Case]:
    """The situations that each loss is tried in."""
    base = Case(loss, fused)
    found = [
        base,
        replace(base, label="unpadded", vocab=None),
        replace(base, label="big", big=True),
        replace(base, label="one-token", tokens=1),
        replace(base, label="no-token", tokens=0),
        replace(base, label="bf16", dtype=torch.bfloat16),
        replace(base, label="float64", dtype=torch.float64),
    ]
    if fused:
        found += [
            replace(base, label="equal-weights", equal_weights=True),
            replace(base, label="equal-weights-bf16", equal_weights=True, dtype=torch.bfloat16),
            replace(base, label="equal-weights-one-chunk", equal_weights=True, chunk=64),
            replace(base, label="equal-weights-no-token", equal_weights=True, tokens=0),
            replace(base, label="recompute", equal_weights=True, recompute=True),
            replace(base, label="bias", equal_weights=True, bias=True, scale=0.7),
            replace(base, label="softcap", softcap=2.0, scale=1.3),
            replace(base, label="softcap-bias", equal_weights=True, softcap=2.0, bias=True),
        ]
    if fused and loss in DIVERGENCES:
        joint = replace(base, with_log_probs=True)
        found += [
            replace(joint, label="with-log-probs"),
            replace(joint, label="with-log-probs-temperature", temperature=2.5, big=True),
            replace(joint, label="with-log-probs-softcap", softcap=2.0, bias=True),
            replace(joint, label="with-log-probs-no-token", tokens=0),
            replace(joint, label="with-log-probs-bf16", dtype=torch.bfloat16),
        ]
    if loss in DIVERGENCES:
        found.append(replace(base, label="temperature", temperature=2.5))
    if loss == "akl":
        found += [replace(base, label="empty-head", mu=0.0), replace(base, label="broad-head", mu=0.99)]
    return found


def wide(loss: str, **changes: object) -> Case:
    """As many columns as a large vocabulary has. Hidden states are wider than elsewhere, and chunks should have four
    rows: MKL's float32 product over 128,256 columns is itself off by 1e-4 where it makes 8 numbers a row, by 3e-5 where
    it makes two rows, and by 1e-6 where both are more."""
    return replace(Case(loss, True, vocab=128256, columns=128384, equal_weights=True, widths=(32, 20, 40), scale=0.5,
                        label="wide"), **changes)


def inputs(case: Case) -> dict[str, list[torch.Tensor] | torch.Tensor]:
    """Whole tensors of a case: for each model [hidden, head] or [logits], labels and the weights of the tokens."""
    generator = torch.Generator().manual_seed(1234)
    models = []
    for place, width in enumerate(case.widths[: SIZES.get(case.loss, 2)]):
        columns = case.columns if place == 0 or case.teacher_columns is None else case.teacher_columns
        shapes = [(case.tokens, width), (columns, width)] if case.fused else [(case.tokens, columns)]
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        if case.big:
            tensors = [tensor.sign() for tensor in tensors]
            if case.fused:
                tensors[1] *= 80.0 / width
            else:
                tensors[0] = tensors[0] * torch.randint(0, 81, shapes[0], generator=generator)
        if case.vocab is not None:  # what stands in the padding is nobody's business
            padding = tensors[1][case.vocab :] if case.fused else tensors[0][:, case.vocab :]
            padding.fill_(float("nan"))
        if case.bias:
            tensors.append(torch.randn(columns, generator=generator, dtype=torch.float64))
            tensors[2][columns if case.vocab is None else case.vocab :] = float("nan")
        models.append([tensor.to(case.dtype) for tensor in tensors])
    labels_T = torch.randint(0, case.vocab or case.columns, (case.tokens,), generator=generator)
    weights_T = torch.randn(case.tokens, generator=generator, dtype=torch.float64)
    weights_T[1::4] = 0.0  # tokens whose value the caller masks
    log_prob_weights_T = weights_T * torch.linspace(-1.0, 2.0, case.tokens, dtype=torch.float64)
    if case.equal_weights:
        weights_T.fill_(-0.7)
    return {
        "models": models, "labels_T": labels_T, "weights_T": weights_T, "log_prob_weights_T": log_prob_weights_T,
    }


def local_inputs(case: Case, group) -> dict[str, list[torch.Tensor] | torch.Tensor]:
    """`inputs` with this rank's share of the columns."""
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    data = inputs(case)
    for model in data["models"]:
        for place in range(1 if case.fused else 0, len(model)):
            model[place] = model[place].chunk(size, dim=0 if case.fused else 1)[rank].clone()
    weights = {name: data[name].to(case.device) for name in ("labels_T", "weights_T", "log_prob_weights_T")}
    return weights | {"models": [[tensor.to(case.device) for tensor in model] for model in data["models"]]}


def ours(case: Case, data, group):
    """The implementation under test: values [T], or what `fused_distillation` returns."""
    models, labels_T = data["models"], data["labels_T"]
    tensors = [tensor for model in models for tensor in model[:2]]
    settings = {"tp_group": group, "vocab_size": case.vocab}
    if case.fused:
        prefixes = [""] if len(models) == 1 else ["student_", "teacher_", "reference_"]
        biases = {f"{name}bias_V": model[2] for name, model in zip(prefixes, models, strict=False) if case.bias}
        settings |= {"chunk_tokens": case.chunk, "logit_scale": case.scale, "logit_softcap": case.softcap, **biases}
    if case.with_log_probs:
        weights = {f"{name}_weights_T": data[key].to(statistics_dtype(tensors[0])) for name, key in
                   (("divergence", "weights_T"), ("log_prob", "log_prob_weights_T"))}
        settings |= {"beta": case.beta, "temperature": case.temperature, "mu": case.mu, **weights}
        return losses.fused_distillation(case.loss, *tensors, labels_T, **settings)
    settings |= {"recompute": case.recompute} if case.fused else {}
    match case.loss, case.fused:
        case "log_probs", True:
            return losses.fused_token_log_probs(*tensors, labels_T, **settings)
        case "log_probs", False:
            return losses.token_log_probs(*tensors, labels_T, **settings)
        case "advantage", True:
            return losses.fused_expected_advantage(*tensors, beta=case.beta, **settings)
        case "advantage", False:
            return losses.expected_advantage(*tensors, beta=case.beta, **settings)
    settings |= {"beta": case.beta, "temperature": case.temperature, "mu": case.mu}
    return (losses.fused_divergence if case.fused else losses.divergence)(case.loss, *tensors, **settings)


def run(case: Case, implementation=ours, group=None) -> dict[str, torch.Tensor]:
    """Value and gradients of the weighted values' sum on this rank, which holds its share of the columns."""
    data = local_inputs(case, group)
    student = [tensor.requires_grad_() for tensor in data["models"][0]]
    teachers = [tensor.requires_grad_() for model in data["models"][1:] for tensor in model]
    result = implementation(case, data, group)
    if case.with_log_probs:
        total, *values = result
        assert not any(tensor.requires_grad for tensor in values)
        value_T = torch.cat([total.detach()[None], *values])
    else:
        value_T = result
        weights_T = data["weights_T"].to(value_T.dtype)
        total = -0.7 * value_T.sum() if case.equal_weights else (value_T * weights_T).sum()
    assert total.requires_grad and value_T.dtype == statistics_dtype(student[0])
    total.backward()
    assert all(tensor.grad is None for tensor in teachers), "a teacher got a gradient"
    return {"value": value_T.detach().cpu()} | {
        name: tensor.grad.cpu() for name, tensor in zip(_names(case), student, strict=False)
    }


def expected(case: Case) -> dict[str, torch.Tensor]:
    """The same from the reference, in float64, on the inputs as rounded to their dtype."""
    data = inputs(case)
    student = [tensor.double().requires_grad_() for tensor in data["models"][0]]
    models = [student, *([tensor.double() for tensor in model] for model in data["models"][1:])]
    logits = [_reference_logits(case, *model) if case.fused else model[0] for model in models]
    match case.loss:
        case "log_probs":
            value_T = reference.token_log_probs(*logits, data["labels_T"], vocab_size=case.vocab)
        case "advantage":
            value_T = reference.expected_advantage(*logits, beta=case.beta, vocab_size=case.vocab)
        case kind:
            settings = {"beta": case.beta, "temperature": case.temperature, "mu": case.mu, "vocab_size": case.vocab}
            value_T = reference.divergence(kind, *logits, **settings)
    total = (value_T * data["weights_T"]).sum()
    if case.with_log_probs:
        log_probs_T = reference.token_log_probs(logits[0], data["labels_T"], vocab_size=case.vocab)
        total = total + (log_probs_T * data["log_prob_weights_T"]).sum()
        value_T = torch.cat([total[None], value_T, log_probs_T])
    total.backward()
    return {"value": value_T.detach()} | {
        name: tensor.grad for name, tensor in zip(_names(case), student, strict=False)
    }


def _reference_logits(case: Case, hidden_TH, head_VH, bias_V=None) -> torch.Tensor:
    # Junk columns are cut before the product: autograd would spread them.
    bias_V = None if bias_V is None else bias_V[: case.vocab]
    return reference.head_logits(hidden_TH, head_VH[: case.vocab], bias_V, scale=case.scale, softcap=case.softcap)


def check(
    case: Case, ranks: list[dict[str, torch.Tensor]], tolerance: float | None = None
) -> dict[str, float]:
    """Compares what `run` gave on each rank with the reference; returns the relative errors."""
    right = expected(case)
    tolerance = tolerance or (1e-12 if case.dtype == torch.float64 else 1e-5)
    errors = {"value": max(_error(rank["value"], right["value"]) for rank in ranks)}
    assert errors["value"] <= tolerance, f"{case}: value is off by {errors['value']:.2e}"
    if case.dtype == torch.bfloat16:
        # Gradients come in the inputs' dtype. On a GPU the products that they are sums of take 16-bit numbers, too: two
        # roundings more, of d(logits) and of the weighted hidden states. Emulated on a CPU, up to 2^-7 is seen.
        tolerance = 2.0**-6 if case.device == "cuda" and case.fused else 2.0**-8
    names = _names(case)
    cut = names[1:] if case.fused else names
    got = {name: torch.cat([rank[name] for rank in ranks], dim=0 if case.fused else 1) for name in cut}
    for name in names:
        assert all(rank[name].dtype == case.dtype for rank in ranks), f"{case}: dtype of the gradient of {name}"
        found = [got[name]] if name in got else [rank[name] for rank in ranks]
        errors[name] = max(_error(gradient, right[name]) for gradient in found)
        assert errors[name] <= tolerance, f"{case}: the gradient of {name} is off by {errors[name]:.2e}"
    _check_exact_zeros(case, {name: ranks[0][name] for name in names} | got)
    return errors


def _check_exact_zeros(case: Case, gradients: dict[str, torch.Tensor]) -> None:
    by_token = gradients[_names(case)[0]]
    assert case.equal_weights or (by_token[1::4] == 0).all(), f"{case}: a masked token has a gradient"
    if case.vocab is not None:
        for name in _names(case)[1:] or ["logits"]:
            padding = gradients[name][case.vocab :] if case.fused else gradients[name][:, case.vocab :]
            assert (padding == 0).all(), f"{case}: the padding of {name} has a gradient"


def _names(case: Case) -> tuple[str, ...]:
    return (("hidden", "head") + (("bias",) if case.bias else ())) if case.fused else ("logits",)


def _error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference relative to the largest magnitude; inf for a wrong shape or anything that is not finite."""
    if found.shape != right.shape or not found.isfinite().all():
        return float("inf")
    if found.numel() == 0:
        return 0.0
    difference, size = (found.double() - right).abs().max().item(), right.abs().max().item()
    return difference / size if size else (0.0 if difference == 0 else float("inf"))
