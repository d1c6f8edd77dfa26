"""Tasks of EleutherAI's lm-eval on a model directory, in a process of its own.

`python -m megakd.evaluation.lm_harness settings.json results.json` is that process: there nothing of a run's other
ranks is known, and megatron-core is not loaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megakd.config_evaluation import LmEvalStage
from megakd.disk import atomic_writer
from megakd.errors import DataError
from megakd.evaluation.external import run_program


def run_tasks(stage: LmEvalStage, label: str, model: Path, folder: Path, *, device: str, seed: int) -> dict[str, float]:
    """Runs a stage's tasks on one model; writes `folder/<label>.json` and returns the metrics.

    Args:
        stage: tasks and settings.
        label: the model's.
        model: its directory.
        folder: where files go.
        device: "cpu" or "cuda".
        seed: of the choice of examples.

    Raises:
        ConfigError: lm-eval failed; its last words are in the message.
        DataError: it left no results.
    """
    settings, results = folder / f"{label}-settings.json", folder / f"{label}.json"
    plain = stage.model_dump(mode="json", include={"tasks", "num_fewshot", "limit", "chat_template", "batch_size"})
    include = None if stage.include_path is None else str(stage.include_path.absolute())
    plain |= {"model": str(model), "include_path": include, "device": "cuda:0" if device == "cuda" else device,
              "dtype": "auto" if device == "cuda" else "float32", "seed": seed}
    settings.write_text(json.dumps(plain), encoding="utf-8")
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "megakd.evaluation.lm_harness", str(settings), str(results)]
    run_program(f"stages.{stage.name}.tasks", command, folder / f"{label}.log", None)
    if not results.exists():
        raise DataError(results, None, None, "lm-eval has not written it", f"See what it printed: {label}.log")
    settings.unlink()
    return task_metrics(json.loads(results.read_text(encoding="utf-8"))["results"])


def task_metrics(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """lm-eval's results as metrics: `<task>/<metric>`, with its standard error as `<task>/<metric>_error`.

    lm-eval writes "acc,none" and "acc_stderr,none", where the part behind the comma is the filter of the answers; a
    filter other than "none" stays in the name.
    """
    metrics: dict[str, float] = {}
    for task, values in results.items():
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or "," not in name:
                continue  # its alias, numbers of samples, and the "N/A" of an error that is not known
            metric, _, chosen = name.partition(",")
            error = "_error" if metric.endswith("_stderr") else ""
            behind = "" if chosen == "none" else f",{chosen}"
            metrics[f"{task}/{metric.removesuffix('_stderr')}{behind}{error}"] = value
    return metrics


def main(arguments: Sequence[str]) -> None:
    """The process: reads settings, runs the tasks, writes the results."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    settings = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    manager = TaskManager(include_path=settings["include_path"], include_defaults=False)
    if not set(settings["tasks"]) <= set(manager.all_tasks):  # lm-eval's own 14,000 take ten seconds to look through
        manager = TaskManager(include_path=settings["include_path"])
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": settings["model"], "dtype": settings["dtype"]},
        tasks=list(settings["tasks"]),
        num_fewshot=settings["num_fewshot"],
        limit=settings["limit"],
        batch_size=settings["batch_size"],
        device=settings["device"],
        apply_chat_template=settings["chat_template"],
        task_manager=manager,
        log_samples=False,
        random_seed=settings["seed"],
        numpy_random_seed=settings["seed"],
        torch_random_seed=settings["seed"],
        fewshot_random_seed=settings["seed"],
    )
    kept = {name: found[name] for name in ("results", "versions", "n-shot", "n-samples") if name in found}
    with atomic_writer(Path(arguments[1])) as stream:
        stream.write(json.dumps(kept, indent=2, default=str).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
