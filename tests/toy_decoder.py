"""A small decoder in plain torch for tests of the rollout engine: rotary positions, grouped queries, tied to nothing.

Layers can be cut over a pipeline group, and the head over a tensor group (the layers themselves are replicated there).

Legend: B rows, S tokens, H hidden width, N query heads, G key/value groups, d head width, V local vocabulary columns.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.rollout import KVCache

VOCAB, PADDED_VOCAB, HIDDEN, HEADS, GROUPS, WIDTH = 50, 64, 32, 4, 2, 8


def _rotate(x_BSHd: Tensor, position_ids_BS: Tensor) -> Tensor:
    half = x_BSHd.shape[-1] // 2
    angles_BS1h = position_ids_BS[:, :, None, None] / 100.0 ** (torch.arange(half) / half)
    first, second = x_BSHd[..., :half], x_BSHd[..., half:]
    cos, sin = angles_BS1h.cos(), angles_BS1h.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class ToyDecoder:
    """A `megakd.rollout.Decoder`; the weights depend on `layers` only."""

    def __init__(self, *, layers: int = 2, context_length: int = 48, tp_group=None, pp_group=None):
        generator = torch.Generator().manual_seed(7)

        def weights(*shape):
            return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

        self.embedding = torch.randn(PADDED_VOCAB, HIDDEN, generator=generator)
        every_layer = [
            {"query": weights(HEADS * WIDTH, HIDDEN), "key": weights(GROUPS * WIDTH, HIDDEN),
             "value": weights(GROUPS * WIDTH, HIDDEN), "out": weights(HIDDEN, HEADS * WIDTH),
             "up": weights(2 * HIDDEN, HIDDEN), "down": weights(HIDDEN, 2 * HIDDEN)}
            for _ in range(layers)]
        whole_head = 2 * weights(PADDED_VOCAB, HIDDEN)
        tensor_rank, tensor_size = (0, 1) if tp_group is None else (dist.get_rank(tp_group), tp_group.size())
        self.stage, self.stages = (0, 1) if pp_group is None else (dist.get_rank(pp_group), pp_group.size())
        self.layers = every_layer[self.stage * layers // self.stages : (self.stage + 1) * layers // self.stages]
        self.tp_group, self.pp_group = tp_group, pp_group
        self.parts = self.stages
        self.head_VH = whole_head.chunk(tensor_size)[tensor_rank] if self.stage == self.stages - 1 else None
        self.vocab_size, self.context_length = VOCAB, context_length
        self.batches: list[tuple[int, int]] = []  # shape of each forward pass

    def new_cache(self, slots: int, max_length: int) -> KVCache:
        return KVCache(len(self.layers), slots, max_length, GROUPS, WIDTH, dtype=torch.float32, device="cpu")

    def run(self, part: int, tokens_BS: Tensor, position_ids_BS: Tensor, cache: KVCache,
            hidden_SBH: Tensor | None) -> Tensor:
        assert part == self.stage
        self.batches.append(tuple(tokens_BS.shape))
        hidden_BSH = self.embedding[tokens_BS] if hidden_SBH is None else hidden_SBH.transpose(0, 1)

        def attend(layer, *heads_BSNd):
            return cache.attend(layer, *(heads.transpose(0, 1) for heads in heads_BSNd)).transpose(0, 1)

        hidden_BSH = self.run_layers(hidden_BSH, position_ids_BS, attend)
        return (_norm(hidden_BSH) if self.stage == self.stages - 1 else hidden_BSH).transpose(0, 1)

    def room_for(self, tokens_BS: Tensor) -> Tensor:
        return torch.empty(*tokens_BS.T.shape, HIDDEN)

    def run_layers(self, hidden_BSH: Tensor, position_ids_BS: Tensor, attend) -> Tensor:
        batch, columns, _ = hidden_BSH.shape
        for number, layer in enumerate(self.layers):
            normed_BSH = _norm(hidden_BSH)
            query, key, value = (
                (normed_BSH @ layer[name].T).view(batch, columns, -1, WIDTH) for name in ("query", "key", "value"))
            context_BSNd = attend(number, _rotate(query, position_ids_BS), _rotate(key, position_ids_BS), value)
            hidden_BSH = hidden_BSH + context_BSNd.reshape(batch, columns, -1) @ layer["out"].T
            hidden_BSH = hidden_BSH + (_norm(hidden_BSH) @ layer["up"].T).relu() @ layer["down"].T
        return hidden_BSH

    def logits(self, tokens: list[int]) -> Tensor:
        """[S, VOCAB] of one sequence, computed afresh without a cache and with a softmax written out (unsharded)."""

        def attend(_, query_BSNd, key_BSGd, value_BSGd):
            repeated = [x.repeat_interleave(HEADS // GROUPS, dim=2) for x in (key_BSGd, value_BSGd)]
            scores_BNSS = torch.einsum("bqnd,bknd->bnqk", query_BSNd, repeated[0]) / WIDTH**0.5
            future_SS = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
            weights_BNSS = scores_BNSS.masked_fill(future_SS, -torch.inf).softmax(-1)
            return torch.einsum("bnqk,bknd->bqnd", weights_BNSS, repeated[1])

        hidden_BSH = self.run_layers(self.embedding[torch.tensor([tokens])], torch.arange(len(tokens))[None], attend)
        return (_norm(hidden_BSH)[0] @ self.head_VH.T)[:, :VOCAB]
