"""The kinds of arithmetic word problem that arithmetic.py tells and solves, as tables of short templates.

The prompts and plans of a ``Kind`` are templates, in which ``{a}`` is a drawn number or word, and ``{a_part}`` the a-th
part of something in words. A plan is a worked solution in two clauses with a semicolon between them. In it
``[s = a * p]`` writes the sum out ("7 x 5 = 35") and calls the result s, which the sums after it may use; ``[a * p]``
does so without a name. The answer is the result of the last sum. A sum goes from left to right and has either + and -,
or * and /, or a single whole division // or remainder %.

Numbers for which a plan meets a result that is not whole or not above 0 do not suit that plan: a problem whose right
plan they do not suit is drawn anew, and a wrong plan that they do not suit is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction


def _items(text: str) -> tuple[str, ...]:
    """Return the items of a list whose lines begin with "- ", each as one line."""
    return tuple(" ".join(item.split()) for item in re.split(r"\n\s*- ", text)[1:])


@dataclass(frozen=True)
class Kind:
    """One kind of problem.

    Attributes:
        numbers: What each number is drawn from. Every prompt tells each of them once.
        prompts: Templates of the problem's text.
        right: The plan of the right solution.
        slips: Plans with one wrong step.
        answer: The right answer from the numbers, as a check on ``right`` that shares no code with it.
        things: What {x} is drawn from, or {x} and {y} where they have the form "x / y"; empty where a kind
            tells no {x}. {name} and {other} are two different people in every kind.
        suits: A condition that the numbers must meet, apart from those of the right plan.
    """

    numbers: dict[str, Sequence[int]]
    prompts: tuple[str, ...]
    right: str
    slips: tuple[str, ...]
    answer: Callable[..., int | Fraction]
    things: tuple[str, ...] = ("",)
    suits: Callable[..., bool] = lambda **numbers: True


CHANGE = Kind(
    numbers={"a": range(2, 8), "p": range(2, 10), "b": range(2, 8), "q": range(2, 10), "note": (20, 50, 100, 200)},
    suits=lambda a, p, b, q, note: note < 2 * (a * p + b * q),
    things=(
        "notebooks / markers",
        "sandwiches / salads",
        "candles / vases",
        "tomato plants / bags of soil",
        "comics / puzzles",
        "bus passes / maps",
        "jars of honey / loaves of bread",
        "scarves / hats",
    ),
    prompts=_items("""
        - {name} buys {a} {x} at {p} euros each and {b} {y} at {q} euros each and hands over {note} euros.
          How many euros of change does {name} get?
        - A customer pays with {note} euros for {a} {x} ({p} euros apiece) and {b} {y} ({q} euros apiece).
          How much change should the till give, in euros?
        - At the market, {x} cost {p} euros each and {y} cost {q} euros each. {name} arrives with {note} euros and
          goes home with {a} {x} and {b} {y}. How many euros are left?
        - {name}'s grandmother has {note} euros in her purse. First she gets {a} {x} for {p} euros each, then {b} {y}
          for {q} euros each. What remains in the purse, in euros?
    """),
    right="the {x} cost [s = a * p] euros and the {y} [t = b * q] euros; [note - s - t] euros remain",
    slips=_items("""
        - the {x} cost [s = a * p] euros; [note - s] euros remain
        - the {x} cost [s = a * p] euros and for the {y} there are another {q} euros to pay; [note - s - q] euros remain
        - the {x} cost [s = a * q] euros and the {y} [t = b * p] euros; [note - s - t] euros remain
    """),
    answer=lambda a, p, b, q, note: note - sum((p,) * a + (q,) * b),
)

TRIP = Kind(
    # Speeds that divide 60 keep the minutes whole.
    numbers={"distance": range(3, 37), "speed": (10, 12, 15, 20, 30), "stop": range(5, 26)},
    things=("the lake", "the next town", "the coast", "the castle", "an old mill"),
    prompts=_items("""
        - {name} rides {distance} km to {x} at a steady {speed} km/h and stops once for {stop} minutes.
          How many minutes does the whole trip take?
        - It is {distance} km to {x}. A tractor drives there at {speed} km/h, but waits {stop} minutes at a crossing.
          After how many minutes does it arrive?
        - A boat makes {speed} km/h and has {distance} km to go to {x}. On the way it lies still for {stop} minutes.
          How long is {name} on board, in minutes?
        - On the way to {x}, {name} rests for {stop} minutes. The way is {distance} km long and the speed is {speed}
          km/h apart from that. How many minutes pass from start to arrival?
    """),
    right="at {speed} km/h the way takes [way = distance * 60 / speed] minutes; the stop makes it [way + stop] minutes",
    slips=_items("""
        - at {speed} km/h the way takes [way = distance * 60 / speed] minutes; the whole trip is done in {way} minutes
        - at {speed} km/h the way takes [way = distance * 60 / speed] minutes; the stop makes it [way - stop] minutes
        - at {speed} km/h the way takes [way = distance * 60 / speed] minutes;
          the stop makes it [way + stop + stop] minutes
        - at {speed} km/h the way takes [way = distance * 100 / speed] minutes; the stop makes it [way + stop] minutes
    """),
    answer=lambda distance, speed, stop: Fraction(distance, speed) * 60 + stop,
)

SHARE = Kind(
    numbers={"total": range(14, 130), "friends": range(3, 10)},
    suits=lambda total, friends: total % (friends + 1) > 0,
    things=("marbles", "stickers", "cherries", "biscuits", "cards", "shells", "beads"),
    prompts=_items("""
        - {name} shares {total} {x} fairly with {friends} friends and keeps a share too.
          How many whole {x} does each of them get?
        - There are {total} {x} on the table for {name} and {friends} guests. Everyone takes the same number, as many
          as possible. How many {x} does one person take?
        - {name} has {friends} cousins. Together they split {total} {x} evenly, and what cannot be split goes back in
          the box. How many {x} are in one share?
        - A bag of {total} {x} is dealt out evenly to {name} and {friends} team-mates.
          How many {x} does {name} end up with?
    """),
    right="with {name} there are [people = friends + 1] people; [total // people]",
    slips=_items("""
        - there are {friends} guests, so the {x} are split between {friends} people; [total // friends]
        - with {name} there are [people = friends + 2] people; [total // people]
        - with {name} there are [people = friends + 1] people;
          [each = total // people], so to use up all it is [each + 1]
    """),
    # Dealt out round by round: the cards that start a full round.
    answer=lambda total, friends: len(range(friends + 1, total + 1, friends + 1)),
)

PACKING = Kind(
    numbers={"total": range(25, 150), "bad": range(2, 10), "size": range(5, 13)},
    things=("eggs", "cups", "light bulbs", "peaches", "tiles", "glass balls"),
    prompts=_items("""
        - Of {total} {x}, {bad} are broken and thrown away. The others are packed into boxes of {size}.
          How many {x} do not fill a box?
        - {name} packs {x} into boxes that hold {size}. There were {total}, but {bad} were damaged and sorted out.
          How many {x} are left over when no more full box can be made?
        - A delivery of {total} {x} contains {bad} spoilt ones, which go in the bin. Boxes take exactly {size} each.
          After filling as many boxes as possible, how many good {x} remain?
        - {name} drops {bad} of {total} {x} and sweeps up the pieces. The rest are put away, {size} to a box.
          How many {x} stay outside because the last box would not be full?
    """),
    right="[good = total - bad] {x} are good; for full boxes, [good % size]",
    slips=_items("""
        - there are {total} {x} to pack; for full boxes, [total % size]
        - [all = total + bad] {x} are packed; for full boxes, [all % size]
        - [good = total - bad] {x} are good; for full boxes, [good // size]
    """),
    answer=lambda total, bad, size: (total - bad) - size * int(Fraction(total - bad, size)),
)

FRACTIONS = Kind(
    numbers={"total": range(24, 361), "a": range(2, 7), "b": range(3, 7)},
    things=("books", "seedlings", "tickets", "loaves", "postcards", "pumpkins", "photos"),
    prompts=_items("""
        - {name} has {total} {x} and gives away {a_part} of them on Monday. On Tuesday {b_part} of the remaining ones
          go too. How many {x} are left?
        - A stall starts with {total} {x}. In the morning {a_part} of them are sold, in the afternoon {b_part} of the
          rest. How many {x} have not been sold?
        - From {total} {x}, {name} sorts out {a_part}. Of what is left, {b_part} turns out to be damaged and is
          removed. How many {x} stay?
        - There were {total} {x} in the hall. After the school took {a_part} of them, the library took {b_part} of what
          the school had left. How many {x} are still in the hall?
    """),
    right="""[gone = total / a] {x} go and [rest = total - gone] are left;
        another [more = rest / b] go and [rest - more] {x} are left""",
    slips=_items("""
        - [gone = total / a] {x} go and [rest = total - gone] are left;
          another [more = total / b] go and [rest - more] {x} are left
        - [gone = total / a] {x} go and [rest = total - gone] are left;
          another [rest / b] go, which is the number of {x} asked for
        - [gone = total / a] {x} go; another [more = gone / b] go and [total - gone - more] {x} are left
    """),
    answer=lambda total, a, b: total * (1 - Fraction(1, a)) * (1 - Fraction(1, b)),
)

AGES = Kind(
    numbers={"young": range(5, 17), "factor": range(2, 5), "years": range(5, 15)},
    prompts=_items("""
        - {name} is {young} years old. {other} is {factor} times as old. How old will {other} be in {years} years?
        - {other} is {factor} times the age of {name}, who is {young}.
          What will be the age of {other} when {years} years have passed?
        - Today {name} turns {young}, and {other} is exactly {factor} times that age.
          How many candles will be on the cake of {other} {years} years from now?
        - A photo in {years} years will show {name} and {other} again. Now {name} is {young} and {other} is {factor}
          times as old. How old is {other} in that photo?
    """),
    right="{other} is now [now = factor * young] years old; after {years} years it is [now + years]",
    slips=_items("""
        - {name} will be [later = young + years] years old; {other} will be [factor * later]
        - {other} is now [now = factor + young] years old; after {years} years it is [now + years]
        - {other} is now [now = factor * young] years old; with a difference of {years} years it is [now - years]
    """),
    answer=lambda young, factor, years: years + young * factor,
)

AREA = Kind(
    numbers={"length": range(6, 27), "width": range(5, 17), "side": range(3, 8)},
    suits=lambda length, width, side: side + 1 < width < length,
    things=("garden / pond", "hall / stage", "yard / sandpit", "park / playground", "field / barn"),
    prompts=_items("""
        - A rectangular {x} is {length} m long and {width} m wide. In it is a square {y} with sides of {side} m.
          How many square metres of the {x} are not taken up by the {y}?
        - {name} wants to cover a {x} of {length} m by {width} m, all but the square {y}, whose side is {side} m.
          How many square metres are to be covered?
        - The square {y} in the middle of a {x} has a side of {side} m. The {x} is a rectangle, {length} m by {width} m.
          What area is left around the {y}, in square metres?
        - What is the free area in square metres of a rectangular {x} ({length} m by {width} m) once {name} has put up a
          square {y} {side} m on each side?
    """),
    right="""the {x} measures [whole = length * width] and the {y} [hole = side * side];
        this makes [whole - hole] square metres""",
    slips=_items("""
        - the {x} measures [whole = length * width] and the {y} [hole = side * side];
          this makes [whole + hole] square metres
        - the {x} measures [whole = length * width] and the {y} [hole = 4 * side];
          this makes [whole - hole] square metres
        - the {x} measures [whole = length * width] and the {y} [hole = 2 * side];
          this makes [whole - hole] square metres
        - the {x} measures [whole = length + width + length + width] and the {y} [hole = side * side];
          this makes [whole - hole] square metres
    """),
    # The strip beside the square over the full length, and what lies before and behind it.
    answer=lambda length, width, side: (width - side) * length + side * (length - side),
)

CREW = Kind(
    numbers={"crew": range(2, 13), "days": range(3, 25), "hands": range(2, 16)},
    suits=lambda crew, days, hands: crew != hands < crew * days,
    things=("painters", "gardeners", "bricklayers", "helpers", "roofers", "pickers"),
    prompts=_items("""
        - {crew} {x} need {days} days for a job. How many days would {hands} {x} need at the same pace?
        - A job is done in {days} days when {crew} {x} work on it. {name} sends {hands} {x} instead.
          After how many days is it done, if all work equally fast?
        - {name} reckons with {crew} {x} and {days} days. In the end {hands} {x} do the job, each as quick as planned.
          How many days does it take them?
        - If {crew} equally fast {x} finish the work in {days} days, in how many days do {hands} such {x} finish it?
    """),
    right="the job is [work = crew * days] days of work for one; it takes [work / hands] days",
    slips=_items("""
        - that is [one = days / crew] days for one; it takes [one * hands] days
        - there are [more = hands - crew] more {x}, each saving a day; it takes [days - more] days
        - there are [fewer = crew - hands] fewer {x}, each costing a day; it takes [days + fewer] days
        - the job is [work = crew * days] days of work for one and there are [both = crew + hands] {x};
          it takes [work / both] days
    """),
    answer=lambda crew, days, hands: days * Fraction(crew, hands),
)

LESSONS = Kind(
    numbers={"lessons": range(3, 10), "length": range(20, 91, 5), "pause": range(3, 21)},
    things=("lessons", "talks", "rehearsals", "interviews", "workshops", "matches"),
    prompts=_items("""
        - {name} plans {lessons} {x} of {length} minutes each, with a break of {pause} minutes between one and the next.
          How many minutes pass from the start of the first to the end of the last?
        - A day has {lessons} {x}, each {length} minutes long. Between them are breaks of {pause} minutes.
          How long is it from beginning to end, in minutes?
        - The {lessons} {x} take {length} minutes each, and between any two there is a pause of {pause} minutes.
          How many minutes does the whole programme take?
        - {name} sits through {lessons} {x}. Each takes {length} minutes, and there are {pause} minutes of pause in
          between, but none before or after. How many minutes is that in all?
    """),
    right="""the {x} take [work = lessons * length] minutes and the [gaps = lessons - 1] breaks [rest = gaps * pause]
        minutes; together it is [work + rest] minutes""",
    slips=_items("""
        - the {x} take [work = lessons * length] minutes and the {lessons} breaks, one for each,
          [rest = lessons * pause] minutes; together it is [work + rest] minutes
        - the {x} take [work = lessons * length] minutes and the [gaps = lessons - 2] breaks in the middle
          [rest = gaps * pause] minutes; together it is [work + rest] minutes
        - the {x} take [work = lessons * length] minutes; together it is {work} minutes from the first to the last
    """),
    answer=lambda lessons, length, pause: lessons * (length + pause) - pause,
)

DISCOUNT = Kind(
    # A price that is a multiple of 20 keeps every 5 percent step whole.
    numbers={"price": range(40, 501, 20), "percent": range(5, 41, 5), "voucher": range(2, 13)},
    things=("coat", "desk", "bicycle", "tent", "camera", "guitar", "mattress", "printer"),
    prompts=_items("""
        - A {x} costs {price} euros. {name} gets {percent} percent off, and afterwards a voucher takes off another
          {voucher} euros. How many euros does {name} pay?
        - In the sale a {x} marked {price} euros is reduced by {percent} percent. From the reduced price, {name} deducts
          a voucher worth {voucher} euros. What is left to pay, in euros?
        - {name} has a voucher for {voucher} euros, taken off at the till after all discounts. The {x} was {price} euros
          and is now {percent} percent cheaper. How many euros are due?
        - First {percent} percent is taken off the price of {price} euros for a {x}, then {voucher} euros for a voucher.
          What does the {x} cost in the end, in euros?
    """),
    right="""{percent} percent of {price} is [cut = price * percent / 100] euros;
        the price to pay is [price - cut - voucher] euros""",
    slips=_items("""
        - {percent} percent of {price} is [cut = price * percent / 100] euros;
          the price to pay at the till comes to [price - cut] euros
        - {percent} percent of {price} is [cut = price * percent / 100] euros;
          the price to pay is [price - cut + voucher] euros
        - a discount of {percent} percent is the same as {percent} euros off the price;
          the price to pay is [price - percent - voucher] euros
        - the voucher leaves [base = price - voucher] euros, and {percent} percent of it is
          [cut = base * percent / 100] euros; the price to pay is [base - cut] euros
    """),
    answer=lambda price, percent, voucher: price * (1 - Fraction(percent, 100)) - voucher,
)

MEAN = Kind(
    numbers={
        "first": range(40, 99),
        "second": range(40, 99),
        "third": range(40, 99),
        "count": (4,),
        "mean": range(50, 93),
    },
    suits=lambda first, second, third, count, mean: count * mean <= first + second + third + 100,
    things=("tests", "rounds", "games", "essays", "exams"),
    prompts=_items("""
        - In three {x}, {name} scored {first}, {second} and {third} points.
          How many points must the last one bring, so that the mean of all {count} {x} is {mean}?
        - After {x} with {first}, {second} and {third} points, {name} wants a mean of {mean} over all {count} {x}.
          How many points are needed in the last one?
        - The mean of {count} {x} is {mean} points. Three of them brought {first}, {second} and {third}.
          How many points did the other one bring?
        - {name} has {first}, {second} and {third} points on the sheet. With which score in the last of the {count} {x}
          does the mean become exactly {mean}?
    """),
    right="the {x} must add up to [all = count * mean]; the last one needs [all - first - second - third] points",
    slips=_items("""
        - the {x} must add up to [all = 3 * mean]; the last one needs [all - first - second - third] points
        - the {x} must add up to [all = count * mean];
          the last one will still have to bring [all - first - second] points
        - the {x} must add up to [all = count * mean]; the last one needs [all - second - third] points
        - the {x} must add up to [all = 5 * mean]; the last one needs [all - first - second - third] points
    """),
    answer=lambda first, second, third, count, mean: mean * count - (first + second + third),
)

TANK = Kind(
    numbers={"capacity": range(30, 361), "start": range(6, 97), "fill": range(5, 19), "leak": range(2, 7)},
    suits=lambda capacity, start, fill, leak: fill - leak > 2 and capacity - start >= 5 * (fill - leak),
    things=("tank", "barrel", "pool", "trough", "cistern"),
    prompts=_items("""
        - A {x} holds {capacity} litres and has {start} litres in it. A tap adds {fill} litres a minute while {leak}
          litres a minute leak out. After how many minutes is it full?
        - {name} fills a leaky {x} with {fill} litres per minute; {leak} litres per minute get lost. At the start there
          are {start} litres in it. How many minutes until it holds {capacity} litres?
        - Each minute {fill} litres flow into a {x} and {leak} litres flow out. It contains {start} litres now and takes
          {capacity} at most. For how many minutes can {name} leave it running?
        - How many minutes does it take to bring a {x} from {start} to {capacity} litres, with {fill} litres a minute
          coming in and {leak} litres a minute running out?
    """),
    right="""[room = capacity - start] litres are missing and each minute brings [net = fill - leak];
        it takes [room / net] minutes""",
    slips=_items("""
        - [room = capacity - start] litres are missing and the tap brings its {fill} litres in each minute;
          it takes [room / fill] minutes
        - [room = capacity - start] litres are missing and each minute moves [both = fill + leak];
          it takes [room / both] minutes
        - the {x} has to take in {capacity} litres and each minute brings [net = fill - leak];
          it takes [capacity / net] minutes
    """),
    answer=lambda capacity, start, fill, leak: Fraction(capacity - start, fill - leak),
)

KINDS: dict[str, Kind] = {
    "change": CHANGE,
    "trip": TRIP,
    "share": SHARE,
    "packing": PACKING,
    "fractions": FRACTIONS,
    "ages": AGES,
    "area": AREA,
    "crew": CREW,
    "lessons": LESSONS,
    "discount": DISCOUNT,
    "mean": MEAN,
    "tank": TANK,
}
