"""Which answers are kept: greedy max-min edit distance, compared with a plain search."""

from __future__ import annotations

import random

from megakd.rollout.selection import most_different


def distance(a: str, b: str) -> int:
    """Levenshtein's, by its recurrence."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def test_each_kept_text_is_the_farthest_from_those_before():
    source = random.Random(0)
    for _ in range(50):
        texts = ["".join(source.choices("abc", k=source.randint(0, 8))) for _ in range(6)]
        kept = most_different(texts, 3)
        if len(set(texts)) < 3:
            assert kept is None
            continue
        order = [0]
        while len(order) < 3:
            gaps = [min(distance(texts[place], texts[other]) for other in order) for place in range(len(texts))]
            order.append(gaps.index(max(gaps)))
        assert kept == sorted(order)


def test_too_few_different_texts():
    assert most_different(["same", "same", "other"], 3) is None
    assert most_different(["same", "same", "other"], 2) == [0, 2]
