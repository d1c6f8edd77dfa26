"""The command `megakd`: run a recipe, look at a machine, write a report."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megakd import gpus
from megakd.config import Recipe, load
from megakd.errors import ConfigError, MegakdError
from megakd.interruption import INTERRUPTED, Interrupted
from megakd.launch import on_ranks

logger = logging.getLogger("megakd")

USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    2: something that the user can mend, printed in one line; 75: the run left when asked to, and can go on.
    """
    top = parser()
    # Overrides may stand behind options, where argparse of Python 3.11 does not look for them.
    options, rest = top.parse_known_args(arguments)
    if options.command in ("run", "plan") and not any(word.startswith("-") for word in rest):
        options.overrides += rest
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    rank = int(os.environ["RANK"]) if "RANK" in os.environ else None
    set_up_logging(quiet=rank not in (None, 0))
    try:
        return options.action(options)
    except MegakdError as error:
        if rank in (None, 0):
            print(f"megakd: error: {error}", file=sys.stderr, flush=True)
        return USAGE_ERROR
    except Interrupted as interruption:
        if rank in (None, 0):
            print(f"megakd: {interruption}", file=sys.stderr, flush=True)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    top = argparse.ArgumentParser(prog="megakd", description="Preference distillation on megatron-core.")
    commands = top.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="run a recipe's stages; those that are done are skipped")
    run.add_argument("recipe", help="path of a recipe.yaml")
    run.add_argument(
        "overrides",
        nargs="*",
        metavar="key.key=value",
        help="settings laid over the recipe, e.g. student.parallel.tensor=2 or stages.adpa.steps=20",
    )
    run.add_argument("--stage", action="append", default=[], metavar="NAME", help="only this stage (may be repeated)")
    run.add_argument(
        "--redo",
        action="append",
        default=[],
        metavar="NAME",
        help="forget this stage's result and make it again (may be repeated)",
    )
    run.add_argument("--check", action="store_true", help="check everything, start nothing")
    run.set_defaults(action=run_command)

    plan = commands.add_parser("plan", help="say what a recipe needs and takes on a cluster, and the best layouts")
    plan.add_argument("recipe", nargs="?", help="path of a recipe.yaml")
    plan.add_argument("overrides", nargs="*", metavar="key.key=value", help="settings laid over the recipe")
    plan.add_argument("--cluster", metavar="C",
                      help="description of a cluster: a file, or a name in slurm/clusters/ such as h100")
    plan.add_argument("--calibrate", type=Path, metavar="FILE", help="plan nothing: measure this machine (under srun "
                      "or torchrun: these) and write its description")
    plan.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="what --calibrate measures")
    plan.add_argument("--processes", type=int, default=1, metavar="N", help="ranks that measure at the same time: one "
                      "a GPU, or as many as a training will have on this CPU; default: 1")
    plan.add_argument("--nodes", metavar="STAGE=N,...", help="nodes of each stage (one that is not named has those of "
                      "the one before), or one number for all; default: the fewest that each stage fits on")
    plan.add_argument("--best", type=int, default=3, metavar="N",
                      help="how many layouts to look for besides the recipe's own, of each place of the teachers")
    plan.add_argument("--prompt-tokens", type=float, metavar="P", help="mean length of the prompts; measured in the "
                      "data when left out")
    plan.add_argument("--answer-tokens", type=float, metavar="A", help="mean length of the answers; likewise")
    plan.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers into this file")
    plan.set_defaults(action=plan_command)

    doctor = commands.add_parser("doctor", help="say what this machine can run and what is missing for what")
    doctor.set_defaults(action=doctor_command)

    report = commands.add_parser("report", help="write report.html of a run's folder")
    report.add_argument("folder", type=Path)
    report.set_defaults(action=report_command)
    return top


def run_command(options: argparse.Namespace) -> int:
    """`megakd run`. Under a launcher (RANK is set) this process is a rank; else it checks and starts the ranks."""
    recipe = load(options.recipe, tuple(options.overrides))
    check_stage_names(recipe, "--stage", options.stage)
    check_stage_names(recipe, "--redo", options.redo)
    launched = "RANK" in os.environ
    world = int(os.environ["WORLD_SIZE"]) if launched else recipe.processes
    # Imported late: a mistake in the recipe is told before torch is loaded.
    from megakd.check import check_recipe

    check_recipe(recipe, world, redo=options.redo, only=options.stage)
    if options.check:
        print(f"{options.recipe}: can run on {world} ranks")
        return 0
    if not launched:
        start_ranks(recipe.processes)
    from megakd.pipeline import run_recipe

    run_recipe(recipe, tuple(options.stage), tuple(options.redo))
    if int(os.environ["RANK"]) == 0:
        show_result(recipe)
    return 0


def check_stage_names(recipe: Recipe, option: str, names: Sequence[str]) -> None:
    """Refuses a stage that the recipe does not have."""
    known = [stage.name for stage in recipe.stages]
    for name in names:
        if name not in known:
            raise ConfigError(option, name, "the recipe has no such stage", f"There are: {', '.join(known)}")


def start_ranks(processes: int) -> None:
    """Replaces this process by a launcher that runs the same command on `processes` ranks of this machine."""
    command, environment = on_ranks(processes, "-m", "megakd.cli", *sys.argv[1:])
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)


def show_result(recipe: Recipe) -> None:
    """Prints the table of before and after and the paths, where there is a summary."""
    import json

    from megakd.evaluation.summary import SUMMARY
    from megakd.report import console_table

    summary = recipe.output / SUMMARY
    if summary.exists():
        print(console_table(json.loads(summary.read_text(encoding="utf-8"))))
    for name in ("report.html", SUMMARY, "models"):
        if (recipe.output / name).exists():
            print(f"{name}: {recipe.output / name}")


def plan_command(options: argparse.Namespace) -> int:
    """`megakd plan`."""
    if options.calibrate is not None:
        return calibrate_command(options)
    for field, value in (("RECIPE", options.recipe), ("--cluster", options.cluster)):
        if value is None:
            raise ConfigError(field, None, "is needed for a plan", "Write megakd plan RECIPE --cluster C")
    from megakd.planning.cluster import cluster_named
    from megakd.planning.nodes import check_device, nodes_of_stages

    recipe = load(options.recipe, tuple(options.overrides))
    cluster = cluster_named(options.cluster)
    check_device(recipe, cluster)
    nodes = None if options.nodes is None else nodes_of_stages(recipe, options.nodes)
    # Imported late: a mistake is told before torch is loaded.
    from megakd.planning.lengths import given_lengths
    from megakd.planning.plan import plan_recipe
    from megakd.planning.text import describe

    lengths = given_lengths(options.prompt_tokens, options.answer_tokens)
    plans = plan_recipe(recipe, cluster, nodes, lengths, options.best)
    if options.json is not None:
        import json

        from megakd.disk import write_text_atomic

        numbers = {"recipe": recipe.name, "cluster": cluster.model_dump(), "stages": [plan.as_dict() for plan in plans]}
        write_text_atomic(options.json, json.dumps(numbers, indent=1) + "\n")
    print(describe(recipe, cluster, plans, lengths is not None, nodes is not None), end="")
    return 0


def calibrate_command(options: argparse.Namespace) -> int:
    """`megakd plan --calibrate FILE`. Under a launcher (RANK is set) this process is a rank; else it starts them."""
    if options.recipe is not None or options.cluster is not None:
        given = "RECIPE" if options.recipe is not None else "--cluster"
        raise ConfigError("--calibrate", str(options.calibrate), f"measures a machine and takes no {given}",
                          "Leave it out")
    if options.processes < 1:
        raise ConfigError("--processes", options.processes, "has to be at least 1", "Correct it")
    gpus.check_device(os.environ, options.device)
    if "RANK" not in os.environ:
        start_ranks(options.processes)
    from megakd.planning.calibrate import calibrate

    calibrate(options.device, options.calibrate)
    if int(os.environ["RANK"]) == 0:
        print(options.calibrate)
    return 0


def doctor_command(options: argparse.Namespace) -> int:
    """`megakd doctor`."""
    from megakd.doctor import print_doctor

    print_doctor()
    return 0


def report_command(options: argparse.Namespace) -> int:
    """`megakd report`."""
    from megakd.report import write_report

    print(write_report(options.folder))
    return 0


def set_up_logging(quiet: bool) -> None:
    """One line a message on stderr; ranks other than 0 show errors only."""
    logging.basicConfig(level=logging.ERROR if quiet else logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.ERROR if quiet else logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
