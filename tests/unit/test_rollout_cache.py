"""The cache against attention written out, row by row, over everything that the row has seen."""

from __future__ import annotations

import pytest
import torch

from megakd.rollout import KVCache
from megakd.rollout import cache as cache_module

LAYERS, SLOTS, LENGTH, GROUPS, HEADS, WIDTH = 2, 5, 20, 2, 6, 4


def _new_cache() -> KVCache:
    return KVCache(LAYERS, SLOTS, LENGTH, GROUPS, WIDTH, dtype=torch.float32, device="cpu")


def _naive(query_Nd, keys_LGd, values_LGd):
    """Context [N, d] of one query over the keys and values that it may see."""
    keys_LNd, values_LNd = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (keys_LGd, values_LGd))
    weights_LN = (torch.einsum("nd,lnd->ln", query_Nd, keys_LNd) / WIDTH**0.5).softmax(0)
    return torch.einsum("ln,lnd->nd", weights_LN, values_LNd)


class _Rows:
    """What each slot has really seen, beside the cache under test."""

    def __init__(self):
        self.cache, self.seen = _new_cache(), [[None] * SLOTS for _ in range(LAYERS)]
        torch.manual_seed(0)

    def step(self, slots: list[int], starts: list[int], lengths: list[int], *, others_free: bool = False,
             filled: int | None = None):
        """A forward pass: row b has `lengths[b]` real tokens from position `starts[b]` on, then padding. With `filled`
        it reads so many positions of each row."""
        width = max(lengths)
        positions = torch.tensor(starts)[:, None] + torch.arange(width)
        self.cache.begin(torch.tensor(slots), positions, others_free=others_free)
        if filled is not None:
            assert self.cache.next_tokens
            self.cache.begin_next_tokens(positions, filled)
        for layer in range(LAYERS):
            query = torch.randn(width, len(slots), HEADS, WIDTH)
            key, value = torch.randn(2, width, len(slots), GROUPS, WIDTH)
            context = self.cache.attend(layer, query, key, value)
            assert context.shape == query.shape
            for row, (slot, start, length) in enumerate(zip(slots, starts, lengths, strict=True)):
                new = torch.stack([key[:length, row], value[:length, row]])
                past = self.seen[layer][slot]
                self.seen[layer][slot] = new if start == 0 else torch.cat([past[:, :start], new], dim=1)
                for column in range(length):
                    keys, values = self.seen[layer][slot][:, : start + column + 1]
                    expected = _naive(query[column, row], keys, values)
                    torch.testing.assert_close(context[column, row], expected, atol=1e-5, rtol=1e-5)


def test_ragged_prefill_then_decode():
    rows = _Rows()
    rows.step([0, 1, 2, 3, 4], [0] * 5, [5, 1, 7, 3, 2])
    lengths = [5, 1, 7, 3, 2]
    for _ in range(4):
        rows.step([0, 1, 2, 3, 4], lengths, [1] * 5)
        lengths = [length + 1 for length in lengths]


def test_refill_of_a_slot_forgets_its_last_row():
    rows = _Rows()
    rows.step([0, 1, 2], [0] * 3, [12, 12, 12])
    rows.step([1], [0], [3])
    rows.step([0, 1, 2], [12, 3, 12], [1] * 3)
    rows.step([0, 1, 2], [13, 4, 13], [1] * 3)


def test_any_slots_in_any_order():
    rows = _Rows()
    rows.step([4, 1, 2], [0] * 3, [4, 2, 6])
    rows.step([2, 4], [6, 4], [1, 1])
    rows.step([1, 2, 4], [2, 7, 5], [1, 1, 1])


def test_prompt_in_pieces():
    rows = _Rows()
    rows.step([1, 2, 3], [0] * 3, [4, 6, 5])
    rows.step([1, 2, 3], [4, 6, 5], [5, 2, 3])
    rows.step([1, 2, 3], [9, 8, 8], [1, 1, 1])


def test_copied_row_goes_on_like_its_source():
    rows = _Rows()
    rows.step([0, 3], [0, 0], [6, 4])
    rows.cache.copy_row(3, 1, 4)
    for layer in range(LAYERS):
        rows.seen[layer][1] = rows.seen[layer][3]
    rows.step([0, 1, 3], [6, 4, 4], [1, 1, 1])


@pytest.mark.parametrize("filled", [None, 8, LENGTH])
def test_next_tokens_of_the_first_slots(filled):
    rows = _Rows()
    rows.step([0, 1, 2], [0] * 3, [4, 6, 1], others_free=True)
    assert not rows.cache.next_tokens  # they are whole prompts
    rows.step([0, 1, 2], [4, 6, 1], [1] * 3, others_free=True, filled=filled)
    rows.step([0, 1], [5, 7], [1] * 2, others_free=True, filled=filled)
    assert rows.cache.next_tokens and rows.cache.length == (filled or 8)
    for slots, others_free in (([0, 1], False), ([1, 0], True), ([1, 2], True), ([0, 2], True)):
        rows.step(slots, [(6, 8, 2)[slot] for slot in slots], [1] * 2, others_free=others_free)
        assert not rows.cache.next_tokens


def test_decoding_reads_the_live_part_of_the_cache_in_place(monkeypatch):
    read = []

    def spy(query, key, value, **options):
        read.append((key, value))
        return real(query, key, value, **options)

    real = cache_module.scaled_dot_product_attention
    monkeypatch.setattr(cache_module, "scaled_dot_product_attention", spy)
    rows = _Rows()
    rows.step([0, 1, 2, 3], [0] * 4, [3, 9, 2, 4])
    read.clear()
    rows.step([1, 2], [9, 2], [1, 1])
    key, value = read[0]
    assert key.shape == value.shape == (2, GROUPS, 10, WIDTH)
    assert key.untyped_storage().data_ptr() == rows.cache._keys.untyped_storage().data_ptr()
    assert value.untyped_storage().data_ptr() == rows.cache._values.untyped_storage().data_ptr()


def test_places_that_do_not_exist_are_refused():
    cache = _new_cache()
    with pytest.raises(ValueError, match=f"position {LENGTH} .* max_length {LENGTH}"):
        cache.begin(torch.tensor([0]), torch.tensor([[LENGTH]]), others_free=False)
    with pytest.raises(ValueError, match=r"slots 2\.\.5 .* 5 slots"):
        cache.begin(torch.tensor([2, 5]), torch.zeros(2, 1, dtype=torch.int64), others_free=False)
