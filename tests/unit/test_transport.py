"""The route of the teachers' hidden states, executed on simulated ranks; the rows themselves move in tests/dist."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.batch import Group, Kind, Sample, collate, number_samples, split_step
from megakd.layout import Layout
from megakd.teacher.transport import Route, exchange, route, shares


def _plan(teacher: Layout, student: Layout, rows_of_sample, samples_of_group, teacher_micro=1, student_micro=1,
          seed=0) -> Route:
    lengths = [random.Random(seed + group).randint(2, 50) for group in range(len(samples_of_group))]
    return route(teacher, student, split_step(lengths, teacher.data, teacher_micro),
                 split_step(lengths, student.data, student_micro), _dealt(rows_of_sample, student.context),
                 samples_of_group)


def _dealt(rows_of_sample, context: int):
    """Numbers of rows as `shares` has them, cut as sequences are."""
    parts = 1 if context == 1 else 2 * context
    ranges = [[range(rows * part // parts, rows * (part + 1) // parts) for part in range(parts)]
              for rows in rows_of_sample]
    own = [{rank, parts - 1 - rank} for rank in range(context)]
    return [[[each for part, each in enumerate(its) if part in mine and len(each)] for its in ranges] for mine in own]


def _labels(message):
    return [(segment.sample, row) for segment in message.segments for row in range(segment.start, segment.stop)]


def _received(plan: Route, rank: int):
    return [label for message in plan.receives(rank) for label in _labels(message)]


def _needed(plan: Route, copy: int):
    return sorted((segment.sample, row) for micro in plan.student_segments[copy] for segment in micro
                  for row in range(segment.start, segment.stop))


@st.composite
def _cases(draw):
    world = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    layouts = []
    for student in (False, True):
        tensor = draw(st.sampled_from(sizes))
        pipeline = draw(st.sampled_from([size for size in sizes if world % (tensor * size) == 0]))
        contexts = [size for size in sizes if world % (tensor * pipeline * size) == 0]
        context = draw(st.sampled_from(contexts)) if student else 1
        layouts.append(Layout(world, tensor=tensor, pipeline=pipeline, context=context))
    micros = [draw(st.integers(1, 2)) for _ in layouts]
    shares = [layout.data * micro for layout, micro in zip(layouts, micros, strict=True)]
    groups = draw(st.integers(1, 2)) * torch.tensor(shares).unique().prod().item()
    per_group = draw(st.integers(1, 2))
    samples = [range(per_group * group, per_group * (group + 1)) for group in range(groups)]
    rows = draw(st.lists(st.integers(0, 9), min_size=groups * per_group, max_size=groups * per_group))
    return layouts, micros, rows, samples, draw(st.integers(0, 1000))


@settings(max_examples=150, deadline=None)
@given(_cases())
def test_every_needed_row_arrives_once_from_a_rank_that_has_it(case):
    (teacher, student), (teacher_micro, student_micro), rows, samples, seed = case
    plan = _plan(teacher, student, rows, samples, teacher_micro, student_micro, seed)
    sent, received = {}, {}
    for rank in range(teacher.world):
        for message in plan.sends(rank):
            sent.setdefault((message.sender, message.receiver), []).append(message)
        for message in plan.receives(rank):
            received.setdefault((message.sender, message.receiver), []).append(message)
    assert sent == received  # pair by pair, in the same order, with the same rows
    assert all(len(messages) == 1 for messages in sent.values())
    for (sender, receiver), (message,) in sent.items():
        from_place, to_place = teacher.coordinates(sender), student.coordinates(receiver)
        assert from_place.pipeline == teacher.pipeline - 1 and to_place.pipeline == student.pipeline - 1
        held = {sample for micro in plan.teacher_samples[from_place.data] for sample in micro}
        assert held.issuperset(segment.sample for segment in message.segments) and message.rows > 0
        receiver_place = teacher.coordinates(receiver)
        if (receiver_place.pipeline, receiver_place.data) == (from_place.pipeline, from_place.data):
            assert sender == receiver  # what a rank holds itself never takes the network
    dealt, arrived = _dealt(rows, student.context), []
    for copy in range(student.copies):
        data, context = divmod(copy, student.context)
        members = [student.rank(tensor=t, context=context, data=data, pipeline=student.pipeline - 1)
                   for t in range(student.tensor)]
        received_of = [_received(plan, rank) for rank in members]
        assert sorted(label for labels in received_of for label in labels) == _needed(plan, copy)
        assert all(any(row in part for part in dealt[context][sample]) for sample, row in _needed(plan, copy))
        assert [len(labels) for labels in received_of] == [plan.received_rows(copy, t) for t in range(student.tensor)]
        assert max(map(len, received_of)) - min(map(len, received_of)) <= len(plan.blocks_of_student[copy])
        arrived += _needed(plan, copy)
    assert sorted(arrived) == [(sample, row) for sample, count in enumerate(rows) for row in range(count)]


@pytest.mark.parametrize("teacher, student", [
    ({"tensor": 8, "pipeline": 16}, {"tensor": 4}),
    ({"tensor": 8, "pipeline": 4}, {"tensor": 2, "pipeline": 2}),
    ({"tensor": 1}, {"tensor": 8, "pipeline": 8}),
])
def test_thousands_of_ranks(teacher, student):
    """Weak scaling from 512 to 4096 ranks: nobody receives more, and the teachers' tensor ranks share the sending."""
    most = []
    for world in (512, 4096):
        roles = Layout(world, **teacher), Layout(world, **student)
        groups = 2 * world
        samples = [(2 * group, 2 * group + 1) for group in range(groups)]
        rng = random.Random(1)
        plan = _plan(*roles, [rng.randint(0, 60) for _ in range(2 * groups)], samples, 2, 2)
        received = [sum(message.rows for message in plan.receives(rank)) for rank in range(world)]
        sent = [sum(message.rows for message in plan.sends(rank)) for rank in range(world)]
        assert sum(sent) == sum(received) == sum(plan.rows_of_sample)
        for data in range(roles[1].data):
            last = [roles[1].rank(tensor=t, data=data, pipeline=roles[1].pipeline - 1) for t in range(roles[1].tensor)]
            assert sorted(label for rank in last for label in _received(plan, rank)) == _needed(plan, data)
            whole = len(_needed(plan, data))
            assert max(received[rank] for rank in last) <= whole / len(last) + len(plan.blocks_of_student[data])
        for data in range(roles[0].data):
            last = [roles[0].rank(tensor=t, data=data, pipeline=roles[0].pipeline - 1) for t in range(roles[0].tensor)]
            whole = sum(sent[rank] for rank in last)
            assert max(sent[rank] for rank in last) <= 2 * whole / len(last)
        most.append(max(received))
    assert most[1] <= 1.35 * most[0]  # the maximum over eight times as many draws of the same distribution


def test_equal_layouts_stay_off_the_network():
    layout = Layout(64, tensor=4, pipeline=2)
    plan = _plan(layout, layout, [5] * 64, [(2 * group, 2 * group + 1) for group in range(32)])
    assert all(message.sender == message.receiver for rank in range(64) for message in plan.sends(rank))
    assert sum(message.rows for rank in range(64) for message in plan.sends(rank)) == 5 * 64


def test_rows_travel_for_the_asked_kinds_only():
    groups = [Group(str(n), (Sample(tuple(range(5 + n)), 2, Kind.CHOSEN), Sample(tuple(range(9)), 4, Kind.ROLLOUT)))
              for n in range(3)]
    batch = collate(groups, number_samples(groups), pad_id=0)
    for kinds in [(Kind.CHOSEN,), (Kind.ROLLOUT,), (Kind.CHOSEN, Kind.ROLLOUT)]:
        wanted = torch.isin(batch.positions.kinds_T, torch.tensor(kinds))
        by_sample = torch.bincount(batch.sample_ids_B[batch.positions.rows_T[wanted]], minlength=6)
        (rows,) = shares(groups, kinds, 1)
        assert [sum(map(len, own)) for own in rows] == by_sample.tolist()
    assert shares(groups, [Kind.ROLLOUT], 1) == [[[], [range(5)]] * 3]
    assert shares(groups[:1], [Kind.CHOSEN, Kind.ROLLOUT], 2) == [
        [[range(0, 1)], []], [[range(1, 3)], [range(0, 3), range(3, 5)]]]


def test_refuses_what_it_cannot_route():
    with pytest.raises(ValueError, match=r"teacher 2 \(must be 1\), student 1"):
        _plan(Layout(4, context=2), Layout(4), [1] * 4, [(g,) for g in range(4)])
    with pytest.raises(ValueError, match="world 4 and student world 8"):
        _plan(Layout(4), Layout(8), [1] * 8, [(g,) for g in range(8)])
    with pytest.raises(ValueError, match="does not hold each of 2 groups once"):
        route(Layout(1), Layout(1), [[[0], [0]]], [[[0], [1]]], _dealt([1, 1], 1), [(0,), (1,)])


def test_exchange_in_a_world_of_one_reorders_and_checks():
    one = Layout(1)
    plan = route(one, one, [[[1], [0]]], [[[0, 1]]], _dealt([2, 0, 3], 1), [(0, 1), (2,)])
    first_TK, second_TK = torch.arange(6.0).view(3, 2).requires_grad_(), torch.arange(10.0, 14.0).view(2, 2)
    options = {"width": 2, "dtype": torch.float32, "device": "cpu", "world_group": None, "student_tp_group": None}
    (both_TK,) = exchange(plan, 0, [first_TK, second_TK], **options)
    torch.testing.assert_close(both_TK, torch.cat([second_TK, first_TK.detach()]), rtol=0, atol=0)
    assert not both_TK.requires_grad
    with pytest.raises(ValueError, match="2 teacher micro-batches"):
        exchange(plan, 0, [first_TK], **options)
    with pytest.raises(ValueError, match="2 teacher micro-batches, the hidden states none"):
        exchange(plan, 0, None, **options)
    with pytest.raises(ValueError, match=r"micro-batch 1: hidden states are \(3, 2\)"):
        exchange(plan, 0, [first_TK, first_TK], **options)
    with pytest.raises(ValueError, match="bfloat16"):
        exchange(plan, 0, [first_TK, second_TK], **{**options, "dtype": torch.bfloat16})
    nothing = dataclasses.replace(route(one, one, [[[0]]], [[[0]]], _dealt([0], 1), [(0,)]))
    assert [tensor.shape for tensor in exchange(nothing, 0, [torch.empty(0, 2)], **options)] == [(0, 2)]
