"""A teacher's scores of rollouts on disk: JSON lines, a header first; the file gets its name only when complete."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megakd.data.files import Place, read_rows
from megakd.disk import atomic_writer
from megakd.errors import DataError
from megakd.manifest import hash_path

FORMAT = "megakd scores 1"


@dataclass(frozen=True)
class Score:
    """What a teacher thinks of one rollout; numbers are None where it could not be scored."""

    key: str
    index: int
    """Which response to the row's prompt."""
    score: float | None
    """What the student is taught."""
    likelihood: float | None
    """Mean log-likelihood a token under the teacher."""
    selection: float | None
    """Log of the probability that the teacher selects it out of two; None where it was not asked."""


@dataclass(frozen=True)
class ScoresHeader:
    """Where scores come from."""

    teacher: str
    """Hash of the teacher's weights."""
    rollouts: str
    """Hash of the rollouts' file."""
    settings: dict[str, Any]
    """The stage's."""


def write_scores(path: str | Path, header: ScoresHeader, scores: Sequence[Score]) -> None:
    """Writes scores, one a line; the file is there whole or not at all."""
    with atomic_writer(path) as stream:
        for row in ({"format": FORMAT, **asdict(header), "scores": len(scores)}, *map(asdict, scores)):
            stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def read_scores(path: str | Path, rollouts: str | Path) -> dict[tuple[str, int], float | None]:
    """The scores by row key and index.

    Args:
        path: what `write_scores` wrote.
        rollouts: the rollouts' file that they have to belong to.

    Raises:
        DataError: not such a file, scores of other rollouts, a cut file, a damaged row.
    """
    lines = read_rows(Path(path))
    place, first = next(lines)
    names = [field.name for field in fields(ScoresHeader)]
    if "format" not in first or first["format"] != FORMAT or any(name not in first for name in (*names, "scores")):
        raise place.error(None, f"not the header of a scores file ({FORMAT!r})", "Give a file that `score` wrote")
    if first["rollouts"] != hash_path(Path(rollouts)):
        raise place.error("rollouts", f"these are scores of other rollouts than {rollouts}", "Score them again")
    found: dict[tuple[str, int], float | None] = {}
    for place, row in lines:
        name, score = _checked(place, row)
        found[name] = score
    if len(found) != first["scores"]:
        raise DataError(Path(path), None, None, f"{len(found)} scores, but the header says {first['scores']}: the file "
                        "is cut or damaged", "Score again")
    return found


def _checked(place: Place, row: dict[str, Any]) -> tuple[tuple[str, int], float | None]:
    """Key, index and score of a row, checked field by field."""
    for field in fields(Score):
        if field.name not in row:
            raise place.error(field.name, "missing", "Score again")
    if not isinstance(row["key"], str) or type(row["index"]) is not int:
        raise place.error("key", "no row's key and a number", "Score again")
    score = row["score"]
    if score is not None and (type(score) not in (int, float) or not math.isfinite(score)):
        raise place.error("score", f"{score!r} is not a finite number", "Score again")
    return (row["key"], row["index"]), score
