"""Several optimizer steps: the same curve in every layout, a gradient whatever the micro-batches, inert padding."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megakd.batch import Group, Kind, Sample
from megakd.config import Parallel, Precision
from megakd.config_objectives import AdpaObjective, SftObjective
from megakd.mcore import optimizer
from megakd.mcore.optimizer import STATES
from tests.mcore.cases import Distillation, Job, assemble, build, curve, first_gradients, memory_of
from tests.mcore.test_gradients import KINDS, OBJECTIVES, check, naive_gradients
from tests.mcore.tiny import make_groups, make_llama
from tests.ranks import run_ranks

ADPA = AdpaObjective(gamma=1.5, beta=0.8)
WHOLE = Parallel()
TP2 = Parallel(tensor=2, pad_heads=True)
PP2 = Parallel(pipeline=2)
LAYOUTS = {
    # name: (world, student, teacher, reference, micro-batches)
    "tp2 | pp2 | dp2": (2, TP2, PP2, WHOLE, (2, 1, 4)),
    "dp2": (2, WHOLE, WHOLE, WHOLE, (2, 2, 2)),
    "pp2": (2, PP2, PP2, PP2, (2, 4, 8)),
    "tp2 sp": (2, Parallel(tensor=2, pad_heads=True, sequence=True), TP2, TP2, (4, 8, 2)),
    "pp2 vpp2 dp2 | tp4 | dp4": (
        4, Parallel(pipeline=2, virtual_pipeline=2), Parallel(tensor=4), WHOLE, (1, 2, 1)),
    "tp2 pp2": (4, Parallel(tensor=2, pipeline=2, pad_heads=True), WHOLE, PP2, (2, 2, 4)),
    "cp2 dp2 | tp2 dp2 | pp2 dp2": (4, Parallel(context=2), TP2, PP2, (2, 4, 2)),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "student": str(make_llama(folder / "student", seed=1)),
        "teacher": str(make_llama(folder / "teacher", seed=2, hidden=64, heads=8, kv_heads=4, tied=False)),
        "reference": str(make_llama(folder / "reference", seed=3, layers=2)),
    }


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> dict[str, str]:
    return {"student": str(make_llama(tmp_path_factory.mktemp("models") / "untied", seed=4, tied=False))}


def distillation(directories, student=WHOLE, teacher=WHOLE, reference=WHOLE, micro_batches=(4, 2, 8),
                 **changes) -> Distillation:
    """An ADPA training of 5 steps of 8 groups."""
    groups = tuple(make_groups(24, (Kind.CHOSEN, Kind.ROLLOUT), seed=5))
    parallels = {"student": student, "teacher": teacher, "reference": reference}
    settings = {"global_batch": 8, "steps": 5, "warmup": 0.4, "weight_decay": 0.1}
    return Distillation(directories, parallels, dict(zip(parallels, micro_batches, strict=True)), ADPA, groups,
                        **(settings | changes))


# ------------------------------------------------------------------------------------------------------------- curves


@pytest.fixture(scope="module")
def one_process(directories) -> list[dict[str, float]]:
    metrics = run_ranks(1, curve, distillation(directories))[0]
    assert max(step["grad_norm"] for step in metrics) > 1, "nothing is clipped: the norm is not tested"
    assert metrics[0]["loss"] - metrics[-1]["loss"] > 0.5, "the training does not train"
    return metrics


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_curve_is_that_of_one_process(directories, one_process, layout):
    world, *roles, micro_batches = LAYOUTS[layout]
    results = run_ranks(world, curve, distillation(directories, *roles, micro_batches=micro_batches))
    assert all(metrics == results[0] for metrics in results), "the ranks report different metrics"
    worst = 0.0
    for number, (found, expected) in enumerate(zip(results[0], one_process, strict=True)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            error = abs(found[name] - value) / max(abs(value), 1e-3)
            assert error < 1e-4, f"step {number}, {name}: {found[name]} instead of {value}"
            worst = max(worst, error)
    print(f"{layout}: worst relative error of a metric in {len(one_process)} steps {worst:.1e}")


def test_the_learning_rate_rises_and_falls_without_a_wasted_step(one_process):
    rates = [step["lr"] / 1e-2 for step in one_process]
    # 2 of 5 steps rise; then half a cosine to the step after the last.
    expected = [0.5, 1.0, *(0.5 + 0.5 * torch.cos(torch.arange(1, 4) / 4 * torch.pi)).tolist()]
    assert rates == pytest.approx(expected, rel=1e-5)


def test_a_training_of_one_step_trains(untied):
    groups = tuple(make_groups(4, (Kind.CHOSEN,)))
    case = Distillation(untied, {"student": WHOLE}, {"student": 4}, SftObjective(), groups, 4, steps=1)
    assert run_ranks(1, curve, case)[0][0]["lr"] > 0


def _trained(case: Distillation, bucket_size: int) -> tuple[list[dict[str, float]], int, list[bool], dict, dict]:
    """A training with buckets of about `bucket_size` numbers: metrics; buckets; whether each of the head's readers saw
    what all replicas have; states; and this rank's parameters at the end."""
    real, whole = optimizer.DistributedDataParallelConfig, []
    optimizer.DistributedDataParallelConfig = partial(real, bucket_size=bucket_size)
    try:
        job = Job(case)
    finally:
        optimizer.DistributedDataParallelConfig = real
    metrics, group = [], job.student.grid.groups.dp_cp
    for number in range(case.steps):
        metrics.append(job.step(number))
        if (head := job.student.head_VH) is not None:  # read before any forward pass
            heads = [torch.empty_like(head) for _ in range(group.size())]
            dist.all_gather(heads, head.detach(), group=group)
            whole.append(all(torch.equal(heads[0], other) for other in heads))
    job.trainer.gather_parameters()
    parameters = {f"{chunk}.{name}": each.detach().clone() for chunk in range(len(job.student.chunks))
                  for name, each in job.student.parameters_of(chunk).items()}
    buckets = sum(len(buffer.buckets) for chunk in job.student.chunks for buffer in chunk.buffers)
    return metrics, buckets, whole, job.states(), parameters


@pytest.mark.parametrize("ranks, parallel, micro_batch", [
    (2, WHOLE, 2), (4, Parallel(pipeline=2, virtual_pipeline=2), 1)], ids=["dp2", "pp2 vpp2 dp2"])
def test_overlapped_exchanges_change_no_bit(untied, ranks, parallel, micro_batch):
    # Nothing is clipped: the norm is summed over other slices.
    case = Distillation(untied, {"student": parallel}, {"student": micro_batch}, SftObjective(),
                        tuple(make_groups(24, (Kind.CHOSEN,))), 8, steps=3, weight_decay=0.1, clip=0.0, overlap=False)
    plain = run_ranks(ranks, _trained, case, 10_000)
    overlapped = run_ranks(ranks, _trained, replace(case, overlap=True), 10_000)
    assert plain[0][1] == parallel.virtual_pipeline < overlapped[0][1]
    for (metrics, _, _, states, parameters), (expected, _, _, expected_states, expected_parameters) in zip(
            overlapped, plain, strict=True):
        for found, wanted in zip(metrics, expected, strict=True):
            assert found.pop("grad_norm") == pytest.approx(wanted.pop("grad_norm"), rel=1e-6)
            assert found == wanted
        assert parameters.keys() == expected_parameters.keys()
        assert all(torch.equal(parameters[name], values) for name, values in expected_parameters.items())
        for state, boxes in expected_states.items():
            assert all(one[:2] == two[:2] and torch.equal(one[2], two[2])
                       for one, two in zip(states[state], boxes, strict=True)), state
    assert all(all(whole) for _, _, whole, _, _ in overlapped)


def beside_plain(case: Distillation) -> dict:
    """Two trainings step by step, one of them with its states on the host in between: what is the same, and memory.

    Both step with the gradient of the first: attention kernels of a GPU may add up in another order each time.
    """
    plain, offloading = Job(case), Job(replace(case, offload=True))
    offloaded = offloading.trainer.offloaded
    states_of = offloading.trainer.states_of
    found = {"metrics": [], "away": [memory_of(offloaded.states())], "norms": [], "states": []}
    for job in (plain, offloading):
        job.trainer.fill_masters(Path(case.directories["student"]))
    for number in range(case.steps):
        found["metrics"].append([job.forward_backward(number) for job in (plain, offloading)])
        for chunk, other in zip(offloading.student.chunks, plain.student.chunks, strict=True):
            for buffer, given in zip(chunk.buffers, other.buffers, strict=True):
                buffer.grad_data.copy_(given.grad_data)
        found["norms"].append([job.trainer.step() for job in (plain, offloading)])
        found["away"].append(memory_of(offloaded.states()))
        kept, right = offloading.local_states(), plain.local_states()
        found["states"].append(kept.keys() == right.keys() and all(map(torch.equal, kept.values(), right.values())))
    written, right = (job.trainer.whole_parameters() for job in (offloading, plain))
    found["written"] = all(torch.equal(one[name], values) for one, two in zip(written, right, strict=True)
                           for name, values in two.items())
    gpu = offloaded.states()[0].is_cuda
    found["allocated"] = [torch.cuda.memory_allocated() if gpu else 0]
    with offloading.trainer.states_at_hand():
        found["at hand"] = memory_of(offloaded.states())
        found["allocated"].append(torch.cuda.memory_allocated() if gpu else 0)
        found["numbers"] = sum(states_of(parameter)["param"].numel() for chunk in range(len(offloading.student.chunks))
                               for parameter in offloading.student.parameters_of(chunk).values()
                               if offloading.trainer.slice_of(parameter) is not None)
    with pytest.raises(RuntimeError, match="inside of states_at_hand"):
        states_of(next(iter(offloading.student.parameters_of(0).values())))
    return found


def check_offloaded(found: dict, states: int) -> None:
    """Checks what `beside_plain` found but for the metrics: everything the same, and nothing kept of `states` float32
    numbers for each of the rank's."""
    assert all(one == two > 0 for one, two in found["norms"])
    assert all(found["states"]) and found["written"]
    assert set(found["away"]) == {0}
    assert found["at hand"] == 4 * states * found["numbers"] > 0


@pytest.mark.parametrize("ranks, parallel, precision, overlap, states", [
    (2, Parallel(), "bf16", False, 3),
    (2, Parallel(pipeline=2, virtual_pipeline=2), "bf16", True, 3),
    (2, Parallel(), "fp32", True, 2),  # the masters are the parameters
], ids=["dp2 bf16", "pp2 vpp2 bf16", "dp2"])
def test_states_in_the_hosts_memory_change_no_bit(untied, ranks, parallel, precision, overlap, states):
    case = Distillation(untied, {"student": parallel}, {"student": 2}, SftObjective(),
                        tuple(make_groups(16, (Kind.CHOSEN,))), 8, steps=3, weight_decay=0.1, overlap=overlap,
                        precision=Precision(dtype=precision))
    for found in run_ranks(ranks, beside_plain, case):
        check_offloaded(found, states)
        assert all(one == two for one, two in found["metrics"])


def _step_with_infinite_gradient(case: Distillation) -> tuple[str, bool]:
    job = Job(case)
    job.step(0)
    before = job.local_states()
    job.forward_backward(1)
    if job.student.grid.is_last_stage:
        job.student.head_VH.main_grad[0, 0] = torch.inf
    try:
        job.trainer.step()
    except RuntimeError as error:
        after = job.local_states()
        return str(error), all(torch.equal(after[name], values) for name, values in before.items())
    return "the step was taken", False


@pytest.mark.parametrize("parallel", [WHOLE, Parallel(pipeline=2)], ids=["dp2", "pp2"])
def test_a_step_with_a_gradient_that_is_not_finite_is_refused_on_all_ranks(untied, parallel):
    groups = tuple(make_groups(4, (Kind.CHOSEN,)))
    case = Distillation(untied, {"student": parallel}, {"student": 2}, SftObjective(), groups, 4, steps=2)
    for message, unchanged in run_ranks(2, _step_with_infinite_gradient, case):
        assert "not finite" in message
        assert unchanged


# ------------------------------------------------------------------------------------------------------ micro-batches


def test_the_gradient_does_not_depend_on_the_micro_batches(directories):
    expected, worst = None, 0.0
    for world, size in ((1, 8), (1, 4), (1, 1), (2, 4), (2, 1)):
        results = run_ranks(world, first_gradients, distillation(directories, micro_batches=(size, 2, 1)))
        found = assemble([boxes for _, boxes in results])
        expected = expected or found
        for name, gradient in found.items():
            error = ((gradient - expected[name]).norm() / expected[name].norm()).item()
            assert error < 2e-6, f"{world} replicas, micro-batches of {size}: {name} differs by {error:.1e}"
            worst = max(worst, error)
    print(f"worst relative difference between one micro-batch of 8 and several: {worst:.1e}")


def _emptied(groups: list[Group], which: dict[Kind, set[int]]) -> tuple[Group, ...]:
    """The groups; those numbered in `which` have an empty response of that kind."""
    def sample(number: int, sample: Sample) -> Sample:
        if sample.kind in which and number in which[sample.kind]:
            return Sample(sample.tokens[: sample.prompt_length], sample.prompt_length, sample.kind)
        return sample

    return tuple(Group(group.key, tuple(sample(number, one) for one in group.samples))
                 for number, group in enumerate(groups))


EVERY = set(range(8))
EMPTY = {
    "micro-batches without rollout tokens": ("adpa", {Kind.ROLLOUT: {0, 3, 4, 6}}),
    "no rollout tokens at all": ("adpa", {Kind.ROLLOUT: EVERY}),
    "micro-batches without any loss token": ("adpa", {Kind.CHOSEN: {1, 2, 5}, Kind.ROLLOUT: {1, 2, 3}}),
    "rejected answers without tokens": ("dpo", {Kind.REJECTED: {0, 1, 7}}),
}


@pytest.mark.parametrize("layout", [None, "tp2 | pp2 | dp2", "pp2 vpp2 dp2 | tp4 | dp4"])
@pytest.mark.parametrize("empty", EMPTY)
def test_micro_batches_without_tokens_of_a_kind(directories, empty, layout):
    method, which = EMPTY[empty]
    groups = _emptied(make_groups(8, KINDS[method]), which)
    world, *roles, _ = LAYOUTS[layout] if layout else (1, WHOLE, WHOLE, WHOLE, None)
    parallels = dict(zip(("student", "teacher", "reference"), roles, strict=True))
    case = Distillation(directories, parallels, dict.fromkeys(parallels, 1), OBJECTIVES[method], groups, 8)
    loss, expected = naive_gradients(directories, method, groups)
    check(run_ranks(world, first_gradients, case), loss, expected)


# ------------------------------------------------------------------------------------------------------------ padding


def _padding_after_training(case: Distillation) -> dict[str, tuple[int, float]]:
    """For each parameter and state with padding: number of its padded elements, and the largest of them."""
    job = Job(case)
    for number in range(case.steps):
        job.step(number)
    found = {}
    for chunk in range(len(job.student.chunks)):
        pieces = job.student.pieces_of(chunk)
        for name, parameter in job.student.parameters_of(chunk).items():
            padding = torch.ones(parameter.shape, dtype=torch.bool)
            for piece in pieces:
                if piece.parameter == name:
                    padding.view(piece.local_view)[piece.local_index] = False
            states = {"weight": parameter.detach()} | {state: job.whole_state(parameter, state) for state in STATES}
            if padding.any():
                for state, values in states.items():
                    found[f"{chunk}.{name}.{state}"] = int(padding.sum()), values[padding].abs().max().item()
                assert states["param"][~padding].numel() == 0 or states["exp_avg"][~padding].abs().max() > 0
    return found


@pytest.mark.parametrize("world, parallel, tied, dtype", [
    (2, Parallel(tensor=2, pad_heads=True, sequence=True), True, "fp32"),
    (2, TP2, False, "bf16"),
    (4, TP2, False, "fp32"),
    (4, Parallel(tensor=2, pipeline=2, pad_heads=True), True, "fp32"),
], ids=["tp2 sp tied", "tp2 untied bf16", "tp2 dp2 untied", "tp2 pp2 tied"])
def test_padded_heads_and_vocabulary_stay_zero(directories, untied, world, parallel, tied, dtype):
    case = distillation(directories if tied else directories | untied, parallel, micro_batches=(2, 2, 2), steps=3,
                        precision=Precision(dtype=dtype))
    found: dict[str, float] = {}
    for result in run_ranks(world, _padding_after_training, case):
        for name, (count, largest) in result.items():
            assert count > 0
            found[name] = max(found.get(name, 0.0), largest)
    padded = {".".join(name.split(".")[-3:]) for name in found}
    kinds = ["linear_qkv", "linear_proj", "word_embeddings"]
    if not tied or parallel.pipeline > 1:
        kinds.append("output_layer")
    assert padded == {f"{kind}.weight.{state}" for kind in kinds for state in ("weight", *STATES)}
    assert all(value == 0.0 for value in found.values()), found


def _small_step(case: Distillation) -> dict[str, float] | None:
    """A step that is smaller than half of a bf16 weight's last place: shares of the numbers that moved, and whether
    what would be written began as the files are."""
    directory = case.directories["student"]
    exact = build(directory, case.parallels["student"]).parameters_of(0)
    job = Job(case)
    job.trainer.fill_masters(Path(directory))
    [before] = job.trainer.whole_parameters()
    rounded = {name: values.clone() for name, values in job.student.parameters_of(0).items()}
    job.step(0)
    [after] = job.trainer.whole_parameters()
    if job.student.grid.at.data != 0:
        return None
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    return {
        "begins as the files": all(torch.equal(before[each], values) for each, values in exact.items()),
        "written": float((after[name] != before[name]).float().mean()),
        "in bf16": float((job.student.parameters_of(0)[name] != rounded[name]).float().mean()),
    }


@pytest.mark.parametrize("parallel", [WHOLE, TP2], ids=["dp2", "tp2"])
def test_steps_that_bf16_cannot_hold_are_kept_and_written(untied, parallel):
    groups = tuple(make_groups(8, (Kind.CHOSEN,), seed=5))
    case = Distillation(untied, {"student": parallel}, {"student": 4}, SftObjective(), groups, global_batch=8,
                        learning_rate=1e-6, eps=1e-8, precision=Precision(dtype="bf16"))
    told = [each for each in run_ranks(2, _small_step, case) if each is not None]
    assert told
    for each in told:
        assert each["begins as the files"] and each["written"] > 0.9 and each["in bf16"] < 0.1, each
