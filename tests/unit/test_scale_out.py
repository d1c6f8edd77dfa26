"""What grows with the number of ranks, and what does not: groups, loss communication, transport, checkpoints."""

from __future__ import annotations

import random
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from megakd.batch import Kind
from megakd.config import Parallel
from megakd.layout import Layout
from megakd.planning.setup import LossCall, RoleSetup, TrainingSetup
from megakd.planning.traffic import training_traffic
from megakd.planning.work import Lengths, work_of_lengths
from megakd.teacher.transport import route, shares
from tests.unit.test_planning import LLAMA_8B, LLAMA_70B

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "scale_out.py"))
BOTH = (Kind.CHOSEN, Kind.REJECTED)
WORLDS = (64, 1024, 16384)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_makes_its_own_groups_alone(world):
    for rank in (0, 3, world // 2, world - 1):
        groups = TOOL["groups_of"](world, rank)
        # Of the student's axes 3 partitions of the world differ, of the teacher's 7; none is the whole world.
        assert (groups.made, groups.asked) == (10, 10)
        assert groups.largest < world


def setup(world: int, vocabulary: int = 128256) -> TrainingSetup:
    """DCKD of an 8B student (TP8) by a 70B teacher (TP8 x PP4), 4 pairs a student replica."""
    sizes = {"student": replace(LLAMA_8B, vocab_size=vocabulary), "teacher": replace(LLAMA_70B, vocab_size=vocabulary)}
    student = RoleSetup(sizes["student"], Parallel(tensor=8), world, 1)
    teacher = RoleSetup(sizes["teacher"], Parallel(tensor=8, pipeline=4), world, 1)
    layouts = {"student": student.layout, "teacher": teacher.layout}
    work = work_of_lengths(Lengths(200, 300), BOTH, 4 * student.layout.data, layouts, {"student": 1, "teacher": 1},
                           {"teacher": BOTH})
    return TrainingSetup(student, {"teacher": teacher}, (LossCall(2, 5, BOTH, "forward"),), work, 1024, "bf16", "cuda")


@pytest.mark.parametrize("vocabulary", [32000, 256000])
def test_loss_communication_a_token_does_not_depend_on_the_vocabulary(vocabulary):
    def loss_bytes(planned: TrainingSetup) -> float:
        calls = training_traffic(planned, 0)
        return sum(call.bytes for call in calls if call.purpose.startswith("loss") or "hidden states" in call.purpose)

    one, other = setup(64), setup(64, vocabulary)
    rows = one.work.roles["student"].sum("all_rows")
    assert loss_bytes(one) == loss_bytes(other)
    # One MAX a model and 5 sums, d(hidden) of the student and the teacher's hidden states: far less than a logit each.
    assert loss_bytes(one) < rows * ((2 + 5) * 4 + 4096 * 4 + 2 * 8192 * 2) < 0.1 * rows * 128256 * 4


@pytest.mark.parametrize("world", WORLDS)
def test_planned_transport_of_a_rank_is_flat(world):
    def moved(planned: TrainingSetup) -> list[float]:
        last = planned.teachers["teacher"].layout.rank(pipeline=3)
        return [call.bytes for call in training_traffic(planned, last) if call.purpose == "teacher: hidden states"]

    assert moved(setup(world)) == moved(setup(64)) and len(moved(setup(world))) == 3


@pytest.mark.parametrize("world", [64, 256, 1024])
def test_real_transport_of_a_rank_is_flat(world):
    student, teacher, draw = Layout(world, 8), Layout(world, 8, 4), random.Random(0)
    peers: list[set[int]] = [set() for _ in range(world)]
    for _ in range(3):
        step = TOOL["random_step"](4 * student.data, draw)
        table = step.table(student.data, 2)
        beside = step.table_beside(table, teacher.data, 4)
        way = route(teacher, student, beside, table, shares(step.groups, BOTH, 1), step.sample_ids)
        replica = max(sum(sample.response_length for micro in micros for group in micro
                          for sample in step.groups[group].samples) for micros in table)
        for rank in range(world):
            sent, received = way.sends(rank), way.receives(rank)
            # Each of a replica's 8 tensor ranks gets an eighth; a teacher's sends those of the 4 replicas beside it.
            assert sum(message.rows for message in received) <= replica / 8 + 4
            assert sum(message.rows for message in sent) <= 4 * (replica / 8 + 1)
            peers[rank] |= {message.receiver for message in sent} | {message.sender for message in received}
    # In every step the same ones.
    assert max(map(len, peers)) <= 4 + 1


def test_a_teacher_in_the_student_s_layout_sends_nothing():
    layout, step = Layout(32, 4), TOOL["random_step"](64, random.Random(0))
    table = step.table(layout.data, 2)
    beside = step.table_beside(table, layout.data, 4)
    way = route(layout, layout, beside, table, shares(step.groups, BOTH, 1), step.sample_ids)
    assert all(message.receiver == rank for rank in range(32) for message in way.sends(rank))
    assert sum(message.rows for rank in range(32) for message in way.receives(rank)) == step.counts["tokens"]


def test_metadata_of_a_checkpoint():
    small, large = TOOL["metadata_of"](64), TOOL["metadata_of"](16384)
    parameters = 32 * 6 + 3
    # A slice for each parameter, and one more wherever the cut between two ranks falls inside one.
    assert small.slices_of_a_rank <= parameters and large.slices_of_a_rank <= 2
    assert parameters < large.slices / 8 < parameters + 2048
    assert large.bytes_of_a_group < 512 * 1024
