"""Pre-training text beside the rows: each group of a step gets a piece of it, for objectives that keep the student a
language model by it (DPKD, MiniLLM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megakd.batch import Group, Kind, Sample, Step
from megakd.config import Recipe
from megakd.config_stages import TrainStage
from megakd.data.files import list_files, read_rows, type_name
from megakd.data.sampler import StepSampler
from megakd.data.tokenizers import Tokenizer
from megakd.errors import ConfigError, DataError


@dataclass(frozen=True)
class Texts:
    """Pieces of text in the order that steps take them, which the seed alone decides."""

    pieces: Sequence[tuple[int, ...]]
    sampler: StepSampler

    def beside(self, step: Step, number: int) -> Step:
        """Step `number` with one piece more in each group."""
        pieces = (self.pieces[index] for index in self.sampler.indices(number))
        return Step(tuple(
            Group(group.key, (*group.samples, Sample(piece, 1, Kind.TEXT)))
            for group, piece in zip(step.groups, pieces, strict=True)
        ))


def read_stage_texts(recipe: Recipe, stage: TrainStage, tokenizer: Tokenizer) -> Texts:
    """`read_texts` for a training stage of a recipe."""
    data = recipe.data
    return read_texts(data.text, tokenizer, max_length=data.max_length, global_batch=stage.global_batch,
                      seed=recipe.seed)


def read_texts(paths: Sequence[Path], tokenizer: Tokenizer, *, max_length: int, global_batch: int, seed: int) -> Texts:
    """Reads rows with a field `text` and cuts each into pieces of at most `max_length` tokens.

    No template is laid around a text. A piece needs two tokens, as the first is only given; what is left of a text
    after its last whole piece and has just one is not used.

    Raises:
        DataError: a row without text.
        ConfigError: fewer pieces than a step takes.
    """
    pieces: list[tuple[int, ...]] = []
    for file in list_files(paths):
        for place, row in read_rows(file):
            if "text" not in row or not isinstance(row["text"], str) or not row["text"].strip():
                found = type_name(row["text"]) if "text" in row else "missing"
                raise place.error("text", f"{found}; it has to be a string with something in it", "Write text there")
            tokens = tokenizer.encode_text(row["text"])
            pieces += [tuple(tokens[start : start + max_length]) for start in range(0, len(tokens), max_length)
                       if len(tokens) - start > 1]
    if not pieces:
        raise DataError(paths[0], None, "text", "no text has two tokens", "Give longer texts")
    if len(pieces) < global_batch:
        raise ConfigError("data.text", [str(path) for path in paths], f"holds {len(pieces)} pieces of {max_length} "
                          f"tokens or less, and a step takes {global_batch}", "Give more text, or lower global_batch")
    return Texts(pieces, StepSampler(len(pieces), global_batch, seed))
