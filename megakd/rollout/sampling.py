"""Vocab-parallel sampling: every tensor rank keeps its own columns of the logits, all of them get the same token.

Noise is a function of (seed, sample id, index, step, column) and of nothing else, so a draw is the same for any tensor
and pipeline size and beside any other rows. Temperature is sampled as a race: the token with the largest
`logit / temperature + Gumbel noise` is a draw from the softmax (Gumbel-max), and the largest is found shard by shard.

Legend: B rows, V local vocabulary columns, R tensor ranks, K gathered candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megakd.errors import ConfigError

KERNEL_PART = 4096
"""Columns of a part where CUDA draws (kernel.py). A row of 128,256 has 32: a few rows fill a GPU, too."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. The recipe's settings, with their defaults, are in `megakd.config`."""

    temperature: float
    """0 takes the most likely token (the lowest id among equals); above 0 divides the logits."""
    top_k: int
    """Keep the k most likely tokens, and what is exactly as likely as the last of them; 0 keeps all."""
    top_p: float
    """Keep the most likely tokens until their mass reaches top_p, and what is exactly as likely as the last; 1 keeps
    all. As in transformers it follows temperature and top_k, and the mass is that of what they leave."""
    n: int
    """Responses to each prompt."""
    max_new_tokens: int
    """A response has at most so many tokens, its stop token among them."""
    stop_ids: tuple[int, ...]
    """Tokens that close a response."""
    seed: int
    """Of the noise."""

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError("sampling.temperature", self.temperature, "must be finite and at least 0",
                              "Write 0 for greedy decoding, 1 for the model's own distribution")
        if self.top_k < 0:
            raise ConfigError("sampling.top_k", self.top_k, "must be at least 0", "Write 0 to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError("sampling.top_p", self.top_p, "must be above 0 and at most 1",
                              "Write 1 to keep all tokens, temperature 0 for greedy decoding")
        if self.n < 1:
            raise ConfigError("sampling.n", self.n, "must be at least 1", "Write 1 for one response a prompt")
        if self.n > 1 and self.temperature == 0:
            raise ConfigError("sampling.n", self.n, "greedy decoding (temperature 0) gives n equal responses",
                              "Write n 1, or a temperature above 0")
        if self.max_new_tokens < 1:
            raise ConfigError("sampling.max_new_tokens", self.max_new_tokens, "must be at least 1", "Write 1 or more")
        if any(token < 0 for token in self.stop_ids):
            raise ConfigError("sampling.stop_ids", self.stop_ids, "must be token ids, 0 or above",
                              "Take them from the tokenizer")
        if not 0 <= self.seed < 2**63:
            raise ConfigError("sampling.seed", self.seed, "must be at least 0 and below 2**63", "Write such a seed")


# --- counter-based noise ----------------------------------------------------------------------------------------------


def _signed(value: int) -> int:
    """The int64 that has the bits of the unsigned 64-bit `value` (torch's uint64 lacks most operations)."""
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _signed(0x94D049BB133111EB)


def mix64(x: Tensor) -> Tensor:
    """SplitMix64's output function (Steele, Lea and Flood 2014), elementwise on int64 taken as unsigned.

    Element c of `mix64(key + (c + 1) * golden)` is number c of the SplitMix64 stream with seed `key`.
    """
    # `>>` on int64 copies the sign bit down; the masks make the shifts logical.
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MULTIPLY_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MULTIPLY_2
    return x ^ ((x >> 31) & (2**33 - 1))


def noise_keys(seed: int, sample_ids_B: Tensor, indices_B: Tensor, steps_B: Tensor) -> Tensor:
    """The key of each row's noise.

    Args:
        seed: 0 <= seed < 2**63.
        sample_ids_B, indices_B, steps_B: int64: the prompt's id, the number of the response to it, the number of the
            token within the response.

    Returns:
        keys_B, int64.
    """
    keys_B = torch.full_like(sample_ids_B, seed)
    for part_B in (sample_ids_B, indices_B, steps_B):
        keys_B = mix64(keys_B + _GOLDEN) ^ part_B
    return mix64(keys_B + _GOLDEN)


def gumbel_noise(keys_B: Tensor, first_column: int, columns: int) -> Tensor:
    """Standard Gumbel noise of columns [first_column, first_column + columns), [B, columns] float32.

    A column's noise depends on the row's key and the column's number only.
    """
    counters_V = torch.arange(first_column + 1, first_column + columns + 1, device=keys_B.device) * _GOLDEN
    bits_BV = mix64(keys_B[:, None] + counters_V)
    # Large noise comes from small uniforms, where float32 is fine-grained: 53 bits of the hash reach it. The clamp
    # keeps -log1p(-u) finite, so that the only candidate of a row can never be lost.
    uniform_BV = ((bits_BV >> 11) & (2**53 - 1)).float().add_(0.5).mul_(2.0**-53).clamp_(max=1 - 2.0**-24)
    return uniform_BV.neg_().log1p_().neg_().log_().neg_()


def uniform(keys_B: Tensor) -> Tensor:
    """One number in [0, 1) for each key [B], float64."""
    return ((mix64(keys_B + _GOLDEN) >> 11) & (2**53 - 1)).double() * 2.0**-53


# --- the draw ---------------------------------------------------------------------------------------------------------


def sample(
    logits_BV: Tensor, sampling: Sampling, keys_B: Tensor, *, tp_group: ProcessGroup | None, vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """Draws a token for each row.

    Collectives over `tp_group`: all-gather of B x P x 6 numbers (`own_parts`); top_k all-gathers B x k values before.
    top_p also sums B masses, and all-gathers B x 3 numbers and sums B masses for each candidate that it looks at (1 +
    the number of refusals, see `_race_within_mass`).

    Args:
        logits_BV: this rank's columns, any float dtype; the same number V on all ranks, in the order of the ranks.
        sampling: temperature, top_k and top_p are used.
        keys_B: int64 (`noise_keys`); not looked at when the temperature is 0.
        tp_group: None means unsharded.
        vocab_size: columns at or above it (tensor-parallel padding) are never drawn and have no probability.

    Returns:
        tokens_B (int64, equal on all ranks) and log_probs_B (float32): the token's log-probability in the model's own
        distribution, that is at temperature 1 and before top_k and top_p. A row with non-finite logits gets a
        non-finite log-probability (nothing is raised here, where only some ranks of a model would see it).
    """
    first = 0 if tp_group is None else dist.get_rank(tp_group) * logits_BV.shape[1]
    logits_BV = logits_BV.float()
    raced = sampling.temperature > 0 and sampling.top_p == 1
    lowest_B = None
    if sampling.temperature > 0 and 0 < sampling.top_k < vocab_size:
        lowest_B = _kth_value(_masked(logits_BV, first, vocab_size), sampling.top_k, tp_group)
    if logits_BV.is_cuda:
        from megakd.rollout import kernel  # Triton, which a CPU does without

        of_this_rank = kernel.own_parts
    else:
        of_this_rank = own_parts
    parts_PBN = _gather(of_this_rank(logits_BV, keys_B if raced else None, lowest_B, sampling.temperature, first,
                                     vocab_size), tp_group).flatten(0, 1)
    highest_PB, total_PB, column_PB, score_PB, logit_PB, place_PB = parts_PBN.unbind(2)
    highest_B = highest_PB.amax(0)
    log_total_B = highest_B + (total_PB * (highest_PB - highest_B).exp()).sum(0).log()
    if sampling.temperature == 0:
        tokens_B, drawn_B = _of_the_first(highest_PB, column_PB, highest_PB)
    elif raced:
        tokens_B, drawn_B = _of_the_first(score_PB, place_PB, logit_PB)
    else:
        tokens_B, drawn_B = _within_mass(logits_BV, sampling, keys_B, highest_B.float(), lowest_B, first, vocab_size,
                                         tp_group)
    return tokens_B.long(), (drawn_B - log_total_B).float()


def own_parts(
    logits_BV: Tensor, keys_B: Tensor | None, lowest_B: Tensor | None, temperature: float, first: int, vocab_size: int
) -> Tensor:
    """What this rank's columns, cut in parts, have to say of the token and of its probability.

    Args:
        logits_BV: float32.
        keys_B: of the noise; None where nothing is drawn.
        lowest_B: logit below which no token is drawn; None draws from all.
        temperature: above 0 where anything is drawn.
        first: the number of column 0 in the vocabulary.
        vocab_size: columns at or above it are not there.

    Returns:
        [P, B, 6] in float64, which holds ids and float32 exactly. The highest logit (at least -1e30), the sum of
        exp(logit - highest), the highest's column; of a draw the best `logit / temperature + noise`, its logit and its
        column (the lowest of equals).
    """
    logits_BV = _masked(logits_BV, first, vocab_size)
    highest_B, column_B = logits_BV.max(1)  # the first of equals
    highest_B = highest_B.clamp(min=-1e30)  # a part of padding alone; its sum is 0
    numbers = [highest_B, (logits_BV - highest_B[:, None]).exp_().sum(1), column_B + first]
    if keys_B is None:
        numbers += 3 * [torch.zeros_like(highest_B)]
    else:
        scores_BV = gumbel_noise(keys_B, first, logits_BV.shape[1]).double().add_(logits_BV.double().div_(temperature))
        if lowest_B is not None:
            scores_BV.masked_fill_(logits_BV < lowest_B[:, None], -torch.inf)
        score_B, place_B = scores_BV.max(1)
        numbers += [score_B, logits_BV.gather(1, place_B[:, None])[:, 0], place_B + first]
    return torch.stack([each.double() for each in numbers], 1)[None]


def _masked(logits_BV: Tensor, first: int, vocab_size: int) -> Tensor:
    """A copy of the logits, without probability where columns are padding."""
    columns_V = torch.arange(first, first + logits_BV.shape[1], device=logits_BV.device)
    return logits_BV.masked_fill(columns_V >= vocab_size, -torch.inf)


def _of_the_first(scores_PB: Tensor, *numbers: Tensor) -> list[Tensor]:
    """Of each row's best part the numbers [B]; of equals the first, whose columns come first."""
    best_1B = scores_PB.argmax(0, keepdim=True)
    return [each_PB.gather(0, best_1B)[0] for each_PB in numbers]


def _within_mass(
    logits_BV: Tensor, sampling: Sampling, keys_B: Tensor, highest_B: Tensor, lowest_B: Tensor | None, first: int,
    vocab_size: int, tp_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """The draw under top_p: ids_B and logits_B."""
    logits_BV = _masked(logits_BV, first, vocab_size)
    tempered_BV = (logits_BV - highest_B[:, None]) / sampling.temperature  # <= 0
    # A row that is not finite is drawn anyhow, so that the race ends; its log-probability tells.
    tempered_BV.nan_to_num_(nan=0.0, neginf=-torch.inf)
    if lowest_B is not None:
        tempered_BV.masked_fill_(logits_BV < lowest_B[:, None], -torch.inf)
    scores_BV = gumbel_noise(keys_B, first, logits_BV.shape[1]).add_(tempered_BV)
    return _race_within_mass(scores_BV, logits_BV, tempered_BV, sampling.top_p, first, tp_group)


def _winner(scores_BV: Tensor, logits_BV: Tensor, first: int, tp_group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The column with the highest score over all shards (the lowest of equals) and its logit: ids_B, logits_B."""
    score_B, column_B = scores_BV.max(dim=1)  # the first of equals
    logit_B = logits_BV.gather(1, column_B[:, None])[:, 0]
    # float64 holds scores, ids and logits exactly.
    best_RB3 = _gather(torch.stack([score_B.double(), (column_B + first).double(), logit_B.double()], dim=1), tp_group)
    rank_B = best_RB3[:, :, 0].argmax(dim=0)  # the first of equals: the lowest rank has the lowest ids
    best_B3 = best_RB3[rank_B, torch.arange(len(rank_B), device=rank_B.device)]
    return best_B3[:, 1].long(), best_B3[:, 2].float()


def _kth_value(logits_BV: Tensor, k: int, tp_group: ProcessGroup | None) -> Tensor:
    """The k-th highest logit over all shards; the k highest of each shard hold the k highest of all."""
    shard_BK = logits_BV.topk(min(k, logits_BV.shape[1]), dim=1).values
    candidates_BK = _gather(shard_BK, tp_group).transpose(0, 1).reshape(len(shard_BK), -1)
    return candidates_BK.topk(k, dim=1).values[:, -1]


def _race_within_mass(
    scores_BV: Tensor, logits_BV: Tensor, tempered_BV: Tensor, top_p: float, first: int, tp_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """The highest score among the tokens that top_p keeps: ids_B, logits_B. Overwrites `scores_BV`.

    A token is kept if the mass of the strictly likelier ones is below top_p of the total. The kept set is never built:
    the race's winner is looked at, which one sum decides, and is kept with a chance of at least top_p. If it is
    refused, so is all that is not likelier than it, and the next winner is looked at. The most likely token is always
    kept; a random cut each round brings the race there in about log2(V) rounds even if top_p keeps nothing else.
    """
    # Masses are whole numbers, in units of 2**-40 of the most likely token's: their sum does not depend on the order of
    # addition, so the kept set is the same for every tensor size. (2**22 columns fit in int64.)
    masses_BV = (tempered_BV.exp() * 2.0**40).long()
    allowed_B = top_p * _sum(masses_BV.sum(1), tp_group).double()
    while True:
        tokens_B, drawn_B = _winner(scores_BV, logits_BV, first, tp_group)
        likelier_BV = logits_BV > drawn_B[:, None]
        refused_B = _sum((masses_BV * likelier_BV).sum(1), tp_group) >= allowed_B
        if not refused_B.any():
            return tokens_B, drawn_B
        scores_BV.masked_fill_(refused_B[:, None] & ~likelier_BV, -torch.inf)


def _gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """[R, *x.shape]: `x` of every rank."""
    if group is None:
        return x[None]
    gathered = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered.view(group.size(), *x.shape)


def _sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """`x` summed over the ranks, in place."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x
