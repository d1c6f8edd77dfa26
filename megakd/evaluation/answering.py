"""The held-out prompts that models are asked."""

from __future__ import annotations

from megakd.data.dataset import KeyedPrompt
from megakd.data.dataset import prompts as tokenised_prompts
from megakd.data.readers import PreferenceRow
from megakd.run import Run


def held_out_prompts(run: Run, count: int | None) -> list[tuple[PreferenceRow, KeyedPrompt]]:
    """The first `count` held-out rows (all for None), each once, whose prompt leaves room for an answer."""
    data = run.recipe.data
    kept, _ = tokenised_prompts(run.eval_rows, run.tokenizer, data.max_length - 1, too_long=data.too_long)
    rows = {row.key: row for row in run.eval_rows}
    return [(rows[prompt.key], prompt) for prompt in kept[:count]]
