"""Seeded generator of arithmetic word problems as preference pairs.

Every row holds a word problem, a short worked solution that is right (``chosen``) and one of the same style with
exactly one wrong step (``rejected``). In the rejected text the sums themselves are computed correctly: what is wrong is
the plan, such as a forgotten item or a wrong unit factor.

Run it as a program::

    python examples/data/arithmetic.py --count 200 --seed 0 --split train --output arithmetic.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

SPLITS = ("train", "eval")
# One problem in five belongs to the eval split.
EVAL_SHARE = 5
# Draws per row before the generator gives up. Only a count near the size of the problem space comes close to it.
MAX_DRAWS = 2000

NAMES = (
    "Aisha", "Bruno", "Chen", "Dalia", "Emre", "Freya", "Goran", "Hanna", "Ines", "Jonas", "Kofi", "Leila",
    "Marek", "Nadia", "Oskar", "Priya", "Quentin", "Rosa", "Sami", "Tomas", "Uma", "Viktor", "Wanda", "Yara",
)  # fmt: skip
FRACTION_WORDS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 6: "a sixth"}
_FRACTION_PATTERN = re.compile(r"\b(" + "|".join(FRACTION_WORDS.values()) + r")\b", re.IGNORECASE)
_ANSWER_PATTERN = re.compile(r"The answer is (\d+)\.$")

Numbers = dict[str, int]
Words = dict[str, str]


@dataclass(frozen=True)
class Solution:
    """Clauses of a worked solution (one or two, without the final full stop) and the number they arrive at."""

    clauses: tuple[str, ...]
    value: int


@dataclass(frozen=True)
class Kind:
    """One problem kind: how its numbers and words are drawn, how it is told, solved, and wrongly solved.

    A slip returns None where its wrong step would not give a whole number for the numbers drawn.
    """

    draw: Callable[[random.Random], Numbers]
    words: Callable[[random.Random], Words]
    prompts: tuple[str, ...]
    right: Callable[[Numbers, Words], Solution]
    slips: tuple[Callable[[Numbers, Words], Solution | None], ...]


# ----- drawing and writing ------------------------------------------------------------------------


def _between(rng: random.Random, low: int, high: int) -> int:
    # Python promises the same sequence across versions for random() only, not for randint() or choice().
    return low + int(rng.random() * (high - low + 1))


def _pick(rng: random.Random, options: Sequence[Any]) -> Any:
    return options[_between(rng, 0, len(options) - 1)]


# Escapes, since the signs are easily taken for an x and a colon in source code.
TIMES, OVER = "\u00d7", "\u00f7"


def _plus(*terms: int) -> str:
    return f"{' + '.join(map(str, terms))} = {sum(terms)}"


def _minus(first: int, *terms: int) -> str:
    return f"{' - '.join(map(str, (first, *terms)))} = {first - sum(terms)}"


def _times(left: int, right: int) -> str:
    return f"{left} {TIMES} {right} = {left * right}"


def _over(left: int, right: int) -> str:
    return f"{left} {OVER} {right} = {left // right}"


def _times_over(left: int, middle: int, right: int) -> str:
    return f"{left} {TIMES} {middle} {OVER} {right} = {left * middle // right}"


def _name_and(rng: random.Random, **pools: Sequence[str]) -> Words:
    return {"name": _pick(rng, NAMES), **{key: _pick(rng, pool) for key, pool in pools.items()}}


# ----- shopping with change -----------------------------------------------------------------------


def _draw_change(rng: random.Random) -> Numbers:
    a, b = _between(rng, 2, 7), _between(rng, 2, 7)
    p, q = _between(rng, 2, 9), _between(rng, 2, 9)
    cost = a * p + b * q
    note = next(n for n in (20, 50, 100, 200) if n > cost)
    return {"a": a, "p": p, "b": b, "q": q, "note": note}


def _words_change(rng: random.Random) -> Words:
    pairs = (
        ("notebooks", "markers"), ("sandwiches", "salads"), ("candles", "vases"), ("tomato plants", "bags of soil"),
        ("comics", "puzzles"), ("bus passes", "maps"), ("jars of honey", "loaves of bread"), ("scarves", "hats"),
    )  # fmt: skip
    x, y = _pick(rng, pairs)
    return {"name": _pick(rng, NAMES), "x": x, "y": y}


def _right_change(n: Numbers, w: Words) -> Solution:
    first, second = n["a"] * n["p"], n["b"] * n["q"]
    return Solution(
        (
            f"the {w['x']} cost {_times(n['a'], n['p'])} euros and the {w['y']} {_times(n['b'], n['q'])} euros",
            f"{_minus(n['note'], first, second)} euros remain",
        ),
        n["note"] - first - second,
    )


def _slip_change_forgets_second(n: Numbers, w: Words) -> Solution:
    first = n["a"] * n["p"]
    return Solution(
        (f"the {w['x']} cost {_times(n['a'], n['p'])} euros", f"{_minus(n['note'], first)} euros remain"),
        n["note"] - first,
    )


def _slip_change_single_second(n: Numbers, w: Words) -> Solution:
    first = n["a"] * n["p"]
    return Solution(
        (
            (
                f"the {w['x']} cost {_times(n['a'], n['p'])} euros "
                f"and for the {w['y']} there are another {n['q']} euros to pay"
            ),
            f"{_minus(n['note'], first, n['q'])} euros remain",
        ),
        n["note"] - first - n["q"],
    )


def _slip_change_swaps_prices(n: Numbers, w: Words) -> Solution | None:
    first, second = n["a"] * n["q"], n["b"] * n["p"]
    if first + second >= n["note"]:
        return None
    return Solution(
        (
            f"the {w['x']} cost {_times(n['a'], n['q'])} euros and the {w['y']} {_times(n['b'], n['p'])} euros",
            f"{_minus(n['note'], first, second)} euros remain",
        ),
        n["note"] - first - second,
    )


CHANGE = Kind(
    _draw_change,
    _words_change,
    (
        (
            "{name} buys {a} {x} at {p} euros each and {b} {y} at {q} euros each and hands over {note} euros. "
            "How many euros of change does {name} get?"
        ),
        (
            "A customer pays with {note} euros for {a} {x} ({p} euros apiece) and {b} {y} ({q} euros apiece). "
            "How much change should the till give, in euros?"
        ),
        (
            "At the market, {x} cost {p} euros each and {y} cost {q} euros each. {name} arrives with {note} euros and "
            "goes home with {a} {x} and {b} {y}. How many euros are left?"
        ),
        (
            "{name}'s grandmother has {note} euros in her purse. First she gets {a} {x} for {p} euros each, then {b} "
            "{y} for {q} euros each. What remains in the purse, in euros?"
        ),
    ),
    _right_change,
    (_slip_change_forgets_second, _slip_change_single_second, _slip_change_swaps_prices),
)


# ----- travel time with a stop --------------------------------------------------------------------


def _draw_trip(rng: random.Random) -> Numbers:
    # Speeds that divide 60 keep the minutes whole.
    speed = _pick(rng, (10, 12, 15, 20, 30))
    return {"distance": _between(rng, 3, 14) * (1 + speed // 15), "speed": speed, "stop": _between(rng, 5, 25)}


def _trip(n: Numbers, change: str) -> Solution:
    minutes = n["distance"] * 60 // n["speed"]
    first = f"at {n['speed']} km/h the way takes {_times_over(n['distance'], 60, n['speed'])} minutes"
    if change == "none":
        return Solution((first, f"the whole trip is done in {minutes} minutes"), minutes)
    if change == "minus":
        return Solution((first, f"the stop makes it {_minus(minutes, n['stop'])} minutes"), minutes - n["stop"])
    if change == "twice":
        total = minutes + 2 * n["stop"]
        return Solution((first, f"the stop makes it {_plus(minutes, n['stop'], n['stop'])} minutes"), total)
    return Solution((first, f"the stop makes it {_plus(minutes, n['stop'])} minutes"), minutes + n["stop"])


TRIP = Kind(
    _draw_trip,
    lambda rng: _name_and(rng, place=("the lake", "the next town", "the coast", "the castle", "an old mill")),
    (
        (
            "{name} rides {distance} km to {place} at a steady {speed} km/h and stops once for {stop} minutes. "
            "How many minutes does the whole trip take?"
        ),
        (
            "It is {distance} km to {place}. A tractor drives there at {speed} km/h, but waits {stop} minutes at a "
            "crossing. After how many minutes does it arrive?"
        ),
        (
            "A boat makes {speed} km/h and has {distance} km to go to {place}. On the way it lies still for {stop} "
            "minutes. How long is {name} on board, in minutes?"
        ),
        (
            "On the way to {place}, {name} rests for {stop} minutes. The way is {distance} km long and the speed is "
            "{speed} km/h apart from that. How many minutes pass from start to arrival?"
        ),
    ),
    lambda n, w: _trip(n, "plus"),
    (
        lambda n, w: _trip(n, "none"),
        lambda n, w: _trip(n, "minus") if n["distance"] * 60 // n["speed"] > n["stop"] else None,
        lambda n, w: _trip(n, "twice"),
    ),
)


# ----- fair sharing, the sharer included ----------------------------------------------------------


def _draw_share(rng: random.Random) -> Numbers:
    friends = _between(rng, 3, 9)
    each = _between(rng, 3, 12)
    return {"total": each * (friends + 1) + _between(rng, 1, friends), "friends": friends}


def _share(n: Numbers, people: int, head: str, *, round_up: bool = False) -> Solution:
    each = n["total"] // people
    if round_up:
        each += 1
        return Solution((head, f"{_times(people, each)} is the first multiple that uses up all {n['total']}"), each)
    return Solution((head, f"{_times(people, each)} is the most that fits into {n['total']}"), each)


SHARE = Kind(
    _draw_share,
    lambda rng: _name_and(rng, x=("marbles", "stickers", "cherries", "biscuits", "cards", "shells", "beads")),
    (
        (
            "{name} shares {total} {x} fairly with {friends} friends and keeps a share too. "
            "How many whole {x} does each of them get?"
        ),
        (
            "There are {total} {x} on the table for {name} and {friends} guests. Everyone takes the same number, as "
            "many as possible. How many {x} does one person take?"
        ),
        (
            "{name} has {friends} cousins. Together they split {total} {x} evenly, and what cannot be split goes back "
            "in the box. How many {x} are in one share?"
        ),
        (
            "A bag of {total} {x} is dealt out evenly to {name} and {friends} team-mates. "
            "How many {x} does {name} end up with?"
        ),
    ),
    lambda n, w: _share(n, n["friends"] + 1, f"with {w['name']} there are {_plus(n['friends'], 1)} people"),
    (
        lambda n, w: _share(
            n, n["friends"], f"there are {n['friends']} guests, so the {w['x']} are split between {n['friends']} people"
        ),
        lambda n, w: _share(n, n["friends"] + 2, f"with {w['name']} there are {_plus(n['friends'], 2)} people"),
        lambda n, w: _share(
            n, n["friends"] + 1, f"with {w['name']} there are {_plus(n['friends'], 1)} people", round_up=True
        ),
    ),
)


# ----- packing with a remainder -------------------------------------------------------------------


def _draw_packing(rng: random.Random) -> Numbers:
    size = _between(rng, 5, 12)
    bad = _between(rng, 2, 9)
    return {"total": _between(rng, 4, 11) * size + _between(rng, 1, size - 1) + bad, "bad": bad, "size": size}


def _packing(n: Numbers, good: int, head: str) -> Solution:
    boxes = good // n["size"]
    packed = boxes * n["size"]
    return Solution(
        (head, f"the full boxes hold {_times(boxes, n['size'])}, which leaves {_minus(good, packed)}"),
        good - packed,
    )


def _slip_packing_counts_boxes(n: Numbers, w: Words) -> Solution:
    good = n["total"] - n["bad"]
    boxes = good // n["size"]
    return Solution(
        (
            f"{_minus(n['total'], n['bad'])} {w['x']} are good",
            f"the full boxes hold {_times(boxes, n['size'])}, and the number asked for is {boxes}",
        ),
        boxes,
    )


PACKING = Kind(
    _draw_packing,
    lambda rng: _name_and(rng, x=("eggs", "cups", "light bulbs", "peaches", "tiles", "glass balls")),
    (
        (
            "Of {total} {x}, {bad} are broken and thrown away. The others are packed into boxes of {size}. "
            "How many {x} do not fill a box?"
        ),
        (
            "{name} packs {x} into boxes that hold {size}. There were {total}, but {bad} were damaged and sorted out. "
            "How many {x} are left over when no more full box can be made?"
        ),
        (
            "A delivery of {total} {x} contains {bad} spoilt ones, which go in the bin. Boxes take exactly {size} "
            "each. After filling as many boxes as possible, how many good {x} remain?"
        ),
        (
            "{name} drops {bad} of {total} {x} and sweeps up the pieces. The rest are put away, {size} to a box. "
            "How many {x} stay outside because the last box would not be full?"
        ),
    ),
    lambda n, w: _packing(n, n["total"] - n["bad"], f"{_minus(n['total'], n['bad'])} {w['x']} are good"),
    (
        lambda n, w: _packing(n, n["total"], f"there are {n['total']} {w['x']} to pack"),
        lambda n, w: _packing(n, n["total"] + n["bad"], f"{_plus(n['total'], n['bad'])} {w['x']} are to be packed"),
        _slip_packing_counts_boxes,
    ),
)


# ----- two fractions in a row ---------------------------------------------------------------------


def _draw_fractions(rng: random.Random) -> Numbers:
    a = _between(rng, 2, 6)
    b = _between(rng, 3, 6)
    return {"total": a * b * _between(rng, 2, 12), "a": a, "b": b}


def _words_fractions(rng: random.Random) -> Words:
    return _name_and(rng, x=("books", "seedlings", "tickets", "loaves", "postcards", "pumpkins", "photos"))


def _right_fractions(n: Numbers, w: Words) -> Solution:
    part = n["total"] // n["a"]
    rest = n["total"] - part
    later = rest // n["b"]
    return Solution(
        (
            f"{_over(n['total'], n['a'])} {w['x']} go and {_minus(n['total'], part)} are left",
            f"another {_over(rest, n['b'])} go and {_minus(rest, later)} {w['x']} are left",
        ),
        rest - later,
    )


def _slip_fractions_of_whole(n: Numbers, w: Words) -> Solution | None:
    part, later = n["total"] // n["a"], n["total"] // n["b"]
    rest = n["total"] - part
    if rest <= later:
        return None
    return Solution(
        (
            f"{_over(n['total'], n['a'])} {w['x']} go and {_minus(n['total'], part)} are left",
            f"another {_over(n['total'], n['b'])} go and {_minus(rest, later)} {w['x']} are left",
        ),
        rest - later,
    )


def _slip_fractions_last_part(n: Numbers, w: Words) -> Solution:
    part = n["total"] // n["a"]
    rest = n["total"] - part
    return Solution(
        (
            f"{_over(n['total'], n['a'])} {w['x']} go and {_minus(n['total'], part)} are left",
            f"another {_over(rest, n['b'])} are taken, and so the number of {w['x']} asked for is {rest // n['b']}",
        ),
        rest // n["b"],
    )


def _slip_fractions_first_part(n: Numbers, w: Words) -> Solution | None:
    part = n["total"] // n["a"]
    if part % n["b"]:
        return None
    later = part // n["b"]
    return Solution(
        (
            f"{_over(n['total'], n['a'])} {w['x']} go",
            f"another {_over(part, n['b'])} go and {_minus(n['total'], part, later)} {w['x']} are left",
        ),
        n["total"] - part - later,
    )


FRACTIONS = Kind(
    _draw_fractions,
    _words_fractions,
    (
        (
            "{name} has {total} {x} and gives away {fa} of them on Monday. On Tuesday {fb} of the remaining ones go "
            "too. How many {x} are left?"
        ),
        (
            "A stall starts with {total} {x}. In the morning {fa} of them are sold, in the afternoon {fb} of the rest. "
            "How many {x} have not been sold?"
        ),
        (
            "From {total} {x}, {name} sorts out {fa}. Of what is left, {fb} turns out to be damaged and is removed. "
            "How many {x} stay?"
        ),
        (
            "There were {total} {x} in the hall. After the school took {fa} of them, the library took {fb} of what the "
            "school had left. How many {x} are still in the hall?"
        ),
    ),
    _right_fractions,
    (_slip_fractions_of_whole, _slip_fractions_last_part, _slip_fractions_first_part),
)


# ----- ages ---------------------------------------------------------------------------------------


def _draw_ages(rng: random.Random) -> Numbers:
    return {"young": _between(rng, 5, 16), "factor": _between(rng, 2, 4), "years": _between(rng, 5, 14)}


def _words_ages(rng: random.Random) -> Words:
    first = _between(rng, 0, len(NAMES) - 1)
    second = (first + _between(rng, 1, len(NAMES) - 1)) % len(NAMES)
    return {"name": NAMES[first], "other": NAMES[second]}


def _right_ages(n: Numbers, w: Words) -> Solution:
    now = n["factor"] * n["young"]
    return Solution(
        (
            f"{w['other']} is now {_times(n['factor'], n['young'])} years old",
            f"after {n['years']} years it is {_plus(now, n['years'])}",
        ),
        now + n["years"],
    )


def _slip_ages_adds_first(n: Numbers, w: Words) -> Solution:
    later = n["young"] + n["years"]
    return Solution(
        (
            f"{w['name']} will be {_plus(n['young'], n['years'])} years old",
            f"{w['other']} will be {_times(n['factor'], later)}",
        ),
        n["factor"] * later,
    )


def _slip_ages_adds_factor(n: Numbers, w: Words) -> Solution:
    now = n["factor"] + n["young"]
    return Solution(
        (
            f"{w['other']} is now {_plus(n['factor'], n['young'])} years old",
            f"after {n['years']} years it is {_plus(now, n['years'])}",
        ),
        now + n["years"],
    )


def _slip_ages_goes_back(n: Numbers, w: Words) -> Solution | None:
    now = n["factor"] * n["young"]
    if now <= n["years"]:
        return None
    return Solution(
        (
            f"{w['other']} is now {_times(n['factor'], n['young'])} years old",
            f"with a difference of {n['years']} years it is {_minus(now, n['years'])}",
        ),
        now - n["years"],
    )


AGES = Kind(
    _draw_ages,
    _words_ages,
    (
        "{name} is {young} years old. {other} is {factor} times as old. How old will {other} be in {years} years?",
        (
            "{other} is {factor} times the age of {name}, who is {young}. "
            "What will be the age of {other} when {years} years have passed?"
        ),
        (
            "Today {name} turns {young}, and {other} is exactly {factor} times that age. "
            "How many candles will be on the cake of {other} {years} years from now?"
        ),
        (
            "A photo in {years} years will show {name} and {other} again. Now {name} is {young} and {other} is "
            "{factor} times as old. How old is {other} in that photo?"
        ),
    ),
    _right_ages,
    (_slip_ages_adds_first, _slip_ages_adds_factor, _slip_ages_goes_back),
)


# ----- area with a piece cut out ------------------------------------------------------------------


def _draw_area(rng: random.Random) -> Numbers:
    side = _between(rng, 3, 7)
    width = _between(rng, side + 2, 16)
    return {"length": _between(rng, width + 1, 26), "width": width, "side": side}


def _area(n: Numbers, w: Words, hole: int, hole_text: str, *, add: bool = False) -> Solution:
    whole = n["length"] * n["width"]
    head = f"the {w['x']} measures {_times(n['length'], n['width'])} and the {w['y']} {hole_text}"
    if add:
        return Solution((head, f"this makes {_plus(whole, hole)} square metres"), whole + hole)
    return Solution((head, f"this makes {_minus(whole, hole)} square metres"), whole - hole)


def _words_area(rng: random.Random) -> Words:
    pairs = (("garden", "pond"), ("hall", "stage"), ("yard", "sandpit"), ("park", "playground"), ("field", "barn"))
    x, y = _pick(rng, pairs)
    return {"name": _pick(rng, NAMES), "x": x, "y": y}


def _slip_area_outline(n: Numbers, w: Words) -> Solution | None:
    around = 2 * (n["length"] + n["width"])
    hole = n["side"] * n["side"]
    if around <= hole:
        return None
    return Solution(
        (
            (
                f"the {w['x']} measures {_plus(n['length'], n['width'], n['length'], n['width'])} "
                f"and the {w['y']} {_times(n['side'], n['side'])}"
            ),
            f"this makes {_minus(around, hole)} square metres",
        ),
        around - hole,
    )


AREA = Kind(
    _draw_area,
    _words_area,
    (
        (
            "A rectangular {x} is {length} m long and {width} m wide. In it is a square {y} with sides of {side} m. "
            "How many square metres of the {x} are not taken up by the {y}?"
        ),
        (
            "{name} wants to cover a {x} of {length} m by {width} m, all but the square {y}, whose side is {side} m. "
            "How many square metres are to be covered?"
        ),
        (
            "The square {y} in the middle of a {x} has a side of {side} m. The {x} is a rectangle, {length} m by "
            "{width} m. What area is left around the {y}, in square metres?"
        ),
        (
            "What is the free area in square metres of a rectangular {x} ({length} m by {width} m) once {name} has put "
            "up a square {y} {side} m on each side?"
        ),
    ),
    lambda n, w: _area(n, w, n["side"] ** 2, _times(n["side"], n["side"])),
    (
        lambda n, w: _area(n, w, n["side"] ** 2, _times(n["side"], n["side"]), add=True),
        lambda n, w: _area(n, w, 4 * n["side"], _times(4, n["side"])),
        lambda n, w: _area(n, w, 2 * n["side"], _times(2, n["side"])),
        _slip_area_outline,
    ),
)


# ----- unit conversion ----------------------------------------------------------------------------


def _draw_cutting(rng: random.Random) -> Numbers:
    metres = _between(rng, 3, 9)
    piece = _between(rng, 11, 45)
    return {"metres": metres, "pieces": _between(rng, 3, min(12, (metres * 100 - 10) // piece)), "piece": piece}


def _cutting(n: Numbers, w: Words, factor: int, pieces: int) -> Solution | None:
    whole = n["metres"] * factor
    cut = pieces * n["piece"]
    if cut >= whole:
        return None
    used = f"{_times(pieces, n['piece'])} cm" if pieces > 1 else f"{cut} cm"
    return Solution(
        (
            f"the {w['x']} is {_times(n['metres'], factor)} cm long",
            f"{used} are cut off, and {_minus(whole, cut)} cm remain",
        ),
        whole - cut,
    )


def _right_cutting(n: Numbers, w: Words) -> Solution:
    solution = _cutting(n, w, 100, n["pieces"])
    if solution is None:
        raise ValueError(f"numbers={n}: the pieces must be shorter in total than the whole length")
    return solution


CUTTING = Kind(
    _draw_cutting,
    lambda rng: _name_and(rng, x=("ribbon", "rope", "cable", "hose", "board", "strip of felt")),
    (
        (
            "{name} has a {x} of {metres} m and cuts off {pieces} pieces of {piece} cm each. "
            "How many centimetres are left?"
        ),
        (
            "From a {x} that is {metres} m long, {pieces} parts are needed, {piece} cm each. "
            "What length of it remains, in centimetres?"
        ),
        (
            "Each part must be {piece} cm long and {name} needs {pieces} of them. They come from a {x} {metres} m in "
            "length. How many centimetres stay unused?"
        ),
        "A {x} measures {metres} m. After {name} has cut {pieces} lengths of {piece} cm from it, how long is it in cm?",
    ),
    _right_cutting,
    (
        lambda n, w: _cutting(n, w, 1000, n["pieces"]),
        lambda n, w: _cutting(n, w, 100, 1),
        lambda n, w: _cutting(n, w, 100, n["pieces"] - 1),
        lambda n, w: _cutting(n, w, 100, n["pieces"] + 1),
    ),
)


# ----- work shared among more or fewer hands ------------------------------------------------------


def _draw_crew(rng: random.Random) -> Numbers:
    while True:
        crew, days, other = _between(rng, 2, 12), _between(rng, 3, 24), _between(rng, 2, 15)
        if other != crew and crew * days % other == 0 and crew * days // other > 1:
            return {"crew": crew, "days": days, "other": other}


def _right_crew(n: Numbers, w: Words) -> Solution:
    total = n["crew"] * n["days"]
    return Solution(
        (
            f"the job is {_times(n['crew'], n['days'])} days of work for one",
            f"it takes {_over(total, n['other'])} days",
        ),
        total // n["other"],
    )


def _slip_crew_direct(n: Numbers, w: Words) -> Solution | None:
    if n["days"] % n["crew"]:
        return None
    one = n["days"] // n["crew"]
    return Solution(
        (f"that is {_over(n['days'], n['crew'])} days for one", f"it takes {_times(one, n['other'])} days"),
        one * n["other"],
    )


def _slip_crew_linear(n: Numbers, w: Words) -> Solution | None:
    extra = n["other"] - n["crew"]
    if extra > 0:
        if extra >= n["days"]:
            return None
        head = f"there are {_minus(n['other'], n['crew'])} more {w['x']}, each saving a day"
        return Solution((head, f"it takes {_minus(n['days'], extra)} days"), n["days"] - extra)
    head = f"there are {_minus(n['crew'], n['other'])} fewer {w['x']}, each costing a day"
    return Solution((head, f"it takes {_plus(n['days'], -extra)} days"), n["days"] - extra)


def _slip_crew_joins(n: Numbers, w: Words) -> Solution | None:
    total, both = n["crew"] * n["days"], n["crew"] + n["other"]
    if total % both:
        return None
    return Solution(
        (
            (
                f"the job is {_times(n['crew'], n['days'])} days of work for one and there are "
                f"{_plus(n['crew'], n['other'])} {w['x']}"
            ),
            f"it takes {_over(total, both)} days",
        ),
        total // both,
    )


CREW = Kind(
    _draw_crew,
    lambda rng: _name_and(rng, x=("painters", "gardeners", "bricklayers", "helpers", "roofers", "pickers")),
    (
        "{crew} {x} need {days} days for a job. How many days would {other} {x} need at the same pace?",
        (
            "A job is done in {days} days when {crew} {x} work on it. {name} sends {other} {x} instead. "
            "After how many days is it done, if all work equally fast?"
        ),
        (
            "{name} reckons with {crew} {x} and {days} days. In the end {other} {x} do the job, each as quick as "
            "planned. How many days does it take them?"
        ),
        "If {crew} equally fast {x} finish the work in {days} days, in how many days do {other} such {x} finish it?",
    ),
    _right_crew,
    (_slip_crew_direct, _slip_crew_linear, _slip_crew_joins),
)


# ----- lessons with breaks ------------------------------------------------------------------------


def _draw_lessons(rng: random.Random) -> Numbers:
    return {"lessons": _between(rng, 3, 9), "length": 5 * _between(rng, 4, 18), "pause": _between(rng, 3, 20)}


def _lessons(n: Numbers, w: Words, pauses: int, note: str = "") -> Solution:
    work, rest = n["lessons"] * n["length"], pauses * n["pause"]
    return Solution(
        (
            (
                f"the {w['x']} take {_times(n['lessons'], n['length'])} minutes and the breaks{note} "
                f"{_times(pauses, n['pause'])} minutes"
            ),
            f"together it is {_plus(work, rest)} minutes",
        ),
        work + rest,
    )


def _slip_lessons_no_breaks(n: Numbers, w: Words) -> Solution:
    work = n["lessons"] * n["length"]
    return Solution(
        (
            f"the {w['x']} take {_times(n['lessons'], n['length'])} minutes",
            f"together it is {work} minutes from the first to the last",
        ),
        work,
    )


LESSONS = Kind(
    _draw_lessons,
    lambda rng: _name_and(rng, x=("lessons", "talks", "rehearsals", "interviews", "workshops", "matches")),
    (
        (
            "{name} plans {lessons} {x} of {length} minutes each, with a break of {pause} minutes between one and the "
            "next. How many minutes pass from the start of the first to the end of the last?"
        ),
        (
            "A day has {lessons} {x}, each {length} minutes long. Between them are breaks of {pause} minutes. "
            "How long is it from beginning to end, in minutes?"
        ),
        (
            "The {lessons} {x} take {length} minutes each, and between any two there is a pause of {pause} minutes. "
            "How many minutes does the whole programme take?"
        ),
        (
            "{name} sits through {lessons} {x}. Each takes {length} minutes, and there are {pause} minutes of pause in "
            "between, but none before or after. How many minutes is that in all?"
        ),
    ),
    lambda n, w: _lessons(n, w, n["lessons"] - 1),
    (
        lambda n, w: _lessons(n, w, n["lessons"], ", one for each,"),
        lambda n, w: _lessons(n, w, n["lessons"] - 2, ", those in the middle,"),
        _slip_lessons_no_breaks,
    ),
)


# ----- posts on both sides of a path --------------------------------------------------------------


def _draw_posts(rng: random.Random) -> Numbers:
    gap = _between(rng, 3, 15)
    return {"length": gap * _between(rng, 6, 40), "gap": gap}


def _posts(n: Numbers, w: Words, extra: int, *, both: bool = True) -> Solution:
    gaps = n["length"] // n["gap"]
    side = gaps + extra
    head = f"one side has {_over(n['length'], n['gap'])} gaps"
    if extra:
        head += f", which makes {_plus(gaps, extra) if extra > 0 else _minus(gaps, -extra)} {w['x']}"
    else:
        head += f", which is also the number of {w['x']} on it"
    if not both:
        return Solution((head, f"counted along the whole length there are {side} {w['x']}"), side)
    return Solution((head, f"both sides need {_times(2, side)} {w['x']}"), 2 * side)


POSTS = Kind(
    _draw_posts,
    lambda rng: _name_and(rng, x=("lamps", "trees", "posts", "flags", "benches")),
    (
        (
            "A straight path is {length} m long. On both sides {x} stand every {gap} m, from the very beginning to the "
            "very end. How many {x} are there?"
        ),
        (
            "{name} puts {x} along both sides of a straight drive of {length} m. The first pair stands at the start, "
            "the last at the end, and the distance is always {gap} m. How many {x} are needed?"
        ),
        (
            "Every {gap} m there is one of the {x} on the left and one on the right of an avenue {length} m long, also "
            "at both ends. How many {x} does the avenue have?"
        ),
        (
            "Along a canal of {length} m, {name} counts {x} on both banks. They stand {gap} m apart, with one at each "
            "end of each bank. How many {x} does {name} count?"
        ),
    ),
    lambda n, w: _posts(n, w, 1),
    (
        lambda n, w: _posts(n, w, 0),
        lambda n, w: _posts(n, w, -1),
        lambda n, w: _posts(n, w, 1, both=False),
    ),
)


# ----- percentage and voucher ---------------------------------------------------------------------


def _draw_discount(rng: random.Random) -> Numbers:
    # A multiple of 20 keeps every 5 percent step whole.
    return {
        "price": 20 * _between(rng, 2, 25),
        "percent": _pick(rng, (5, 10, 15, 20, 25, 30, 35, 40)),
        "voucher": _between(rng, 2, 12),
    }


def _discount(n: Numbers, cut: int, head: str, last: str) -> Solution:
    reduced = n["price"] - cut
    if last == "forget":
        return Solution((head, f"the price to pay at the till comes to {_minus(n['price'], cut)} euros"), reduced)
    if last == "plus":
        text = f"the price to pay is {n['price']} - {cut} + {n['voucher']} = {reduced + n['voucher']} euros"
        return Solution((head, text), reduced + n["voucher"])
    text = f"the price to pay is {_minus(n['price'], cut, n['voucher'])} euros"
    return Solution((head, text), reduced - n["voucher"])


def _percent_head(n: Numbers) -> tuple[int, str]:
    cut = n["price"] * n["percent"] // 100
    return cut, f"{n['percent']} percent of {n['price']} is {_times_over(n['price'], n['percent'], 100)} euros"


def _right_discount(n: Numbers, w: Words) -> Solution:
    return _discount(n, *_percent_head(n), "minus")


def _slip_discount_euros(n: Numbers, w: Words) -> Solution | None:
    if n["price"] <= n["percent"] + n["voucher"]:
        return None
    return _discount(
        n,
        n["percent"],
        f"a discount of {n['percent']} percent is the same as {n['percent']} euros off the price",
        "minus",
    )


def _slip_discount_voucher_first(n: Numbers, w: Words) -> Solution | None:
    base = n["price"] - n["voucher"]
    if base * n["percent"] % 100:
        return None
    cut = base * n["percent"] // 100
    return Solution(
        (
            (
                f"the voucher leaves {_minus(n['price'], n['voucher'])} euros, and {n['percent']} percent of it is "
                f"{_times_over(base, n['percent'], 100)} euros"
            ),
            f"the price to pay is {_minus(base, cut)} euros",
        ),
        base - cut,
    )


DISCOUNT = Kind(
    _draw_discount,
    lambda rng: _name_and(rng, x=("coat", "desk", "bicycle", "tent", "camera", "guitar", "mattress", "printer")),
    (
        (
            "A {x} costs {price} euros. {name} gets {percent} percent off, and afterwards a voucher takes off another "
            "{voucher} euros. How many euros does {name} pay?"
        ),
        (
            "In the sale a {x} marked {price} euros is reduced by {percent} percent. From the reduced price, {name} "
            "deducts a voucher worth {voucher} euros. What is left to pay, in euros?"
        ),
        (
            "{name} has a voucher for {voucher} euros, taken off at the till after all discounts. The {x} was {price} "
            "euros and is now {percent} percent cheaper. How many euros are due?"
        ),
        (
            "First {percent} percent is taken off the price of {price} euros for a {x}, then {voucher} euros for a "
            "voucher. What does the {x} cost in the end, in euros?"
        ),
    ),
    _right_discount,
    (
        lambda n, w: _discount(n, *_percent_head(n), "forget"),
        lambda n, w: _discount(n, *_percent_head(n), "plus"),
        _slip_discount_euros,
        _slip_discount_voucher_first,
    ),
)


# ----- the missing score for a mean ---------------------------------------------------------------


def _draw_mean(rng: random.Random) -> Numbers:
    while True:
        first, second, third = (_between(rng, 40, 98) for _ in range(3))
        mean = _between(rng, 50, 92)
        if 1 <= 4 * mean - first - second - third <= 100:
            return {"first": first, "second": second, "third": third, "count": 4, "mean": mean}


def _mean(n: Numbers, w: Words, count: int, scores: tuple[int, ...], verb: str = "needs") -> Solution | None:
    need = count * n["mean"] - sum(scores)
    if need <= 0:
        return None
    return Solution(
        (
            f"the {w['x']} must add up to {_times(count, n['mean'])}",
            f"the last one {verb} {_minus(count * n['mean'], *scores)} points",
        ),
        need,
    )


def _right_mean(n: Numbers, w: Words) -> Solution:
    solution = _mean(n, w, n["count"], (n["first"], n["second"], n["third"]))
    if solution is None:
        raise ValueError(f"numbers={n}: the missing score must be above 0")
    return solution


MEAN = Kind(
    _draw_mean,
    lambda rng: _name_and(rng, x=("tests", "rounds", "games", "essays", "exams")),
    (
        (
            "In three {x}, {name} scored {first}, {second} and {third} points. How many points must the last one "
            "bring, so that the mean of all {count} {x} is {mean}?"
        ),
        (
            "After {x} with {first}, {second} and {third} points, {name} wants a mean of {mean} over all {count} {x}. "
            "How many points are needed in the last one?"
        ),
        (
            "The mean of {count} {x} is {mean} points. Three of them brought {first}, {second} and {third}. "
            "How many points did the other one bring?"
        ),
        (
            "{name} has {first}, {second} and {third} points on the sheet. With which score in the last of the {count} "
            "{x} does the mean become exactly {mean}?"
        ),
    ),
    _right_mean,
    (
        lambda n, w: _mean(n, w, n["count"] - 1, (n["first"], n["second"], n["third"])),
        lambda n, w: _mean(n, w, n["count"], (n["first"], n["second"]), "will still have to bring"),
        lambda n, w: _mean(n, w, n["count"], (n["second"], n["third"])),
        lambda n, w: _mean(n, w, n["count"] + 1, (n["first"], n["second"], n["third"])),
    ),
)


# ----- filling against a leak ---------------------------------------------------------------------


def _draw_tank(rng: random.Random) -> Numbers:
    leak = _between(rng, 2, 6)
    net = _between(rng, 3, 12)
    # The start level is a multiple of the net rate, so that forgetting it gives a whole number as well.
    start = net * _between(rng, 2, 8)
    return {"capacity": start + net * _between(rng, 5, 30), "start": start, "fill": net + leak, "leak": leak}


def _tank(n: Numbers, w: Words, start: int, rate: int, rate_text: str) -> Solution | None:
    missing = n["capacity"] - start
    if missing % rate:
        return None
    room = (
        f"{_minus(n['capacity'], start)} litres are missing"
        if start
        else f"the {w['x']} has to take in {missing} litres"
    )
    return Solution((f"{room} and {rate_text}", f"it takes {_over(missing, rate)} minutes"), missing // rate)


def _right_tank(n: Numbers, w: Words) -> Solution:
    net = n["fill"] - n["leak"]
    solution = _tank(n, w, n["start"], net, f"each minute brings {_minus(n['fill'], n['leak'])}")
    if solution is None:
        raise ValueError(f"numbers={n}: the net rate must divide the missing litres")
    return solution


TANK = Kind(
    _draw_tank,
    lambda rng: _name_and(rng, x=("tank", "barrel", "pool", "trough", "cistern")),
    (
        (
            "A {x} holds {capacity} litres and has {start} litres in it. A tap adds {fill} litres a minute while "
            "{leak} litres a minute leak out. After how many minutes is it full?"
        ),
        (
            "{name} fills a leaky {x} with {fill} litres per minute; {leak} litres per minute get lost. At the start "
            "there are {start} litres in it. How many minutes until it holds {capacity} litres?"
        ),
        (
            "Each minute {fill} litres flow into a {x} and {leak} litres flow out. It contains {start} litres now and "
            "takes {capacity} at most. For how many minutes can {name} leave it running?"
        ),
        (
            "How many minutes does it take to bring a {x} from {start} to {capacity} litres, with {fill} litres a "
            "minute coming in and {leak} litres a minute running out?"
        ),
    ),
    _right_tank,
    (
        lambda n, w: _tank(n, w, n["start"], n["fill"], f"the tap brings its {n['fill']} litres in each minute"),
        lambda n, w: _tank(n, w, n["start"], n["fill"] + n["leak"], f"each minute moves {_plus(n['fill'], n['leak'])}"),
        lambda n, w: _tank(n, w, 0, n["fill"] - n["leak"], f"each minute brings {_minus(n['fill'], n['leak'])}"),
    ),
)


# ----- answers, recomputed from the stored numbers ------------------------------------------------


def _answer_share(n: Numbers) -> int:
    # Dealing out round by round: no division in common with the solution text.
    left, rounds = n["total"], 0
    while left >= n["friends"] + 1:
        left -= n["friends"] + 1
        rounds += 1
    return rounds


def _answer_posts(n: Numbers) -> int:
    return sum(2 for _ in range(0, n["length"] + 1, n["gap"]))


def _answer_lessons(n: Numbers) -> int:
    return n["lessons"] * (n["length"] + n["pause"]) - n["pause"]


def _answer_fractions(n: Numbers) -> Fraction:
    return n["total"] * (1 - Fraction(1, n["a"])) * (1 - Fraction(1, n["b"]))


# These formulas share no code with the solution texts above, so that a mistake in one shows against the other.
ANSWERS: dict[str, Callable[[Numbers], int | Fraction]] = {
    "change": lambda n: n["note"] - sum((n["p"],) * n["a"] + (n["q"],) * n["b"]),
    "trip": lambda n: Fraction(n["distance"], n["speed"]) * 60 + n["stop"],
    "share": _answer_share,
    "packing": lambda n: (n["total"] - n["bad"]) % n["size"],
    "fractions": _answer_fractions,
    "ages": lambda n: n["years"] + n["young"] * n["factor"],
    "area": lambda n: n["length"] * n["width"] - n["side"] ** 2,
    "cutting": lambda n: (n["metres"] - Fraction(n["piece"] * n["pieces"], 100)) * 100,
    "crew": lambda n: n["days"] * Fraction(n["crew"], n["other"]),
    "lessons": _answer_lessons,
    "posts": _answer_posts,
    "discount": lambda n: n["price"] * (1 - Fraction(n["percent"], 100)) - n["voucher"],
    "mean": lambda n: n["mean"] * n["count"] - (n["first"] + n["second"] + n["third"]),
    "tank": lambda n: Fraction(n["capacity"] - n["start"], n["fill"] - n["leak"]),
}

KINDS: dict[str, Kind] = {
    "change": CHANGE,
    "trip": TRIP,
    "share": SHARE,
    "packing": PACKING,
    "fractions": FRACTIONS,
    "ages": AGES,
    "area": AREA,
    "cutting": CUTTING,
    "crew": CREW,
    "lessons": LESSONS,
    "posts": POSTS,
    "discount": DISCOUNT,
    "mean": MEAN,
    "tank": TANK,
}


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


def _told_numbers(prompt: str, kind: str) -> Counter[int]:
    if kind == "fractions":
        words = {word: str(value) for value, word in FRACTION_WORDS.items()}
        prompt = _FRACTION_PATTERN.sub(lambda match: words[match.group(1).casefold()], prompt)
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
    if kind not in ANSWERS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(ANSWERS)}")
    told = _told_numbers(row["prompt"], kind)
    if told != Counter(numbers.values()):
        raise ValueError(f"prompt={row['prompt']!r}: must tell exactly the numbers {sorted(numbers.values())}")
    right = ANSWERS[kind](numbers)
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


def _write(solution: Solution, style: int) -> str:
    first, second = solution.clauses
    if style == 0:
        body = f"{_upper_first(first)}. {_upper_first(second)}."
    elif style == 1:
        body = f"First, {first}. Then, {second}."
    else:
        body = f"{_upper_first(first)}; {second}."
    return f"{body} The answer is {solution.value}."


def _draw_row(rng: random.Random, name: str) -> dict[str, Any] | None:
    """Draw one problem of a kind; None where no slip leads to a wrong number above 0."""
    kind = KINDS[name]
    numbers, words = kind.draw(rng), kind.words(rng)
    told: dict[str, Any] = {**numbers, **words}
    if name == "fractions":
        told |= {"fa": FRACTION_WORDS[numbers["a"]], "fb": FRACTION_WORDS[numbers["b"]]}
    prompt = _upper_first(_pick(rng, kind.prompts).format(**told))
    right = kind.right(numbers, words)
    wrong = [slip for slip in (make(numbers, words) for make in kind.slips) if slip is not None]
    wrong = [slip for slip in wrong if slip.value > 0 and slip.value != right.value]
    style = _between(rng, 0, 2)
    if not wrong:
        return None
    return {
        "category": "arithmetic",
        "kind": name,
        "numbers": numbers,
        "prompt": prompt,
        "chosen": _write(right, style),
        "rejected": _write(_pick(rng, wrong), style),
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
