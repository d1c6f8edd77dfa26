"""Cutting a step into micro-batches: every sequence lands exactly once, and every position has the right label."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.batch import Group, Kind, Padding, Sample, Step, collate, number_samples, split_step

QUICK = settings(max_examples=60, deadline=None)


@st.composite
def samples(draw):
    """A prompt of at least one token and a response that may be empty (a rollout is allowed to be)."""
    prompt, response = draw(st.integers(1, 6)), draw(st.integers(0, 6))
    tokens = draw(st.lists(st.integers(0, 50), min_size=prompt + response, max_size=prompt + response))
    return Sample(tuple(tokens), prompt, draw(st.sampled_from(Kind)))


@st.composite
def groups(draw, count):
    return [Group(f"f:{number}", tuple(draw(st.lists(samples(), min_size=1, max_size=3)))) for number in range(count)]


@st.composite
def steps(draw):
    """(groups, data, micro_batch) that fit together."""
    data, micro_batch, micros = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return draw(groups(data * micro_batch * micros)), data, micro_batch


# ----------------------------------------------------------------------------------------------- split_step

@QUICK
@given(st.data(), st.integers(1, 8), st.integers(1, 4), st.integers(1, 5))
def test_a_step_is_dealt_out_once_and_evenly(data_of, data, micro_batch, micros):
    count = data * micro_batch * micros
    lengths = data_of.draw(st.lists(st.integers(1, 100), min_size=count, max_size=count))
    table = split_step(lengths, data, micro_batch)
    assert [len(rank) for rank in table] == [micros] * data
    assert all(len(micro) == micro_batch for rank in table for micro in rank)
    assert sorted(number for rank in table for micro in rank for number in micro) == list(range(count))
    # No two micro-batches, and no two ranks, differ by more than two groups do.
    widest = max(lengths) - min(lengths)
    sums = [[sum(lengths[number] for number in micro) for micro in rank] for rank in table]
    of_micros = [total for rank in sums for total in rank]
    assert max(of_micros) - min(of_micros) <= widest
    assert max(map(sum, sums)) - min(map(sum, sums)) <= max(of_micros) - min(of_micros)


@QUICK
@given(st.lists(st.integers(1, 5), min_size=12, max_size=12), st.permutations(range(12)))
def test_the_table_depends_on_lengths_alone(lengths, order):
    """Every rank computes it for itself, and the order of the groups changes only which of two equal ones is taken."""
    assert split_step(lengths, 2, 3) == split_step(tuple(lengths), 2, 3)
    mixed = split_step([lengths[number] for number in order], 2, 3)
    widths = [[[lengths[n] for n in micro] for micro in rank] for rank in split_step(lengths, 2, 3)]
    assert [[[lengths[order[n]] for n in micro] for micro in rank] for rank in mixed] == widths
    assert split_step([7] * 4, 1, 2) == [[[0, 2], [1, 3]]]
    assert split_step([9, 1, 2, 8], 1, 2) == [[[0, 1], [3, 2]]]


@pytest.mark.parametrize(("count", "data", "micro_batch"), [(5, 2, 1), (6, 2, 2), (3, 1, 2)])
def test_a_step_that_does_not_divide_is_refused(count, data, micro_batch):
    rule = f"{count} groups are not a multiple of data {data} x micro_batch {micro_batch}"
    with pytest.raises(ValueError, match=rule):
        split_step([1] * count, data, micro_batch)


# ----------------------------------------------------------------------------------------------- collate

@QUICK
@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 20))
def test_a_batch_holds_its_groups(data_of, count, multiple, at_least):
    """Against loops over single positions."""
    its = data_of.draw(groups(count))
    ids = number_samples(its)
    batch = collate(its, ids, pad_id=99, padding=Padding(multiple), at_least=at_least)
    flat = [(number, sample) for number, group in enumerate(its) for sample in group.samples]
    (width,) = batch.tokens_P.shape
    real = sum(len(sample.tokens) for _, sample in flat)
    assert width % multiple == 0 and width - multiple < max(at_least, real) <= width
    starts = batch.cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(starts)]
    filling = [width - real] if width > real else []
    assert starts[0] == 0 and lengths == [len(sample.tokens) for _, sample in flat] + filling
    assert batch.longest == max(lengths) and batch.cu_seqlens.dtype == torch.int32
    assert batch.sample_ids_B.tolist() == list(range(len(flat)))
    assert batch.group_ids_B.tolist() == [number for number, _ in flat]
    assert batch.kinds_B.tolist() == [sample.kind for _, sample in flat]
    expected = []  # (place, row, label, kind) of each loss position
    for row, (_, sample) in enumerate(flat):
        for column, token in enumerate(sample.tokens):
            place = starts[row] + column
            assert batch.tokens_P[place] == token and batch.position_ids_P[place] == column
            predicts = column + 1 < len(sample.tokens) and column + 1 >= sample.prompt_length
            assert batch.loss_mask_P[place] == predicts
            if column + 1 < len(sample.tokens):
                assert batch.labels_P[place] == sample.tokens[column + 1]
            if predicts:
                expected.append((place, row, sample.tokens[column + 1], int(sample.kind)))
    assert batch.tokens_P[real:].tolist() == [99] * (width - real) and not batch.loss_mask_P[real:].any()
    assert batch.position_ids_P[real:].tolist() == list(range(width - real))
    positions = batch.positions
    columns = (positions.places_T, positions.rows_T, positions.labels_T, positions.kinds_T)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    counts = batch.counts()
    assert counts["tokens"] == len(expected) and counts["groups"] == count
    for kind in Kind:
        assert counts[f"{kind.name.lower()}_tokens"] == sum(item[3] == kind for item in expected)


def test_the_labels_of_a_sequence_are_its_response():
    """The T order strings the responses together."""
    its = [Group("f:1", (Sample((1, 2, 3, 4), 2, Kind.CHOSEN), Sample((1, 2, 9), 2, Kind.REJECTED))),
           Group("f:2", (Sample((5, 6), 1, Kind.CHOSEN), Sample((5, 7, 8, 9, 10), 1, Kind.REJECTED)))]
    positions = collate(its, [(4, 5), (0, 1)], pad_id=0).positions
    assert positions.labels_T.tolist() == [3, 4, 9, 6, 7, 8, 9, 10]
    assert positions.kinds_T.tolist() == [0, 0, 1, 0, 1, 1, 1, 1]
    assert collate(its, [(4, 5), (0, 1)], pad_id=0).sample_ids_B.tolist() == [4, 5, 0, 1]
    with pytest.raises(ValueError, match="argument"):
        collate(its, [(0, 1)], pad_id=0)


def test_a_pad_id_inside_a_response_keeps_its_loss():
    """Where padding and the end of a turn are one id, the end is learnt all the same."""
    batch = collate([Group("f:1", (Sample((1, 2, 0), 1, Kind.CHOSEN), Sample((1, 2, 3, 4, 0), 1, Kind.REJECTED)))],
                    [(0, 1)], pad_id=0)
    assert batch.positions.labels_T.tolist() == [2, 0, 2, 3, 4, 0]


def test_a_batch_without_a_response_has_no_positions():
    positions = collate([Group("f:1", (Sample((1, 2), 2, Kind.ROLLOUT),))], [(0,)], pad_id=0).positions
    assert positions.labels_T.shape == (0,) and positions.labels_T.dtype == torch.int64


@QUICK
@given(st.data(), st.integers(1, 4), st.integers(1, 3), st.integers(2, 4))
def test_context_ranks_share_a_row(data_of, count, multiple, context):
    """Against the whole row, position by position."""
    its = data_of.draw(groups(count))
    ids = number_samples(its)
    whole = collate(its, ids, pad_id=99)
    flat = [sample for group in its for sample in group.samples]
    seen = {}
    for rank in range(context):
        padding = Padding(multiple, context=context, context_rank=rank)
        share = collate(its, ids, pad_id=99, padding=padding)
        starts = share.cu_seqlens.tolist()
        assert len(share.tokens_P) * context == starts[-1] and len(share.tokens_P) % multiple == 0
        rows = [row for row, (start, stop) in enumerate(itertools.pairwise(starts))
                for _ in range((stop - start) // context)]
        for place, (row, position) in enumerate(zip(rows, share.position_ids_P.tolist(), strict=True)):
            part = (starts[row + 1] - starts[row]) // (2 * context)
            assert position // part in (rank, 2 * context - 1 - rank)
            if row < len(flat) and position < len(flat[row].tokens):
                at = int(whole.cu_seqlens[row]) + position
                for name in ("tokens_P", "labels_P", "loss_mask_P"):
                    assert getattr(share, name)[place] == getattr(whole, name)[at]
                assert (row, position) not in seen
                seen[row, position] = rank
            else:
                assert share.tokens_P[place] == 99 and not share.loss_mask_P[place]
        positions = share.positions
        found = list(zip(positions.rows_T.tolist(), share.position_ids_P[positions.places_T].tolist(), strict=True))
        rows_of = [[row + sample.prompt_length - 1 for part in padding.own_rows(sample) for row in part]
                   for sample in flat]
        assert found == [(row, position) for row, own in enumerate(rows_of) for position in own]
        prompts = [flat[row].prompt_length for row, _ in found]
        assert positions.within_T.tolist() == [position + 1 - prompt
                                               for (_, position), prompt in zip(found, prompts, strict=True)]
        assert share.counts() == whole.counts()
        assert torch.equal(share.lengths_B, whole.lengths_B)
    everything = [(row, position) for row, sample in enumerate(flat) for position in range(len(sample.tokens))]
    assert sorted(seen) == everything


# ----------------------------------------------------------------------------------------------- Step

@QUICK
@given(steps(), st.integers(1, 3), st.booleans())
def test_every_sequence_of_a_step_lands_exactly_once(case, multiple, uniform):
    its, data, micro_batch = case
    step = Step(tuple(its))
    seen: dict[int, tuple[int, ...]] = {}
    totals: dict[str, int] = {}
    widths: dict[int, set[int]] = {}
    for number, rank in enumerate(step.table(data, micro_batch)):
        for batch in step.batches(rank, pad_id=0, padding=Padding(multiple, uniform), device="cpu"):
            positions = batch.positions
            widths.setdefault(number, set()).add(len(batch.tokens_P))
            for row, sample_id in enumerate(batch.sample_ids_B.tolist()):
                assert sample_id not in seen
                seen[sample_id] = tuple(positions.labels_T[positions.rows_T == row].tolist())
            for name, value in batch.counts().items():
                totals[name] = totals.get(name, 0) + value
    flat = [sample for group in its for sample in group.samples]
    assert step.samples == len(flat)
    assert seen == {number: sample.tokens[sample.prompt_length :] for number, sample in enumerate(flat)}
    assert totals == step.counts, "the denominators of the step are those of its micro-batches together"
    for of_rank in widths.values():
        assert all(width % multiple == 0 for width in of_rank) and (len(of_rank) == 1 or not uniform)
    assert step.all_tokens == sum(len(sample.tokens) for sample in flat)


@QUICK
@given(st.integers(0, 1 << 17), st.sampled_from([1, 24, 256]))
def test_few_lengths_are_not_much_longer(tokens, multiple):
    every, few = Padding(multiple), Padding(multiple, few=True)
    assert every.width([tokens]) - multiple < max(1, tokens) <= every.width([tokens])
    length = few.width([tokens])
    assert length % multiple == 0 and every.width([tokens]) <= length < max(tokens, 1) * 9 / 8 + multiple
    assert few.width([length]) == length


def test_lengths_are_few():
    assert len({Padding(256, few=True).width([tokens]) for tokens in range(1, 65537)}) == 16 + 4 * 8
    step = Step(tuple(Group(f"f:{size}", (Sample((1,) * size, 1, Kind.CHOSEN),)) for size in (70, 71, 3)))
    micro_batches = [[0], [1], [2]]
    widths = [len(batch.tokens_P) for batch in step.batches(micro_batches, pad_id=0, padding=Padding(2, few=True),
                                                            device="cpu")]
    assert widths == [72, 72, 4]


@QUICK
@given(st.data(), st.integers(1, 6))
def test_numbers_are_consecutive(data_of, count):
    its = data_of.draw(groups(count))
    numbers = number_samples(its)
    assert [len(part) for part in numbers] == [len(group.samples) for group in its]
    assert [number for part in numbers for number in part] == list(range(sum(len(group.samples) for group in its)))
    assert number_samples([]) == []
    assert its[0].total_length == sum(len(sample.tokens) for sample in its[0].samples)
