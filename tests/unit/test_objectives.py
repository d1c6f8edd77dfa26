"""Loss and gradient of each objective against float64 numpy written from the papers' formulas, and how they may be cut.

Legend: N sequences of the step, S positions, V vocabulary (padded), H student width.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megakd.batch import Batch, Draw, Group, Kind, Padding, Sample, collate, number_samples
from megakd.config_objectives import (
    AdpaObjective,
    CpoObjective,
    DckdObjective,
    DpkdObjective,
    DpkdTokenObjective,
    DpoObjective,
    IpoObjective,
    KdObjective,
    MiniLlmObjective,
    PadObjective,
    SftObjective,
    SimpoObjective,
)
from megakd.objectives import build_objective
from megakd.objectives.base import LossContext, RoleOutput, StoredListedLogProbs, StoredLogProbs, StoredTopK
from tests.ranks import run_ranks, subgroup

VOCAB, PADDED = 37, 40
WIDTHS = {"student": 6, "teacher": 9, "reference": 4}
CONFIGS = {
    "sft": SftObjective(),
    "dpo": DpoObjective(beta=0.4, label_smoothing=0.1, sft_weight=0.3),
    "dckd": DckdObjective(alpha=0.7, sft_weight=1.3, temperature=1.7),
    "adpa": AdpaObjective(gamma=1.5, beta=0.8, sft_weight=0.6),
    "dckd-top-k": DckdObjective(alpha=0.7, sft_weight=1.3, top_k=5),
    "dckd-released": DckdObjective(alpha=0.7, top_k=5, released=True),
    "adpa-top-k": AdpaObjective(gamma=1.5, beta=0.8, sft_weight=0.6, top_k=5),
    "adpa-released": AdpaObjective(gamma=1.5, top_k=5, released=True),
    "kd-top-k": KdObjective(weight=0.6, top_k=5),
    "seqkd": SftObjective(answers="teacher"),
    "kd": KdObjective(weight=0.6, temperature=1.7),
    "kd-on-policy": KdObjective(divergence="jsd", weight=0.9, beta=0.3, on_policy=0.5),
    "kd-teacher-answers": KdObjective(divergence="reverse_kl", weight=0.7, answers="teacher"),
    "kd-akl": KdObjective(divergence="akl", weight=1.0, mu=0.4),
    "dckd-reference": DckdObjective(alpha=0.7, teacher="reference"),
    "adpa-no-reference": AdpaObjective(gamma=1.5, beta=0.8, reference=False),
    "ipo": IpoObjective(tau=0.2, sft_weight=0.3),
    "ipo-mean": IpoObjective(tau=0.6, mean_log_probs=True),
    "cpo": CpoObjective(beta=0.2, nll_weight=0.4, sft_weight=0.3),
    "simpo": SimpoObjective(beta=2.5, gamma=0.7),
    "dpkd": DpkdObjective(beta=3.0, lm_weight=0.5),
    "dpkd-sums": DpkdObjective(beta=0.3, length_normalize=False, lm_weight=0.0),
    "dpkd-ipo": DpkdObjective(form="ipo", tau=0.5),
    "dpkd-cpo": DpkdObjective(form="cpo", beta=0.4),
    "dpkd-simpo": DpkdObjective(form="simpo", beta=2.0, gamma=0.5),
    "dpkd-token": DpkdTokenObjective(beta=0.7, weight=0.6),
    "dpkd-token-teacher-answers": DpkdTokenObjective(beta=0.7, weight=1.0, answers="teacher"),
    "minillm": MiniLlmObjective(clip=0.3, single_step_weight=0.8, lm_weight=0.4),
    "minillm-text": MiniLlmObjective(lm_on="text"),
    "dpkd-text": DpkdObjective(lm_on="text"),
    "minillm-alone": MiniLlmObjective(single_step_weight=0.0, lm_weight=0.0),
    "pad-vanilla": PadObjective(loss="vanilla", beta=2.0),
    "pad-jsd": PadObjective(beta=1.5),
    "pad-am_gm": PadObjective(divergence="am_gm", beta=1.5),
}
ANSWERS = 3
"""To each prompt where an objective ranks them."""
CUTS = [[[0, 1, 2, 3]], [[3], [0, 2], [1]], [[2, 1], [0, 3]]]


def make_groups(name: str) -> list[Group]:
    generator = np.random.default_rng(0)
    requires = build_objective(CONFIGS[name]).requires
    ranked = isinstance(CONFIGS[name], PadObjective)

    def sample(kind: Kind) -> Sample:
        prompt, answer = generator.integers(1, 4), generator.integers(1, 6)
        tokens = tuple(generator.integers(0, VOCAB, prompt + answer).tolist())
        draw = None
        if requires.draws and kind is Kind.ROLLOUT:
            # Of the policy that drew it, near enough to this one that some ratios are within the limits.
            now = policy_log_probs(tokens, int(prompt))
            draw = Draw(tuple(now + generator.normal(scale=0.3, size=answer)), tuple(generator.normal(size=answer)))
        return Sample(tokens, int(prompt), kind, generator.normal() if ranked else np.nan, draw)

    def policy_log_probs(tokens: tuple[int, ...], prompt: int) -> np.ndarray:
        """The student's log-probabilities of the response of the next sample."""
        hidden, head = make_models()["student"]
        log_q = log_softmax(hidden[next(numbers), prompt - 1 : len(tokens) - 1] @ head[:VOCAB].T)
        return log_q[np.arange(len(log_q)), list(tokens[prompt:])]

    kinds_a_group = len(requires.kinds) + CONFIGS[name].reads_text
    numbers = (number * kinds_a_group for number in range(4))  # the rollout is the first of its group

    def kinds(number: int) -> tuple[Kind, ...]:
        if ranked:
            return (Kind.ROLLOUT,) * ANSWERS
        if requires.on_policy > 0 and number % 2:
            return (Kind.ROLLOUT,)
        return (*requires.kinds, Kind.TEXT) if CONFIGS[name].reads_text else requires.kinds

    return [Group(f"row:{number}", tuple(sample(kind) for kind in kinds(number))) for number in range(4)]


def make_models() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each role hidden states [N, S, H] by sample id and position, and a head [V, H] with junk in its padding."""
    generator = np.random.default_rng(1)
    models = {}
    for role, width in WIDTHS.items():
        head = generator.normal(size=(PADDED, width))
        head[VOCAB:] = np.nan
        models[role] = (generator.normal(size=(12, 10, width)), head)
    return models


# ------------------------------------------------------------------------------------------- the formulas, in numpy
def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.log1p(np.exp(-x))


def pair_values(config, better, worse) -> tuple[np.ndarray, np.ndarray]:
    """Losses and reward margins of pairs; better and worse are (log-probabilities, the reference's, lengths)."""
    (s_w, r_w, n_w), (s_l, r_l, n_l) = better, worse
    form = config.form if config.kind == "dpkd" else config.kind
    if form == "dpo":
        margin, smooth = config.beta * ((s_w - r_w) - (s_l - r_l)), config.label_smoothing
        return -(1 - smooth) * log_sigmoid(margin) - smooth * log_sigmoid(-margin), margin
    if form == "ipo":
        if config.length_normalize if config.kind == "dpkd" else config.mean_log_probs:
            s_w, r_w, s_l, r_l = s_w / n_w, r_w / n_w, s_l / n_l, r_l / n_l
        margin = (s_w - r_w) - (s_l - r_l)
        return (margin - 1 / (2 * config.tau)) ** 2, margin
    if form == "cpo":
        margin = config.beta * (s_w - s_l)
        return -log_sigmoid(margin) - (0.0 if config.kind == "dpkd" else config.nll_weight) * s_w, margin
    if form == "simpo":
        margin = config.beta * (s_w / n_w - s_l / n_l)
        return -log_sigmoid(margin - config.gamma), margin
    if not config.length_normalize:
        n_w, n_l = 1, 1
    margin = config.beta * ((s_w - r_w) / n_w - (s_l - r_l) / n_l)
    return -log_sigmoid(margin), margin


def pad_values(config, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Losses of prompts from mean log-probabilities and the teacher's scores [N, G]."""

    def log_pl(scores, ranking):
        ordered = config.beta * scores[:, list(ranking)]
        return sum(ordered[:, k] - np.log(np.exp(ordered[:, k:]).sum(1)) for k in range(ANSWERS))

    if config.loss == "vanilla":
        rankings = np.argsort(-teacher, axis=1)
        return -np.concatenate([log_pl(student[n : n + 1], rankings[n]) for n in range(len(teacher))])
    total = 0.0
    for ranking in itertools.permutations(range(ANSWERS)):
        s, t = np.exp(log_pl(student, ranking)), np.exp(log_pl(teacher, ranking))
        m = (s + t) / 2
        jsd = s * np.log(s / m) + t * np.log(t / m)
        total = total + 0.5 * (jsd if config.divergence == "jsd" else m * np.log(m / s) + m * np.log(m / t))
    return total


def bucketed(log_probs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Probabilities of the listed tokens, and of all the others together."""
    listed = np.take_along_axis(np.exp(log_probs), ids, -1)
    return np.concatenate([listed, 1 - listed.sum(-1, keepdims=True)], -1)


def listed_divergence(config, log_p: np.ndarray, log_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`token_divergence` of the teacher's likeliest tokens and the rest, with the released code's limits on request."""
    ids = np.argsort(-log_p, axis=-1, kind="stable")[:, : config.top_k]
    p, q = bucketed(log_p, ids), bucketed(log_q, ids)
    free = np.ones_like(q)
    if config.released:
        p, free, q = np.clip(p, 1e-8, 1 - 1e-8), q >= 1e-7, np.maximum(q, 1e-7)
    # d value / d log bucket, and d log bucket / d logits: 1[in the bucket] q_a / bucket - q_a.
    weight = -p * free
    share = np.tile(weight[:, -1:] / q[:, -1:], log_q.shape[1]) * np.exp(log_q)
    np.put_along_axis(share, ids, weight[:, :-1], -1)
    return (p * np.log(p / q)).sum(-1), share - weight.sum(-1, keepdims=True) * np.exp(log_q)


def listed_advantage(config, log_p: np.ndarray, log_r: np.ndarray) -> np.ndarray:
    """Advantages [T, V]: of the teacher's likeliest tokens, 0 elsewhere; as the released code has them on request."""
    ids = np.argsort(-log_p, axis=-1, kind="stable")[:, : config.top_k]
    advantage = np.zeros_like(log_p)
    if not config.released:
        values = config.beta * np.take_along_axis(log_p - log_r, ids, -1)
        np.put_along_axis(advantage, ids, values, -1)
        return advantage
    for row, (row_p, row_r) in enumerate(zip(np.exp(log_p), np.exp(log_r), strict=True)):
        others = set(np.argsort(-row_r, kind="stable")[: config.top_k].tolist())
        for token in ids[row].tolist():
            floor = row_r[token] if token in others else row_p[ids[row]].min()
            advantage[row, token] = np.log(max(row_p[token], 1e-7) / max(floor, 1e-7))
    return np.clip(advantage, 1e-8, 1 - 1e-8)


def token_divergence(config, log_p: np.ndarray, log_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and gradients by the logits (over the temperature) of each token."""
    if config.top_k is not None:
        return listed_divergence(config, log_p, log_q)
    p, q = np.exp(log_p), np.exp(log_q)
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    d_forward, d_reverse = q - p, q * (log_q - log_p - reverse[:, None])
    if config.kind == "dckd" or config.divergence == "forward_kl":
        return forward, d_forward
    if config.divergence == "reverse_kl":
        return reverse, d_reverse
    if config.divergence == "jsd":
        m = config.beta * p + (1 - config.beta) * q
        kl_q = (q * np.log(q / m)).sum(-1)
        value = config.beta * (p * np.log(p / m)).sum(-1) + (1 - config.beta) * kl_q
        return value, (1 - config.beta) * q * (np.log(q / m) - kl_q[:, None])
    share = np.zeros(len(p))
    for row, (row_p, row_q) in enumerate(zip(p, q, strict=True)):
        order = np.argsort(-row_p, kind="stable")
        head = max(1, int((np.cumsum(row_p[order]) <= config.mu).sum()))
        gap = np.abs(row_p - row_q)[order]
        share[row] = gap[:head].sum() / gap.sum()
    value = share * forward + (1 - share) * reverse
    return value, share[:, None] * d_forward + (1 - share[:, None]) * d_reverse


def released_terms(config, sample, labels, log_q, log_p) -> tuple[dict[str, float], np.ndarray]:
    """What DPKD's token form and MiniLLM report, summed over a sequence's tokens, and d loss / d logits of each."""
    if config.kind == "dpkd_token":
        a, b, rows = log_p.argmax(1), log_q.argmax(1), np.arange(len(log_q))
        rel = (log_q[rows, a] - log_q[rows, b]) - (log_p[rows, a] - log_p[rows, b])
        slope = -config.beta * np.exp(log_sigmoid(-config.beta * rel))
        slopes = slope[:, None] * (np.eye(VOCAB)[a] - np.eye(VOCAB)[b])
        return {"dpkd_token": -log_sigmoid(config.beta * rel).sum()}, config.weight * slopes
    if sample.kind != Kind.ROLLOUT:
        return {}, np.zeros_like(log_q)
    worth = np.array(sample.draw.returns)
    ratio = np.exp((log_q * labels).sum(1) - np.array(sample.draw.log_probs))
    limited = np.clip(ratio, 1 - config.clip, 1 + config.clip)
    weight = np.where(ratio * worth <= limited * worth, -ratio * worth, 0.0)[:, None]
    reverse = (np.exp(log_q) * (log_q - log_p)).sum(1)
    slope = np.exp(log_q) * (log_q - log_p - reverse[:, None])
    return {"policy_gradient": -np.minimum(ratio * worth, limited * worth).sum(), "reverse_kl": reverse.sum()}, (
        weight * (labels - np.exp(log_q)) + config.single_step_weight * slope)


def by_complex_step(function, scores: np.ndarray) -> np.ndarray:
    """The derivative of the sum of `function(scores)`, exact to rounding: Im f(x + ih) / h."""
    slopes = np.zeros(scores.shape)
    for place in np.ndindex(*scores.shape):
        moved = scores.astype(complex)
        moved[place] += 1e-30j
        slopes[place] = function(moved).sum().imag / 1e-30
    return slopes


def sequence_terms(config, samples, scores: np.ndarray, references: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Reported means of an objective over sequences, and d loss / d score of each.

    The better answers of all pairs come before the worse ones, the answers of a prompt one after the other.
    """
    lengths = np.array([len(sample.tokens) - sample.prompt_length for sample in samples])
    teacher = np.array([sample.score for sample in samples]).reshape(4, -1)

    def values(scores):
        if config.kind == "pad":
            return pad_values(config, (scores / lengths).reshape(4, -1), teacher), None
        return pair_values(config, *((scores[p], references[p], lengths[p]) for p in (slice(0, 4), slice(4, 8))))

    value, margin = values(scores)
    slopes = by_complex_step(lambda moved: values(moved)[0], scores) / 4
    if config.kind == "pad":
        agreed = (scores / lengths).reshape(4, -1).argmax(1) == teacher.argmax(1)
        return {"pad": value.mean(), "best_agreed": agreed.mean()}, slopes
    name = config.form if config.kind == "dpkd" else config.kind
    return {name: value.mean(), "reward_accuracy": (margin > 0).mean(), "reward_margin": margin.mean()}, slopes


def naive(name: str) -> tuple[float, dict[str, float], np.ndarray, np.ndarray]:
    """Loss, reported means, and gradients of the student's hidden states and head."""
    config, groups, models = CONFIGS[name], make_groups(name), make_models()
    ids = number_samples(groups)
    kind_of = config.kind
    tau = config.temperature if kind_of in ("dckd", "kd") else 1.0
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

    from_teacher = kind_of in ("sft", "kd", "dpkd_token") and config.answers == "teacher"
    nll_kind = Kind.TEXT if config.reads_text else Kind.TEACHER_ANSWER if from_teacher else Kind.CHOSEN
    match kind_of:
        case "sft":
            sft_weight = 1.0
        case "kd" | "dpkd_token":
            sft_weight = 1.0 - config.weight
        case "dpkd" | "minillm":
            sft_weight = config.lm_weight
        case "pad":
            sft_weight = 0.0
        case _:
            sft_weight = config.sft_weight
    for sample, number, _ in samples:
        log_q, labels = log_probs("student", sample, number), one_hot(sample)
        if sample.kind == nll_kind and (sft_weight > 0 or kind_of in ("ipo", "cpo", "simpo", "dpo")):
            add("nll", -(log_q * labels).sum() / counts[nll_kind])
            backward(sample, number, sft_weight / counts[nll_kind] * (np.exp(log_q) - labels))
        if kind_of == "kd":
            log_q, log_p = log_probs("student", sample, number, tau), log_probs("teacher", sample, number, tau)
            value, slope = token_divergence(config, log_p, log_q)
            add(config.divergence, value.sum() / sum(counts.values()))
            backward(sample, number, config.weight / sum(counts.values()) * slope / tau)
        if kind_of == "dckd":
            log_q, log_p = log_probs("student", sample, number, tau), log_probs(config.teacher, sample, number, tau)
            value, slope = token_divergence(config, log_p, log_q)
            add(f"kl_{sample.kind.name.lower()}", value.sum() / counts[sample.kind])
            backward(sample, number, config.alpha / counts[sample.kind] * slope / tau)
        if kind_of == "adpa" and sample.kind == Kind.ROLLOUT:
            other = log_probs("reference", sample, number) if config.reference else -np.log(VOCAB)
            log_p, q = log_probs("teacher", sample, number), np.exp(log_q)
            a = config.beta * (log_p - other)
            if config.top_k is not None:
                a = listed_advantage(config, log_p, other)
                add("top_k_mass", bucketed(log_q, np.argsort(-log_p, axis=-1)[:, : config.top_k])[:, :-1].sum()
                    / counts[Kind.ROLLOUT])
            mean = (q * a).sum(-1, keepdims=True)
            add("expected_advantage", mean.sum() / counts[Kind.ROLLOUT])
            backward(sample, number, -config.gamma / counts[Kind.ROLLOUT] * q * (a - mean))
        if kind_of in ("dpkd_token", "minillm"):
            reported, slope = released_terms(config, sample, labels, log_q, log_probs("teacher", sample, number))
            for metric, total in reported.items():
                add(metric, total / counts[sample.kind])
            backward(sample, number, slope / counts[sample.kind])
    if kind_of in ("dpo", "ipo", "cpo", "simpo", "dpkd", "pad"):
        own = [(sample, number) for sample, number, _ in samples]
        if kind_of != "pad":
            kinds = (Kind.TEACHER_ANSWER, Kind.ROLLOUT) if kind_of == "dpkd" else (Kind.CHOSEN, Kind.REJECTED)
            own = [pair for kind in kinds for pair in own if pair[0].kind == kind]
        role = "teacher" if kind_of == "dpkd" else "reference"
        scores, references = (
            np.array([(log_probs(model, *pair) * one_hot(pair[0])).sum() for pair in own])
            for model in ("student", role)
        )
        reported, slopes = sequence_terms(config, [sample for sample, _ in own], scores, references)
        means |= reported
        for slope, (sample, number) in zip(slopes, own, strict=True):
            backward(sample, number, slope * (one_hot(sample) - np.exp(log_probs("student", sample, number))))
    weights = {"nll": sft_weight, "top_k_mass": 0.0, "reward_accuracy": 0.0, "reward_margin": 0.0, "best_agreed": 0.0}
    weights |= dict.fromkeys(("dpo", "ipo", "cpo", "simpo", "dpkd", "pad"), 1.0)
    if kind_of == "dpkd_token":
        weights |= {"dpkd_token": config.weight}
    if kind_of == "minillm":
        weights |= {"policy_gradient": 1.0, "reverse_kl": config.single_step_weight}
    if kind_of == "kd":
        weights |= {config.divergence: config.weight}
    if kind_of == "dckd":
        weights |= {"kl_chosen": config.alpha, "kl_rejected": config.alpha}
    if kind_of == "adpa":
        weights |= {"expected_advantage": -config.gamma}
    return sum(weights[key] * value for key, value in means.items()), means, grad_hidden, grad_head


# ------------------------------------------------------------------------------------------------ the implementation
def columns_of(batch: Batch) -> torch.Tensor:
    """The position of each loss position in its own sequence."""
    return batch.position_ids_P[batch.positions.places_T]


class WithoutMasks(TorchDispatchMode):
    """Refuses what a host waits for its GPU at because the size of the result is in the numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten.nonzero, torch.ops.aten.masked_select), func
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten.index_put):
            assert all(index is None or index.dtype == torch.int64 for index in args[1]), f"{func} with a mask"
        return func(*args, **(kwargs or {}))


def run(name: str, cut: list[list[int]], dtype=torch.float32, tp: int = 1, cp: int = 1):
    """Loss, reported means, d(hidden) and this rank's rows of d(head) over micro-batches that are cut as `cut` says; of
    the ranks that share sequences (`cp`) each one's part of all four."""
    group = None if tp == cp == 1 else subgroup(tuple(range(tp * cp)))
    rank = 0 if group is None else dist.get_rank(group)
    objective, groups = build_objective(CONFIGS[name]), make_groups(name)
    ids, padding = number_samples(groups), Padding(context=cp, context_rank=rank % cp)
    batches = [collate([groups[g] for g in part], [ids[g] for g in part], pad_id=0, padding=padding) for part in cut]
    counts: dict[str, int] = {}
    for batch in batches:
        counts = {key: counts.get(key, 0) + value for key, value in batch.counts().items()}
    models = {
        role: (torch.tensor(hidden, dtype=dtype), torch.tensor(head, dtype=dtype).chunk(tp)[rank % tp].clone())
        for role, (hidden, head) in make_models().items()
    }
    for tensor in models["student"]:
        tensor.requires_grad_()

    def output(role, batch, kinds):
        positions = batch.positions
        wanted_T = torch.isin(positions.kinds_T, torch.tensor([int(kind) for kind in kinds]))
        samples_T, columns_T = batch.sample_ids_B[positions.rows_T[wanted_T]], columns_of(batch)[wanted_T]
        return RoleOutput(models[role][0][samples_T, columns_T], models[role][1])

    context = LossContext(group if tp > 1 else None, VOCAB, 7, counts, group if cp > 1 else None)
    loss, reported, means = 0.0, 0.0, {}
    for batch in batches:
        teachers = {role: output(role, batch, kinds) for role, kinds in objective.requires.teacher_kinds.items()}
        assert set(teachers) == set(objective.requires.teachers)
        student = output("student", batch, list(Kind))
        # These losses ask which of the likeliest tokens tie; AKL, on a CPU, which are in a bin.
        asks = any(word in name for word in ("top-k", "released", "akl"))
        with nullcontext() if asks else WithoutMasks():
            result = objective.loss(student, teachers, batch, context)
        # Where the losses have added the terms up themselves, they did so for a division by the step's tokens.
        loss = loss + (0.0 if result.loss is None else result.loss / counts["tokens"])
        for term in result.terms:
            mean = term.values_N.sum() / counts[term.denominator]
            assert term.values_N.requires_grad == (result.loss is None)
            loss = loss + (term.weight * mean if result.loss is None else 0.0)
            mean = term.values_N.sum().item() / context.divisor(term.denominator)
            means[term.name] = means.get(term.name, 0.0) + mean
            reported += term.weight * mean
        for metric in result.metrics:
            assert metric.total.dim() == 0 and not metric.total.requires_grad
            mean = metric.total.item() / context.divisor(metric.denominator)
            means[metric.name] = means.get(metric.name, 0.0) + mean
    loss.backward()
    if context.cp_group is None:
        reported = loss.item()
    return reported, means, *(tensor.grad.double().numpy() for tensor in models["student"])


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


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_over_two_context_ranks(name):
    for cut in CUTS[:2]:
        first, second = run_ranks(2, run, name, cut, torch.float64, 1, 2)
        means = {key: value + second[1][key] for key, value in first[1].items()}
        hidden, head = (mine + other for mine, other in zip(first[2:], second[2:], strict=True))
        compare((first[0] + second[0], means, hidden, head), naive(name), 1e-12)
        assert not np.any((first[2] != 0) & (second[2] != 0)), "a position belongs to one rank"
        # Of rollouts alone none reaches the last quarter of its filled sequence, nor begins in the first.
        assert second[2].any() and (first[2].any() or name == "minillm-alone")


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


@pytest.mark.parametrize("name", CONFIGS)
def test_objectives_say_what_they_need(name):
    requires, config = build_objective(CONFIGS[name]).requires, CONFIGS[name]
    assert requires.teachers == config.roles == tuple(requires.teacher_kinds)
    taken = (*requires.kinds, Kind.ROLLOUT) if requires.on_policy > 0 else requires.kinds
    for kinds in requires.teacher_kinds.values():
        assert set(kinds) <= set(taken)
        assert tuple(kind.name.lower() for kind in kinds) == config.scored


def test_roles_of_the_objectives():
    teachers = {"sft": (), "dpo": ("reference",), "dckd": ("teacher",), "adpa": ("teacher", "reference"),
                "adpa-no-reference": ("teacher",), "dckd-reference": ("reference",), "kd": ("teacher",), "simpo": (),
                "dpkd": ("teacher",), "dpkd-cpo": (), "pad-jsd": (), "seqkd": ()}
    assert {name: CONFIGS[name].roles for name in teachers} == teachers


# ----------------------------------------------------------------------------------------------------- stored outputs
@pytest.mark.parametrize("name", ["dpo", "ipo-mean", "dpkd", "dckd-top-k", "kd-top-k", "adpa-top-k", "adpa-released"])
def test_what_is_stored_of_a_role_gives_the_same_as_its_hidden_states(name):
    """A list of 9 tokens is stored where the objective takes 5."""
    objective, groups = build_objective(CONFIGS[name]), make_groups(name)
    batch = collate(groups, number_samples(groups), pad_id=0)
    positions = batch.positions
    context = LossContext(None, VOCAB, 7, batch.counts())

    def outputs(stored: bool):
        found = {}
        models = {role: [torch.tensor(tensor) for tensor in tensors] for role, tensors in make_models().items()}
        hidden = models["student"][0].requires_grad_()
        student = RoleOutput(hidden[batch.sample_ids_B[positions.rows_T], columns_of(batch)], models["student"][1])
        for role, kinds in objective.requires.teacher_kinds.items():
            wanted_T = torch.isin(positions.kinds_T, torch.tensor([int(kind) for kind in kinds]))
            rows = models[role][0][batch.sample_ids_B[positions.rows_T[wanted_T]], columns_of(batch)[wanted_T]]
            found[role] = output = RoleOutput(rows, models[role][1])
            if stored and "token_log_probs" in CONFIGS[name].signal_kinds:
                found[role] = StoredLogProbs(output.token_log_probs(positions.labels_T[wanted_T], context))
            elif stored and role == "reference" and not CONFIGS[name].released:
                ids = found["teacher"].top_k(9, context).ids_TK
                found[role] = StoredListedLogProbs(output.log_probs_at(ids, context))
            elif stored:
                found[role] = StoredTopK(output.top_k(9, context))
        return hidden, objective.loss(student, found, batch, context)

    results = []
    for stored in (False, True):
        hidden, terms = outputs(stored)
        loss = sum(term.values_N.sum() * term.weight for term in terms.terms) if terms.loss is None else terms.loss
        (gradient,) = torch.autograd.grad(loss, hidden)
        results.append((loss.detach(), gradient))
    assert objective.requires.teachers
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)
