"""The smallest change of a layout that makes it fit into the memory of a cluster's devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

from megakd.planning.candidate import Candidate, settings_of
from megakd.planning.search import Limits, Option, Question, Teachers, fits, layouts, own_needs, teacher_needs
from megakd.planning.setup import RoleSetup

MOST_CHANGES = 4
TIMED = 40
"""Layouts with equally many changes that are timed, to find the quickest."""


def smallest_change(question: Question, own: Candidate, stored: Mapping[str, str],
                    limits: Limits) -> Candidate | None:
    """The layout that fits and differs from `own` in the fewest settings; the quickest of several. None where even
    four changes do not help.

    Args:
        question: the stage.
        own: a layout of it that does not fit.
        stored: role -> signal of those that it reads from disk.
        limits: of the layouts that are looked at.
    """
    ladders = {name: _by_changes(question, own, name, role, limits) for name, role in own.roles.items()}
    # A teacher that answers together with the trained model has fewest rows beside it.
    fewest = min((role for rung in ladders["student"].values() for role in rung), key=lambda each: each.layout.copies)
    known: dict[tuple[str, RoleSetup], Option] = {}

    def option(name: str, role: RoleSetup) -> Option:
        if (name, role) not in known:
            known[name, role] = _option(question, own, stored, name, role, fewest)
        return known[name, role]

    for changes in range(1, MOST_CHANGES + 1):
        fitting = []
        for split in _splits(changes, len(ladders)):
            rungs = [ladder.get(count, []) for ladder, count in zip(ladders.values(), split, strict=True)]
            for choice in product(*rungs):
                student, *others = (option(name, role) for name, role in zip(ladders, choice, strict=True))
                beside = Teachers({}, sum(each.kept[0] for each in others),
                                  max((each.phase[0] for each in others), default=0.0))
                if fits(student, beside, own.cluster):
                    fitting.append(dict(zip(ladders, choice, strict=True)))
        # Those that change least within a setting come first: micro-batch 2 rather than 1 in place of 4.
        candidates = [Candidate(own.cluster, question.setup(
            roles["student"], {name: role for name, role in roles.items() if name != "student"}, stored))
            for roles in fitting[:TIMED]]
        # Two models that answer together have their caches at the same time, which their own needs do not say.
        candidates = [each for each in candidates if each.fits]
        if candidates:
            return min(candidates, key=lambda each: each.seconds)
    return None


def changes_between(own: Candidate, other: Candidate, trains: str) -> list[str]:
    """The settings, as a recipe's overrides, that turn one layout into another."""
    changes = []
    for name, role in other.roles.items():
        label = trains if name == "student" else name
        old = settings_of(own.roles[name]) if name in own.roles else {}
        changes += [f"{label}.{setting}={_yaml(value)}" for setting, value in settings_of(role).items()
                    if setting not in old or old[setting] != value]
    return changes


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _by_changes(question: Question, own: Candidate, name: str, role: RoleSetup,
                limits: Limits) -> dict[int, list[RoleSetup]]:
    """A role's layouts by the number of settings in which they differ from its own, nearer values first."""
    rungs: dict[int, list[RoleSetup]] = {0: [role]}
    old = settings_of(role)
    for other in layouts(question, own.cluster, limits, question.trains if name == "student" else name):
        new = settings_of(other)
        changed = [setting for setting in new if new[setting] != old[setting] and setting != "parallel.pad_heads"]
        if changed:
            rungs.setdefault(len(changed), []).append(other)
    for rung in rungs.values():
        rung.sort(key=lambda each: _distance(settings_of(each), old))
    return rungs


def _distance(new: Mapping[str, object], old: Mapping[str, object]) -> float:
    """By what factor sizes differ; a step that is no size counts as one of two."""
    total = 0.0
    for setting, value in new.items():
        before = old[setting]
        if value == before:
            continue
        sizes = isinstance(value, int) and not isinstance(value, bool)
        total += max(value / before, before / value) if sizes else 2.0
    return total


def _splits(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to share `total` changes out over some roles."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in _splits(total - first, parts - 1):
            yield (first, *rest)


def _option(question: Question, own: Candidate, stored: Mapping[str, str], name: str, role: RoleSetup,
            fewest: RoleSetup) -> Option:
    """What one role needs in a layout, whatever the others': as `search.Option`; a teacher at the least, beside the
    trained model's layout `fewest`."""
    trained = role if name == "student" else fewest
    teachers = dict(own.setup.teachers) | ({} if name == "student" else {name: role})
    setup = question.setup(trained, teachers, stored)
    if name != "student":
        kept, phase = teacher_needs(setup, name)
        return Option(role, (kept,), (phase,), 0.0)
    return Option(role, *own_needs(setup), 0.0)
