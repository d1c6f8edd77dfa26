"""megakd's per-token losses beside other packages' and beside the bare matrix products, in one run.

    python benchmarks/losses.py --tokens 4096 --vocab 49152 --hidden 576 --tp 1 2 4 --repeats 5 \\
        --out benchmarks/results/losses/NAME.json
    python benchmarks/losses.py --device cuda --dtype bf16 --tokens 8192 --vocab 128256 --hidden 4096

Prints a table; writes it as JSON and one SVG plot a metric beside it. benchmarks/README.md says how to install the
peers and what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # run as a script, which is also how its ranks import it
    sys.path.insert(0, str(ROOT))

from benchmarks import loss_inputs, measure, peers  # noqa: E402
from benchmarks.loss_inputs import TEACHERS, Contestant, Inputs, Shapes  # noqa: E402
from benchmarks.loss_table import table, write_plots  # noqa: E402
from benchmarks.record_run import machine  # noqa: E402

LIMIT, OURS = "bare GEMMs", "megakd"
CUDA_CALLS = 3
"""Calls of everything in a round on a GPU, for which Python launches the second while the first runs."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None, seen: Callable[[dict[str, Any]], None] | None = None) -> int:
    """Runs the ranks of each TP size and writes what they found; `seen` is told after each loss. 1 if one failed."""
    options = parse(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # the ranks inherit both
    os.environ["KINETO_LOG_LEVEL"] = "99"  # else the profiler tells of each start and stop
    results: list[dict[str, Any]] = []
    record = {
        "command": " ".join(["python benchmarks/losses.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "note": options.note,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine() | ({"gpu": torch.cuda.get_device_name()} if options.device == "cuda" else {}),
        "versions": versions(),
        "options": {name: value for name, value in vars(options).items() if name not in ("out", "note")},
        "results": results,
    }
    for ranks in options.tp:
        for rows in run_ranks(ranks, options):
            results += rows
            if seen is not None:
                seen(record)
    print(table(record))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        plots = write_plots(record, options.out)
        print(f"\n{options.out}, {', '.join(plot.name for plot in plots)}")
    return int(any("unavailable" in row for row in results if row["name"] in (LIMIT, OURS)))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--tokens", default=4096, **number)
    parser.add_argument("--vocab", default=49152, help="columns of all ranks together", **number)
    parser.add_argument("--hidden", default=576, **number)
    parser.add_argument("--teacher-hidden", help="width of the teachers; the student's if not given", **number)
    parser.add_argument("--logit-std", type=float, default=2.5, help="spread of the logits of each model")
    parser.add_argument("--sequence", default=256, help="tokens of a sequence (dpo)", **number)
    parser.add_argument("--tp", default=[1], nargs="+", help="tensor-parallel sizes", **number)
    parser.add_argument("--repeats", default=5, **number)
    parser.add_argument("--sweep-tokens", default=1024, help="tokens on which chunk sizes are tried", **number)
    parser.add_argument("--error-tokens", default=48, help="tokens on which errors are measured", **number)
    parser.add_argument("--chunk", help="megakd's chunk_tokens; else its default", **number)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="of hidden states and heads")
    parser.add_argument("--only", nargs="+", default=list(TEACHERS), choices=list(TEACHERS), metavar="LOSS")
    parser.add_argument("--peers", nargs="*", default=list(peers.PACKAGES), choices=list(peers.PACKAGES))
    parser.add_argument("--no-peers", action="store_const", const=[], dest="peers", help="megakd and the limit alone")
    parser.add_argument("--compiled", action="store_true", help="also what torch.compile makes of Liger and of torch")
    parser.add_argument("--note", default="", help="what a reader has to know, e.g. that other jobs ran beside it")
    parser.add_argument("--out", type=Path, help="JSON file; plots are written beside it")
    options = parser.parse_args(arguments)
    options.teacher_hidden = options.teacher_hidden or options.hidden
    if "dpo" in options.only and options.tokens % (2 * options.sequence):
        parser.error(f"--tokens {options.tokens}: dpo needs a multiple of 2 x --sequence {options.sequence}")
    if options.device == "cuda" and options.tp != [1]:
        parser.error(f"--tp {options.tp}: one rank alone on a GPU")
    if any(options.vocab % ranks for ranks in options.tp):
        parser.error(f"--vocab {options.vocab}: it must be a multiple of each of --tp {options.tp}")
    return options


def versions() -> dict[str, str | None]:
    """Versions of what is measured; None where a package is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("megakd", "transformers", *peers.PACKAGES.values()):
        try:
            found[package] = version_of(package)
        except PackageNotFoundError:
            found[package] = None
    return found


# -------------------------------------------------------------------------------------------------------------- ranks
def run_ranks(ranks: int, options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Starts the processes of one TP size and yields what the first one found of each loss."""
    context = multiprocessing.get_context("spawn")
    directory = tempfile.mkdtemp(prefix="losses-")
    ours, theirs = context.Pipe(duplex=False)
    processes = [
        context.Process(target=run_rank, args=(rank, ranks, directory, options, theirs), daemon=True)
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.start()
        theirs.close()
        for _ in options.only:
            while not ours.poll(1.0):
                if any(process.exitcode for process in processes):
                    break
            yield ours.recv()
    except EOFError as error:
        raise SystemExit(f"a rank of TP {ranks} has failed; its message is above") from error
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        shutil.rmtree(directory, ignore_errors=True)


def run_rank(rank: int, ranks: int, directory: str, options: argparse.Namespace, pipe: Connection) -> None:
    """Life of one rank: all losses, one after another. Alone, a rank goes on after a loss that failed."""
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine's host name need not resolve
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(directory) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(hours=1))
    if {"modelopt", "mcore"} & set(options.peers):
        peers.start_megatron(ranks)
    shapes = Shapes(options.tokens, options.vocab, options.hidden, options.teacher_hidden, options.sequence,
                    options.logit_std, options.device, DTYPES[options.dtype])
    for loss in options.only:
        try:
            rows = measure_loss(loss, shapes, options, rank, ranks)
        except Exception as error:
            if ranks > 1:  # the others wait for this one
                raise
            traceback.print_exc()
            rows = [{"loss": loss, "tp": ranks, "name": OURS, "unavailable": in_short(error)}]
        if rank == 0:
            pipe.send(rows)
    dist.barrier()
    dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------------- loss
def measure_loss(
    loss: str, shapes: Shapes, options: argparse.Namespace, rank: int, ranks: int
) -> list[dict[str, Any]]:
    """The rows of the table for one loss and one TP size."""
    inputs = loss_inputs.make_inputs(loss, shapes, rank, ranks)
    found, missing = peers.peers_of(loss, options.peers, compiled=options.compiled)
    rows = [{"loss": loss, "tp": ranks, "name": name, "unavailable": reason} for name, reason in missing]
    running: dict[str, tuple[Contestant, Any]] = {}
    right = right_outcome(loss, shapes, options, ranks)
    device, ours, calls = torch.device(options.device), [loss_inputs.megakd(options.chunk)], 1
    limit = loss_inputs.bare_gemms()
    if options.device == "cuda":
        calls, limit = CUDA_CALLS, loss_inputs.bare_gemms(loss_inputs.CUDA_CHUNKS)
        ours.append(replace(loss_inputs.megakd(*loss_inputs.CUDA_CHUNKS), name=f"{OURS}, fastest chunk"))
    for contestant in [limit, *ours, *found]:
        row = {"loss": loss, "tp": ranks, "name": contestant.name, "note": contestant.note}
        rows.append(row)
        if ranks > 1 and not contestant.shards:
            row["unavailable"] = "works on the whole vocabulary only"
            continue
        say(f"TP {ranks} {loss}: {contestant.name}", rank)
        try:
            setting = fastest_setting(contestant, inputs.first(options.sweep_tokens), row)
            row |= {"setting": setting, "unit": contestant.unit}
            measure_once(contestant, inputs, setting, right, options.error_tokens, row)
        except Exception as error:  # a peer that does not run is a row of the table; ours must run
            if contestant.name in (LIMIT, OURS):
                raise
            traceback.print_exc()
            row["unavailable"] = in_short(error)
            continue
        running[contestant.name] = (contestant, setting)
    functions = {name: contestant.prepare(inputs, setting) for name, (contestant, setting) in running.items()}
    say(f"TP {ranks} {loss}: {options.repeats} rounds of {len(functions)}", rank)
    seconds = measure.interleaved_seconds(functions, options.repeats, device, calls)
    for row in rows:
        if row["name"] in seconds:
            add_seconds(row, seconds)
    return rows


def fastest_setting(contestant: Contestant, inputs: Inputs, row: dict[str, Any]) -> Any:
    """The setting of the shortest time of two on fewer tokens; the times are kept in the row."""
    if len(contestant.settings) == 1:
        return contestant.settings[0]
    seconds = {}
    for setting in contestant.settings:
        function = contestant.prepare(inputs, setting)
        seconds[setting] = min(measure.seconds_of(function, inputs.labels_T.device).wall for _ in range(2))
    row["sweep"] = {str(setting): value for setting, value in seconds.items()}
    return min(seconds, key=seconds.__getitem__)


def measure_once(
    contestant: Contestant,
    inputs: Inputs,
    setting: Any,
    right: loss_inputs.Outcome,
    error_tokens: int,
    row: dict[str, Any],
) -> None:
    """Peak memory and collectives at full size, errors on a few tokens, into the row. Also the warm-up."""
    function = contestant.prepare(inputs, setting)
    if contestant.name == LIMIT:
        function()
        return
    counter = measure.CollectiveCounter()
    # With one rank nothing is exchanged, and some peers call their group of one all the same.
    with counter if inputs.group is not None else nullcontext():
        if inputs.labels_T.device.type == "cuda":
            peak, outcome = measure.peak_extra_cuda_bytes(function, inputs.labels_T.device)
            peak -= sum(gradient.nbytes for gradient in outcome[1:])  # are there at the end, so at the peak at most
        else:
            peak, outcome = measure.peak_extra_bytes(function, lambda outcome: outcome[1:])
    row["peak_extra_bytes"] = int(most(peak))
    row["collectives"] = {"calls": counter.found.calls, "bytes": counter.found.bytes}
    del outcome
    outcome = contestant.prepare(inputs.first(error_tokens), setting)()
    value = right.value if outcome.value.dim() else right.value.mean()
    errors = {"value": measure.largest_relative_error(outcome.value, value)}
    errors["hidden"] = measure.largest_relative_error(outcome.grad_hidden_TH, right.grad_hidden_TH)
    # Relative to the largest gradient of all ranks' rows.
    share_VH = right.grad_head_VH.chunk(1 if inputs.group is None else dist.get_world_size())[dist.get_rank()]
    size = right.grad_head_VH.abs().max() / share_VH.abs().max()
    errors["head"] = measure.largest_relative_error(outcome.grad_head_VH, share_VH) / size.item()
    row["errors"] = {name: most(error) for name, error in errors.items()}


def right_outcome(loss: str, shapes: Shapes, options: argparse.Namespace, ranks: int) -> loss_inputs.Outcome:
    """The reference on the first tokens, which is the same on all ranks."""
    return loss_inputs.reference_outcome(loss_inputs.make_inputs(loss, shapes).first(options.error_tokens))


def most(number: float) -> float:
    """The largest of the ranks' numbers."""
    number_1 = torch.tensor([number], dtype=torch.float64)
    dist.all_reduce(number_1, op=dist.ReduceOp.MAX)
    return number_1.item()


def add_seconds(row: dict[str, Any], seconds: dict[str, list[float]]) -> None:
    """Median and quartiles of a row's times, and its ratios to the limit and to megakd within rounds."""
    mine = seconds[row["name"]]
    first, median, third = measure.quartiles(mine)
    row["seconds"] = {"median": median, "first_quartile": first, "third_quartile": third, "all": mine}
    row["over_limit"] = measure.paired_ratio(mine, seconds[LIMIT])
    row["over_megakd"] = measure.paired_ratio(mine, seconds[OURS])


def in_short(error: Exception) -> str:
    """Its type and first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def say(text: str, rank: int) -> None:
    """Progress on stderr."""
    if rank == 0:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
