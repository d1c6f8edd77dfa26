"""ROUGE-L by the package rouge-score. Lin, 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", sec. 3."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.errors import LossInputError
from megakd.evaluation import Estimate


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> Estimate:
    """Mean of `rouge_l_scores`."""
    return Estimate.of(rouge_l_scores(predictions, references))


def rouge_l_scores(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L F1 in [0, 1] of each prediction against its one reference.

    F1 of the longest common subsequence of lower-cased words, Porter-stemmed, as DPKD and MiniLLM report it (they
    print it times 100). The package knows words of a-z and 0-9 only: text in other scripts scores 0.
    """
    from rouge_score.rouge_scorer import RougeScorer  # half a second of imports, wanted by the evaluation only

    if len(predictions) != len(references):
        raise LossInputError(f"{len(predictions)} predictions and {len(references)} references: give one each")
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(predictions, references, strict=True)
    return [scorer.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in pairs]
