"""Forward passes without gradients on their way around the stages of a pipeline, each stage at work on another one.

A model's parts in their order lie around the ring of stages: part p on stage p mod stages, as (virtual) pipelines are
cut. In a tick every pass under way has its next part run by the stage that has it, and what that made handed on. A pass
alone keeps one stage at a time busy; as many as there are stages, begun a tick apart, keep all.

Legend: B rows of a pass, S tokens of a row, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megakd.rollout.cache import KVCache


class Decoder(Protocol):
    """One rank's parts of a model, as the rollout engine sees it."""

    tp_group: ProcessGroup | None
    pp_group: ProcessGroup | None
    """None where there is one stage."""
    stage: int
    stages: int
    parts: int
    """Of the whole model; a multiple of `stages`."""
    head_VH: Tensor | None
    """The LM head's local rows, on the last stage."""
    vocab_size: int
    context_length: int

    def new_cache(self, slots: int, max_length: int) -> KVCache:
        """A cache for this rank's layers and key/value groups."""
        ...

    def run(self, part: int, tokens_BS: Tensor, position_ids_BS: Tensor, cache: KVCache,
            hidden_SBH: Tensor | None) -> Tensor:
        """Runs a part that this rank has; each layer's attention is `cache.attend`. Slots that are not in use may be
        written where `cache.next_tokens` says so.

        Args:
            hidden_SBH: what the part before has made; None for part 0, which embeds the tokens.

        Returns:
            hidden_SBH, whole in S and H on every tensor rank; after the final norm if the part is the last.
        """
        ...

    def room_for(self, tokens_BS: Tensor) -> Tensor:
        """Memory for the hidden_SBH of a pass."""
        ...


@dataclass
class Pass:
    """A forward pass; every rank of the model has it, from before its first tick to after its last."""

    tokens_BS: Tensor
    position_ids_BS: Tensor
    """Both on the device."""
    cache: KVCache
    """Told of the pass (`KVCache.begin`), and used by no other until this one is done."""
    part: int = 0
    """That runs in the next tick; the number of parts when it is done."""
    hidden_SBH: Tensor | None = None
    """What this rank is to read in the next tick; when the pass is done, on the last stage, what the last part made."""


class Ring:
    """Moves passes through a decoder's parts."""

    def __init__(self, decoder: Decoder):
        """Collectives: a barrier of `decoder.pp_group`: under NCCL, messages of some of its ranks need an earlier
        collective of all of them."""
        self.decoder = decoder
        if decoder.stages > 1:
            dist.barrier(group=decoder.pp_group)

    def tick(self, passes: Sequence[Pass]) -> None:
        """Runs the next part of each pass; no two of them may be due on the same stage. All ranks of the model call it
        alike.

        Collectives: the layers' own over the tensor group, and one `batch_isend_irecv` in `decoder.pp_group` on the
        ranks between which hidden states go.
        """
        decoder, messages = self.decoder, []
        for each in passes:
            if each.part % decoder.stages == decoder.stage:
                each.hidden_SBH = decoder.run(
                    each.part, each.tokens_BS, each.position_ids_BS, each.cache, each.hidden_SBH).contiguous()
        for each in passes:
            each.part += 1
            if each.part == decoder.parts:
                continue
            if (each.part - 1) % decoder.stages == decoder.stage:
                messages.append(self._message(dist.isend, each.hidden_SBH, 1))
                each.hidden_SBH = None
            if each.part % decoder.stages == decoder.stage:
                each.hidden_SBH = decoder.room_for(each.tokens_BS)
                messages.append(self._message(dist.irecv, each.hidden_SBH, -1))
        if messages:
            for work in dist.batch_isend_irecv(messages):
                work.wait()

    def whole(self, alone: Pass) -> Tensor | None:
        """Runs a pass to its end; hidden_SBH after the final norm on the last stage, None elsewhere."""
        while alone.part < self.decoder.parts:
            self.tick([alone])
        return alone.hidden_SBH

    def _message(self, operation: object, hidden_SBH: Tensor, step: int) -> dist.P2POp:
        group, stages = self.decoder.pp_group, self.decoder.stages
        return dist.P2POp(operation, hidden_SBH, group=group, group_peer=(self.decoder.stage + step) % stages)
