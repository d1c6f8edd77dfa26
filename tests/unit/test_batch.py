"""Cutting a step into micro-batches: every sequence lands exactly once, and every position has the right label."""

from __future__ import annotations

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
    # No other cut of the step into micro-batches of this size pads less: each is a run of the sorted lengths.
    by_length = sorted(lengths, reverse=True)
    widest = sorted((max(lengths[number] for number in micro) for rank in table for micro in rank), reverse=True)
    assert widest == by_length[::micro_batch]
    # The ranks work side by side: none's micro-batch is wider than the one before it of any other rank.
    for number in range(1, micros):
        before = min(max(lengths[group] for group in rank[number - 1]) for rank in table)
        assert before >= max(max(lengths[group] for group in rank[number]) for rank in table)


@QUICK
@given(st.lists(st.integers(1, 5), min_size=12, max_size=12), st.permutations(range(12)))
def test_the_table_depends_on_lengths_alone(lengths, order):
    """Every rank computes it for itself; groups of equal length keep their order."""
    assert split_step(lengths, 2, 3) == split_step(tuple(lengths), 2, 3)
    mixed = split_step([lengths[number] for number in order], 2, 3)
    widths = [[[lengths[n] for n in micro] for micro in rank] for rank in split_step(lengths, 2, 3)]
    assert [[[lengths[order[n]] for n in micro] for micro in rank] for rank in mixed] == widths
    assert split_step([7] * 4, 1, 2) == [[[0, 1], [2, 3]]]


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
    batch = collate(its, ids, pad_id=99, multiple=multiple, at_least=at_least)
    flat = [(number, sample) for number, group in enumerate(its) for sample in group.samples]
    rows, width = batch.tokens_BS.shape
    assert rows == len(flat) and width % multiple == 0
    assert width - multiple < max(at_least, *(len(sample.tokens) for _, sample in flat)) <= width
    assert batch.sample_ids_B.tolist() == list(range(rows))
    assert batch.group_ids_B.tolist() == [number for number, _ in flat]
    assert batch.kinds_B.tolist() == [sample.kind for _, sample in flat]
    expected = []  # (row, column, label, kind) of each loss position, row-major
    for row, (_, sample) in enumerate(flat):
        for column in range(width):
            real = column < len(sample.tokens)
            assert batch.tokens_BS[row, column] == (sample.tokens[column] if real else 99)
            assert batch.position_ids_BS[row, column] == column
            predicts = column + 1 < len(sample.tokens) and column + 1 >= sample.prompt_length
            assert batch.loss_mask_BS[row, column] == predicts
            if column + 1 < len(sample.tokens):
                assert batch.labels_BS[row, column] == sample.tokens[column + 1]
            if predicts:
                expected.append((row, column, sample.tokens[column + 1], int(sample.kind)))
    positions = batch.positions
    columns = (positions.rows_T, positions.columns_T, positions.labels_T, positions.kinds_T)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    counts = batch.counts()
    assert counts["tokens"] == len(expected) and counts["groups"] == count
    for kind in Kind:
        assert counts[f"{kind.name.lower()}_tokens"] == sum(item[3] == kind for item in expected)


def test_the_labels_of_a_sequence_are_its_response():
    """The T order strings the responses together, whatever pads them."""
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


# ----------------------------------------------------------------------------------------------- Step

@QUICK
@given(steps(), st.integers(1, 3), st.booleans())
def test_every_sequence_of_a_step_lands_exactly_once(case, multiple, uniform):
    its, data, micro_batch = case
    step = Step(tuple(its))
    seen: dict[int, tuple[int, ...]] = {}
    totals: dict[str, int] = {}
    widths: set[int] = set()
    for rank in step.table(data, micro_batch):
        for batch in step.batches(rank, pad_id=0, padding=Padding(multiple, uniform), device="cpu"):
            positions = batch.positions
            widths.add(batch.tokens_BS.shape[1])
            for row, number in enumerate(batch.sample_ids_B.tolist()):
                assert number not in seen
                seen[number] = tuple(positions.labels_T[positions.rows_T == row].tolist())
            for name, value in batch.counts().items():
                totals[name] = totals.get(name, 0) + value
    flat = [sample for group in its for sample in group.samples]
    assert step.samples == len(flat)
    assert seen == {number: sample.tokens[sample.prompt_length :] for number, sample in enumerate(flat)}
    assert totals == step.counts, "the denominators of the step are those of its micro-batches together"
    assert all(width % multiple == 0 for width in widths) and (len(widths) == 1 or not uniform)
    assert step.all_tokens == sum(len(sample.tokens) for sample in flat)


@QUICK
@given(st.data(), st.integers(1, 6))
def test_numbers_are_consecutive(data_of, count):
    its = data_of.draw(groups(count))
    numbers = number_samples(its)
    assert [len(part) for part in numbers] == [len(group.samples) for group in its]
    assert [number for part in numbers for number in part] == list(range(sum(len(group.samples) for group in its)))
    assert number_samples([]) == []
    assert its[0].length == max(len(sample.tokens) for sample in its[0].samples)
