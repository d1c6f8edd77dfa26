"""A model as the rollout engine sees it (`rollout.ring.Decoder`): its parts are the chunks of all stages.

Legend: B rows of a forward pass, S tokens of a row in it, H hidden width, V local vocabulary columns.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from megakd.mcore.fp8_layers import quantizers_of
from megakd.mcore.graphs import GraphedDecoding
from megakd.mcore.layers import attention_of
from megakd.mcore.model import Model, unwrap
from megakd.rollout.cache import KVCache

PACKED_ROWS = ("sequence_parallel", "reduce_scatter_embeddings", "apply_rope_fusion", "with_amax_reduction",
               "all_gather_usage")
"""What holds for packed rows alone: sequence parallelism, with what Transformer Engine's quantizers (`quantizers_of`)
do for it (scales that the tensor ranks agree on, blocks laid out to be gathered); and rotation by one row's angles."""


def _of_packed_rows(model: Model) -> list[tuple[object, str]]:
    """Where a model's modules are told of `PACKED_ROWS`."""
    owners = [model.config, *(module for chunk in model.chunks for module in chunk.modules()),
              *(each for chunk in model.chunks for each in quantizers_of(chunk))]
    return [(owner, name) for owner in owners for name in PACKED_ROWS if getattr(owner, name, False) is True]


class PipelineDecoder:
    """One rank's parts of a model.

    A token cannot be cut: a model under sequence parallelism decodes without it. Where the model's role asks for it
    (`Model.decode_recorder`), passes of one token a row are recorded once for each of their sizes, and replayed.
    """

    def __init__(self, model: Model, longest: int):
        """`longest` bounds prompt and answer together, besides the model's own context."""
        self.model = model
        self.switched_off = _of_packed_rows(model)
        self.tp_group = model.grid.groups.tp
        self.pp_group = model.grid.groups.pp
        self.stage, self.stages = model.grid.at.pipeline, model.grid.layout.pipeline
        self.parts = self.stages * len(model.chunks)
        self.vocab_size = model.architecture.vocab_size
        self.context_length = min(longest, model.architecture.max_positions)
        # They and a cache end together, with what runs them: no cycle keeps their memory until Python looks for one.
        self._recordings: WeakKeyDictionary[KVCache, GraphedDecoding] = WeakKeyDictionary()

    @property
    def head_VH(self) -> Tensor | None:
        """The head's local columns on the last stage."""
        return self.model.head_VH

    def new_cache(self, slots: int, max_length: int) -> KVCache:
        """A cache for `slots` sequences of at most `max_length` tokens: the beginning of a rollout."""
        self.model.weights_changed()
        config = self.model.config
        layers = sum(shard.layers for shard in self.model.shards)
        device = next(self.model.chunks[0].parameters()).device
        cache = KVCache(
            layers,
            slots,
            max_length,
            config.num_query_groups // config.tensor_model_parallel_size,
            config.kv_channels,
            dtype=self.model.dtype,
            device=device,
        )
        if self.model.decode_recorder is not None:
            self._recordings[cache] = GraphedDecoding(self.model, cache, self.model.decode_recorder)
        return cache

    @torch.no_grad()
    def run(self, part: int, tokens_BS: Tensor, position_ids_BS: Tensor, cache: KVCache,
            hidden_SBH: Tensor | None) -> Tensor:
        """Runs one of this rank's parts (`rollout.ring.Decoder`).

        Collectives: the layers' own over the tensor group; `Recorder.record`'s where a size comes for the first time.
        """
        if cache.next_tokens and (recordings := self._recordings.get(cache)) is not None:
            return recordings(self._launch, part, tokens_BS, position_ids_BS, cache, hidden_SBH)
        return self._launch(part, tokens_BS, position_ids_BS, cache, hidden_SBH)

    def _launch(self, part: int, tokens_BS: Tensor, position_ids_BS: Tensor, cache: KVCache,
                hidden_SBH: Tensor | None) -> Tensor:
        """Runs a part by its modules."""
        chunk = unwrap(self.model.chunks[part // self.stages])
        chunk.set_input_tensor(hidden_SBH)
        for layer in chunk.decoder.layers:
            attention_of(layer).cache = cache
        for owner, name in self.switched_off:
            setattr(owner, name, False)
        try:
            return chunk(tokens_BS, position_ids_BS)
        finally:
            for owner, name in self.switched_off:
                setattr(owner, name, True)
            for layer in chunk.decoder.layers:
                attention_of(layer).cache = None
            chunk.set_input_tensor(None)  # it would keep the memory until its next pass

    def room_for(self, tokens_BS: Tensor) -> Tensor:
        """Memory for hidden [S, B, H]."""
        rows, width = tokens_BS.shape
        return torch.empty(width, rows, self.model.config.hidden_size, dtype=self.model.dtype, device=tokens_BS.device)
