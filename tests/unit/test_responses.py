"""Figures of a model's own answers: over rows, seeds and reference lengths, against sums written out."""

from __future__ import annotations

import math
import statistics

import pytest
from rouge_score.rouge_scorer import RougeScorer

from megakd.errors import LossInputError
from megakd.evaluation.responses import LENGTHS, exactly, length_class, response_metrics

REFERENCES = ["There are twelve.", "word " * 30, "word " * 31, "one two three " * 24]
ANSWERS = [
    ["there ARE twelve", "word word", "another thing", "one two three four"],
    ["There are nine.", "word " * 30, "word " * 40, "none"],
    ["twelve there are", "something else", "word " * 31, "one two three " * 24],
]


def lcs_f1(answer: str, reference: str) -> float:
    return RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"].fmeasure


def test_means_and_standard_errors():
    found = response_metrics(ANSWERS, REFERENCES)
    table = [[lcs_f1(*pair) for pair in zip(answers, REFERENCES, strict=True)] for answers in ANSWERS]
    by_row = [statistics.fmean(column) for column in zip(*table, strict=True)]
    by_seed = [statistics.fmean(line) for line in table]
    assert found["rouge_l"] == pytest.approx(statistics.fmean(by_row))
    assert found["rouge_l_error"] == pytest.approx(statistics.stdev(by_row) / math.sqrt(4))
    assert found["rouge_l_seed_error"] == pytest.approx(statistics.stdev(by_seed) / math.sqrt(3))
    assert found["exact_match"] == pytest.approx((1 + 1 + 1 + 1) / 12)
    assert found["exact_match_seed_error"] == pytest.approx(statistics.stdev([1 / 4, 1 / 4, 2 / 4]) / math.sqrt(3))
    # The first two references have 3 and 30 words, the third 31, the last 72.
    assert [found[f"references_words_{name}"] for name in LENGTHS] == [2, 1, 1]
    assert found["rouge_l_words_1_30"] == pytest.approx((by_row[0] + by_row[1]) / 2)
    assert found["rouge_l_words_31_70"] == pytest.approx(by_row[2])
    assert found["exact_match_words_71_up"] == pytest.approx(1 / 3)


def test_one_seed_has_no_error_over_seeds_and_one_row_none_at_all():
    found = response_metrics([["a b"]], ["a b"])
    assert found == {"rouge_l": 1.0, "exact_match": 1.0, "rouge_l_words_1_30": 1.0, "exact_match_words_1_30": 1.0,
                     "references_words_1_30": 1, "distinct_answers": 1.0}


@pytest.mark.parametrize(("words", "name"), [(1, "1_30"), (30, "1_30"), (31, "31_70"), (70, "31_70"), (71, "71_up")])
def test_classes_of_length(words, name):
    assert length_class(" ".join(["w"] * words)) == name


def test_exact_match_looks_at_words_alone():
    assert exactly("  It's, twelve!\n", "its twelve") and exactly("a  b", "a\nb")
    assert not exactly("ab", "a b") and not exactly("", "a")


def test_the_same_answer_to_all():
    refusals = [["I don't.", "i DON'T", "I don't know."], ["a", "b", "c"]]
    assert response_metrics(refusals, ["x", "y", "z"])["distinct_answers"] == pytest.approx((2 / 3 + 1) / 2)
    assert response_metrics([["no"] * 4], ["x"] * 4)["distinct_answers"] == 1 / 4


def test_what_cannot_be_measured():
    with pytest.raises(LossInputError, match="answers of no seed"):
        response_metrics([], ["a"])
    with pytest.raises(LossInputError, match="1 predictions and 2 references"):
        response_metrics([["a"]], ["a", "b"])
    with pytest.raises(LossInputError):
        response_metrics([[]], [])
