"""Writes what a finished run measured as one JSON file for benchmarks/results/.

    python benchmarks/record_run.py runs/quickstart --command "make quickstart" --out benchmarks/results/NAME.json

Everything but the command and the note comes from the run's own manifests, metrics and summary.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml


def main() -> int:
    """Reads the run's folder and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's output folder")
    parser.add_argument("--command", required=True, help="what was typed, with $VARIABLES for other paths")
    parser.add_argument("--note", default="", help="what a reader has to know, e.g. that other jobs ran beside it")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    record = {"command": options.command, "note": options.note, "machine": machine(), **measured(options.run)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out}: {record['stages_seconds']:.0f} s in stages, {record['wall_seconds']:.0f} s of wall")
    return 0


def machine() -> dict[str, Any]:
    """Processor, cores and memory of this machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": (names or [platform.processor()])[0], "cores": os.cpu_count(), "memory_gib": round(memory, 1)}


def measured(folder: Path) -> dict[str, Any]:
    """Stages, losses and held-out figures of a run, and the time from the first stage's start to the last's end."""
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("stages/*/manifest.json")]
    manifests.sort(key=lambda manifest: manifest["started"])
    stages = {}
    for manifest in manifests:
        stage = {key: manifest[key] for key in ("seconds", "tokens", "ranks", "layout", "config")}
        metrics = folder / "stages" / manifest["stage"] / "metrics.jsonl"
        if metrics.exists():
            rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
            stage["losses"] = [row["loss"] for row in rows]
        stages[manifest["stage"]] = stage
    began, ended = (datetime.fromisoformat(manifests[place][key]) for place, key in ((0, "started"), (-1, "finished")))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    return {
        "date": ended.date().isoformat(),
        "wall_seconds": (ended - began).total_seconds(),
        "stages_seconds": round(sum(manifest["seconds"] for manifest in manifests), 1),
        "versions": manifests[-1]["versions"],
        "rows": {key: recipe["data"][key] for key in ("train_rows", "eval_rows", "max_length")},
        "stages": stages,
        "summary": json.loads((folder / "summary.json").read_text(encoding="utf-8")),
    }


if __name__ == "__main__":
    sys.exit(main())
