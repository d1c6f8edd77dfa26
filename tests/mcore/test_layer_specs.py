"""The two layer specs: the same model under other names. Transformer Engine's modules are stood in for
(tests/mcore/engine_stand_in.py); megatron-core's wrappers of them, its spec, blocks and optimizer are the real ones."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megakd.batch import Kind
from megakd.config import Parallel
from megakd.config_objectives import SftObjective
from megakd.hf.pieces import parameter_shapes
from megakd.mcore import checkpoint
from megakd.mcore.decoder import PipelineDecoder
from megakd.mcore.model import HiddenGPT, unwrap
from megakd.rollout import Prompt, Sampling, generate
from tests.mcore.cases import Distillation, Job, assemble, build
from tests.mcore.engine_stand_in import transformer_engine
from tests.mcore.tiny import make_groups, make_llama, make_qwen2, make_qwen3
from tests.ranks import run_ranks

FACTS = {"stage": "d41d8cd98f00b204"}
SEQUENCE = Parallel(tensor=2, pad_heads=True, sequence=True)
STEPS, SAVED = 3, 1


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {"tied": str(make_llama(folder / "tied", seed=1)), "biases": str(make_qwen2(folder / "biases", seed=3)),
            "norms of heads": str(make_qwen3(folder / "norms", seed=4, tied=False))}


def training(student: str, parallel: Parallel) -> Distillation:
    return Distillation({"student": student}, {"student": parallel}, {"student": 2}, SftObjective(),
                        tuple(make_groups(24, (Kind.CHOSEN,))), global_batch=8, steps=STEPS, weight_decay=0.1)


def layers_of(spec: str) -> AbstractContextManager:
    """While it lasts, models are built of `spec` on this rank."""
    return transformer_engine() if spec == "te" else nullcontext()


def _registered(student: str, parallel: Parallel, spec: str) -> dict[str, object]:
    """What a built chunk registers, and what the table says of it."""
    with layers_of(spec):
        model = build(student, parallel)
    parameters = model.parameters_of(0)
    marks = {
        name: (getattr(each, "tensor_model_parallel", False), getattr(each, "partition_dim", -1),
               getattr(each, "sequence_parallel", False), getattr(each, "allreduce", True), each.dtype)
        for name, each in parameters.items()
    }
    states = {name.rpartition(".")[0] for name in unwrap(model.chunks[0]).state_dict() if name.endswith("_extra_state")}
    return {"shapes": {name: tuple(each.shape) for name, each in parameters.items()}, "marks": marks,
            "table": parameter_shapes(model.architecture, model.shards[0]), "extra states": states}


@pytest.mark.parametrize("student", ["tied", "biases", "norms of heads"])
def test_a_block_registers_what_the_table_says(students, student):
    local, engine = (run_ranks(2, _registered, students[student], SEQUENCE, spec)[0] for spec in ("local", "te"))
    for found in (local, engine):
        assert found["shapes"] == found["table"]
    # All that differs are the norms' names, here written out once more.
    others = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
              "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}
    renamed = {name.replace(own, other): name for name in local["shapes"] for own, other in others.items()
               if name.endswith(own)}
    assert len(renamed) == 2 * 4
    assert engine["shapes"].keys() == (local["shapes"].keys() - set(renamed.values())) | renamed.keys()
    for name in engine["shapes"]:
        assert engine["shapes"][name] == local["shapes"][renamed.get(name, name)]
        # Which parameters the tensor ranks share out, or hold alike: what gradients are summed and normed by.
        assert engine["marks"][name] == local["marks"][renamed.get(name, name)], name
    assert local["extra states"] <= {f"decoder.layers.{layer}.{module}" for layer in range(4) for module in (
        "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")} | {
        "output_layer"}
    assert {"decoder.layers.3.self_attention.core_attention.inner", "decoder.final_layernorm",
            "decoder.layers.0.mlp.linear_fc2"} <= engine["extra states"]


def _train(case: Distillation, spec: str, folder: str, resumes: bool) -> dict[str, object]:
    """Trains to the end, from the newest checkpoint in `folder` if it `resumes`; else saves one after `SAVED` steps."""
    with layers_of(spec):
        job, start = Job(case), 0
        if resumes:
            path, start = checkpoint.latest(Path(folder))
            checkpoint.load(path, job.trainer, FACTS, dist.group.WORLD)
        found = {"states": job.states() if resumes else None, "metrics": []}
        for number in range(start, case.steps):
            job.forward_backward(number)
            found["gradients"] = job.gradients()
            found["metrics"].append(job.trainer.step())
            if number + 1 == SAVED and not resumes:
                checkpoint.save(Path(folder), SAVED, job.trainer, FACTS, dist.group.WORLD)
                found["states"] = job.states()
        found["in place"] = [each.fuse_wgrad_accumulation for each in job.student.chunks[0].modules()
                             if hasattr(each, "fuse_wgrad_accumulation")]
    return found


@pytest.mark.parametrize("student, parallel, writer, reader", [
    ("biases", SEQUENCE, "local", "te"), ("biases", SEQUENCE, "te", "local"), ("tied", Parallel(), "local", "te"),
    ("tied", Parallel(context=2), "local", "te"), ("norms of heads", SEQUENCE, "te", "local"),
    ("norms of heads", Parallel(tensor=2, pad_heads=True), "local", "te"),
], ids=["tp2 sp", "tp2 sp, back", "dp2", "cp2", "tp2 sp, norms of heads, back", "tp2, norms of heads"])
def test_a_training_goes_on_in_the_other_spec(students, tmp_path, student, parallel, writer, reader):
    case = training(students[student], parallel)
    wrote = run_ranks(2, _train, case, writer, str(tmp_path), False)
    read = run_ranks(2, _train, case, reader, str(tmp_path), True)
    # Transformer Engine's linears add gradients to the sums themselves: four in each of four layers.
    assert [len(ranks[0]["in place"]) for ranks in (wrote, read)] == [16 * (spec == "te") for spec in (writer, reader)]
    assert all(wrote[0]["in place"] + read[0]["in place"])
    for state in ("param", "exp_avg", "exp_avg_sq"):
        written, found = (assemble([rank["states"][state] for rank in ranks]) for ranks in (wrote, read))
        assert found.keys() == written.keys()
        assert all(torch.equal(found[name], values) for name, values in written.items()), state
        assert all(values.isfinite().all() for values in written.values())
    expected, found = (assemble([rank["gradients"] for rank in ranks]) for ranks in (wrote, read))
    worst = max(float((found[name] - values).norm() / values.norm()) for name, values in expected.items())
    norms = torch.tensor(read[0]["metrics"]) / torch.tensor(wrote[0]["metrics"][SAVED:])
    print(f"{writer} -> {reader}: worst gradient {worst:.1e}, worst norm {float((norms - 1).abs().max()):.1e}")
    assert worst < 1e-5
    torch.testing.assert_close(norms, torch.ones(STEPS - SAVED), rtol=1e-5, atol=0)


def _answers(student: str, spec: str) -> tuple[list[tuple[int, ...]], list[bool], set[tuple[int, ...]]]:
    """A model's likeliest answers, its settings for packed rows afterwards, and the shapes of positions decoded."""
    shapes, angles = set(), HiddenGPT.rotary_angles

    def seen(chunk: HiddenGPT, position_ids_BS: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(position_ids_BS.shape))
        return angles(chunk, position_ids_BS)

    with layers_of(spec), mock.patch.object(HiddenGPT, "rotary_angles", seen):
        model = build(student, SEQUENCE)
        prompts = [Prompt(number, tuple(range(3, 5 + number))) for number in range(4)]
        sampling = Sampling(temperature=0.0, top_k=0, top_p=1.0, n=1, max_new_tokens=5, stop_ids=(), seed=0)
        answers = generate(PipelineDecoder(model, 32), prompts, sampling, slots=3, pad_id=0)
    return [each.tokens for each in answers], [model.config.sequence_parallel, model.config.apply_rope_fusion], shapes


def test_both_specs_decode_alike(students):
    # The kernel that rotates takes one row's angles, and rows of a rollout have their own.
    (right, settings, _), (found, engine, shapes) = (
        run_ranks(2, _answers, students["norms of heads"], spec)[0] for spec in ("local", "te"))
    assert found == right and len({len(tokens) for tokens in right}) == 1
    assert (settings, engine) == ([True, False], [True, True])
    assert (3, 1) in shapes
