"""Which of a prompt's answers to keep."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein


def most_different(texts: Sequence[str], keep: int) -> list[int] | None:
    """The places of `keep` texts that differ much from each other, in rising order; None where too few differ at all.

    Greedy max-min: the first text is kept, then each time the one whose smallest edit distance to the kept ones is the
    largest, the earlier of equals (the released code of PAD, arXiv 2502.14272).
    """
    if len(set(texts)) < keep:
        return None
    kept = [0]
    nearest = [Levenshtein.distance(texts[0], text) for text in texts]
    while len(kept) < keep:
        best = max(range(len(texts)), key=lambda place: (nearest[place], -place))
        kept.append(best)
        nearest = [min(old, Levenshtein.distance(texts[best], text)) for old, text in zip(nearest, texts, strict=True)]
    return sorted(kept)
