"""How long a stage's prompts and answers are: measured in the recipe's data, or given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from megakd.batch import Kind
from megakd.check import directory_behind, tokenizer_of
from megakd.config import Recipe
from megakd.data.dataset import preference_groups, read_rows
from megakd.errors import ConfigError
from megakd.hf.families import Architecture
from megakd.planning.work import Lengths

SAMPLE = 256
"""Rows that are tokenised."""


def given_lengths(prompt: float | None, answer: float | None) -> Lengths | None:
    """The lengths of the options `--prompt-tokens` and `--answer-tokens`; None where neither is there.

    Raises:
        ConfigError: only one of them, or no positive number.
    """
    options = {"--prompt-tokens": prompt, "--answer-tokens": answer}
    for option, value in options.items():
        if value is None and any(other is not None for other in options.values()):
            raise ConfigError(option, None, "has to be given with the other one", "Give both, or neither")
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(option, value, "has to be more than 0", "Correct it")
    return None if prompt is None else Lengths(prompt, answer)


def lengths_of(recipe: Recipe, kinds: Sequence[Kind], given: Lengths | None) -> Lengths:
    """Mean lengths of a stage's sequences.

    Answers that models will have made are taken to be as long as the data's.

    Args:
        recipe: whose data and tokenizer are read where nothing is given: a sample of the rows that the seed draws.
        kinds: of the sequences; of those that the data have, all are measured, the chosen ones where there is none.
        given: lengths from the command line.

    Raises:
        ConfigError: nothing is given, and data or tokenizer are not there; or what is given is longer than a sequence
            may be.
        DataError: the data cannot be used.
    """
    if given is not None:
        if given.prompt + given.answer > recipe.data.max_length:
            longest = recipe.data.max_length
            raise ConfigError("--prompt-tokens", given.prompt, f"with the answer's {given.answer:g} it is longer than "
                              "the longest sequence of the recipe", f"Set data.max_length above {longest}")
        return given
    lacking = what_lacks(recipe)
    if lacking is not None:
        field, value, rule = lacking
        raise ConfigError(field, value, f"{rule}, so that the lengths of prompts and answers cannot be measured",
                          "Give --prompt-tokens and --answer-tokens")
    data = recipe.data
    count = SAMPLE if data.train_rows is None else min(SAMPLE, data.train_rows)
    rows = read_rows(data.train, count, recipe.seed, data.answer)
    known = (Kind.CHOSEN, Kind.REJECTED)
    measured = [kind for kind in kinds if kind in known] or [Kind.CHOSEN]
    groups = preference_groups(rows, tokenizer_of(recipe), measured, max_length=data.max_length,
                               too_long=data.too_long)
    samples = [sample for group in groups for sample in group.samples]
    return Lengths(sum(len(sample.tokens) - sample.response_length for sample in samples) / len(samples),
                   sum(sample.response_length for sample in samples) / len(samples))


def what_lacks(recipe: Recipe) -> tuple[str, object, str] | None:
    """What is not there of what lengths are measured from: the field that names it, its value and the rule."""
    if not recipe.data.train:
        return "data.train", [], "names no file"
    for file in recipe.data.train:
        if not file.exists():
            return "data.train", str(file), "there is no such file"
    tokenizer = directory_behind(recipe, recipe.reference.model)
    if not any((tokenizer / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return "reference.model", str(tokenizer), "holds no tokenizer"
    return None


def longest_of(recipe: Recipe, lengths: Lengths) -> Lengths:
    """As long as a sequence may be, with as large a share of answer."""
    factor = recipe.data.max_length / (lengths.prompt + lengths.answer)
    return Lengths(lengths.prompt * factor, lengths.answer * factor)


def longest_prompt(recipe: Recipe, max_new_tokens: int, mean: Lengths) -> int:
    """A row of a cache is as long as a sequence may be: some prompt leaves the answer just what is left, and none is
    taken to be shorter than the mean."""
    return max(1, recipe.data.max_length - max_new_tokens, ceil(mean.prompt))


def longest_answered(recipe: Recipe, architecture: Architecture, prompt: int, max_new_tokens: int) -> Lengths:
    """A prompt, and the tokens that an answer to it may have."""
    return Lengths(prompt, min(max_new_tokens, min(recipe.data.max_length, architecture.max_positions) - prompt))


def cut_off(mean: Lengths, longest: Lengths) -> Lengths:
    """The mean lengths where answers end with `longest`."""
    return replace(mean, answer=min(mean.answer, longest.answer))
