"""Other packages' implementations of the losses, each at equal work: from hidden states and heads to their gradients.

A peer that takes logits gets them from a matrix product within the time, as its users pay for it. Where a peer can be
called on fewer tokens at a time (one slice's forward and backward after another, gradients added up, as micro-batches
do it), both ways are run: the plain call and the fastest slice. Nothing of a peer is replaced. What cannot run is
listed with its reason.

Legend: T tokens, V local vocabulary columns, C tokens of a slice, P pairs.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.loss_inputs import (
    AKL_MU,
    CHUNKS,
    DIVERGENCES,
    DPO_BETA,
    JSD_BETA,
    Contestant,
    Inputs,
    Outcome,
    outcome_of,
)

Unavailable = tuple[str, str]
"""A peer's name and why it cannot run."""
PACKAGES = {
    "liger": "liger-kernel", "trl": "trl", "modelopt": "nvidia-modelopt", "mcore": "megatron-core", "torch": "torch"
}
"""Peers as --peers names them, and the packages they are in."""
KL_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": JSD_BETA}
"""beta of Liger's and TRL's generalised JSD, which has the two KLs as its ends; JSD's weighs the teacher, as ours."""
WHOLE = None


def peers_of(loss: str, chosen: list[str], *, compiled: bool) -> tuple[list[Contestant], list[Unavailable]]:
    """Implementations of a loss, and those that cannot be imported."""
    found: list[Contestant] = []
    missing: list[Unavailable] = []
    if compiled:
        # Code made for one loss must not use up the number of compilations of the next, beyond which functions run
        # uncompiled; and each chunk size gets code of its own, which is the faster one.
        torch.compiler.reset()
        torch._dynamo.config.automatic_dynamic_shapes = False
    for name in chosen:
        makers = {"liger": partial(_liger, compiled=compiled), "trl": _trl, "modelopt": _modelopt, "mcore": _mcore,
                  "torch": partial(_torch, compiled=compiled)}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what packages say of others that they miss
                found += makers[name](loss)
        except ImportError as error:
            missing.append((name, f"cannot be imported: {error}"))
    return found, missing


def _contestant(name: str, call: Callable[[Inputs, Any], Outcome], settings: tuple, unit: str, **kwargs) -> Contestant:
    return Contestant(name, lambda inputs, setting: partial(call, inputs, setting), settings, unit, **kwargs)


def in_slices(inputs: Inputs, tokens: int | None, values_of: Callable[..., Tensor]) -> Outcome:
    """`values_of(hidden, head, *teachers, labels)` on slices of tokens, each forward and backward; None is one slice.

    Only for losses that are sums over tokens.
    """
    tokens = tokens or inputs.tokens
    hidden_TH, head_VH = inputs.student()
    if tokens >= inputs.tokens:
        return outcome_of(values_of(hidden_TH, head_VH, *inputs.teachers(), inputs.labels_T), (hidden_TH, head_VH))
    values, grad_hidden_TH = [], torch.empty_like(inputs.hidden[0])
    for start in range(0, inputs.tokens, tokens):
        rows = slice(start, start + tokens)
        hidden_CH = inputs.hidden[0][rows].detach().requires_grad_()
        teachers = [tensor if place % 2 else tensor[rows] for place, tensor in enumerate(inputs.teachers())]
        value_C = values_of(hidden_CH, head_VH, *teachers, inputs.labels_T[rows])
        (value_C.sum() / inputs.tokens).backward()
        grad_hidden_TH[rows] = hidden_CH.grad
        values.append(value_C.detach())
    return Outcome(torch.cat(values), grad_hidden_TH, head_VH.grad)


def dpo_value(logp_of: Callable[[Tensor, Tensor], Tensor], inputs: Inputs, student: tuple[Tensor, Tensor]) -> Tensor:
    """DPO of each pair by a peer's token log-probabilities, `logp_of(hidden, head)`."""
    sums_N = logp_of(*student).view(-1, inputs.sequence).sum(1)
    with torch.no_grad():
        ref_sums_N = logp_of(*inputs.teachers()).view(-1, inputs.sequence).sum(1)
    chosen_P, rejected_P = (sums_N - ref_sums_N).chunk(2)
    return -F.logsigmoid(DPO_BETA * (chosen_P - rejected_P))


# -------------------------------------------------------------------------------------------------------------- Liger
def _liger(loss: str, *, compiled: bool) -> list[Contestant]:
    """Its chunked losses in plain torch; gradients are made in the forward pass, chunk by chunk."""
    if loss not in KL_BETA and loss != "dpo":
        return []
    package = importlib.import_module("liger_kernel.chunked_loss")

    def distillation(inputs: Inputs, chunk: int, *, compiled: bool) -> Outcome:
        function = package.LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=KL_BETA[loss], compiled=compiled, chunk_size=chunk
        )
        student = inputs.student()
        return outcome_of(function(*student, *inputs.teachers(), inputs.labels_T), student)

    def preference(inputs: Inputs, pairs: int, *, compiled: bool) -> Outcome:
        function = package.LigerFusedLinearDPOLoss(beta=DPO_BETA, compiled=compiled, chunk_size=pairs)
        student, (ref_hidden, ref_head) = inputs.student(), inputs.teachers()
        by_token = (student[0], inputs.labels_T, ref_hidden)
        hidden_NLH, labels_NL, ref_hidden = (tensor.unflatten(0, (-1, inputs.sequence)) for tensor in by_token)
        value, _ = function(student[1], hidden_NLH, labels_NL, ref_input=ref_hidden, ref_weight=ref_head)
        return outcome_of(value, student)

    call, settings, unit = (preference, (1, 2), "pairs") if loss == "dpo" else (distillation, CHUNKS, "tokens")
    found = [_contestant("liger", partial(call, compiled=False), settings, unit, note="compiled=False")]
    if compiled:
        few = (2,) if loss == "dpo" else (256, 1024)  # each is a compilation
        found.append(_contestant("liger compiled", partial(call, compiled=True), few, unit, note="its default"))
    return found


# ---------------------------------------------------------------------------------------------------------------- TRL
def _trl(loss: str) -> list[Contestant]:
    """The tiled functions behind its distillation and preference trainers, in torch where there is no Triton device.

    The divergence comes with the student's entropy, which cannot be left out. Tile sizes are constants of its modules
    (tokens, and for divergences columns), set here for "best tiles" as they are in "as shipped".
    """
    if loss in KL_BETA:
        module = importlib.import_module("trl.kernels.chunked_divergence")
        call = partial(_trl_divergence, module)
    elif loss in ("log_probs", "dpo"):
        module = importlib.import_module("trl.kernels.chunked_logprob")
        call = partial(_trl_log_probs, module)
    else:
        return []
    trainer = importlib.import_module("trl.trainer.utils")
    columns = trainer._CHUNKED_LOGPROB_CHUNK_SIZE if loss in ("log_probs", "dpo") else module.VOCAB_CHUNK_SIZE
    shipped = (module.TOKEN_CHUNK_SIZE, columns)
    tiles = ((128, WHOLE), (256, WHOLE), (256, 16384), (1024, WHOLE), (1024, 16384), (1024, 4096))
    return [_contestant("trl", call, (shipped,), "tokens x columns", note="as shipped"),
            _contestant("trl, best tiles", call, tiles, "tokens x columns", note="tile constants set")]


@contextlib.contextmanager
def _tiles(module: Any, tokens: int, columns: int) -> Iterator[None]:
    """Sets the constants that the module has for its tiles."""
    names = [name for name in ("TOKEN_CHUNK_SIZE", "VOCAB_CHUNK_SIZE") if hasattr(module, name)]
    before = [getattr(module, name) for name in names]
    for name, value in zip(names, (tokens, columns), strict=False):
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(module, name, value)


def _trl_divergence(module: Any, inputs: Inputs, tiles: tuple[int, int | None]) -> Outcome:
    student, (teacher_hidden, teacher_head) = inputs.student(), inputs.teachers()
    with _tiles(module, tiles[0], tiles[1] or inputs.heads[0].shape[0]):
        function = module.ChunkedDivergenceFunction.apply
        value_T, _ = function(*student, None, teacher_hidden, teacher_head, None, KL_BETA[inputs.loss])
        return outcome_of(value_T, student)


def _trl_log_probs(module: Any, inputs: Inputs, tiles: tuple[int, int | None]) -> Outcome:
    student, columns = inputs.student(), tiles[1] or inputs.heads[0].shape[0]

    def logp_of(hidden: Tensor, head: Tensor) -> Tensor:
        function = module.ChunkedLogProbFunction.apply
        return function(hidden, head, None, inputs.labels_T, 1.0, columns, None, 1.0, ())[0]

    with _tiles(module, tiles[0], columns):
        value = dpo_value(logp_of, inputs, student) if inputs.loss == "dpo" else logp_of(*student)
        return outcome_of(value, student)


# ----------------------------------------------------------------------------------------------------------- ModelOpt
def _modelopt(loss: str) -> list[Contestant]:
    """LogitsKLLoss of its Megatron plugin, which takes whole logits [s, b, V] and reads megatron-core's groups."""
    if loss not in ("forward_kl", "reverse_kl"):
        return []
    plugin = importlib.import_module("modelopt.torch.distill.plugins.megatron")

    def call(inputs: Inputs, tokens: int | None) -> Outcome:
        criterion = plugin.LogitsKLLoss(_model_config(), reverse=loss == "reverse_kl")

        def values_of(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, _) -> Tensor:
            with torch.no_grad():
                teacher_logits = teacher_hidden @ teacher_head.t()
            local_1T = criterion(_sharded_logits(hidden, head)[:, None], teacher_logits[:, None])[0]
            return _mappings().reduce_from_tensor_model_parallel_region(local_1T)[0]  # its training loop does so

        return in_slices(inputs, tokens, values_of)

    return [_contestant("modelopt", call, (WHOLE,), "tokens", shards=True, note="whole logits"),
            _contestant("modelopt, sliced", call, CHUNKS, "tokens", shards=True, note="slices as micro-batches")]


# ------------------------------------------------------------------------------------------------------ megatron-core
def _mcore(loss: str) -> list[Contestant]:
    """Its vocabulary-parallel cross entropies, which take whole logits."""
    if loss not in ("log_probs", "dpo"):
        return []
    plain = importlib.import_module("megatron.core.tensor_parallel.cross_entropy").vocab_parallel_cross_entropy
    fused = importlib.import_module("megatron.core.fusions.fused_cross_entropy").fused_vocab_parallel_cross_entropy

    def call(inputs: Inputs, tokens: int | None, *, cross_entropy: Callable[..., Tensor]) -> Outcome:
        def values_of(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
            return -cross_entropy(_sharded_logits(hidden, head)[:, None], labels[:, None])[:, 0]

        if loss == "dpo":
            student = inputs.student()
            return outcome_of(dpo_value(partial(values_of, labels=inputs.labels_T), inputs, student), student)
        return in_slices(inputs, tokens, values_of)

    def with_group(logits: Tensor, labels: Tensor) -> Tensor:
        state = importlib.import_module("megatron.core.parallel_state")
        return fused(logits, labels, state.get_tensor_model_parallel_group())

    plain_call, fused_call = partial(call, cross_entropy=plain), partial(call, cross_entropy=with_group)
    found = [_contestant("mcore", plain_call, (WHOLE,), "tokens", shards=True, note="whole logits")]
    if loss == "log_probs":
        note, fused_note = "slices as micro-batches", "whole logits, their gradient in bf16"
        found += [_contestant("mcore, sliced", plain_call, CHUNKS, "tokens", shards=True, note=note),
                  _contestant("mcore fused", fused_call, (WHOLE,), "tokens", shards=True, note=fused_note)]
    return found


def start_megatron(ranks: int) -> None:
    """Groups of megatron-core, which ModelOpt and its own losses read from its global state."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="modelopt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it says of others that it misses
        state = importlib.import_module("megatron.core.parallel_state")
        importlib.import_module("megatron.core.tensor_parallel")
    state.initialize_model_parallel(tensor_model_parallel_size=ranks, create_gloo_process_groups=False)


def _mappings() -> Any:
    return importlib.import_module("megatron.core.tensor_parallel.mappings")


def _model_config() -> Any:
    state = importlib.import_module("megatron.core.parallel_state")
    config = importlib.import_module("megatron.core.model_parallel_config").ModelParallelConfig
    return config(tensor_model_parallel_size=state.get_tensor_model_parallel_world_size())


def _sharded_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Local logits as megatron-core's output layer makes them: d(hidden) is summed over the ranks."""
    return _mappings().copy_to_tensor_model_parallel_region(hidden) @ head.t()


# -------------------------------------------------------------------------------------------------------- plain torch
def _torch(loss: str, *, compiled: bool) -> list[Contestant]:
    """What one writes without a library: log-softmax and autograd. For akl and advantage there is no other peer."""
    if loss == "dpo":
        return []

    def call(inputs: Inputs, tokens: int | None, *, values_of: Callable[..., Tensor]) -> Outcome:
        return in_slices(inputs, tokens, partial(values_of, loss))

    note = "slices as micro-batches"
    found = [_contestant("torch, sliced", partial(call, values_of=_plain_values), CHUNKS, "tokens", note=note)]
    if compiled:
        one_graph = torch.compile(_plain_values, dynamic=False)
        call_compiled = partial(call, values_of=one_graph)
        found.append(_contestant("torch compiled", call_compiled, (256, 1024), "tokens", note=f"torch.compile, {note}"))
    return found


def _plain_values(loss: str, hidden: Tensor, head: Tensor, *teachers_and_labels: Tensor) -> Tensor:
    *teachers, labels_C = teachers_and_labels
    log_q_CV = F.log_softmax(hidden @ head.t(), dim=1)
    if loss == "log_probs":
        return log_q_CV.gather(1, labels_C[:, None])[:, 0]
    with torch.no_grad():
        log_p_CV, *rest = (F.log_softmax(teachers[i] @ teachers[i + 1].t(), dim=1) for i in range(0, len(teachers), 2))
    if loss == "advantage":
        return (log_q_CV.exp() * (log_p_CV - rest[0])).sum(1)
    assert loss in DIVERGENCES
    match loss:
        case "forward_kl":
            return (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(1)
        case "reverse_kl":
            return (log_q_CV.exp() * (log_q_CV - log_p_CV)).sum(1)
        case "jsd":
            p_CV, q_CV = log_p_CV.exp(), log_q_CV.exp()
            log_m_CV = (JSD_BETA * p_CV + (1 - JSD_BETA) * q_CV).log()
            teacher_kl_C, student_kl_C = (p_CV * (log_p_CV - log_m_CV)).sum(1), (q_CV * (log_q_CV - log_m_CV)).sum(1)
            return JSD_BETA * teacher_kl_C + (1 - JSD_BETA) * student_kl_C
    share_C = _head_share(log_p_CV.exp(), log_q_CV.detach().exp())
    forward_C = (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(1)
    reverse_C = (log_q_CV.exp() * (log_q_CV - log_p_CV)).sum(1)
    return share_C * forward_C + (1 - share_C) * reverse_C


def _head_share(p_CV: Tensor, q_CV: Tensor) -> Tensor:
    """AKL's weight of the forward KL."""
    sorted_CV, order_CV = p_CV.sort(dim=1, descending=True, stable=True)
    in_head_CV = sorted_CV.cumsum(1) <= AKL_MU
    in_head_CV[:, 0] = True
    gap_CV = (p_CV - q_CV).abs().gather(1, order_CV)
    return (gap_CV * in_head_CV).sum(1) / gap_CV.sum(1)
