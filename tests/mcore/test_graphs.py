"""Recorded forward passes on the CPU: a recorder that keeps the call stands in for CUDA's, all else is real."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch

from megakd.batch import Batch, Group, Kind, Padding, Sample, Step, collate
from megakd.config import Parallel, parse
from megakd.mcore import runtime
from megakd.mcore.graphs import replay_forward
from megakd.mcore.model import Model, freeze
from megakd.mcore.step import forward_hidden
from megakd.run import Run
from tests.mcore.cases import KeptCalls, build, world
from tests.mcore.engine_stand_in import transformer_engine
from tests.mcore.tiny import VOCABULARY, make_groups, make_llama
from tests.ranks import run_ranks
from tests.recipes import tiny_recipe

GRAPH_TOKENS = 8
KINDS = (Kind.CHOSEN, Kind.REJECTED)


def micro_batch(lengths: Sequence[int], seed: int, multiple: int) -> Batch:
    """Random sequences of these lengths, each with half of it a response."""
    draw = torch.Generator().manual_seed(seed)
    groups = [Group(f"row:{number}", (Sample(
        tuple(torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()), -(-length // 2), Kind.CHOSEN),))
        for number, length in enumerate(lengths)]
    return collate(groups, [(number,) for number in range(len(groups))], pad_id=0, padding=Padding(multiple))


STEPS = [
    # 24 rows, 4 sequences at most, up to 8 tokens; the second has one sequence fewer, and no filling.
    ([7, 6, 8], [8, 8, 8], [3, 8, 7]),
    # A longer row, one of the first size again, one of as many rows with longer sequences.
    ([8, 8, 8, 7], [5, 8, 6], [13, 7]),
    ([8, 8, 8, 1], [16, 8], [8, 8, 2]),
]
RECORDINGS = [0, 0, 0, 1, 0, 2, 1, 2, 0]
"""Which one each micro-batch takes."""


def _graphed_and_not(directory: str, parallel: Parallel, spec: str) -> dict[str, object]:
    with transformer_engine() if spec == "te" else nullcontext():
        model, plain = (freeze(build(directory, parallel, trained=False)) for _ in range(2))
        return _both(model, plain)


def _both(model: Model, plain: Model) -> dict[str, object]:
    """Hidden states of STEPS by recordings, by the same model on the same rows, and on rows that are not filled up."""
    recorder, found = KeptCalls(), {"graphed": [], "same rows": [], "own rows": []}
    replay_forward(model, GRAPH_TOKENS, recorder)
    graphs = model.graphs
    for number, step in enumerate(STEPS):
        for kind, run, recorded in (("graphed", model, graphs), ("same rows", model, None), ("own rows", plain, None)):
            run.graphs = recorded
            batches = [micro_batch(lengths, 10 * number + place, run.rows) for place, lengths in enumerate(step)]
            found[kind] += forward_hidden(run, batches) or []
        model.graphs = graphs
    if model.grid.layout.pipeline == 1:
        own = graphs(micro_batch([7, 6, 8], 1, model.rows))
        kept = own.clone()
        graphs(micro_batch([7, 6, 8], 2, model.rows))
        assert torch.equal(own, kept), "the next micro-batch has overwritten what was handed out"
        del recorder.replayed[-2:]
    return found | {"rows": model.rows, "few": model.padding.few, "replayed": recorder.replayed,
                    "recorded": recorder.recorded, "last": model.grid.is_last_stage}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    return str(make_llama(tmp_path_factory.mktemp("model"), seed=1))


@pytest.mark.parametrize("parallel, spec", [
    (Parallel(), "te"), (Parallel(pipeline=2), "local"), (Parallel(tensor=2, sequence=True, pad_heads=True), "te"),
], ids=["one rank, te", "pp2", "tp2 sp, te"])
def test_recorded_passes_give_the_same_hidden_states(directory, parallel, spec):
    for found in run_ranks(2, _graphed_and_not, directory, parallel, spec):
        assert (found["rows"], found["few"]) == (GRAPH_TOKENS, True)
        assert found["recorded"] == 3 and found["replayed"] == RECORDINGS
        assert found["last"] or found["graphed"] == []
        if found["last"]:
            assert len(found["graphed"]) == sum(map(len, STEPS))
        for graphed, same, own in zip(*(found[name] for name in ("graphed", "same rows", "own rows")), strict=True):
            assert len(graphed) > 0 and graphed.abs().max() > 0.1
            assert torch.equal(graphed, same)
            torch.testing.assert_close(graphed, own, rtol=1e-5, atol=1e-5)


def _teachers(raw: dict, model: str) -> dict[str, object]:
    """What a run that asks for the teacher's graphs makes of a model, and that teacher's signals with and without."""
    run = Run(parse(raw), world())
    run._recorder = KeptCalls()  # in place of CUDA's, which it would make here
    student = run.grid("student")
    runtime.seed(1, student)
    teacher = run.load_teacher("teacher", model, KINDS, student)
    step, signals = Step(tuple(make_groups(8, KINDS))), {}
    with_graphs = teacher.model.graphs is not None
    for kind in ("recorded", "launched"):
        signals[kind] = [each.hidden_TH for each in teacher.signals(step, student, 2, pad_id=0) or ()]
        teacher.model.graphs = None
    others = (("teacher", "training"), ("teacher", "copy"), ("reference", "forward"))
    loaded = [run.load_model(role, model, use) for role, use in others]
    return {"decoding": [each.decode_recorder is run._recorder for each in (teacher.model, *loaded)],
            "graphs": with_graphs, "rows": teacher.model.rows, "replayed": len(run._recorder.replayed), **signals,
            "others": [each.graphs for each in loaded]}


def test_a_run_records_the_passes_of_the_role_that_asks_for_it(tmp_path):
    raw = tiny_recipe(tmp_path) | {"device": "cuda", "precision": "bf16"}
    raw["teacher"] |= {"cuda_graphs": True, "graph_tokens": 24, "decode_graphs": True}
    ranks = run_ranks(2, _teachers, raw, raw["reference"]["model"])
    for found in ranks:
        assert found["graphs"] and found["others"] == [None] * 3
        assert found["decoding"] == [True, True, False, False]  # not where it is only copied, nor another role's
        assert (found["rows"], found["replayed"]) == (24, 4)
        assert len(found["recorded"]) == 4  # tensor 2 has one last stage on both ranks
        for recorded, launched in zip(found["recorded"], found["launched"], strict=True):
            # Rows that are filled up make other blocks of products: bf16's rounding.
            assert (recorded - launched).norm() / launched.norm() < 0.01
