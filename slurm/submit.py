"""Submits a recipe's stages as a chain of jobs of different sizes, each of which waits for the one before.

    python slurm/submit.py slurm/adpa_70b_to_7b.yaml --nodes dckd=16,generate=4,adpa=16,export=1 --overrides my.txt

A stage that is not named runs on as many nodes as the one before it; neighbours on as many nodes share a job. Stages
before the first named one have to be done. `--nodes 16` is one job for all. The parallel sizes of a model stay what the
recipe says; only the number of its copies follows the nodes.

Everything that can be known beforehand is refused before anything is submitted. sbatch's own settings (partition,
account) come from its variables (SBATCH_PARTITION, SBATCH_ACCOUNT) or by `--sbatch=--partition=NAME`.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from job import USAGE_ERROR, check_job, is_done, load_with

from megakd.config import Recipe
from megakd.config_stages import TrainStage
from megakd.errors import ConfigError, MegakdError
from megakd.log import METRICS, read_metrics
from megakd.planning.cluster import cluster_named
from megakd.planning.nodes import by_stage, check_device, nodes_of_stages

SCRIPT = Path(__file__).resolve().with_name("adpa_70b_to_7b.sbatch")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


@dataclass(frozen=True)
class Job:
    """One job: stages that follow one another on equal numbers of nodes."""

    stages: tuple[str, ...]
    nodes: int
    time: str
    """The walltime as sbatch takes it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status (1: sbatch refused, 2: something that the user can mend)."""
    options = parser().parse_intermixed_args(arguments)
    try:
        recipe = load_with(options.recipe, options.overrides, options.settings)
        jobs = jobs_of(recipe, options.nodes, options.time)
        for job in jobs:
            check_job(recipe, job.stages, job.nodes, options.gpus_per_node)
        planned = planned_seconds(recipe, jobs, options)
        for job in jobs:
            check_time(recipe, job, options.seconds_per_step, planned)
        if options.dry_run:
            show(recipe, jobs, options)
            return 0
        if shutil.which("sbatch") is None:
            raise ConfigError("sbatch", None, "there is no such program on this machine",
                              "Run this on a login node of the cluster, or add --dry-run")
        return submit(recipe, jobs, options)
    except MegakdError as error:
        print(f"submit: error: {error}", file=sys.stderr)
        return USAGE_ERROR


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("recipe", type=Path)
    top.add_argument("settings", nargs="*", metavar="key.key=value", help="settings laid over the recipe")
    top.add_argument("--nodes", required=True, metavar="STAGE=N,...", help="nodes of each stage, or one number for all")
    top.add_argument("--gpus-per-node", type=int, default=8, metavar="N",
                     help="ranks on a node: one a GPU (device: cpu: processes); default: 8")
    top.add_argument("--time", metavar="TIME", help="walltime as sbatch writes it, for all jobs or STAGE=TIME,... "
                     "(a job takes that of its first named stage); default: the job script's")
    top.add_argument("--seconds-per-step", type=float, metavar="S", help="for the check of the walltime, where the run "
                     "has no metrics.jsonl yet")
    top.add_argument("--cluster", metavar="C", help="plan the trainings on this cluster first, as `megakd plan` does: "
                     "what does not fit into its GPUs is refused, and the walltime is checked with the predicted time "
                     "of a step where no other is known")
    top.add_argument("--prompt-tokens", type=float, metavar="P", help="for --cluster: mean length of the prompts; "
                     "measured in the data when left out")
    top.add_argument("--answer-tokens", type=float, metavar="A", help="for --cluster: mean length of the answers")
    top.add_argument("--overrides", type=Path, metavar="FILE", help="settings, one key.key=value a line")
    top.add_argument("--container", metavar="IMAGE", help="run inside this image (pyxis and enroot)")
    top.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="another option of sbatch, "
                     "written --sbatch=--partition=NAME (may be repeated)")
    top.add_argument("--dry-run", action="store_true", help="print plan and commands, submit nothing")
    return top


# ------------------------------------------------------------------------------------------------------------ the jobs
def jobs_of(recipe: Recipe, nodes: str, time: str | None) -> list[Job]:
    """The jobs that `--nodes` and `--time` ask for.

    Raises:
        ConfigError: a stage that the recipe does not have, or not in this order; a number that is none; earlier stages
            that are not done.
    """
    names = [stage.name for stage in recipe.stages]
    times = {} if time is None else by_stage("--time", time, names)
    counts = nodes_of_stages(recipe, nodes)
    first = names.index(next(iter(counts)))
    for name in names[:first]:
        if not is_done(recipe, name):
            raise ConfigError("--nodes", nodes, f"leaves out the stage {name!r}, which comes before and is not done",
                              f"Name it, too: {name}=N")
    for name in times:
        if names.index(name) < first:
            raise ConfigError("--time", time, f"no job runs the stage {name!r}", "Leave it out, or name it in --nodes")
    walltime = header("time")
    for text in (*times.values(), walltime):
        seconds_of(text)
    jobs: list[Job] = []
    for name in names[first:]:
        count = counts[name]
        if jobs and jobs[-1].nodes == count:
            last = jobs.pop()
            asked = [times[stage] for stage in (*last.stages, name) if stage in times]
            jobs.append(Job((*last.stages, name), count, asked[0] if asked else walltime))
        else:
            jobs.append(Job((name,), count, times[name] if name in times else walltime))
    return jobs


def header(name: str) -> str:
    """The value of an `#SBATCH` line of the job script."""
    found = re.search(rf"^#SBATCH --{name}=(\S+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ConfigError(SCRIPT.name, None, f"has no line #SBATCH --{name}=", "Put it back")
    return found[1]


# -------------------------------------------------------------------------------------------------------- the walltime
def seconds_of(time: str) -> float:
    """A walltime in seconds: minutes, minutes:seconds, hours:minutes:seconds, or days- before hours, hours:minutes or
    hours:minutes:seconds. Raises ConfigError."""
    found = _TIME.fullmatch(time)
    if found is None:
        raise ConfigError("--time", time, "is no walltime", "Write hours:minutes:seconds or days-hours")
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(found["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 1:
        return parts[0] * 60
    *hours, minutes, seconds = parts
    return (sum(hours) * 60 + minutes) * 60 + seconds


def planned_seconds(recipe: Recipe, jobs: Sequence[Job], options: argparse.Namespace) -> dict[str, float]:
    """The predicted seconds a step of each training that a job is to run, where `--cluster` says on what.

    Raises:
        ConfigError: a training does not fit into the GPUs' memory, or cannot be planned.
    """
    if options.cluster is None:
        for option in ("prompt_tokens", "answer_tokens"):
            if getattr(options, option) is not None:
                raise ConfigError(f"--{option.replace('_', '-')}", getattr(options, option),
                                  "is what a plan is made with, and there is none", "Add --cluster, or leave it out")
        return {}
    cluster = cluster_named(options.cluster)
    check_device(recipe, cluster)
    # Imported late: it loads torch.
    from megakd.planning.lengths import given_lengths
    from megakd.planning.plan import plan_training

    lengths = given_lengths(options.prompt_tokens, options.answer_tokens)
    seconds = {}
    for job in jobs:
        for stage in trainings(recipe, job):
            plan = plan_training(recipe, stage, cluster, job.nodes, options.gpus_per_node, lengths, best=0)
            seconds[stage.name] = plan.own.seconds
    return seconds


def trainings(recipe: Recipe, job: Job) -> list[TrainStage]:
    """The training stages that a job still has to run."""
    return [stage for stage in recipe.stages
            if stage.name in job.stages and isinstance(stage, TrainStage) and not is_done(recipe, stage.name)]


def check_time(recipe: Recipe, job: Job, given: float | None, planned: Mapping[str, float]) -> None:
    """Refuses a walltime in which a training would not come to its first checkpoint, where the time of a step is known.

    Args:
        given: seconds a step; the stage's own `metrics.jsonl` is asked when None.
        planned: seconds a step that are taken for a stage where both know nothing.
    """
    for stage in trainings(recipe, job):
        known = {"--seconds-per-step": given, METRICS: measured(recipe, stage.name),
                 "--cluster": planned.get(stage.name)}
        source = next((name for name, value in known.items() if value is not None), None)
        if source is None:
            continue
        seconds = known[source]
        steps = stage.checkpoint_every if stage.steps is None else min(stage.checkpoint_every, stage.steps)
        if (needed := steps * seconds) > seconds_of(job.time):
            fewer = int(seconds_of(job.time) // seconds)
            fix = f"Give it at least {-int(-needed // 60)} minutes"
            if fewer > 0:
                fix += f", or write stages.{stage.name}.checkpoint_every={fewer} or less"
            rule = (f"is shorter than the {steps} steps of {seconds:.1f} s ({source}) to the first checkpoint of stage "
                    f"{stage.name}")
            raise ConfigError("--time", job.time, rule, fix)


def measured(recipe: Recipe, stage: str) -> float | None:
    """The median time of the steps that a stage has made so far."""
    file = recipe.output / "stages" / stage / METRICS
    lines = read_metrics(file) if file.is_file() else []
    return statistics.median(line["seconds"] for line in lines) if lines else None


# --------------------------------------------------------------------------------------------------------- the commands
def sbatch_command(recipe: Recipe, job: Job, after: str | None, options: argparse.Namespace) -> list[str]:
    """The command that submits a job.

    Args:
        after: id of the job that has to end well before; if it fails, this one is cancelled rather than left waiting.
    """
    each = options.gpus_per_node
    command = ["sbatch", "--parsable", f"--job-name={recipe.name}-{job.stages[0]}", f"--nodes={job.nodes}",
               f"--ntasks-per-node={each}", f"--gpus-per-node={each if recipe.device == 'cuda' else 0}",
               f"--time={job.time}", *options.sbatch]
    if after is not None:
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return [*command, str(SCRIPT), *script_arguments(job, options)]


def script_arguments(job: Job, options: argparse.Namespace) -> list[str]:
    """What the job script is given."""
    words = ["--recipe", str(options.recipe)]
    if options.overrides is not None:
        words += ["--overrides", str(options.overrides)]
    if options.container is not None:
        words += ["--container", options.container]
    for stage in job.stages:
        words += ["--stage", stage]
    return [*words, *options.settings]


def submit(recipe: Recipe, jobs: Sequence[Job], options: argparse.Namespace) -> int:
    """Submits the jobs and prints their ids; returns the exit status."""
    after: str | None = None
    for job in jobs:
        done = subprocess.run(sbatch_command(recipe, job, after, options), capture_output=True, text=True)
        if done.returncode != 0:
            print(f"submit: sbatch refused the job for {', '.join(job.stages)}: {' '.join(done.stderr.split())}",
                  file=sys.stderr)
            if after is not None:
                print(f"submit: the jobs printed above wait or run; scancel {after} ends the last", file=sys.stderr)
            return 1
        after = done.stdout.strip().partition(";")[0]
        print(f"{after}  {', '.join(job.stages)} on {job.nodes} nodes, at most {job.time}", flush=True)
    return 0


def show(recipe: Recipe, jobs: Sequence[Job], options: argparse.Namespace) -> None:
    """Prints each job's plan, its sbatch command and its srun line, which the job script itself says."""
    for number, job in enumerate(jobs, start=1):
        print(f"job {number}: {', '.join(job.stages)}")
        print(shlex.join(sbatch_command(recipe, job, f"<job {number - 1}>" if number > 1 else None, options)))
        done = subprocess.run(["bash", str(SCRIPT), "--dry-run", *script_arguments(job, options)], text=True,
                              env=os.environ | dry_environment(job, options), stdout=subprocess.PIPE, check=True)
        print(done.stdout)


def dry_environment(job: Job, options: argparse.Namespace) -> Mapping[str, str]:
    """What the job script would find in its environment."""
    return {"SLURM_NNODES": str(job.nodes), "SLURM_NTASKS_PER_NODE": str(options.gpus_per_node),
            "MEGAKD_PYTHON": sys.executable}


if __name__ == "__main__":
    sys.exit(main())
