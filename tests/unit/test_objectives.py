"""Loss and gradient of each objective against float64 numpy written from the papers' formulas, and how they may be cut.

Legend: N sequences of the step, S positions, V vocabulary (padded), H student width.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megakd.batch import Batch, Group, Kind, Sample, collate, number_samples
from megakd.config import AdpaObjective, DckdObjective, DpoObjective, SftObjective
from megakd.objectives import build_objective
from megakd.objectives.base import LossContext, RoleOutput
from tests.ranks import run_ranks, subgroup

VOCAB, PADDED = 37, 40
WIDTHS = {"student": 6, "teacher": 9, "reference": 4}
CONFIGS = {
    "sft": SftObjective(),
    "dpo": DpoObjective(beta=0.4, label_smoothing=0.1, sft_weight=0.3),
    "dckd": DckdObjective(alpha=0.7, sft_weight=1.3, temperature=1.7),
    "adpa": AdpaObjective(gamma=1.5, beta=0.8, sft_weight=0.6),
}
CUTS = [[[0, 1, 2, 3]], [[3], [0, 2], [1]], [[2, 1], [0, 3]]]


def make_groups(name: str) -> list[Group]:
    generator = np.random.default_rng(0)
    kinds = build_objective(CONFIGS[name]).requires.kinds

    def sample(kind: Kind) -> Sample:
        prompt, answer = generator.integers(1, 4), generator.integers(1, 6)
        return Sample(tuple(generator.integers(0, VOCAB, prompt + answer).tolist()), int(prompt), kind)

    return [Group(f"row:{number}", tuple(sample(kind) for kind in kinds)) for number in range(4)]


def make_models() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each role hidden states [N, S, H] by sample id and position, and a head [V, H] with junk in its padding."""
    generator = np.random.default_rng(1)
    models = {}
    for role, width in WIDTHS.items():
        head = generator.normal(size=(PADDED, width))
        head[VOCAB:] = np.nan
        models[role] = (generator.normal(size=(8, 10, width)), head)
    return models


# ------------------------------------------------------------------------------------------- the formulas, in numpy
def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def naive(name: str) -> tuple[float, dict[str, float], np.ndarray, np.ndarray]:
    """Loss, reported means, and gradients of the student's hidden states and head."""
    config, groups, models = CONFIGS[name], make_groups(name), make_models()
    ids = number_samples(groups)
    tau = config.temperature if name == "dckd" else 1.0
    samples = [(sample, ids[g][i], g) for g, group in enumerate(groups) for i, sample in enumerate(group.samples)]
    counts = {kind: sum(len(s.tokens) - s.prompt_length for s, _, _ in samples if s.kind == kind) for kind in Kind}
    grad_hidden, grad_head = np.zeros_like(models["student"][0]), np.zeros_like(models["student"][1])
    means: dict[str, float] = {}

    def hidden(role, sample, number):
        return models[role][0][number, sample.prompt_length - 1 : len(sample.tokens) - 1]

    def log_probs(role, sample, number, temperature=1.0):
        return log_softmax(hidden(role, sample, number) @ models[role][1][:VOCAB].T / temperature)

    def one_hot(sample):
        return np.eye(VOCAB)[list(sample.tokens[sample.prompt_length :])]

    def backward(sample, number, d_logits):
        at = slice(sample.prompt_length - 1, len(sample.tokens) - 1)
        grad_hidden[number, at] += d_logits @ models["student"][1][:VOCAB]
        grad_head[:VOCAB] += d_logits.T @ hidden("student", sample, number)

    def add(metric, value):
        means[metric] = means.get(metric, 0.0) + value

    sft_weight = {"sft": 1.0}.get(name) or config.sft_weight
    for sample, number, _ in samples:
        log_q, labels = log_probs("student", sample, number), one_hot(sample)
        if sample.kind == Kind.CHOSEN:
            add("nll", -(log_q * labels).sum() / counts[Kind.CHOSEN])
            backward(sample, number, sft_weight / counts[Kind.CHOSEN] * (np.exp(log_q) - labels))
        if name == "dckd":
            log_q, log_p = log_probs("student", sample, number, tau), log_probs("teacher", sample, number, tau)
            p, q = np.exp(log_p), np.exp(log_q)
            add(f"kl_{sample.kind.name.lower()}", (p * (log_p - log_q)).sum() / counts[sample.kind])
            backward(sample, number, config.alpha / counts[sample.kind] * (q - p) / tau)
        if name == "adpa" and sample.kind == Kind.ROLLOUT:
            a = config.beta * (log_probs("teacher", sample, number) - log_probs("reference", sample, number))
            q = np.exp(log_q)
            mean = (q * a).sum(-1, keepdims=True)
            add("expected_advantage", mean.sum() / counts[Kind.ROLLOUT])
            backward(sample, number, -config.gamma / counts[Kind.ROLLOUT] * q * (a - mean))
    if name == "dpo":
        for chosen, rejected in zip(samples[::2], samples[1::2], strict=False):
            scores = []
            for sample, number, _ in (chosen, rejected):
                labels = one_hot(sample)
                ratio = log_probs("student", sample, number) - log_probs("reference", sample, number)
                scores.append((ratio * labels).sum())
            margin = config.beta * (scores[0] - scores[1])
            right, wrong = 1 / (1 + np.exp(-margin)), 1 / (1 + np.exp(margin))
            smooth = config.label_smoothing
            add("dpo", -((1 - smooth) * np.log(right) + smooth * np.log(wrong)) / 4)
            add("reward_accuracy", float(margin > 0) / 4)
            add("reward_margin", margin / 4)
            d_margin = (-(1 - smooth) * wrong + smooth * right) / 4
            for sign, (sample, number, _) in ((1, chosen), (-1, rejected)):
                d_score = sign * config.beta * d_margin
                log_q = log_probs("student", sample, number)
                backward(sample, number, d_score * (one_hot(sample) - np.exp(log_q)))
    weights = {"nll": sft_weight, "dpo": 1.0, "reward_accuracy": 0.0, "reward_margin": 0.0}
    if name == "dckd":
        weights |= {"kl_chosen": config.alpha, "kl_rejected": config.alpha}
    if name == "adpa":
        weights |= {"expected_advantage": -config.gamma}
    return sum(weights[key] * value for key, value in means.items()), means, grad_hidden, grad_head


# ------------------------------------------------------------------------------------------------ the implementation
def columns_of(batch: Batch) -> torch.Tensor:
    """The position of each loss position in its own sequence."""
    return batch.position_ids_P[batch.positions.places_T]


def run(name: str, cut: list[list[int]], dtype=torch.float32, world: int = 1):
    """Loss, reported means, d(hidden) and this rank's rows of d(head) over micro-batches that are cut as `cut` says."""
    group = None if world == 1 else subgroup(tuple(range(world)))
    rank = 0 if group is None else dist.get_rank(group)
    objective, groups = build_objective(CONFIGS[name]), make_groups(name)
    ids = number_samples(groups)
    batches = [collate([groups[g] for g in part], [ids[g] for g in part], pad_id=0) for part in cut]
    counts: dict[str, int] = {}
    for batch in batches:
        counts = {key: counts.get(key, 0) + value for key, value in batch.counts().items()}
    models = {
        role: (torch.tensor(hidden, dtype=dtype), torch.tensor(head, dtype=dtype).chunk(world)[rank].clone())
        for role, (hidden, head) in make_models().items()
    }
    for tensor in models["student"]:
        tensor.requires_grad_()

    def output(role, batch, kinds):
        positions = batch.positions
        wanted_T = torch.isin(positions.kinds_T, torch.tensor([int(kind) for kind in kinds]))
        samples_T, columns_T = batch.sample_ids_B[positions.rows_T[wanted_T]], columns_of(batch)[wanted_T]
        return RoleOutput(models[role][0][samples_T, columns_T], models[role][1])

    context = LossContext(group, VOCAB, chunk_tokens=7, counts=counts)
    loss, means = 0.0, {}
    for batch in batches:
        teachers = {role: output(role, batch, kinds) for role, kinds in objective.requires.teacher_kinds.items()}
        assert set(teachers) == set(objective.requires.teachers)
        result = objective.loss(output("student", batch, list(Kind)), teachers, batch, context)
        # Where the losses have added the terms up themselves, they did so for a division by the step's tokens.
        loss = loss + (0.0 if result.loss is None else result.loss / counts["tokens"])
        for term in result.terms:
            mean = term.values_N.sum() / counts[term.denominator]
            assert term.values_N.requires_grad == (result.loss is None)
            loss = loss + (term.weight * mean if result.loss is None else 0.0)
            means[term.name] = means.get(term.name, 0.0) + mean.item()
        for metric in result.metrics:
            assert metric.total.dim() == 0 and not metric.total.requires_grad
            means[metric.name] = means.get(metric.name, 0.0) + metric.total.item() / counts[metric.denominator]
    loss.backward()
    return loss.item(), means, *(tensor.grad.double().numpy() for tensor in models["student"])


def compare(found, right, tolerance: float) -> None:
    assert found[0] == pytest.approx(right[0], rel=tolerance)
    assert found[1] == pytest.approx(right[1], rel=tolerance)
    for ours, exact in zip(found[2:], right[2:], strict=False):
        assert np.abs(ours - exact).max() <= tolerance * np.abs(exact).max()


@pytest.mark.parametrize("cut", CUTS, ids=["one", "three", "two"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_in_one_process(name, cut):
    compare(run(name, cut), naive(name), 1e-5)
    compare(run(name, cut, torch.float64), naive(name), 1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_over_two_ranks(name):
    for cut in CUTS[:2]:
        first, second = run_ranks(2, run, name, cut, torch.float32, 2)
        for mine, other in ((first, second), (second, first)):
            head = np.concatenate([first[3], second[3]])
            compare((*mine[:3], head), naive(name), 1e-5)
            assert np.array_equal(mine[2], other[2])


def test_pairs_are_matched_by_group_whatever_the_order_of_the_rows():
    name = "dpo"
    groups, ids = make_groups(name), [list(numbers) for numbers in number_samples(make_groups(name))]
    for number in (1, 3):
        groups[number] = Group(groups[number].key, groups[number].samples[::-1])
        ids[number].reverse()
    batch = collate(groups, ids, pad_id=0)
    models = {role: [torch.tensor(tensor) for tensor in tensors] for role, tensors in make_models().items()}
    positions = batch.positions
    outputs = {role: RoleOutput(hidden[batch.sample_ids_B[positions.rows_T], columns_of(batch)], head)
               for role, (hidden, head) in models.items()}
    result = build_objective(CONFIGS[name]).loss(outputs["student"], outputs, batch,
                                                 LossContext(None, VOCAB, 64, batch.counts()))
    assert result.terms[0].values_N.sum().item() / 4 == pytest.approx(naive(name)[1]["dpo"], rel=1e-12)


@pytest.mark.parametrize("name", ["dckd", "adpa"])
def test_a_micro_batch_without_a_term_keeps_its_graph(name):
    """Here: no chosen token. The values are empty, and yet hang on the student's hidden states and head."""
    group = make_groups(name)[0]
    batch = collate([Group(group.key, group.samples[1:])], [[1]], pad_id=0)
    hidden, head = (torch.tensor(tensor, requires_grad=True) for tensor in make_models()["student"])
    outputs = {}
    for role, tensors in make_models().items():
        outputs[role] = RoleOutput(torch.tensor(tensors[0])[1, columns_of(batch)], torch.tensor(tensors[1]))
    student = RoleOutput(hidden[1, columns_of(batch)], head)
    context = LossContext(None, VOCAB, 64, batch.counts())
    result = build_objective(CONFIGS[name]).loss(student, outputs, batch, context)
    nll = next(term for term in result.terms if term.name == "nll")
    assert nll.values_N.shape == (0,)
    if result.loss is None:
        nll.values_N.sum().backward()
        assert not hidden.grad.any() and not head.grad.any()
    else:  # the other terms' gradient comes with it
        result.loss.backward()
        assert hidden.grad.isfinite().all() and hidden.grad.any() and head.grad.isfinite().all()


def test_objectives_say_what_they_need():
    teachers = {"sft": (), "dpo": ("reference",), "dckd": ("teacher",), "adpa": ("teacher", "reference")}
    for name, roles in teachers.items():
        requires = build_objective(CONFIGS[name]).requires
        assert requires.teachers == roles == tuple(requires.teacher_kinds)
        assert all(set(kinds) <= set(requires.kinds) for kinds in requires.teacher_kinds.values())
