"""The driver of benchmarks/gpu.py, and a part of it on tiny shapes; `python -m benchmarks.gpu --small` runs all."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch

from benchmarks import gpu, gpu_parts
from megakd.batch import Kind
from megakd.config_objectives import DckdObjective, SftObjective
from tests.ranks import run_ranks

CLUSTER = gpu.ROOT / "slurm/clusters/h200.yaml"


def status_of(record: dict) -> dict[str, str]:
    return {name: found["status"] for name, found in record["parts"].items() if found["error"] != "not among --only"}


def test_what_is_not_given_is_skipped_with_a_reason(tmp_path):
    skipped = {part.name: part.skip for part in gpu.parts(gpu.parse(["--out", str(tmp_path)])) if part.skip}
    assert skipped == {"te_smoke": "--te-smoke is not given", "tensor_parallel": "--nccl is not given",
                       "quickstart": "--quickstart-models is not given"}
    dry = gpu.parts(gpu.parse(["--out", str(tmp_path), "--device", "cpu", "--small"]))
    assert [part.name for part in dry if part.skip] == ["te_smoke"]
    with pytest.raises(SystemExit):
        gpu.parse(["--out", str(tmp_path), "--only", "nothing"])


def test_a_part_that_fails_keeps_its_findings_and_its_last_words(tmp_path, capsys):
    script = tmp_path / "smoke.py"
    script.write_text('import sys\nprint(\'{"check": "one", "ok": true}\')\nprint(\'{"check": "two", "ok": false}\')\n'
                      "sys.exit('two | failed')\n")
    out = tmp_path / "out"
    assert gpu.main(["--out", str(out), "--te-smoke", str(script), "--only", "te_smoke"]) == 1
    record = json.loads((out / "gpu.json").read_text())
    assert status_of(record) == {"te_smoke": "failed"}
    found = record["parts"]["te_smoke"]
    assert [check["check"] for check in found["found"]["checks"]] == ["one", "two"]
    assert found["error"] == "exit status 1: two | failed" and "two | failed" in found["output"]
    table = (out / "gpu.md").read_text()
    assert "failed: exit status 1: two / failed" in table
    assert "| te_smoke | checks passed, of 2 | 1  | all | MISSED |" in table and table in capsys.readouterr().out


def test_time_is_kept(tmp_path):
    script = tmp_path / "smoke.py"
    script.write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    options = gpu.parse(["--out", str(tmp_path), "--te-smoke", str(script)])
    found = gpu.run_part(gpu.Part("te_smoke", 100), options, tmp_path, left=1.0)
    assert found["status"] == "failed" and found["error"] == "took longer than 1 s: begun" and found["seconds"] < 30
    assert gpu.main(["--out", str(tmp_path), "--te-smoke", str(script), "--only", "te_smoke", "--minutes", "0"]) == 1
    assert "not begun" in json.loads((tmp_path / "gpu.json").read_text())["parts"]["te_smoke"]["error"]


def test_figures_beside_their_targets():
    def training(seconds: float, loss: float, mfu: float, memory: float) -> dict:
        return {"seconds": seconds, "tokens_s": 1.0, "mfu": mfu, "peak_bytes": 2**30, "losses": [9.0, loss],
                "measured_over_planned_bytes": memory}

    parts = {
        "training:bf16": {"found": {"alone": training(1.0, 2.0, 0.5, 1.04)}},
        "training:delayed": {"found": {"alone": training(1.5, 2.01, 0.3, 0.9)}},
        "loss_kernels": {"found": {"kernels": [{"name": "kl", "dtype": "float32", "share_of_copy": 0.7}]}},
        "fused_losses": {"found": {"results": [
            {"loss": "jsd", "name": "megakd", "seconds": {"median": 0.2}, "over_limit": 1.1},
            {"loss": "jsd", "name": "liger", "unavailable": "cannot be imported"}]}},
        "quickstart": {"status": "failed"},
    }
    reached = {(part, figure): verdict for part, figure, *_, verdict in gpu.figures(parts) if verdict is not None}
    assert reached == {
        ("training:bf16", "alone: MFU"): True, ("training:bf16", "alone: measured over planned memory"): True,
        ("training:delayed", "alone: MFU"): False, ("training:delayed", "alone: measured over planned memory"): False,
        ("training:delayed", "alone: step over bf16's"): False,
        ("training:delayed", "alone: last loss over bf16's"): True,
        ("loss_kernels", "kl, float32: of a copy's rate"): False,
        ("fused_losses", "jsd, megakd: over bare GEMMs"): True,
    }


# -------------------------------------------------------------------------------------------------------------- parts


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> gpu_parts.Options:
    folder = tmp_path_factory.mktemp("gpu")
    given = gpu_parts.Options("cpu", True, str(folder), str(folder / "out.json"), str(CLUSTER), None, None)
    gpu_parts.models(given)
    return given


def _measured(options: gpu_parts.Options, objective: object, kinds: tuple[Kind, ...]) -> dict:
    precision = gpu_parts.precision_of("fp32", "cpu")
    case = gpu_parts.distillation(options, options.shapes, objective, kinds, precision)
    device = torch.device("cpu")
    job, found = gpu_parts.measured(options, case, device)
    return found | gpu_parts.longest_kernels(partial(job.step, 0), device)


def naive_flop(shapes: gpu_parts.Shapes, role: str) -> float:
    """A step's, product by product: forward, and for the student twice that backward."""
    a, sequences = getattr(shapes, role), 2 * shapes.global_batch
    length = shapes.prompt + shapes.answer
    products = {name: 2.0 * inner * columns for name, inner, columns in gpu_parts.products_of(shapes)}
    layer = sum(products[f"{role} {name}"] for name in ("qkv", "proj", "fc1", "fc2")) * length
    attention = sum(4.0 * a.heads * a.head_dim * (place + 1) for place in range(length))
    head = products[f"{role} head"] * shapes.answer
    return (3 if role == "student" else 1) * sequences * (a.layers * (layer + attention) + head)


@pytest.mark.parametrize("objective, kinds", [
    (DckdObjective(), (Kind.CHOSEN, Kind.REJECTED)), (SftObjective(), (Kind.CHOSEN,))], ids=["dckd", "sft"])
def test_a_training_is_measured(options, objective, kinds):
    found, shapes = run_ranks(1, _measured, options, objective, kinds)[0], options.shapes
    assert found["tokens"] == 2 * shapes.global_batch * (shapes.prompt + shapes.answer)
    roles = ("student", "teacher") if isinstance(objective, DckdObjective) else ("student",)
    assert found["flop"] == pytest.approx({role: naive_flop(shapes, role) for role in roles})
    # The H200's dense bf16 peak, from its description.
    assert found["mfu"] == pytest.approx(sum(found["flop"].values()) / found["seconds"] / 989e12)
    assert len(found["all_seconds"]) == shapes.steps and len(found["losses"]) == shapes.warm_up + shapes.steps
    assert found["losses"][-1] < found["losses"][0]
    assert found["peak_bytes"] is None and found["planned_bytes"] > 0 and found["planned_seconds"] > 0
    assert math.isclose(sum(kernel["ms"] for kernel in found["kernels"]) / found["kernels_ms"],
                        sum(kernel["share"] for kernel in found["kernels"]))
