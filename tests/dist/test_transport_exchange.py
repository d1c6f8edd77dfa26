"""Rows that carry their own numbers, moved between layouts on gloo ranks."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist

from megakd.batch import Batch, Group, Kind, Padding, Sample, collate, number_samples, split_step
from megakd.layout import Coordinates, Layout
from megakd.teacher.transport import exchange, route, shares
from tests.ranks import run_ranks, subgroup

WIDTH = 6


def _step_groups(count: int) -> list[Group]:
    rng = random.Random(3)
    groups = []
    for number in range(count):
        kinds = (Kind.CHOSEN, Kind.ROLLOUT)
        samples = []
        for kind in kinds:
            prompt, response = rng.randint(1, 4), rng.randint(0, 7)
            samples.append(Sample(tuple(range(prompt + response)), prompt, kind))
        groups.append(Group(str(number), tuple(samples)))
    return groups


def _batches(groups: list[Group], layout: Layout, micro_batch: int, at: Coordinates) -> tuple[list, list[Batch]]:
    """The table of a step, and what one rank has of it."""
    table = split_step([group.total_length for group in groups], layout.data, micro_batch)
    ids, padding = number_samples(groups), Padding(context=layout.context, context_rank=at.context)
    return table, [collate([groups[g] for g in micro], [ids[g] for g in micro], pad_id=0, padding=padding)
                   for micro in table[at.data]]


def _numbered_rows(batch: Batch, kinds: tuple[Kind, ...], dtype: torch.dtype) -> torch.Tensor:
    """What a teacher would hand over, each row [sample, position, salt...]: one row for each scored position."""
    positions = batch.positions
    wanted = torch.isin(positions.kinds_T, torch.tensor(kinds))
    sample_T, position_T = batch.sample_ids_B[positions.rows_T[wanted]], batch.position_ids_P[positions.places_T[wanted]]
    salt_TK = (sample_T[:, None] * 7 + position_T[:, None] + torch.arange(WIDTH - 2)) % 11
    return torch.cat([sample_T[:, None], position_T[:, None], salt_TK], dim=1).to(dtype)


def _carry(teacher: dict, student: dict, teacher_micro: int, student_micro: int, kinds: tuple[Kind, ...],
           dtype: torch.dtype) -> int:
    """One exchange on this rank, checked bit for bit; returns the rows that came."""
    rank, world = dist.get_rank(), dist.get_world_size()
    teacher, student = Layout(world, **teacher), Layout(world, **student)
    groups = _step_groups(2 * world)
    here, place = teacher.coordinates(rank), student.coordinates(rank)
    teacher_table, teacher_batches = _batches(groups, teacher, teacher_micro, here)
    student_table, student_batches = _batches(groups, student, student_micro, place)
    rows = shares(groups, kinds, student.context)
    plan = route(teacher, student, teacher_table, student_table, rows, number_samples(groups))
    holds = here.pipeline == teacher.pipeline - 1
    local = [_numbered_rows(batch, kinds, dtype) for batch in teacher_batches] if holds else None
    tp_group = None
    if student.tensor > 1:
        for first in range(0, world, student.tensor):  # tensor groups are neighbours
            members = subgroup(tuple(range(first, first + student.tensor)))
            tp_group = members if first <= rank < first + student.tensor else tp_group
    arrived = exchange(plan, rank, local, width=WIDTH, dtype=dtype, device="cpu", world_group=dist.group.WORLD,
                       student_tp_group=tp_group)
    if place.pipeline != student.pipeline - 1:
        assert arrived is None
        return 0
    expected = [_numbered_rows(batch, kinds, dtype) for batch in student_batches]
    assert [tuple(rows.shape) for rows in arrived] == [tuple(rows.shape) for rows in expected]
    for rows_TK, expected_TK in zip(arrived, expected, strict=True):
        torch.testing.assert_close(rows_TK, expected_TK, rtol=0, atol=0)
    return sum(len(rows) for rows in arrived)


BOTH, ROLLOUT = (Kind.CHOSEN, Kind.ROLLOUT), (Kind.ROLLOUT,)


@pytest.mark.parametrize("world, teacher, student, teacher_micro, student_micro, kinds, dtype", [
    (2, {"pipeline": 2}, {"tensor": 2}, 1, 2, BOTH, torch.float32),
    (2, {}, {"tensor": 2}, 2, 1, ROLLOUT, torch.float32),
    (4, {"pipeline": 2}, {"tensor": 2}, 2, 1, BOTH, torch.float32),
    (4, {}, {"tensor": 2, "pipeline": 2}, 1, 2, BOTH, torch.bfloat16),
    (4, {"tensor": 4}, {}, 2, 1, ROLLOUT, torch.float32),
    (4, {"tensor": 2}, {"tensor": 4}, 1, 1, BOTH, torch.float64),
    (4, {"tensor": 2, "pipeline": 2}, {"tensor": 2, "pipeline": 2}, 4, 2, BOTH, torch.float32),
    (4, {"pipeline": 2}, {"tensor": 2, "context": 2}, 1, 2, BOTH, torch.float32),
    (8, {"tensor": 2, "pipeline": 2}, {"context": 4}, 2, 1, BOTH, torch.float32),
    (8, {}, {"tensor": 4, "pipeline": 2}, 1, 4, ROLLOUT, torch.bfloat16),
])
def test_rows_arrive_where_they_are_needed(world, teacher, student, teacher_micro, student_micro, kinds, dtype):
    counts = run_ranks(world, _carry, teacher, student, teacher_micro, student_micro, kinds, dtype)
    rows = sum(len(part) for own in shares(_step_groups(2 * world), kinds, 1)[0] for part in own)
    assert sum(counts) == rows * Layout(world, **student).tensor > 0


def _two_roles() -> None:
    """Two teacher roles one after the other, as in one ADPA step: their messages do not mix."""
    for teacher, kinds in [({"pipeline": 2}, ROLLOUT), ({"tensor": 4}, BOTH), ({}, (Kind.CHOSEN,))]:
        _carry(teacher, {"tensor": 2}, 1, 2, kinds, torch.float32)


def test_roles_in_turn():
    run_ranks(4, _two_roles)
