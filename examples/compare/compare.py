"""Compares methods: one start, equal student tokens, several seeds; then one table and one figure.

    python examples/compare/compare.py examples/compare/settings.yaml              # run what is not done, tabulate
    python examples/compare/compare.py examples/compare/settings.yaml --collect    # tabulate what is done

Every run is `megakd run` on a recipe of its own, in `<output>/<method>/seed-<seed>` with its log beside it. Typed
again, the command goes on where it was stopped. It leaves comparison.md, comparison.json and comparison.svg in
`<output>`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megakd.comparison import ComparedRun, as_json, as_markdown, collect, compared_runs, load_comparison
from megakd.comparison_plot import comparison_plot
from megakd.config import dump
from megakd.disk import write_json_atomic, write_text_atomic
from megakd.errors import MegakdError

EXAMPLES = Path(__file__).resolve().parents[1]


def main() -> int:
    """Command line; returns the exit status (1: a run failed, 2: something that the user can mend)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time; default: 1")
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="just these methods")
    parser.add_argument("--collect", action="store_true", help="run nothing, tabulate what is finished")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error("--jobs has to be at least 1")
    try:
        comparison = load_comparison(options.settings)
        runs = compared_runs(comparison, EXAMPLES, options.only)
        failed = [] if options.collect else run_all(runs, options.jobs)
        results = collect(runs if options.collect and options.only else compared_runs(comparison, EXAMPLES))
    except MegakdError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    comparison.output.mkdir(parents=True, exist_ok=True)
    table = as_markdown(results)
    write_text_atomic(comparison.output / "comparison.md", table)
    write_json_atomic(comparison.output / "comparison.json", as_json(results))
    if len(results.figures) > 1:
        write_text_atomic(comparison.output / "comparison.svg", comparison_plot(results))
    print(table)
    for run in failed:
        print(f"{run.method}, seed {run.seed} failed: {run.log}", file=sys.stderr)
    return 1 if failed else 0


def run_all(runs: list[ComparedRun], jobs: int) -> list[ComparedRun]:
    """Runs what is not done; returns the runs that failed, which keep the others from nothing."""
    waiting = [run for run in runs if run.unfinished()]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        return [run for run, succeeded in zip(waiting, pool.map(run_one, waiting), strict=True) if not succeeded]


def run_one(run: ComparedRun) -> bool:
    """`megakd run` of one run; whether it succeeded."""
    run.file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(run.file, dump(run.recipe))
    clock = time.perf_counter()
    with run.log.open("a", encoding="utf-8") as log:
        done = subprocess.run([sys.executable, "-m", "megakd.cli", "run", str(run.file)], stdout=log, stderr=log)
    verdict = "done" if done.returncode == 0 else f"failed, see {run.log}"
    print(f"{run.method}, seed {run.seed}: {verdict} ({time.perf_counter() - clock:.0f} s)", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
