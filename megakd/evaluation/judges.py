"""Which of two answers is better: an external program or a reward model says it.

Legend: C comparisons.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megakd.config_evaluation import CommandJudge, RewardModelJudge
from megakd.data.dataset import sample_id
from megakd.data.files import describe_names, read_rows
from megakd.data.readers import Message
from megakd.disk import atomic_writer
from megakd.errors import DataError
from megakd.evaluation.external import run_program
from megakd.evaluation.reward_model import reward_scores

QUESTIONS, VERDICTS, LOG = "comparisons.jsonl", "verdicts.jsonl", "judge.log"
WINS = {"a": 1.0, "tie": 0.5, "b": 0.0}
"""What a verdict is worth to the answer called a."""


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt, each by its model's label."""

    key: str
    prompt: tuple[Message, ...]
    model: str
    answer: str
    against: str
    other: str


def ask_command(judge: CommandJudge, field: str, comparisons_C: Sequence[Comparison], folder: Path) -> list[dict]:
    """Asks an external program.

    It reads `folder/comparisons.jsonl` and writes `folder/verdicts.jsonl`; both names are given to it as its last two
    arguments. The ids that it sees are numbers and tell nothing about the models.

    Returns:
        for each comparison `{"wins": [...]}`: what the answer won in each order (1, 0.5 for a tie, or 0).

    Raises:
        ConfigError: the program failed, or took too long.
        DataError: its file is missing or damaged, or lacks verdicts.
    """
    numbers = range(len(comparisons_C))
    if judge.both_orders:
        asked = [(number, swapped) for swapped in (False, True) for number in numbers]
    else:  # as often in one order as in the other, and a row always in the same
        asked = [(number, sample_id(comparisons_C[number].key) % 2 == 1) for number in numbers]
    questions, verdicts = folder / QUESTIONS, folder / VERDICTS
    with atomic_writer(questions) as stream:
        for place, (number, swapped) in enumerate(asked):
            each = comparisons_C[number]
            first, second = (each.other, each.answer) if swapped else (each.answer, each.other)
            line = {"id": str(place), "prompt": list(each.prompt), "a": first, "b": second}
            stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    verdicts.unlink(missing_ok=True)
    run_program(field, [*judge.command, str(questions), str(verdicts)], folder / LOG, judge.timeout)
    winners = read_verdicts(verdicts, [str(place) for place in range(len(asked))])
    results: list[dict] = [{"wins": []} for _ in comparisons_C]
    for (number, swapped), winner in zip(asked, winners, strict=True):
        results[number]["wins"].append(1.0 - WINS[winner] if swapped else WINS[winner])
    return results


def read_verdicts(path: Path, ids: Sequence[str]) -> list[str]:
    """The winners of the comparisons `ids`, in their order: "a", "b" or "tie".

    Raises:
        DataError: no such file, a line that is no verdict, an id that was not asked or comes twice, missing ids.
    """
    if not path.exists():
        raise DataError(path, None, None, "the judge has not written it", "It gets this name as its last argument")
    wanted, winners = set(ids), {}
    fix = 'Write {"id": the comparison\'s, "winner": "a", "b" or "tie"} for each'
    for place, row in read_rows(path):
        for name in ("id", "winner"):
            if name not in row:
                raise place.error(name, f"missing; the line has {describe_names(row)}", fix)
        if not isinstance(row["id"], str) or row["id"] not in wanted:
            raise place.error("id", f"{row['id']!r} was not asked", fix)
        if row["id"] in winners:
            raise place.error("id", f"{row['id']!r} comes twice", fix)
        if not isinstance(row["winner"], str) or row["winner"] not in WINS:
            raise place.error("winner", f"{row['winner']!r} is none of a, b, tie", fix)
        winners[row["id"]] = row["winner"]
    missing = [name for name in ids if name not in winners]
    if missing:
        problem = f"no verdict on {len(missing)} of {len(ids)} comparisons: {describe_names(missing)}"
        raise DataError(path, None, "id", problem, fix)
    return [winners[name] for name in ids]


def ask_reward_model(judge: RewardModelJudge, comparisons_C: Sequence[Comparison], device: str) -> list[dict]:
    """Asks a reward model: the higher score wins, equal ones tie. An answer that comes again is scored once.

    Returns:
        for each comparison `{"wins": [w], "rewards": [the answer's, the other's]}`.
    """
    texts = list(dict.fromkeys((each.key, text) for each in comparisons_C for text in (each.answer, each.other)))
    prompts = {each.key: each.prompt for each in comparisons_C}
    conversations = [[*prompts[key], Message(role="assistant", content=text)] for key, text in texts]
    rewards = dict(zip(texts, reward_scores(judge.model, conversations, device), strict=True))
    results = []
    for each in comparisons_C:
        own, other = rewards[each.key, each.answer], rewards[each.key, each.other]
        results.append({"wins": [1.0 if own > other else 0.5 if own == other else 0.0], "rewards": [own, other]})
    return results
