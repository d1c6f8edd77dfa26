"""How often a model, read as a reward, prefers the chosen answer of a held-out pair.

Legend: P pairs. Log-probabilities are sums over an answer's tokens, its closing token included.
"""

from __future__ import annotations

from collections.abc import Sequence

from megakd.errors import LossInputError
from megakd.evaluation import Estimate


def reward_accuracy(chosen_P: Sequence[float], rejected_P: Sequence[float], len_chosen_P: Sequence[int],
                    len_rejected_P: Sequence[int]) -> Estimate:
    """Share of the pairs whose chosen answer has the higher mean log-probability a token; a tie counts half.

    The reward of SimPO (Meng et al., 2024, eq. 3): r(y) = log pi(y | x) / |y|.

    Args:
        chosen_P, rejected_P: log-probabilities of the answers.
        len_chosen_P, len_rejected_P: their lengths in tokens.
    """
    _check_lengths(chosen_P, rejected_P, len_chosen_P, len_rejected_P)
    if any(length < 1 for length in [*len_chosen_P, *len_rejected_P]):
        raise LossInputError("an answer of no tokens has no mean log-probability: drop the pair")
    columns = zip(chosen_P, len_chosen_P, rejected_P, len_rejected_P, strict=True)
    return _share([a / len_a - b / len_b for a, len_a, b, len_b in columns])


def relative_reward_accuracy(chosen_P: Sequence[float], rejected_P: Sequence[float], start_chosen_P: Sequence[float],
                             start_rejected_P: Sequence[float]) -> Estimate:
    """Share of the pairs whose chosen answer gained more on the start model than the rejected one; a tie counts half.

    The implicit reward of DPO (Rafailov et al., 2023, eq. 5 without its constant): r(y) = log pi(y | x) -
    log pi_start(y | x); beta > 0 does not change the order. A model against itself scores 0.5.

    Args:
        chosen_P, rejected_P: log-probabilities under the model.
        start_chosen_P, start_rejected_P: under the model that its training began from.
    """
    _check_lengths(chosen_P, rejected_P, start_chosen_P, start_rejected_P)
    columns = zip(chosen_P, start_chosen_P, rejected_P, start_rejected_P, strict=True)
    return _share([(a - start_a) - (b - start_b) for a, start_a, b, start_b in columns])


def _check_lengths(*columns: Sequence[float]) -> None:
    sizes = [len(column) for column in columns]
    if len(set(sizes)) != 1:
        raise LossInputError(f"columns of {sizes} numbers: every pair needs one in each")


def _share(margins_P: Sequence[float]) -> Estimate:
    """Share of positive margins, zero ones counting half."""
    margins_P = [float(margin) for margin in margins_P]
    bad = sum(margin != margin for margin in margins_P)
    if bad:
        raise LossInputError(f"{bad} of {len(margins_P)} pairs have a reward that is not a number")
    return Estimate.of([1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins_P])
