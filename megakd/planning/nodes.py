"""How many nodes of a cluster each stage of a recipe gets, and whether it can run there. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megakd.config import Recipe
from megakd.config_checks import check_world, roles_of, trains
from megakd.config_stages import AnyStage
from megakd.errors import ConfigError
from megakd.planning.cluster import Cluster


def by_stage(option: str, text: str, known: Sequence[str]) -> dict[str, str]:
    """The value of each stage that an option names; a value alone is every stage's."""
    if "=" not in text:
        return dict.fromkeys(known, text)
    values: dict[str, str] = {}
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if not equals or not value:
            raise ConfigError(option, item, "is not of the form STAGE=VALUE", f"Write e.g. {known[0]}=...")
        if name not in known:
            raise ConfigError(option, name, "the recipe has no such stage", f"There are: {', '.join(known)}")
        if name in values:
            raise ConfigError(option, text, f"names the stage {name!r} twice", "Name it once")
        values[name] = value
    ordered = sorted(values, key=known.index)
    if list(values) != ordered:
        raise ConfigError(option, ", ".join(values), f"the recipe runs these stages as {', '.join(ordered)}",
                          "Name them in this order")
    return values


def count_of(name: str, text: str) -> int:
    """A number of nodes."""
    if not text.isdigit() or int(text) < 1:
        raise ConfigError("--nodes", f"{name}={text}", "has to be a whole number of at least 1", "Correct it")
    return int(text)


def nodes_of_stages(recipe: Recipe, text: str) -> dict[str, int]:
    """The nodes of each stage from the first that `--nodes` names; one that it does not name has those of the stage
    before.

    Raises:
        ConfigError: a stage that the recipe does not have, or not in this order; a number that is none.
    """
    names = [stage.name for stage in recipe.stages]
    counts = {name: count_of(name, value) for name, value in by_stage("--nodes", text, names).items()}
    nodes: dict[str, int] = {}
    for name in names[names.index(next(iter(counts))):]:
        nodes[name] = counts[name] if name in counts else nodes[list(nodes)[-1]]
    return nodes


def check_nodes(recipe: Recipe, stages: Sequence[AnyStage], nodes: int, ranks_per_node: int) -> None:
    """Checks that stages can run on so many ranks.

    Raises:
        ConfigError: fewer ranks than one copy of a model takes, or a number of them that its layout or a stage's batch
            does not divide.
    """
    world = nodes * ranks_per_node
    for stage in stages:
        for role in roles_of(stage):
            cut = recipe.role(role).cut(trained=trains(stage, role))
            if cut.ranks > world:
                least = -(-cut.ranks // ranks_per_node)
                rule = (f"{nodes} x {ranks_per_node} = {world} ranks are fewer than one copy of the {role} takes in "
                        f"stage {stage.name}: tensor {cut.tensor} x pipeline {cut.pipeline} x context {cut.context}")
                raise ConfigError("--nodes", nodes, rule, f"Give it at least {least} nodes, or lower {role}.parallel")
    check_world(recipe, world, [stage.name for stage in stages])


def fewest_nodes(recipe: Recipe, stage: AnyStage, ranks_per_node: int, most: int, fits: Callable[[int], bool]) -> int:
    """The fewest nodes, a power of two up to `most`, on which a stage can run and `fits` says that it has room; where
    it has on none, the fewest on which it can run.

    Raises:
        ConfigError: it can run on no number of them.
    """
    first: int | None = None
    refusal: ConfigError | None = None
    nodes = 1
    while nodes <= most:
        try:
            check_nodes(recipe, [stage], nodes, ranks_per_node)
        except ConfigError as error:
            refusal = refusal or error
        else:
            first = first or nodes
            if fits(nodes):
                return nodes
        nodes *= 2
    if first is None:
        raise refusal
    return first


def check_device(recipe: Recipe, cluster: Cluster) -> None:
    """Refuses a cluster of another kind of device than the recipe's. Raises ConfigError."""
    if recipe.device != cluster.device_type:
        raise ConfigError("device", recipe.device, f"{cluster.name} has devices of type {cluster.device_type}",
                          f"Write device={cluster.device_type}, or name another cluster")
