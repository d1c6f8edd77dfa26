"""How near a model's answers are to the references, over rows, seeds and reference lengths: ROUGE-L and exact match.
And whether it still answers each prompt by itself: a student that over-optimises says the same to all.

Legend: S seeds (draws), N rows.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

from megakd.errors import LossInputError
from megakd.evaluation import Estimate
from megakd.evaluation.rouge import rouge_l_scores

LENGTHS = {"1_30": (0, 30), "31_70": (30, 70), "71_up": (70, float("inf"))}
"""Classes of references by their number of words w: low < w <= high (DPKD, arXiv 2406.19774, its table by length)."""
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def response_metrics(answers_SN: Sequence[Sequence[str]], references_N: Sequence[str]) -> dict[str, float]:
    """The figures of answers against references, all in [0, 1].

    Args:
        answers_SN: for each seed an answer to each row.
        references_N: one reference a row.

    Returns:
        `rouge_l` and `exact_match`: means over seeds and rows. `<name>_error`: standard error over the rows, of each
        row's mean over the seeds; `<name>_seed_error`: over the seeds, of each seed's mean over the rows (from two on).
        `<name>_words_<class>` and `references_words_<class>`: the mean over the rows whose reference has so many
        words, and their number; a class without rows is left out. `distinct_answers`: the number of different answers
        of a seed over the number of rows, a mean over seeds; 1/N is one answer for everything.

    Raises:
        LossInputError: no seeds or rows, or another number of answers than references.
    """
    if not answers_SN:
        raise LossInputError("answers of no seed: give at least one")
    tables = {
        "rouge_l": [rouge_l_scores(answers_N, references_N) for answers_N in answers_SN],
        "exact_match": [
            [float(exactly(*pair)) for pair in zip(answers_N, references_N, strict=True)] for answers_N in answers_SN
        ],
    }
    classes = [length_class(reference) for reference in references_N]
    metrics: dict[str, float] = {}
    for name, scores_SN in tables.items():
        by_row = [sum(scores_S) / len(scores_S) for scores_S in zip(*scores_SN, strict=True)]
        metrics |= named_estimate(name, Estimate.of(by_row))
        if len(scores_SN) > 1:
            metrics[f"{name}_seed_error"] = Estimate.of([Estimate.of(row).value for row in scores_SN]).standard_error
        for length in LENGTHS:
            own = [value for value, its in zip(by_row, classes, strict=True) if its == length]
            if own:
                metrics[f"{name}_words_{length}"] = Estimate.of(own).value
                metrics[f"references_words_{length}"] = len(own)
    distinct = [len({tuple(_plain(answer)) for answer in answers_N}) / len(answers_N) for answers_N in answers_SN]
    return metrics | {"distinct_answers": sum(distinct) / len(distinct)}


def exactly(answer: str, reference: str) -> bool:
    """Whether two texts are the same but for case, ASCII punctuation and blanks (as MiniLLM's and DPKD's code)."""
    return _plain(answer) == _plain(reference)


def length_class(reference: str) -> str:
    """The class of LENGTHS that a reference belongs to, by its words between blanks."""
    words = max(1, len(reference.split()))
    return next(name for name, (low, high) in LENGTHS.items() if low < words <= high)


def named_estimate(name: str, estimate: Estimate) -> dict[str, float]:
    """An estimate as metrics: its value, and its standard error where there is one."""
    if estimate.standard_error is None:
        return {name: estimate.value}
    return {name: estimate.value, f"{name}_error": estimate.standard_error}


def _plain(text: str) -> list[str]:
    return text.lower().translate(_WITHOUT_PUNCTUATION).split()
