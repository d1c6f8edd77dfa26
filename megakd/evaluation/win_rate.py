"""The win rate: how often a judge prefers a model's answer to a held-out prompt to that of the stage's first model."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megakd.comm import broadcast_json, on_one_rank
from megakd.config_evaluation import CommandJudge, WinRateStage
from megakd.data.artefacts import Rollout, RolloutsHeader, read_rollouts, write_rollouts
from megakd.data.dataset import KeyedPrompt, sample_id
from megakd.data.readers import PreferenceRow
from megakd.disk import atomic_writer
from megakd.errors import DataError
from megakd.evaluation import Estimate
from megakd.evaluation.answering import held_out_prompts
from megakd.evaluation.judges import Comparison, ask_command, ask_reward_model
from megakd.evaluation.responses import named_estimate
from megakd.manifest import hash_path
from megakd.mcore.model import freeze
from megakd.rollout.engine import Prompt
from megakd.rollout.replicas import generate_on_replicas
from megakd.rollout.sampling import Sampling
from megakd.run import Run

logger = logging.getLogger("megakd")

JUDGEMENTS = "judgements.jsonl"
Asked = Sequence[tuple[PreferenceRow, KeyedPrompt]]


@dataclass(frozen=True)
class Answers:
    """One model's answers to the prompts, in their order."""

    texts: list[str]
    tokens: int
    """Of all of them together."""
    generated: bool
    """False where they are an earlier attempt's."""


def win_rate(run: Run, stage: WinRateStage) -> tuple[int, dict[str, dict[str, float]]]:
    """Lets the models answer and the judge decide. Every rank calls it; rank 0 asks the judge and writes.

    Returns:
        tokens that were generated, and by label the metrics: `win_rate` with its standard error over the prompts (a tie
        is half a win, the two orders of a prompt are one result), `win_rate_ties` (share of the verdicts),
        `win_rate_consistent` (share of the prompts on which both orders agree) and `win_rate_tokens` (mean length).

    Raises:
        ConfigError, DataError, ModelError: the judge failed; on every rank (a MegakdError on others than rank 0).
    """
    asked = held_out_prompts(run, stage.prompts)
    answers = {label: _answers(run, stage, label, asked) for label in stage.models}
    first, *others = stage.models
    comparisons = [
        Comparison(row.key, row.prompt, label, answers[label].texts[number], first, answers[first].texts[number])
        for label in others
        for number, (row, _) in enumerate(asked)
    ]
    folder = run.folder(stage.name)

    def judge() -> list[dict]:
        if isinstance(stage.judge, CommandJudge):
            return ask_command(stage.judge, f"stages.{stage.name}.judge.command", comparisons, folder)
        return ask_reward_model(stage.judge, comparisons, str(run.world.device))

    results = on_one_rank(judge, 0, dist.group.WORLD, run.world.device)
    if run.is_root:
        with atomic_writer(folder / JUDGEMENTS) as stream:
            for each, result in zip(comparisons, results, strict=True):
                line = {"key": each.key, "prompt": list(each.prompt), "model": each.model, "answer": each.answer,
                        "against": each.against, "other": each.other, **result}
                stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    metrics = {label: {"win_rate_tokens": own.tokens / len(asked)} for label, own in answers.items()}
    for label in others:
        wins = [result["wins"] for each, result in zip(comparisons, results, strict=True) if each.model == label]
        metrics[label] |= win_metrics(wins)
        if run.is_root:
            logger.info("%s against %s: win rate %.4f", label, first, metrics[label]["win_rate"])
    return sum(own.tokens for own in answers.values() if own.generated), metrics


def win_metrics(wins: Sequence[Sequence[float]]) -> dict[str, float]:
    """The figures of one model: for each prompt what its answer won in each order (1, 0.5 or 0)."""
    verdicts = [value for own in wins for value in own]
    metrics = named_estimate("win_rate", Estimate.of([sum(own) / len(own) for own in wins]))
    metrics["win_rate_ties"] = sum(value == 0.5 for value in verdicts) / len(verdicts)
    if all(len(own) > 1 for own in wins):
        metrics["win_rate_consistent"] = sum(len(set(own)) == 1 for own in wins) / len(wins)
    return metrics


def _answers(run: Run, stage: WinRateStage, label: str, asked: Asked) -> Answers:
    """A model's answers: those that an earlier attempt of the stage left, or new ones, which it leaves."""
    path = run.folder(stage.name) / f"answers-{label}.jsonl"
    data, directory = run.recipe.data, run.recipe.path_of_model(stage.models[label])
    settings = stage.model_dump(include={"temperature", "top_k", "top_p", "max_new_tokens"})
    found = header = None
    if run.is_root:
        kept = {**settings, "seed": run.recipe.seed, "max_length": data.max_length}
        header = RolloutsHeader(hash_path(directory), run.tokenizer.fingerprint, kept)
        found = _earlier(run, path, header, asked)
    found = broadcast_json(found, 0, dist.group.WORLD, run.world.device)
    if found is not None:
        return Answers(found["texts"], found["tokens"], False)
    model = freeze(run.load_model("student", stage.models[label]))
    sampling = Sampling(n=1, stop_ids=run.tokenizer.stop_ids, seed=run.recipe.seed, **settings)
    prompts = [Prompt(sample_id(prompt.key), prompt.tokens) for _, prompt in asked]
    rollouts = generate_on_replicas(run, model, prompts, sampling, stage.slots)
    texts = [run.tokenizer.decode(rollout.tokens) for rollout in rollouts]
    if run.is_root:
        write_rollouts(path, header, [
            Rollout(prompt.key, 0, prompt.hash, rollout.tokens, text, rollout.finish_reason, rollout.log_probs)
            for (_, prompt), rollout, text in zip(asked, rollouts, texts, strict=True)
        ])
    return Answers(texts, sum(len(rollout.tokens) for rollout in rollouts), True)


def _earlier(run: Run, path: Path, header: RolloutsHeader, asked: Asked) -> dict | None:
    """What an attempt that did not get to its end has left, if it is what would be made again."""
    if not path.exists():
        return None
    try:
        old, rollouts = read_rollouts(path, run.tokenizer, keys=[prompt.key for _, prompt in asked])
    except DataError as error:
        logger.warning("%s is made again: %s", path, error)
        return None
    own = [rollouts[prompt.key][0] for _, prompt in asked]
    same = all(rollout.prompt_hash == prompt.hash for rollout, (_, prompt) in zip(own, asked, strict=True))
    if old != header or not same:
        logger.warning("%s is made again: it was made with other settings, another model or other prompts", path)
        return None
    logger.info("%s: answered by an earlier attempt", path)
    return {"texts": [rollout.text for rollout in own], "tokens": sum(len(rollout.tokens) for rollout in own)}
