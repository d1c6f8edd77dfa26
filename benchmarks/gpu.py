"""Everything that is measured on one GPU, in one command and ten minutes.

    python -m benchmarks.gpu --out DIR --te-smoke FILE --nccl LIBRARY --quickstart-models DIR
    python -m benchmarks.gpu --out DIR --device cpu --small        # a dry run, without a GPU, in two minutes

Each part is a process with a time limit of its own; one that fails is reported and the others go on. DIR/gpu.json is
written again after each part and holds all that was measured, and DIR/gpu.md the figures beside their targets, which
nothing enforces. The exit status is 1 if a part failed. benchmarks/README.md says what the parts are.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.record_run import machine
from megakd.disk import write_json_atomic, write_text_atomic

ROOT = Path(__file__).parents[1]
FP8 = ("tensorwise", "delayed", "blockwise")
"""Recipes that Hopper has; a CPU emulates them."""
SLOWER = 5
"""Times that a part's limit is longer on a CPU, which may have other things to do."""
GRACE = 10
"""Seconds between asking a part to end and ending it."""
LOG_END = 3000
"""Characters of a part's output that are kept."""


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    seconds: float
    """It may take no longer."""
    skip: str = ""
    """Why it is not run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts and writes what they found; returns 1 if one failed."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    record: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)]),
        "date": datetime.now(UTC).date().isoformat(), "machine": machine(), "small": options.small, "parts": {},
    }
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="gpu-") as scratch:
        for part in parts(options):
            found = {"status": "skipped", "error": part.skip}
            if not part.skip:
                left = deadline - time.monotonic()
                found = run_part(part, options, Path(scratch), left) if left > 0 else {
                    "status": "failed", "error": f"not begun: the {options.minutes:g} minutes were over"}
            record["parts"][part.name] = found
            print(f"{part.name}: {found['status']}"
                  + (f", {found['seconds']:.0f} s" if "seconds" in found else "")
                  + (f": {found['error']}" if found["error"] else ""), flush=True)
            write_json_atomic(options.out / "gpu.json", record)
            write_text_atomic(options.out / "gpu.md", "\n".join(table(record)) + "\n")
    print("\n".join(["", *table(record)]))
    return int(any(found["status"] == "failed" for found in record["parts"].values()))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models and shapes")
    parser.add_argument("--minutes", type=float, default=9.5, help="of all parts together (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    parser.add_argument("--te-smoke", type=Path, metavar="FILE", help="a script that checks Transformer Engine and "
                        "prints one JSON line a check")
    parser.add_argument("--nccl", type=Path, metavar="LIBRARY", help="libnccl.so.2 (or .gz) of 2.30 or newer, which "
                        "lets two ranks share a GPU")
    parser.add_argument("--quickstart-models", type=Path, metavar="DIR",
                        help="folder with reference and student_start, as `make models` makes it")
    parser.add_argument("--scratch", type=Path, metavar="DIR", default=Path(tempfile.gettempdir()),
                        help="where 18 GB of random models go meanwhile, best in memory (default: %(default)s)")
    parser.add_argument("--cluster", type=Path, metavar="FILE", default=ROOT / "slurm/clusters/h200.yaml",
                        help="description with the card's peak rates (default: that of the H200)")
    options = parser.parse_args(arguments)
    names = [part.name for part in parts(options)]
    for name in options.only or ():
        if name not in names:
            parser.error(f"--only {name}: there are {', '.join(names)}")
    return options


def parts(options: argparse.Namespace) -> list[Part]:
    """All parts in their order, each with its limit or the reason why it is left out."""
    gpu = options.device == "cuda"
    no_gpu = "" if gpu else "needs a GPU"
    smoke = "" if options.te_smoke else "--te-smoke is not given"
    nccl = "" if options.nccl or not gpu else "--nccl is not given"
    models = "" if options.quickstart_models or options.small else "--quickstart-models is not given"
    found = [
        Part("te_smoke", 120, smoke or no_gpu), Part("environment", 75), Part("models", 90), Part("training:bf16", 90),
        *(Part(f"training:{recipe}", 90) for recipe in FP8), Part("fused_losses", 150), Part("loss_kernels", 120),
        Part("tensor_parallel", 90, nccl), Part("quickstart", 150, models), Part("teacher_graphs", 90),
        Part("rollouts", 90),
    ]
    if options.only:
        found = [part if part.name in options.only else Part(part.name, 0, "not among --only") for part in found]
    return found


def run_part(part: Part, options: argparse.Namespace, scratch: Path, left: float) -> dict[str, Any]:
    """Runs a part until it ends or its time is over: its status, error, seconds, findings and the end of its output."""
    name = part.name.replace(":", "_")
    log, out = scratch / f"{name}.log", scratch / f"{name}.json"
    if part.name == "te_smoke":
        command = [sys.executable, str(options.te_smoke.absolute())]
    else:
        given = {"device": options.device, "small": options.small, "scratch": str(scratch), "out": str(out),
                 "cluster": str(options.cluster.absolute()), "nccl": options.nccl and str(options.nccl.absolute()),
                 "quickstart_models": options.quickstart_models and str(options.quickstart_models.absolute())}
        command = [sys.executable, "-m", "benchmarks.gpu_parts", part.name, json.dumps(given)]
    path = os.pathsep.join([str(ROOT), *sys.path])
    # megatron-core asks for one queue on GPUs before Blackwell, so that communication is not held up by kernels.
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **os.environ, "PYTHONPATH": path}
    start, limit = time.monotonic(), min(part.seconds * (1 if options.device == "cuda" else SLOWER), left)
    with log.open("wb") as written:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=written, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            status = process.wait(limit)
            error = "" if status == 0 else f"exit status {status}: {last_line(log)}"
        except subprocess.TimeoutExpired:
            error = f"took longer than {limit:.0f} s: {last_line(log)}"
        finally:
            end(process)
    found = {"status": "failed" if error else "done", "error": error, "seconds": time.monotonic() - start}
    if out.exists():
        found["found"] = json.loads(out.read_text(encoding="utf-8"))
    text = log.read_text(encoding="utf-8", errors="replace")
    if part.name == "te_smoke":
        lines = [line for line in text.splitlines() if line.startswith('{"check"') and line.endswith("}")]
        found["found"] = {"checks": [json.loads(line) for line in lines]}
    return found | ({"output": text[-LOG_END:]} if error else {})


def end(process: subprocess.Popen) -> None:
    """Ends a process that still runs, with those that it has started: torchrun's ranks are in sessions of their own,
    so that it has to be asked to end them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue


def last_line(log: Path) -> str:
    """What a process said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "without a word"


# ----------------------------------------------------------------------------------------------------------- the table
def table(record: dict[str, Any]) -> list[str]:
    """The figures beside their targets, in Markdown."""
    note = ["Shapes of a dry run: the figures say nothing.", ""] if record["small"] else []
    lines = [*note, "| part | figure | measured | target | |", "|---|---|---|---|---|"]
    for part, found in record["parts"].items():
        if found["status"] != "done":
            lines.append(f"| {part} | | {found['status']}: {' '.join(found['error'].split()).replace('|', '/')} | | |")
    for part, figure, value, unit, target, reached in figures(record["parts"]):
        verdict = "" if reached is None else "reached" if reached else "MISSED"
        lines.append(f"| {part} | {figure} | {value:.4g} {unit} | {target} | {verdict} |")
    return lines


Figure = tuple[str, str, float, str, str, bool | None]
"""Part, what it is, value, unit, target, whether it is reached (None: there is none)."""


def figures(parts: dict[str, Any]) -> Iterator[Figure]:
    """Every figure that is there, of failed parts too."""
    there = {name: part["found"] for name, part in parts.items() if "found" in part}
    if "te_smoke" in there:
        checks = there["te_smoke"]["checks"]
        passed = sum(check["ok"] for check in checks)
        yield "te_smoke", f"checks passed, of {len(checks)}", passed, "", "all", passed == len(checks)
    if "environment" in there:
        yield from _floors(there["environment"])
    for name in there:
        if name.startswith("training:"):
            yield from _training(name, there[name], there)
    for row in there["teacher_graphs"]["passes"] if "teacher_graphs" in there else ():
        what, ratio = f"{row['precision']}, {row['rows']} rows", row["recorded_ms"] / row["launched_ms"]
        yield "teacher_graphs", f"{what}: launched", row["launched_ms"], "ms", "", None
        yield "teacher_graphs", f"{what}: recorded over launched", ratio, "x", "<= 1", ratio <= 1
        yield "teacher_graphs", f"{what}: held by all recordings so far", row["held_bytes"] / 2**30, "GiB", "", None
    for row in there["rollouts"]["answers"] if "rollouts" in there else ():
        yield from _rollouts(row, there)
    if "loss_kernels" in there:
        for row in there["loss_kernels"]["kernels"]:
            if "share_of_copy" not in row:
                continue
            share = row["share_of_copy"]
            yield "loss_kernels", f"{row['name']}, {row['dtype']}: of a copy's rate", share, "", ">= 0.8", share >= 0.8
    if "fused_losses" in there:
        for row in there["fused_losses"]["results"]:
            if "seconds" not in row:
                continue
            what = f"{row['loss']}, {row['name']}"
            yield "fused_losses", what, 1e3 * row["seconds"]["median"], "ms", "", None
            if row["name"] == "megakd":
                ratio = row["over_limit"]
                yield "fused_losses", f"{what}: over bare GEMMs", ratio, "x", "<= 1.15", ratio <= 1.15
    if "tensor_parallel" in there and "apart: loss" in there["tensor_parallel"]:
        apart = there["tensor_parallel"]["apart: loss"]
        what = "largest relative difference of a loss between tensor 1 and 2"
        yield "tensor_parallel", what, apart, "", "<= 0.01", apart <= 0.01
    if "quickstart" in there:
        yield "quickstart", "wall", there["quickstart"]["wall_seconds"], "s", "", None


def _rollouts(row: dict[str, Any], there: dict[str, Any]) -> Iterator[Figure]:
    what, launched, recorded = f"{row['role']}, {row['rows']} rows", row["launched"], row["recorded"]
    yield "rollouts", f"{what}: a pass, launched", launched["pass_ms"], "ms", "", None
    for name, figure in (("a pass", "pass_ms"), ("everything", "seconds")):
        ratio = recorded[figure] / launched[figure]
        yield "rollouts", f"{what}: {name}, recorded over launched", ratio, "x", "<= 1", ratio <= 1
    if "environment" in there and "copy_gb_s" in there["environment"]:
        ratio = recorded["pass_ms"] / (1e-6 * row["read_bytes"] / there["environment"]["copy_gb_s"])
        yield "rollouts", f"{what}: recorded over reading weights, keys, values", ratio, "x", "", None


def _floors(found: dict[str, Any]) -> Iterator[Figure]:
    if "copy_gb_s" in found:
        yield "environment", "copy on the device, read and written", found["copy_gb_s"], "GB/s", "", None
    for row in found["gemms"] if "gemms" in found else ():
        for dtype in ("bf16", "fp8"):
            if f"{dtype}_tflops" in row:
                shape = f"{row['m']} x {row['k']} x {row['n']}"
                yield "environment", f"{row['name']} {dtype}, {shape}", row[f"{dtype}_tflops"], "TFLOP/s", "", None


def _training(name: str, found: dict[str, Any], there: dict[str, Any]) -> Iterator[Figure]:
    for kind in ("with its teacher", "alone"):
        if kind not in found:
            continue
        row = found[kind]
        yield name, f"{kind}: step", row["seconds"], "s", "", None
        yield name, f"{kind}: tokens a second", row["tokens_s"], "", "", None
        yield name, f"{kind}: MFU", row["mfu"], "", ">= 0.45", row["mfu"] >= 0.45
        if "planned_seconds" in row:
            yield name, f"{kind}: measured over planned seconds", row["seconds"] / row["planned_seconds"], "", "", None
        if row["measured_over_planned_bytes"] is not None:
            ratio = row["measured_over_planned_bytes"]
            yield name, f"{kind}: peak of memory", row["peak_bytes"] / 2**30, "GiB", "", None
            yield name, f"{kind}: measured over planned memory", ratio, "", "0.95 to 1.05", abs(ratio - 1) <= 0.05
        if "training:bf16" in there and name != "training:bf16" and kind in there["training:bf16"]:
            base = there["training:bf16"][kind]
            ratio = row["seconds"] / base["seconds"]
            yield name, f"{kind}: step over bf16's", ratio, "x", "< 1", ratio < 1
            ratio = row["losses"][-1] / base["losses"][-1]
            yield name, f"{kind}: last loss over bf16's", ratio, "", "0.99 to 1.01", abs(ratio - 1) <= 0.01


if __name__ == "__main__":
    sys.exit(main())
