"""ROUGE-L against the definition, written out."""

from __future__ import annotations

import numpy as np
import pytest

from megakd.errors import LossInputError
from megakd.evaluation import Estimate
from megakd.evaluation.rouge import rouge_l


def _f1(prediction: str, reference: str) -> float:
    """The longest common subsequence by the textbook table; words are chosen so that stemming changes nothing."""
    a, b = prediction.lower().split(), reference.lower().split()
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, left in enumerate(a, 1):
        for j, right in enumerate(b, 1):
            table[i, j] = table[i - 1, j - 1] + 1 if left == right else max(table[i - 1, j], table[i, j - 1])
    common = table[-1, -1]
    return 2 * common / (len(a) + len(b)) if common else 0.0


def test_against_the_definition():
    pairs = [("the cat sat on the mat", "the cat lay on the red mat"), ("one two", "three four"),
             ("A b c d", "d c b a"), ("same words here", "same words here"), ("", "empty answer")]
    found = rouge_l([left for left, _ in pairs], [right for _, right in pairs])
    expected = [_f1(*pair) for pair in pairs]
    assert found.value == pytest.approx(np.mean(expected)) and found.count == 5
    assert found.standard_error == pytest.approx(np.std(expected, ddof=1) / np.sqrt(5))


def test_stems_and_case():
    assert rouge_l(["The Dogs were running"], ["the dog were run"]) == Estimate(1.0, 1, None)


def test_refuses_uneven_or_no_texts():
    with pytest.raises(LossInputError, match="2 predictions and 1 references"):
        rouge_l(["a", "b"], ["a"])
    with pytest.raises(LossInputError, match="no examples"):
        rouge_l([], [])


def test_an_estimate_refuses_what_is_not_finite():
    with pytest.raises(LossInputError, match="1 of 2 values are not finite"):
        Estimate.of([1.0, float("nan")])
