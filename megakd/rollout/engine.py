"""The rollout engine: `slots` rows decode side by side, and a row that has finished makes room for the next prompt.

Every rank of the model (its tensor x pipeline group) runs `generate` with the same prompts. The last stage samples; the
tokens and their log-probabilities go to the other stages in one small broadcast a forward pass. All decisions (who is
admitted, who has finished) are taken from those tokens, so that every rank takes the same ones.

The next token of a row is drawn after its last one, so rows that decode together keep one stage of a pipeline busy at a
time. Hence there are as many such companies as stages, their passes a tick apart on the same ring; a stage has the keys
and values of its own layers alone, so all companies' caches together are as large as one of a model without a pipeline.

A response depends on (seed, sample id, index) alone. The noise does so exactly; the logits do so up to the rounding of
matrix products, which can differ between batch shapes and between layouts: two tokens whose scores tie within rounding
can swap.

Legend: B rows of a forward pass, S tokens of a row, H hidden width, V local vocabulary columns.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.batch import to_device
from megakd.errors import ConfigError, ModelError
from megakd.rollout.cache import KVCache
from megakd.rollout.ring import Decoder, Pass, Ring
from megakd.rollout.sampling import Sampling, noise_keys, sample

PREFILL_TOKENS = 4096
"""Prompt tokens, padding included, of one forward pass (or one prompt, where that is longer): enough to keep a device
busy, and a bound on the activations whatever `slots` is."""


@dataclass(frozen=True)
class Prompt:
    """`tokens` to respond to; `sample_id` is its own in the run, and seeds its noise."""

    sample_id: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Rollout:
    """One response. `log_probs` are the model's own, before temperature, top_k and top_p (see `sampling.sample`)."""

    sample_id: int
    index: int
    """0 <= index < n, which of the responses to its prompt it is."""
    tokens: tuple[int, ...]
    """The response alone, the stop token included."""
    log_probs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


Progress = Callable[[int, int, int], None]
"""Called after each forward pass with: responses finished, responses asked for, tokens generated so far."""


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    slots: int,
    pad_id: int,
    progress: Progress | None = None,
) -> list[Rollout]:
    """Responds to each prompt `sampling.n` times.

    Collectives: those of `Ring` and of `sampling.sample`, and one broadcast of B x 2 numbers over `decoder.pp_group` a
    forward pass.

    Args:
        decoder: this rank's part of the model.
        prompts: the same on every rank of the model; data-parallel replicas are given different ones.
        sampling: how to draw, and when to stop.
        slots: rows of a forward pass; as many passes are under way as the model has stages.
        pad_id: token written on the padding of prompts; never attended to by a real token.
        progress: called alike on every rank.

    Returns:
        The responses on every rank, in the order of `prompts`, and of the index within a prompt.

    Raises:
        ConfigError: a prompt or setting that cannot be used, before any forward pass.
        ModelError: non-finite logits; on every rank.
    """
    _check(decoder, prompts, sampling, slots, pad_id)
    if not prompts:
        return []
    run = _Run(decoder, prompts, sampling, slots, pad_id)
    total = len(run.queue)
    for _ in run.passes():
        if progress is not None:
            progress(len(run.finished), total, run.generated)
    return [run.finished[prompt.sample_id, index] for prompt in prompts for index in range(sampling.n)]


def _check(decoder: Decoder, prompts: Sequence[Prompt], sampling: Sampling, slots: int, pad_id: int) -> None:
    """Raises ConfigError for what cannot be generated."""
    if slots < 1:
        raise ConfigError("slots", slots, "must be at least 1", "Write the number of rows to decode at a time")
    rule = f"must be a token id of the model, 0 to {decoder.vocab_size - 1}"
    if not 0 <= pad_id < decoder.vocab_size:
        raise ConfigError("pad_id", pad_id, rule, "Take it from the model's own tokenizer")
    for token in sampling.stop_ids:
        if token >= decoder.vocab_size:
            raise ConfigError("sampling.stop_ids", token, rule, "Take them from the model's own tokenizer")
    seen = set()
    for prompt in prompts:
        name = f"prompt of sample {prompt.sample_id}"
        if prompt.sample_id in seen:
            raise ConfigError(name, prompt.sample_id, "two prompts have this sample id", "Number the prompts")
        seen.add(prompt.sample_id)
        length, limit = len(prompt.tokens), decoder.context_length - 1
        if not 1 <= length <= limit:
            raise ConfigError(
                name, f"{length} tokens",
                f"must have 1 to {limit} tokens (context length {decoder.context_length}, less one to generate)",
                "Drop or shorten the prompt")
        for token in prompt.tokens:
            if not 0 <= token < decoder.vocab_size:
                raise ConfigError(name, token, rule, "Tokenize with the model's own tokenizer")


@dataclass
class Row:
    """A response in the making."""

    prompt: Prompt
    index: int
    limit: int
    """Tokens that it may have."""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Of the newest token."""
        return len(self.prompt.tokens) + len(self.tokens) - 1


@dataclass
class _Step:
    """A forward pass over some of a company's rows, and who is given a token by it."""

    forward: Pass
    rows: list[Row]
    receivers: list[int]
    """The rows' slots."""
    places: list[tuple[int, int]]
    """Each one's newest token, by row and column of the pass."""


class _Run:
    """The state of one `generate`."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Prompt], sampling: Sampling, slots: int, pad_id: int):
        self.decoder, self.sampling = decoder, sampling
        # Longest first: neighbours in the queue are of like length and pad each other little, and what does not fit in
        # memory shows at once.
        longest_first = sorted(prompts, key=lambda prompt: -len(prompt.tokens))
        self.queue = deque(
            Row(prompt, index, min(sampling.max_new_tokens, decoder.context_length - len(prompt.tokens)))
            for prompt in longest_first for index in range(sampling.n))
        self.finished: dict[tuple[int, int], Rollout] = {}
        self.generated = 0
        length = max(len(row.prompt.tokens) + row.limit for row in self.queue)
        # Shared out evenly, as a company of few rows takes a stage no less time than one of some more.
        each = min(slots, math.ceil(len(self.queue) / decoder.stages))
        self.companies = [_Company(self.queue, decoder.new_cache(each, length), pad_id)
                          for _ in range(min(decoder.stages, math.ceil(len(self.queue) / each)))]

    def passes(self) -> Iterator[None]:
        """Runs everything; stops after each forward pass.

        Company c begins a pass in ticks that are c more than a multiple of the stages. A pass takes a tick for each
        part, which are a multiple of the stages, too. So the company can begin its next pass in the tick after, and of
        all companies' passes no two are due on one stage.
        """
        ring = Ring(self.decoder)
        going = {number: company.steps() for number, company in enumerate(self.companies)}
        under_way: dict[int, _Step] = {}
        for tick in itertools.count():
            number = tick % self.decoder.stages
            if number in going and number not in under_way:
                step = next(going[number], None)
                if step is None:
                    del going[number]
                    if not going:
                        return
                else:
                    under_way[number] = step
            ring.tick([step.forward for step in under_way.values()])
            for number, step in list(under_way.items()):
                if step.forward.part == self.decoder.parts:
                    del under_way[number]
                    self._receive(self.companies[number], step.receivers, self._draw(step))
                    yield

    def _draw(self, step: _Step) -> list[tuple[float, float]]:
        """Token and log-probability for each receiver, the same on every rank."""
        device = step.forward.cache.device
        if self.decoder.stage == self.decoder.stages - 1:
            numbers, columns = to_device(torch.tensor(step.places), device).unbind(1)
            tokens_B, log_probs_B = self._sample(step.forward.hidden_SBH[columns, numbers], step.rows)
            drawn_2B = torch.stack([tokens_B.double(), log_probs_B.double()])  # float64 holds both exactly
        else:
            drawn_2B = torch.empty((2, len(step.rows)), dtype=torch.float64, device=device)
        if self.decoder.stages > 1:
            dist.broadcast(drawn_2B, group=self.decoder.pp_group, group_src=self.decoder.stages - 1)
        return list(zip(*drawn_2B.tolist(), strict=True))

    def _sample(self, hidden_BH: Tensor, rows: list[Row]) -> tuple[Tensor, Tensor]:
        """tokens_B and log_probs_B of the rows' next tokens."""
        numbers_B3 = torch.tensor([(row.prompt.sample_id, row.index, len(row.tokens)) for row in rows])
        ids_B, indices_B, steps_B = to_device(numbers_B3, hidden_BH.device).unbind(1)
        keys_B = noise_keys(self.sampling.seed, ids_B, indices_B, steps_B)
        return sample(logits(hidden_BH, self.decoder.head_VH), self.sampling, keys_B,
                      tp_group=self.decoder.tp_group, vocab_size=self.decoder.vocab_size)

    def _receive(self, company: _Company, receivers: list[int], drawn: list[tuple[float, float]]) -> None:
        """Adds a token to each receiver's row, and frees the slot if the token is the row's last."""
        for slot, (drawn_token, log_prob) in zip(receivers, drawn, strict=True):
            row, token = company.rows[slot], int(drawn_token)
            if not -torch.inf < log_prob < torch.inf:
                raise ModelError(
                    f"non-finite logits at token {len(row.tokens)} of response {row.index} to sample "
                    f"{row.prompt.sample_id}: the model's weights or activations are not finite")
            row.tokens.append(token)
            row.log_probs.append(log_prob)
            self.generated += 1
            if token in self.sampling.stop_ids or len(row.tokens) == row.limit:
                self.finished[row.prompt.sample_id, row.index] = Rollout(
                    row.prompt.sample_id, row.index, tuple(row.tokens), tuple(row.log_probs),
                    "stop" if token in self.sampling.stop_ids else "length")
                company.rows[slot] = None


class _Company:
    """Rows that decode together: row number i of `rows` has cache slot i, so that live slots are always 0, 1, ..."""

    def __init__(self, queue: deque[Row], cache: KVCache, pad_id: int):
        self.queue, self.cache, self.pad_id = queue, cache, pad_id
        self.rows: list[Row | None] = []  # None: finished, its slot is free

    def steps(self) -> Iterator[_Step]:
        """The forward passes, one after the other, until the queue is empty and all rows have finished; each must have
        been received before the next is asked for."""
        while self.queue or self.rows:
            yield from self._admit()
            if self.rows:
                tokens_BS = torch.tensor([row.tokens[-1:] for row in self.rows])
                positions_BS = torch.tensor([[row.position] for row in self.rows])
                every = list(range(len(self.rows)))
                yield self._step(tokens_BS, positions_BS, every, [(row, 0) for row in every], every, others_free=True)

    def _admit(self) -> Iterator[_Step]:
        """Gives free slots to the queue as long as there are both, then closes the gaps: no dead row is decoded."""
        while self.queue and (free := self._free_slots()):
            newcomers = [(slot, self.queue.popleft()) for slot in free[: len(self.queue)]]
            for batch in _prefill_batches(newcomers):
                yield from self._prefill(batch)
        for slot in range(len(self.rows) - 1, -1, -1):
            if self.rows[slot] is None:
                last = self.rows.pop()
                if slot < len(self.rows):
                    self.cache.copy_row(len(self.rows), slot, last.position)
                    self.rows[slot] = last

    def _free_slots(self) -> list[int]:
        return [slot for slot in range(self.cache.slots) if slot >= len(self.rows) or self.rows[slot] is None]

    def _prefill(self, newcomers: list[tuple[int, Row]]) -> Iterator[_Step]:
        """Reads prompts into the cache and generates the first token of each newcomer; a prompt with several newcomers
        is read once."""
        self.rows.extend([None] * (max(slot for slot, _ in newcomers) + 1 - len(self.rows)))
        readers: dict[int, int] = {}  # sample id -> the slot that its prompt is read into
        prompts: list[Prompt] = []
        for slot, row in newcomers:
            self.rows[slot] = row
            if row.prompt.sample_id not in readers:
                readers[row.prompt.sample_id] = slot
                prompts.append(row.prompt)
        width = max(len(prompt.tokens) for prompt in prompts)
        tokens_BS = torch.full((len(prompts), width), self.pad_id)
        for number, prompt in enumerate(prompts):
            tokens_BS[number, : len(prompt.tokens)] = torch.tensor(prompt.tokens)
        numbers = {prompt.sample_id: number for number, prompt in enumerate(prompts)}
        places = [(numbers[row.prompt.sample_id], len(row.prompt.tokens) - 1) for _, row in newcomers]
        yield self._step(tokens_BS, torch.arange(width).expand(tokens_BS.shape), list(readers.values()), places,
                         [slot for slot, _ in newcomers], others_free=False)
        for slot, row in newcomers:
            if slot != readers[row.prompt.sample_id]:
                self.cache.copy_row(readers[row.prompt.sample_id], slot, len(row.prompt.tokens))

    def _step(
        self, tokens_BS: Tensor, positions_BS: Tensor, slots: list[int], places: list[tuple[int, int]],
        receivers: list[int], *, others_free: bool,
    ) -> _Step:
        """A forward pass over the batch's `slots`. The token after `places[i]` (a row and column of the batch) goes to
        the response in slot `receivers[i]`."""
        device = self.cache.device
        self.cache.begin(torch.tensor(slots), positions_BS, others_free=others_free)
        forward = Pass(to_device(tokens_BS, device), to_device(positions_BS, device), self.cache)
        return _Step(forward, [self.rows[slot] for slot in receivers], receivers, places)


def logits(hidden_BH: Tensor, head_VH: Tensor) -> Tensor:
    """Float32 logits [B, V] whatever the model's dtype: rounded to bfloat16, the likeliest tokens would often tie."""
    if hidden_BH.is_cuda and hidden_BH.dtype.itemsize == 2:
        return torch.mm(hidden_BH, head_VH.T, out_dtype=torch.float32)  # 16-bit operands, summed in float32
    return hidden_BH.float() @ head_VH.float().T


def _prefill_batches(newcomers: list[tuple[int, Row]]) -> list[list[tuple[int, Row]]]:
    """Cuts newcomers, longest prompt first, into batches of at most PREFILL_TOKENS; each prompt counts once a batch."""
    batches: list[list[tuple[int, Row]]] = []
    for slot, row in newcomers:
        if batches:
            width = len(batches[-1][0][1].prompt.tokens)
            prompts = {other.prompt.sample_id for _, other in batches[-1]} | {row.prompt.sample_id}
            if len(prompts) * width <= PREFILL_TOKENS:
                batches[-1].append((slot, row))
                continue
        batches.append([(slot, row)])
    return batches
