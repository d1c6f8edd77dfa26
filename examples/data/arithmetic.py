"""Seeded generator of arithmetic word problems as preference pairs.

Every row holds a word problem, a short worked solution that is right (``chosen``) and one of the same style with
exactly one wrong step (``rejected``). In the rejected text the sums themselves are computed correctly: what is wrong is
the plan, such as a forgotten item or a wrong unit factor.

Run it as a program::

    python examples/data/arithmetic.py --count 200 --seed 0 --split train --output arithmetic.jsonl

The kinds of problem, and how they are written down, are in arithmetic_kinds.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from arithmetic_kinds import KINDS, Kind

SPLITS = ("train", "eval")
# One problem in five belongs to the eval split.
EVAL_SHARE = 5
# Draws per row before the generator gives up. Only a count near the size of the problem space comes close to it.
MAX_DRAWS = 20_000

NAMES = (
    "Aisha", "Bruno", "Chen", "Dalia", "Emre", "Freya", "Goran", "Hanna", "Ines", "Jonas", "Kofi", "Leila",
    "Marek", "Nadia", "Oskar", "Priya", "Quentin", "Rosa", "Sami", "Tomas", "Uma", "Viktor", "Wanda", "Yara",
)  # fmt: skip
# A prompt may tell the number a as {a_part}, the a-th part of something.
PARTS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 6: "a sixth"}
# Escapes, since the signs are easily taken for an x and a colon in source code.
SIGNS = {"+": "+", "-": "-", "*": "\u00d7", "/": "\u00f7"}

_PART_PATTERN = re.compile(r"\b(" + "|".join(PARTS.values()) + r")\b", re.IGNORECASE)
_ANSWER_PATTERN = re.compile(r"The answer is (\d+)\.$")

Numbers = dict[str, int]
Words = dict[str, str]


# ----- drawing and solving ------------------------------------------------------------------------


def _pick(rng: random.Random, options: Sequence[Any]) -> Any:
    # Python promises the same sequence across versions for random() only, not for randint() or choice().
    return options[int(rng.random() * len(options))]


def _sum(expression: str, values: Numbers) -> tuple[str, Fraction]:
    """Write a plan's sum out and compute it, from left to right."""
    tokens = [str(values[token]) if token in values else token for token in expression.split()]
    if tokens[1] in ("//", "%"):
        left, right = int(tokens[0]), int(tokens[2])
        most, rest = left - left % right, left % right
        fits = f"{right} {SIGNS['*']} {most // right} = {most}"
        if tokens[1] == "//":
            return f"{fits} is the most that fits into {left}", Fraction(most, right)
        return f"{fits} fits into {left} and leaves {left} - {most} = {rest}", Fraction(rest)
    result = Fraction(tokens[0])
    for operator, number in zip(tokens[1::2], map(int, tokens[2::2]), strict=True):
        if operator == "+":
            result += number
        elif operator == "-":
            result -= number
        elif operator == "*":
            result *= number
        else:
            result /= number
    return f"{' '.join(SIGNS.get(token, token) for token in tokens)} = {result}", result


def solve(plan: str, numbers: Numbers, words: Words) -> tuple[str, int] | None:
    """Carry out a plan.

    Args:
        plan: The plan, as arithmetic_kinds.py explains.
        numbers: The problem's numbers by name.
        words: The problem's words by name.

    Returns:
        The plan's text and its answer; None where the numbers do not suit the plan.
    """
    values = dict(numbers)
    # Text and sums in turn.
    parts = re.split(r"\[(.+?)\]", " ".join(plan.split()))
    answer = 0
    for index in range(1, len(parts), 2):
        name, _, expression = parts[index].rpartition(" = ")
        parts[index], result = _sum(expression, values)
        if result.denominator != 1 or result <= 0:
            return None
        answer = int(result)
        if name:
            values[name] = answer
    return "".join(parts).format(**values, **words), answer


def draw(kind: Kind, rng: random.Random) -> tuple[Numbers, Words]:
    """Draw a problem's numbers and words.

    Args:
        kind: The kind of problem.
        rng: The source of random numbers.

    Returns:
        The numbers and the words by name. The numbers need not suit the kind yet.
    """
    numbers = {name: _pick(rng, options) for name, options in kind.numbers.items()}
    name = _pick(rng, NAMES)
    other = _pick(rng, [someone for someone in NAMES if someone != name])
    things = _pick(rng, kind.things).split(" / ")
    return numbers, {"name": name, "other": other, **dict(zip("xy", things, strict=False))}


# ----- rows ---------------------------------------------------------------------------------------


def fold(text: str) -> str:
    """Return ``text`` in lower case with every run of white space as one space, for comparing prompts."""
    return " ".join(text.casefold().split())


def split_of(kind: str, numbers: Numbers) -> str:
    """Return the split, "train" or "eval", a problem belongs to.

    The kind and the numbers decide, not the wording: a problem told in other words or about other people stays in
    its split.

    Args:
        kind: A key of ``KINDS``.
        numbers: The problem's numbers by name.

    Returns:
        One of ``SPLITS``.
    """
    key = json.dumps([kind, sorted(numbers.items())])
    digest = hashlib.sha256(key.encode()).digest()
    return "eval" if int.from_bytes(digest[:8], "big") % EVAL_SHARE == 0 else "train"


def final_number(text: str) -> int:
    """Return the number N from the closing words "The answer is N." of a response.

    Args:
        text: A chosen or rejected response.

    Returns:
        The whole number at its end.

    Raises:
        ValueError: If the response does not end that way.
    """
    match = _ANSWER_PATTERN.search(text)
    if match is None:
        raise ValueError(f'response={text!r}: must end with "The answer is N.", where N is a whole number')
    return int(match.group(1))


def _told_numbers(prompt: str) -> Counter[int]:
    words = {word: str(value) for value, word in PARTS.items()}
    prompt = _PART_PATTERN.sub(lambda match: words[match.group(1).casefold()], prompt)
    return Counter(int(digits) for digits in re.findall(r"\d+", prompt))


def verify(row: dict[str, Any]) -> int:
    """Check one row: the prompt tells exactly its numbers, chosen ends on the right answer and rejected does not.

    Args:
        row: A row as ``generate`` gives it.

    Returns:
        The right answer, computed from ``row["kind"]`` and ``row["numbers"]`` alone.

    Raises:
        ValueError: If the row is wrong in one of these ways.
    """
    kind, numbers = row["kind"], row["numbers"]
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
    if numbers.keys() != KINDS[kind].numbers.keys():
        raise ValueError(f"numbers={numbers}: must have exactly the names {', '.join(KINDS[kind].numbers)}")
    if _told_numbers(row["prompt"]) != Counter(numbers.values()):
        raise ValueError(f"prompt={row['prompt']!r}: must tell exactly the numbers {sorted(numbers.values())}")
    right = KINDS[kind].answer(**numbers)
    if right != int(right) or right < 0:
        raise ValueError(f"numbers={numbers}: kind {kind!r} must have a whole answer of at least 0, got {right}")
    chosen, rejected = final_number(row["chosen"]), final_number(row["rejected"])
    if chosen != right:
        raise ValueError(f"chosen={row['chosen']!r}: must end on the right answer {right}")
    if rejected == right:
        raise ValueError(f"rejected={row['rejected']!r}: must not end on the right answer {right}")
    return int(right)


def _upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


def _write(text: str, answer: int, style: int) -> str:
    first, second = text.split("; ")
    if style == 0:
        body = f"{_upper_first(first)}. {_upper_first(second)}."
    elif style == 1:
        body = f"First, {first}. Then, {second}."
    else:
        body = f"{_upper_first(first)}; {second}."
    return f"{body} The answer is {answer}."


def _draw_row(rng: random.Random, name: str) -> dict[str, Any] | None:
    """Draw one problem of a kind; None where the numbers do not suit it."""
    kind = KINDS[name]
    numbers, words = draw(kind, rng)
    prompt, style = _pick(rng, kind.prompts), _pick(rng, range(3))
    right = solve(kind.right, numbers, words) if kind.suits(**numbers) else None
    if right is None:
        return None
    wrong = [solution for slip in kind.slips if (solution := solve(slip, numbers, words)) and solution[1] != right[1]]
    if not wrong:
        return None
    parts = {f"{number}_part": PARTS[value] for number, value in numbers.items() if value in PARTS}
    return {
        "category": "arithmetic",
        "kind": name,
        "numbers": numbers,
        "prompt": _upper_first(prompt.format(**numbers, **words, **parts)),
        "chosen": _write(*right, style),
        "rejected": _write(*_pick(rng, wrong), style),
    }


def _check_arguments(count: int, seed: int, split: str) -> None:
    for name, value, low in (("count", count, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name}={value!r}: must be a whole number of at least {low}")
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: must be one of {', '.join(SPLITS)}")


def generate(count: int, seed: int = 0, split: str = "train") -> list[dict[str, Any]]:
    """Generate verified rows; the kinds take turns, and no prompt occurs twice.

    The same arguments give the same rows everywhere, and a smaller count gives the beginning of a larger one.

    Args:
        count: Number of rows, at least 1.
        seed: Seed of the random numbers, at least 0.
        split: "train" or "eval". No problem of one split, whatever the seed, occurs in the other.

    Returns:
        Rows with the fields id, category, kind, numbers, prompt, chosen and rejected.

    Raises:
        ValueError: If an argument is out of range, a row fails ``verify``, or no new problems are left.
    """
    _check_arguments(count, seed, split)
    rng = random.Random(seed)
    names = list(KINDS)
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        name = names[len(rows) % len(names)]
        for _ in range(MAX_DRAWS):
            row = _draw_row(rng, name)
            if row is None or split_of(name, row["numbers"]) != split or fold(row["prompt"]) in seen:
                continue
            break
        else:
            raise ValueError(
                f"count={count}: must be smaller; no new {name!r} problem was found after {len(rows)} rows"
            )
        row = {"id": f"arith-{split}-{seed}-{len(rows) + 1:05d}", **row}
        verify(row)
        seen.add(fold(row["prompt"]))
        rows.append(row)
    return rows


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as UTF-8 JSON Lines.

    Args:
        rows: The rows to write.
        path: The file to write; its folder must exist.

    Raises:
        ValueError: If the folder does not exist.
    """
    if not path.parent.is_dir():
        raise ValueError(f"output={str(path)!r}: its folder must exist")
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line program.

    Args:
        argv: Arguments without the program name; those of the process if None.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description="Generate arithmetic word problems as preference pairs.")
    parser.add_argument("--count", type=int, required=True, help="number of rows, at least 1")
    parser.add_argument("--seed", type=int, default=0, help="seed, at least 0 (default 0)")
    parser.add_argument("--split", default="train", help="train or eval (default train)")
    parser.add_argument("--output", type=Path, required=True, help="JSON Lines file to write")
    options = parser.parse_args(argv)
    try:
        rows = generate(options.count, options.seed, options.split)
        write_rows(rows, options.output)
    except ValueError as error:
        parser.error(str(error))
    print(f"wrote {len(rows)} {options.split} rows to {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
