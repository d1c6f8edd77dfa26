"""The gradient of a whole step in many layouts of student and teachers, against plain torch."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from megakd.batch import Kind
from megakd.config import Parallel
from megakd.config_objectives import AdpaObjective, DckdObjective, DpoObjective, SftObjective
from tests.mcore.cases import Distillation, assemble, first_gradients, first_step, forward_calls
from tests.mcore.tiny import make_groups, make_llama, make_qwen2, make_qwen3
from tests.ranks import run_ranks

OBJECTIVES = {
    "dpo": DpoObjective(beta=0.3, sft_weight=0.5),
    "dckd": DckdObjective(alpha=0.7),
    "adpa": AdpaObjective(gamma=1.5, beta=0.8),
}
KINDS = {
    "dpo": (Kind.CHOSEN, Kind.REJECTED), "dckd": (Kind.CHOSEN, Kind.REJECTED), "adpa": (Kind.CHOSEN, Kind.ROLLOUT),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, str]:
    """Models whose layers divide by no pipeline of the layouts below; those of the students do."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "student": str(make_llama(folder / "student", seed=1, layers=5)),
        "teacher": str(make_llama(folder / "teacher", seed=2, layers=5, hidden=64, heads=8, kv_heads=4, tied=False)),
        "reference": str(make_llama(folder / "reference", seed=3, layers=3)),
    }


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> dict[str, str]:
    """Students of other makes than the tied Llama with 3 groups of heads."""
    folder = tmp_path_factory.mktemp("students")
    return {
        "untied head": str(make_llama(folder / "untied", seed=4, tied=False)),
        "4 groups of heads": str(make_llama(folder / "groups", seed=5, heads=8, kv_heads=4)),
        "biases": str(make_qwen2(folder / "biases", seed=6)),
    }


def naive_gradients(directories: dict[str, str], method: str, groups) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients in float64 by transformers and autograd, from the formulas of the papers."""
    models = {role: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
              for role, path in directories.items()}

    def rows(role: str, sample) -> torch.Tensor:
        tokens = torch.tensor([sample.tokens])
        return models[role](tokens).logits[0, sample.prompt_length - 1 : -1].log_softmax(-1)

    def labels(sample) -> torch.Tensor:
        return torch.tensor(sample.tokens[sample.prompt_length :])

    def of_kind(kind: Kind) -> list:
        return [sample for group in groups for sample in group.samples if sample.kind == kind]

    def mean(values: list[torch.Tensor]) -> torch.Tensor:
        together = torch.cat(values)
        return together.sum() / max(1, together.numel())

    def nll(samples) -> torch.Tensor:
        return -mean([rows("student", s).gather(1, labels(s)[:, None])[:, 0] for s in samples])

    def kl(samples) -> torch.Tensor:
        pairs = [(rows("teacher", s).detach(), rows("student", s)) for s in samples]
        return mean([(p.exp() * (p - q)).sum(-1) for p, q in pairs])

    def sequence(role: str, sample) -> torch.Tensor:
        return rows(role, sample).gather(1, labels(sample)[:, None]).sum()

    settings = (OBJECTIVES | {"sft": SftObjective()})[method]
    if method == "sft":
        loss = nll(of_kind(Kind.CHOSEN))
    elif method == "dckd":
        loss = nll(of_kind(Kind.CHOSEN)) + settings.alpha * (kl(of_kind(Kind.CHOSEN)) + kl(of_kind(Kind.REJECTED)))
    elif method == "adpa":
        gains = [
            (rows("student", s).exp() * settings.beta * (rows("teacher", s) - rows("reference", s)).detach()).sum(-1)
            for s in of_kind(Kind.ROLLOUT)
        ]
        loss = nll(of_kind(Kind.CHOSEN)) - settings.gamma * mean(gains)
    else:
        margins = [
            sequence("student", w) - sequence("reference", w).detach() - sequence("student", r)
            + sequence("reference", r).detach()
            for w, r in (group.samples for group in groups)
        ]
        loss = -torch.nn.functional.logsigmoid(settings.beta * torch.stack(margins)).mean()
        loss = loss + settings.sft_weight * nll(of_kind(Kind.CHOSEN))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in models["student"].named_parameters()}


def check(results, loss: float, expected: dict[str, torch.Tensor]) -> float:
    """Compares every rank's loss and the assembled gradients; returns the largest relative error of a tensor."""
    for metrics, _ in results:
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    found = assemble([boxes for _, boxes in results])
    assert found.keys() == {name for name in expected if not name.startswith("lm_head") or name in found}
    worst = 0.0
    for name, gradient in found.items():
        error = (gradient.double() - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, f"{name}: relative error {error:.2e}"
        worst = max(worst, error.item())
    return worst


LAYOUTS = {
    # name: (world, student, teacher, reference, micro-batches)
    "one process": (1, Parallel(), Parallel(), Parallel(), (4, 2, 8)),
    "tp2 | pp2 | dp2": (2, Parallel(tensor=2, pad_heads=True), Parallel(pipeline=2), Parallel(), (2, 1, 4)),
    "pp2 | tp2 | dp2": (2, Parallel(pipeline=2), Parallel(tensor=2), Parallel(), (1, 4, 2)),
    "dp2 | tp2 | pp2": (2, Parallel(), Parallel(tensor=2), Parallel(pipeline=2), (2, 4, 2)),
    "tp2 sp | tp2 sp | dp2": (
        2, Parallel(tensor=2, sequence=True, pad_heads=True), Parallel(tensor=2, sequence=True), Parallel(), (2, 4, 2)),
    "tp2 pp2 | dp4 | tp4": (
        4, Parallel(tensor=2, pipeline=2, pad_heads=True), Parallel(), Parallel(tensor=4, pad_heads=True), (2, 1, 4)),
    "dp4 | tp2 pp2 | pp2 dp2": (4, Parallel(), Parallel(tensor=2, pipeline=2), Parallel(pipeline=2), (1, 2, 1)),
    "tp4 | pp2 dp2 | tp2 dp2": (
        4, Parallel(tensor=4, pad_heads=True), Parallel(pipeline=2), Parallel(tensor=2, pad_heads=True), (4, 2, 2)),
    "pp2 vpp2 dp2 | tp4 | dp4": (
        4, Parallel(pipeline=2, virtual_pipeline=2), Parallel(tensor=4), Parallel(), (1, 2, 1)),
    "tp2 sp pp2 vpp2 | pp4 | dp4": (
        4, Parallel(tensor=2, sequence=True, pipeline=2, virtual_pipeline=2, pad_heads=True), Parallel(pipeline=4),
        Parallel(), (2, 2, 1)),
    "cp2 | pp2 | dp2": (2, Parallel(context=2), Parallel(pipeline=2), Parallel(), (2, 1, 4)),
    "tp2 sp cp2 | tp2 dp2 | dp4": (
        4, Parallel(tensor=2, sequence=True, context=2, pad_heads=True), Parallel(tensor=2), Parallel(), (4, 2, 1)),
    "pp2 vpp2 cp2 | tp4 | dp4": (
        4, Parallel(pipeline=2, virtual_pipeline=2, context=2), Parallel(tensor=4), Parallel(context=4), (1, 2, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", OBJECTIVES)
def test_first_gradients_equal_plain_torch(directories, method, layout, recompute="none"):
    world, student, teacher, reference, micro_batches = LAYOUTS[layout]
    groups = tuple(make_groups(8, KINDS[method]))
    loss, expected = naive_gradients(directories, method, groups)
    case = Distillation(
        directories, {"student": student, "teacher": teacher, "reference": reference},
        dict(zip(("student", "teacher", "reference"), micro_batches, strict=True)), OBJECTIVES[method], groups, 8,
        recompute=recompute,
    )
    worst = check(run_ranks(world, first_gradients, case), loss, expected)
    print(f"{method}, {layout}: worst relative error {worst:.1e}")


@pytest.mark.parametrize("layout", ["tp2 sp | tp2 sp | dp2", "tp4 | pp2 dp2 | tp2 dp2", "tp2 sp pp2 vpp2 | pp4 | dp4"])
@pytest.mark.parametrize("student", ["untied head", "4 groups of heads", "biases"])
def test_first_gradients_of_other_students(directories, students, student, layout):
    test_first_gradients_equal_plain_torch(directories | {"student": students[student]}, "adpa", layout)


STEPS = {
    # name: (layout, recompute, whether the head is tied); 3 groups of heads, so that tensor ranks have some of zeros
    "one process": (Parallel(), "none", True),
    "tp2": (Parallel(tensor=2, pad_heads=True), "none", True),
    "tp2 sp": (Parallel(tensor=2, sequence=True, pad_heads=True), "full", False),
    "pp2": (Parallel(pipeline=2), "none", True),
    "cp2": (Parallel(context=2), "none", False),
    "tp2 pp2": (Parallel(tensor=2, pipeline=2, pad_heads=True), "mlp", False),
}


@pytest.mark.parametrize("layout", STEPS)
def test_a_step_with_norms_of_queries_and_keys(tmp_path, layout):
    """Gradients, their norm and the step against transformers and torch: each rank normalises heads of its own by
    weights that all have, so gradients of these are summed once, and count once."""
    parallel, recompute, tied = STEPS[layout]
    student = str(make_qwen3(tmp_path / "student", seed=6, tied=tied))
    groups = tuple(make_groups(8, (Kind.CHOSEN,)))
    case = Distillation({"student": student}, {"student": parallel}, {"student": 2}, SftObjective(), groups, 8,
                        recompute=recompute, weight_decay=0.5)
    loss, expected = naive_gradients(case.directories, "sft", groups)
    results = run_ranks(parallel.tensor * parallel.pipeline * parallel.context, first_step, case)
    worst = check([(metrics, boxes) for metrics, boxes, _ in results], loss, expected)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.grad = expected[name].clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), case.clip)
    vectors = [each for each in parameters.values() if each.ndim == 1]  # are not decayed
    torch.optim.AdamW([{"params": vectors, "weight_decay": 0.0},
                       {"params": [each for each in parameters.values() if each.ndim > 1]}],
                      lr=results[0][0]["lr"], weight_decay=case.weight_decay, eps=case.eps).step()
    stepped = assemble([after for *_, after in results])
    for metrics, _, _ in results:
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5) and norm > case.clip
    assert stepped.keys() == parameters.keys() and len([name for name in stepped if "self_attn.q_norm" in name]) == 4
    for name, values in stepped.items():
        torch.testing.assert_close(values.double(), parameters[name].data, rtol=0, atol=2e-6, msg=name)
    print(f"{layout}: worst relative error {worst:.1e}, norm {norm:.3f}")


@pytest.mark.parametrize("layout", ["one process", "tp2 sp cp2 | tp2 dp2 | dp4", "tp2 sp pp2 vpp2 | pp4 | dp4"])
@pytest.mark.parametrize("recompute", ["mlp", "full"])
def test_first_gradients_with_activations_made_again(directories, recompute, layout):
    test_first_gradients_equal_plain_torch(directories, "dckd", layout, recompute)


@pytest.mark.parametrize(("recompute", "attention", "mlp"), [("none", 1, 1), ("mlp", 1, 2), ("full", 2, 2)])
def test_what_is_made_again(directories, recompute, attention, mlp):
    case = Distillation(directories, {"student": Parallel()}, {"student": 2}, SftObjective(),
                        tuple(make_groups(2, (Kind.CHOSEN,))), 2, recompute=recompute)
    assert run_ranks(1, forward_calls, case) == [{"attention": attention, "mlp": mlp}]
