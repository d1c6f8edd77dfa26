"""Losses on a teacher's likeliest tokens, from hidden states: against float64 autograd on logits, at TP 1, 2, 4.

Legend: T tokens, V columns (of all ranks), H student width, K listed ids of a token.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megakd import losses
from megakd.errors import LossInputError
from megakd.losses import TopK, reference
from tests.ranks import run_ranks, subgroup

TOKENS, VOCAB, COLUMNS, WIDTH = 13, 33, 48, 8
SIZES = (1.0, 3.0)
"""Scales of the student's hidden states: at 3 many of its probabilities are below the released code's 1e-7."""
LISTED = (1, 6, 33)


def tensors(size: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Hidden states, heads with junk in their padding, labels and weights; a quarter of the weights is 0."""
    generator = torch.Generator().manual_seed(7)
    made = {}
    for role, scale in (("student", size), ("teacher", 1.0), ("reference", 1.0)):
        made[f"{role}_hidden"] = scale * torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
        made[f"{role}_head"] = torch.randn(COLUMNS, WIDTH, generator=generator, dtype=torch.float64)
        made[f"{role}_head"][VOCAB:] = float("nan")
    for name in ("kl_weights", "log_prob_weights"):
        made[name] = torch.randn(TOKENS, generator=generator, dtype=torch.float64)
        made[name][1::4] = 0.0
    made = {name: tensor.to(dtype) for name, tensor in made.items()}
    return made | {"labels": torch.randint(VOCAB, (TOKENS,), generator=generator)}


def whole_logits(data: dict[str, torch.Tensor], role: str) -> torch.Tensor:
    return data[f"{role}_hidden"].double() @ data[f"{role}_head"][:VOCAB].double().t()


def settings() -> dict:
    """Of this process: the ranks of its world share the columns."""
    group = subgroup(tuple(range(dist.get_world_size()))) if dist.is_initialized() else None
    return {"tp_group": group, "vocab_size": VOCAB, "chunk_tokens": 5}


def on_this_rank(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The heads' share of this rank."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return {name: tensor.chunk(size)[rank].clone() if name.endswith("head") else tensor
            for name, tensor in data.items()}


def lists(data: dict[str, torch.Tensor], k: int) -> tuple[TopK, TopK]:
    """The teacher's and the reference's own, by the implementation."""
    return tuple(losses.fused_top_k(data[f"{role}_hidden"], data[f"{role}_head"], k, **settings())
                 for role in ("teacher", "reference"))


def run(k: int, size: float, released: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Everything that this rank computes of one case."""
    data = on_this_rank(tensors(size, dtype))
    teacher, own = lists(data, k)
    at_teachers = losses.fused_log_probs_at(data["reference_hidden"], data["reference_head"], teacher.ids_TK,
                                            **settings())
    found = {"ids": teacher.ids_TK, "log_probs": teacher.log_probs_TK, "reference_log_probs": at_teachers}
    for tensor in (hidden := data["student_hidden"], head := data["student_head"]):
        tensor.requires_grad_()
    loss, kl_T, log_prob_T = losses.fused_topk_distillation(
        hidden, head, teacher, data["labels"], divergence_weights_T=data["kl_weights"],
        log_prob_weights_T=data["log_prob_weights"], released=released, **settings(),
    )
    gradients = torch.autograd.grad(loss, (hidden, head))
    found |= {"loss": loss.detach(), "kl": kl_T, "log_prob": log_prob_T}
    found |= {"kl_d_hidden": gradients[0], "kl_d_head": gradients[1]}
    if released:
        advantages_TK = losses.released_topk_advantages(teacher, own)
    else:
        advantages_TK = losses.topk_advantages(teacher, at_teachers, beta=0.7)
    value_T, mass_T = losses.fused_topk_advantage(hidden, head, teacher.ids_TK, advantages_TK, released=released,
                                                  **settings())
    assert not mass_T.requires_grad
    gradients = torch.autograd.grad((value_T * data["kl_weights"].to(value_T.dtype)).sum(), (hidden, head))
    return found | {"advantages": advantages_TK, "value": value_T.detach(), "mass": mass_T,
                    "advantage_d_hidden": gradients[0], "advantage_d_head": gradients[1]}


def naive(k: int, size: float, released: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same from whole logits in float64, sum by sum as the paper and the released code have it."""
    data = tensors(size, dtype)
    hidden_TH = data["student_hidden"].double().requires_grad_()
    head_VH = data["student_head"][:VOCAB].double().requires_grad_()
    student_TV = hidden_TH @ head_VH.t()
    teacher_TV, reference_TV = (whole_logits(data, role).log_softmax(1) for role in ("teacher", "reference"))
    log_probs_TK, ids_TK = teacher_TV.topk(k, dim=1)
    kl_T = reference.released_topk_kl(student_TV, ids_TK, log_probs_TK.exp(), clamp=released, vocab_size=VOCAB)
    log_prob_T = student_TV.log_softmax(1)[torch.arange(TOKENS), data["labels"]]
    weights_T = data["kl_weights"].double()
    loss = (weights_T * kl_T).sum() + (data["log_prob_weights"].double() * log_prob_T).sum()
    found = {"ids": ids_TK, "log_probs": log_probs_TK, "reference_log_probs": reference_TV.gather(1, ids_TK),
             "loss": loss, "kl": kl_T, "log_prob": log_prob_T}
    found["kl_d_hidden"], found["kl_d_head"] = torch.autograd.grad(loss, (hidden_TH, head_VH), retain_graph=True)
    advantages_TK = 0.7 * (log_probs_TK - found["reference_log_probs"])
    if released:
        own = [set(row) for row in reference_TV.topk(k, dim=1).indices.tolist()]
        for row in range(TOKENS):
            p = log_probs_TK[row].exp().tolist()
            for place, token in enumerate(ids_TK[row].tolist()):
                r = reference_TV[row, token].exp().item()
                denominator = max(r, 1e-7) if token in own[row] else max(min(p), 1e-7)
                advantages_TK[row, place] = math.log(max(p[place], 1e-7) / denominator)
    value_T = reference.released_topk_advantage(student_TV, ids_TK, advantages_TK, clamp=released, vocab_size=VOCAB)
    gradients = torch.autograd.grad((weights_T * value_T).sum(), (hidden_TH, head_VH), retain_graph=True)
    mass_T = student_TV.softmax(1).gather(1, ids_TK).sum(1)
    return found | {"advantages": advantages_TK, "value": value_T, "mass": mass_T,
                    "advantage_d_hidden": gradients[0], "advantage_d_head": gradients[1]}


def compare(ranks: list[dict[str, torch.Tensor]], right: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, exact in right.items():
        exact = exact.detach()
        if name.endswith("head"):
            found = torch.cat([rank[name] for rank in ranks])
            assert (found[VOCAB:] == 0).all(), f"{name}: the padding has a gradient"
            both = [found[:VOCAB]]
        else:
            both = [rank[name] for rank in ranks]
        for found in both:
            assert found.shape == exact.shape, name
            error = (found.double() - exact).abs().max() / exact.abs().max()
            assert error <= (0 if name == "ids" else tolerance), f"{name} is off by {error:.1e}"


CASES = [(k, size, released) for k in LISTED for size in SIZES for released in (False, True)]


@pytest.mark.parametrize(("k", "size", "released"), CASES)
def test_values_and_gradients_in_one_process(k, size, released):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        case = (k, size, released, dtype)
        compare([run(*case)], naive(*case), tolerance)


def _run_all(cases, dtype):
    return [run(*case, dtype) for case in cases]


@pytest.mark.parametrize("world", [2, 4])
def test_values_and_gradients_over_ranks(world):
    """Over 4 ranks the last one has no real column, and 33 are listed of 12 a rank."""
    by_rank = run_ranks(world, _run_all, CASES, torch.float32)
    for case, ranks in zip(CASES, zip(*by_rank, strict=True), strict=True):
        compare(list(ranks), naive(*case, torch.float32), 1e-5)
        for name in ("ids", "log_probs", "reference_log_probs", "kl", "value"):
            assert torch.equal(ranks[0][name], ranks[-1][name])


def test_the_cases_meet_the_released_limits():
    probs = whole_logits(tensors(3.0, torch.float64), "student").softmax(1)
    assert 0.1 < (probs < 1e-7).double().mean() < 0.9
    signed, clamped = (naive(6, 1.0, released, torch.float64)["advantages"] for released in (False, True))
    assert (clamped < 0).any() and (clamped > 1).any() and (signed != 0.7 * clamped).any()


def _tied(head_VH, k):
    mine_VH = on_this_rank({"head": head_VH})["head"]
    return losses.fused_top_k(torch.ones(2, 1), mine_VH, k, **settings()).ids_TK.tolist()


def test_of_equal_tokens_the_lowest_ids_are_listed_in_every_layout():
    head_VH = torch.zeros(COLUMNS, 1)
    head_VH[5::6] = 1.0  # 5, 11, 17, 23, 29 are the likeliest, all others equal
    expected = [[5, 11, 17, 23, 29, 0, 1, 2]] * 2
    assert _tied(head_VH, 8) == expected and _tied(head_VH, 3) == [[5, 11, 17]] * 2
    assert run_ranks(2, _tied, head_VH, 8) == [expected] * 2
    assert run_ranks(4, _tied, head_VH, 3) == [[[5, 11, 17]] * 2] * 4


def test_the_first_of_a_list_are_a_shorter_list():
    data = on_this_rank(tensors(1.0, torch.float32))
    (long, _), (short, _) = lists(data, 9), lists(data, 4)
    assert torch.equal(long.first(4).ids_TK, short.ids_TK)
    assert torch.equal(long.first(4).log_probs_TK, short.log_probs_TK)


H, W = torch.zeros(2, 3), torch.zeros(8, 3)
IDS, LOGS, ONES = torch.tensor([[0, 1], [7, 2]]), torch.full((2, 2), -1.0), torch.ones(2)


def distil(ids=IDS, logs=LOGS, weights=ONES):
    return losses.fused_topk_distillation(H, W, TopK(ids, logs), torch.tensor([0, 1]), divergence_weights_T=weights,
                                          log_prob_weights_T=ONES, released=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.fused_top_k(H, W, 9), r"k = 9: it must be between 1 and the vocabulary's 8 tokens"),
        (lambda: losses.fused_top_k(H, W, 0), r"k = 0"),
        (lambda: losses.fused_log_probs_at(H, W, IDS[:1]), r"token_ids_TK is torch.int64 \[1, 2\].*\[2, K\]"),
        (lambda: losses.fused_log_probs_at(H, W, IDS + 1), r"token_ids_TK holds 8: ids must be in \[0, 8\)"),
        (lambda: distil(ids=IDS * 0), r"2 of 2 rows with an id twice"),
        (lambda: distil(logs=LOGS[:, :1]), r"log_probs_TK is torch.float32 \[2, 1\].*\[2, 2\]"),
        (lambda: distil(weights=ONES[:1]), r"divergence_weights_T is torch.float32 \[1\]"),
        (lambda: losses.fused_topk_advantage(H, W, IDS, LOGS * float("nan"), released=True), r"advantages_TK holds 4"),
    ],
)
def test_wrong_inputs_are_refused(call, message):
    with pytest.raises(LossInputError, match=message):
        call()
