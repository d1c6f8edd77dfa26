"""The rollout engine on all copies of a model."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.comm import all_gather_json
from megakd.mcore.decoder import PipelineDecoder
from megakd.mcore.model import Model, evaluating
from megakd.rollout.engine import Prompt, Rollout, generate
from megakd.rollout.sampling import Sampling
from megakd.run import Run


def generate_on_replicas(
    run: Run, model: Model, prompts: Sequence[Prompt], sampling: Sampling, slots: int
) -> list[Rollout]:
    """Lets the copies of a model (`Layout.copies`) answer the prompts in turn.

    Returns:
        The answers in the order of the prompts (and of the index within one), on every rank.

    Collectives: the engine's, then an all-gather of the answers over the data and context group.
    """
    grid = model.grid
    mine = prompts[grid.layout.copy(grid.at) :: grid.layout.copies]
    with evaluating(model):
        answers = generate(
            PipelineDecoder(model, run.recipe.data.max_length), mine, sampling, slots=slots, pad_id=run.tokenizer.pad_id
        )
    plain = [[r.sample_id, r.index, r.tokens, r.log_probs, r.finish_reason] for r in answers]
    gathered = all_gather_json(plain, grid.groups.dp_cp, run.world.device)
    order = {prompt.sample_id: number for number, prompt in enumerate(prompts)}
    everything = [
        Rollout(i, index, tuple(tokens), tuple(log_probs), reason)
        for part in gathered
        for i, index, tokens, log_probs, reason in part
    ]
    return sorted(everything, key=lambda rollout: (order[rollout.sample_id], rollout.index))
