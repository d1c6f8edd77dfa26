"""What a job needs to know of a recipe: is it sound on these nodes, what will run, where does it belong.

    python slurm/job.py RECIPE --nodes 16 --ranks-per-node 8 [--stage NAME]... [--overrides FILE] [key.key=value ...]

prints the plan. With `--keep JOB` (the job script, inside a job) it writes the resolved recipe and the plan into
`<output>/slurm/job-<JOB>/` and prints that folder alone; a job that starts again keeps what is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megakd.cli import check_stage_names
from megakd.config import Recipe, dump, load
from megakd.config_checks import roles_of
from megakd.disk import write_text_atomic
from megakd.errors import ConfigError, MegakdError
from megakd.layout import Layout
from megakd.manifest import MANIFEST
from megakd.planning.nodes import check_nodes

USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status (2: something that the user can mend)."""
    options = parser().parse_intermixed_args(arguments)
    try:
        recipe = load_with(options.recipe, options.overrides, options.settings)
        check_job(recipe, options.stage, options.nodes, options.ranks_per_node)
        plan = describe(recipe, options.stage, options.nodes, options.ranks_per_node)
        if options.keep is None:
            print(plan, end="")
        else:
            print(keep(recipe, plan, options.keep))
    except MegakdError as error:
        print(f"slurm: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("recipe", type=Path)
    top.add_argument("settings", nargs="*", metavar="key.key=value")
    top.add_argument("--overrides", type=Path, metavar="FILE")
    top.add_argument("--stage", action="append", default=[], metavar="NAME")
    top.add_argument("--nodes", type=int, required=True)
    top.add_argument("--ranks-per-node", type=int, required=True)
    top.add_argument("--keep", metavar="JOB")
    return top


def load_with(recipe: Path, overrides: Path | None, settings: Sequence[str]) -> Recipe:
    """A recipe with the settings of a file laid over it, and `settings` over these."""
    return load(recipe, (*(() if overrides is None else read_overrides(overrides)), *settings))


def read_overrides(file: Path) -> tuple[str, ...]:
    """The settings of an override file: one `key.key=value` a line; empty lines and those with # in front are skipped.

    Raises:
        ConfigError: the file is not there, or a line is something else.
    """
    if not file.is_file():
        raise ConfigError("--overrides", str(file), "there is no such file", "Give a file of key.key=value lines")
    settings = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if "=" not in text:
            raise ConfigError("--overrides", f"{file}:{number}: {text}", "is not of the form key.key=value",
                              "Write e.g. teacher.model=/models/teacher")
        settings.append(text)
    return tuple(settings)


def check_job(recipe: Recipe, stages: Sequence[str], nodes: int, ranks_per_node: int) -> None:
    """Checks that some stages of a recipe (all, if none is named) can run on so many ranks.

    Raises:
        ConfigError: there is no such stage; fewer ranks than one copy of a model takes, or a number of them that its
            layout or a stage's batch does not divide.
    """
    check_stage_names(recipe, "--stage", stages)
    wanted = [stage for stage in recipe.stages if not stages or stage.name in stages]
    check_nodes(recipe, wanted, nodes, ranks_per_node)


def describe(recipe: Recipe, stages: Sequence[str], nodes: int, ranks_per_node: int) -> str:
    """The plan of a job: a line for each of its stages, with the layouts of the models that take part."""
    world = nodes * ranks_per_node
    many = f"{nodes} node{'s' if nodes > 1 else ''}"
    lines = [f"{recipe.name}: {many} x {ranks_per_node} = {world} ranks on {recipe.device}, output {recipe.output}"]
    for stage in recipe.stages:
        if stages and stage.name not in stages:
            continue
        layouts = []
        for role in roles_of(stage):
            cut = recipe.role(role).parallel
            layout = Layout(world, cut.tensor, cut.pipeline, cut.context)
            layouts.append(f"{role} TP{layout.tensor} x PP{layout.pipeline} x DP{layout.data}")
        done = "  (done)" if is_done(recipe, stage.name) else ""
        lines.append(f"  {stage.name} ({stage.kind}): {', '.join(layouts)}{done}")
    return "\n".join(lines) + "\n"


def is_done(recipe: Recipe, stage: str) -> bool:
    """Whether a stage has been finished. Whether it is still what the recipe asks for is seen when it runs."""
    return (recipe.output / "stages" / stage / MANIFEST).is_file()


def keep(recipe: Recipe, plan: str, job: str) -> Path:
    """Writes resolved recipe and plan into the job's folder, if they are not there; returns the folder, absolute."""
    folder = recipe.output.absolute() / "slurm" / f"job-{job}"
    if not (folder / "recipe.yaml").exists():
        write_text_atomic(folder / "plan.txt", plan)
        write_text_atomic(folder / "recipe.yaml", dump(recipe))
    return folder


if __name__ == "__main__":
    sys.exit(main())
