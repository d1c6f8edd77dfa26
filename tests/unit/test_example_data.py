"""Checks of the example preference data and of the arithmetic generator in examples/data."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
sys.path.insert(0, str(DATA))

import arithmetic  # noqa: E402

CATEGORIES = ("helpful", "correct", "harmless", "format")
FILES = {"instructions.jsonl": ("inst", 50), "instructions.eval.jsonl": ("eval", 12)}
MAX_WORDS = 90

Row = dict[str, Any]


def _read(name: str) -> list[Row]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


ROWS = {name: _read(name) for name in FILES}
ALL_ROWS = [row for rows in ROWS.values() for row in rows]
FORMAT_ROWS = [row for row in ALL_ROWS if row["category"] == "format"]


def _words(text: str) -> int:
    return len(text.split())


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())


def _prompt_text(row: Row) -> str:
    return _fold(" ".join(message["content"] for message in row["prompt"]))


# ----- instructions -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_counts_and_ids(name: str) -> None:
    prefix, per_category = FILES[name]
    rows = ROWS[name]
    assert Counter(row["category"] for row in rows) == dict.fromkeys(CATEGORIES, per_category)
    assert [row["id"] for row in rows] == [f"{prefix}-{number:03d}" for number in range(1, len(rows) + 1)]


@pytest.mark.parametrize("row", ALL_ROWS, ids=lambda row: row["id"])
def test_fields(row: Row) -> None:
    fields = ["id", "category", "prompt", "chosen", "rejected"]
    if row["category"] == "format":
        fields.append("check")
    assert list(row) == fields
    roles = [message["role"] for message in row["prompt"]]
    assert roles in (["user"], ["user", "assistant", "user"])
    texts = [message["content"] for message in row["prompt"]] + [row["chosen"], row["rejected"]]
    for text in texts:
        assert text and text == text.strip()
        assert "  " not in text
    assert all(set(message) == {"role", "content"} for message in row["prompt"])
    assert _fold(row["chosen"]) != _fold(row["rejected"])
    assert _words(row["chosen"]) <= MAX_WORDS
    assert _words(row["rejected"]) <= MAX_WORDS


def test_some_rows_have_several_turns() -> None:
    assert sum(len(row["prompt"]) == 3 for row in ROWS["instructions.jsonl"]) == 10
    assert sum(len(row["prompt"]) == 3 for row in ROWS["instructions.eval.jsonl"]) == 4


def test_texts_are_unique() -> None:
    for texts in (
        [_prompt_text(row) for row in ALL_ROWS],
        [_fold(row["prompt"][-1]["content"]) for row in ALL_ROWS],
        # One-word format answers such as "yes" may come twice; a longer answer may not.
        [_fold(row["chosen"]) for row in ALL_ROWS if _words(row["chosen"]) > 3],
        [_fold(row["rejected"]) for row in ALL_ROWS],
    ):
        assert [text for text, count in Counter(texts).items() if count > 1] == []


def test_eval_prompts_do_not_paraphrase_train_prompts() -> None:
    def bag(row: Row) -> set[str]:
        return set(re.findall(r"[a-z]+", _prompt_text(row)))

    train = [(row["id"], bag(row)) for row in ROWS["instructions.jsonl"]]
    for row in ROWS["instructions.eval.jsonl"]:
        mine = bag(row)
        close = [name for name, other in train if len(mine & other) / len(mine | other) > 0.45]
        assert close == [], row["id"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("category", (None, *CATEGORIES))
def test_length_does_not_tell_which_is_better(name: str, category: str | None) -> None:
    rows = [row for row in ROWS[name] if category in (None, row["category"])]
    longer = sum(_words(row["chosen"]) > _words(row["rejected"]) for row in rows)
    assert 0.35 <= longer / len(rows) <= 0.7


# ----- format rules -------------------------------------------------------------------------------


def _sentences(text: str) -> int:
    return len(re.findall(r"[.!?]+(?=\s|$)", text)) + (re.search(r"[.!?]$", text) is None)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _begin(lines: list[str], starts: list[str]) -> bool:
    return len(lines) == len(starts) and all(
        line.startswith(f"{start} ") and len(line) > len(start) + 1 for line, start in zip(lines, starts, strict=True)
    )


def _acrostic(lines: list[str], value: str) -> bool:
    return len(lines) == len(value) and all(line[0] == letter for line, letter in zip(lines, value, strict=True))


def _upper(text: str) -> bool:
    return text == text.upper() and text != text.lower()


RULES = {
    "words": lambda text, rule: rule["min"] <= _words(text) <= rule["max"],
    "sentences": lambda text, rule: _sentences(text) == rule["count"],
    "lines": lambda text, rule: len(text.split("\n")) == rule["count"],
    "sorted_lines": lambda text, rule: (
        len(text.split("\n")) == rule["count"] and text.split("\n") == sorted(text.split("\n"))
    ),
    "bullets": lambda text, rule: _begin(text.split("\n"), [rule["marker"]] * rule["count"]),
    "numbered": lambda text, rule: _begin(text.split("\n"), [f"{i + 1}." for i in range(rule["count"])]),
    "json": lambda text, rule: isinstance(_parsed(text), dict) and list(_parsed(text)) == rule["keys"],
    "json_array": lambda text, rule: isinstance(_parsed(text), list) and len(_parsed(text)) == rule["count"],
    "without": lambda text, rule: rule["letter"] not in text.casefold(),
    "word_count": lambda text, rule: re.findall(r"\w+", text.casefold()).count(rule["value"]) == rule["count"],
    "upper": lambda text, rule: _upper(text),
    "lower": lambda text, rule: text == text.lower(),
    "starts": lambda text, rule: text.startswith(rule["value"]),
    "ends": lambda text, rule: text.removesuffix(".").endswith(rule["value"]),
    "acrostic": lambda text, rule: _acrostic(text.split("\n"), rule["value"]),
    "regex": lambda text, rule: re.fullmatch(rule["pattern"], text) is not None,
}


@pytest.mark.parametrize("row", FORMAT_ROWS, ids=lambda row: row["id"])
def test_chosen_follows_the_format_and_rejected_does_not(row: Row) -> None:
    rule = row["check"]
    follows = RULES[rule["kind"]]
    assert follows(row["chosen"], rule)
    assert not follows(row["rejected"], rule)


def test_every_rule_is_used() -> None:
    assert {row["check"]["kind"] for row in FORMAT_ROWS} == set(RULES)


# ----- arithmetic ---------------------------------------------------------------------------------

SEEDS = (0, 1, 7, 2024)
EQUATION = re.compile(r"\d+(?: [-+\u00d7\u00f7] \d+)+ = \d+")
PINNED = {
    "id": "arith-train-0-00001",
    "category": "arithmetic",
    "kind": "change",
    "numbers": {"a": 7, "p": 8, "b": 4, "q": 4, "note": 100},
    "prompt": (
        "A customer pays with 100 euros for 7 candles (8 euros apiece) and 4 vases (4 euros apiece). How much change "
        "should the till give, in euros?"
    ),
    "chosen": (
        "First, the candles cost 7 \u00d7 8 = 56 euros and the vases 4 \u00d7 4 = 16 euros. Then, 100 - 56 - 16 = "
        "28 euros remain. The answer is 28."
    ),
    "rejected": (
        "First, the candles cost 7 \u00d7 4 = 28 euros and the vases 4 \u00d7 8 = 32 euros. Then, 100 - 28 - 32 = "
        "40 euros remain. The answer is 40."
    ),
}


def _evaluate(terms: str) -> Fraction:
    first, *rest = terms.split()
    total, product, sign = Fraction(0), Fraction(first), 1
    for operator, number in zip(rest[::2], rest[1::2], strict=True):
        if operator == "\u00d7":
            product *= int(number)
        elif operator == "\u00f7":
            product /= int(number)
        else:
            total += sign * product
            product, sign = Fraction(number), 1 if operator == "+" else -1
    return total + sign * product


def _solve(kind: str, n: dict[str, int]) -> Fraction:
    """Answer a problem with formulas written apart from those of the generator, mostly by counting."""
    if kind == "change":
        return Fraction(n["note"]) - n["a"] * n["p"] - n["b"] * n["q"]
    if kind == "trip":
        return Fraction(n["stop"]) + Fraction(60 * n["distance"], n["speed"])
    if kind == "share":
        return Fraction(max(k for k in range(n["total"] + 1) if k * (n["friends"] + 1) <= n["total"]))
    if kind == "packing":
        good = n["total"] - n["bad"]
        return Fraction(min(good - k * n["size"] for k in range(good) if k * n["size"] <= good))
    if kind == "fractions":
        rest = Fraction(n["total"]) - Fraction(n["total"], n["a"])
        return rest - rest / n["b"]
    if kind == "ages":
        return Fraction(sum([n["young"]] * n["factor"]) + n["years"])
    if kind == "area":
        inside = range(n["side"])
        return Fraction(sum(not (x in inside and y in inside) for x in range(n["length"]) for y in range(n["width"])))
    if kind == "crew":
        return 1 / (Fraction(n["hands"]) * Fraction(1, n["crew"] * n["days"]))
    if kind == "lessons":
        return Fraction(sum(n["length"] + (n["pause"] if i else 0) for i in range(n["lessons"])))
    if kind == "discount":
        return Fraction(n["price"] * (100 - n["percent"]), 100) - n["voucher"]
    if kind == "mean":
        scores = [n["first"], n["second"], n["third"]]
        return next(Fraction(x) for x in range(101) if Fraction(sum(scores) + x, n["count"]) == n["mean"])
    if kind == "tank":
        level, minutes = n["start"], 0
        while level < n["capacity"]:
            level, minutes = level + n["fill"] - n["leak"], minutes + 1
        assert level == n["capacity"]
        return Fraction(minutes)
    raise AssertionError(kind)


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("seed", SEEDS)
def test_arithmetic_rows(seed: int, split: str) -> None:
    rows = arithmetic.generate(500, seed, split)
    assert len(rows) == len({row["id"] for row in rows}) == len({_fold(row["prompt"]) for row in rows}) == 500
    for row in rows:
        assert list(row) == ["id", "category", "kind", "numbers", "prompt", "chosen", "rejected"]
        assert row["category"] == "arithmetic"
        right = _solve(row["kind"], row["numbers"])
        assert arithmetic.verify(row) == right
        assert re.search(r"The answer is (\d+)\.$", row["chosen"])[1] == str(right)
        wrong = re.search(r"The answer is (\d+)\.$", row["rejected"])[1]
        assert wrong != str(right)
        assert int(wrong) > 0
        for text in (row["chosen"], row["rejected"]):
            assert _words(text) <= MAX_WORDS
            assert 1 <= _sentences(text) <= 3
            for equation in EQUATION.findall(text):
                terms, result = equation.split(" = ")
                assert _evaluate(terms) == int(result), text


def test_arithmetic_kinds_and_wordings() -> None:
    rows = arithmetic.generate(2400, 3, "train")
    counts = Counter(row["kind"] for row in rows)
    assert len(counts) == 12 and set(counts.values()) == {200}
    assert all(len(kind.prompts) >= 4 and len(kind.slips) >= 3 for kind in arithmetic.KINDS.values())
    longer = Counter()
    for row in rows:
        longer[
            (_words(row["chosen"]) > _words(row["rejected"])) - (_words(row["chosen"]) < _words(row["rejected"]))
        ] += 1
    # Many pairs are equally long; neither side may be the longer one much more often than the other.
    assert abs(longer[1] - longer[-1]) / len(rows) < 0.15


def test_every_slip_can_be_drawn() -> None:
    """A slip that is never both whole and wrong would be dead text."""
    for name, kind in arithmetic.KINDS.items():
        used = Counter()
        rng = random.Random(0)
        for _ in range(3000):
            numbers, words = arithmetic.draw(kind, rng)
            right = arithmetic.solve(kind.right, numbers, words) if kind.suits(**numbers) else None
            if right is None:
                continue
            assert right[1] == _solve(name, numbers)
            for slip in kind.slips:
                solution = arithmetic.solve(slip, numbers, words)
                used[slip] += solution is not None and solution[1] != right[1]
        assert all(used[slip] > 0 for slip in kind.slips), (name, used)


def test_every_prompt_tells_its_numbers_once_and_every_plan_has_two_clauses() -> None:
    for name, kind in arithmetic.KINDS.items():
        for prompt in kind.prompts:
            told = [field.removesuffix("_part") for field in re.findall(r"\{(\w+)\}", prompt)]
            assert [told.count(number) for number in kind.numbers] == [1] * len(kind.numbers), (name, prompt)
            assert re.search(r"\d", prompt) is None
        for plan in (kind.right, *kind.slips):
            assert " ".join(plan.split()).count("; ") == 1, (name, plan)
        assert len(set(kind.slips)) == len(kind.slips) and kind.right not in kind.slips


@pytest.mark.parametrize(
    ("plan", "solution"),
    [
        ("{name} has [s = a + b - 2]; [s * a]", ("Uma has 7 + 3 - 2 = 8; 8 \u00d7 7 = 56", 56)),
        ("[a * 6 / b] {x}", ("7 \u00d7 6 \u00f7 3 = 14 eggs", 14)),
        ("[a // b]", ("3 \u00d7 2 = 6 is the most that fits into 7", 2)),
        ("[a % b]", ("3 \u00d7 2 = 6 fits into 7 and leaves 7 - 6 = 1", 1)),
        ("[s = a - b] and {s}", ("7 - 3 = 4 and 4", 4)),
        ("[a / b]", None),
        ("[s = b - a]; [s + a]", None),
        ("[a - 7]", None),
    ],
)
def test_plans_are_carried_out(plan: str, solution: tuple[str, int] | None) -> None:
    assert arithmetic.solve(plan, {"a": 7, "b": 3}, {"name": "Uma", "x": "eggs"}) == solution


def test_arithmetic_is_determined_by_its_arguments() -> None:
    first = arithmetic.generate(60, 5, "train")
    assert arithmetic.generate(60, 5, "train") == first
    assert arithmetic.generate(100, 5, "train")[:60] == first
    assert [row["prompt"] for row in arithmetic.generate(60, 6, "train")] != [row["prompt"] for row in first]


def test_arithmetic_rows_are_the_same_on_every_machine() -> None:
    """Pin one row, so that a change of the generator or of Python's random numbers shows."""
    row = arithmetic.generate(1, 0, "train")[0]
    assert row == PINNED


def test_arithmetic_splits_share_no_problem() -> None:
    def problems(split: str) -> set[str]:
        return {
            json.dumps([row["kind"], row["numbers"]]) for seed in SEEDS for row in arithmetic.generate(500, seed, split)
        }

    assert problems("train").isdisjoint(problems("eval"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, "train"), "count=0: must be a whole number of at least 1"),
        ((True, 0, "train"), "count=True: must be"),
        ((1.5, 0, "train"), "count=1.5: must be"),
        ((1, -1, "train"), "seed=-1: must be a whole number of at least 0"),
        ((1, 0, "test"), "split='test': must be one of train, eval"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        arithmetic.generate(*arguments)


def test_generator_says_when_no_problem_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "MAX_DRAWS", 0)
    with pytest.raises(ValueError, match=r"count=5: must be smaller; no new 'change' problem"):
        arithmetic.generate(5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("chosen", "The answer is 1000000.", "must end on the right answer"),
        ("chosen", "It is 3.", "must end with"),
        ("kind", "riddle", "kind='riddle': must be one of"),
        ("prompt", "How much is 1 and 1?", "must tell exactly the numbers"),
        ("numbers", {"a": 1, "b": 1}, "must have exactly the names a, p, b, q, note"),
    ],
)
def test_verify_finds_broken_rows(field: str, value: Any, message: str) -> None:
    row = arithmetic.generate(1, 0, "train")[0]
    with pytest.raises(ValueError, match=message):
        arithmetic.verify({**row, field: value})


def test_verify_finds_a_right_rejected_answer() -> None:
    row = arithmetic.generate(1, 0, "train")[0]
    with pytest.raises(ValueError, match="must not end on the right answer"):
        arithmetic.verify({**row, "rejected": row["chosen"]})


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.jsonl"
    assert arithmetic.main(["--count", "20", "--seed", "4", "--split", "eval", "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert rows == arithmetic.generate(20, 4, "eval")
    assert "wrote 20 eval rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--count", "0", "--output", "rows.jsonl"], "count=0"),
        (["--count", "1", "--output", "no/rows.jsonl"], "output="),
    ],
)
def test_command_line_errors(
    extra: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        arithmetic.main(extra)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
