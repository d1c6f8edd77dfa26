"""What each kind of stage does once the run is up. `pipeline.py` decides which of them run."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from megakd.comm import on_one_rank
from megakd.config_evaluation import AnswersStage, EvalStage, LmEvalStage, WinRateStage
from megakd.config_stages import AnyStage, ExportStage, GenerateStage, ReportStage, ScoreStage, TrainStage
from megakd.data import artefacts
from megakd.data.dataset import KeyedPrompt, left_out, sample_id, skipped
from megakd.data.dataset import prompts as tokenised_prompts
from megakd.data.scores import ScoresHeader, write_scores
from megakd.data.tokenizers import load_tokenizer
from megakd.disk import atomic_writer
from megakd.errors import DataError
from megakd.evaluation.benchmarks import answer_questions
from megakd.evaluation.evaluate import Evaluation
from megakd.evaluation.lm_harness import run_tasks
from megakd.evaluation.preferences import score_rollouts
from megakd.evaluation.summary import write_summary
from megakd.evaluation.win_rate import win_rate
from megakd.manifest import hash_path
from megakd.mcore.model import freeze
from megakd.provenance import ROLLOUTS, SCORES
from megakd.report import write_report
from megakd.rollout.engine import Prompt
from megakd.rollout.engine import Rollout as Answer
from megakd.rollout.replicas import generate_on_replicas
from megakd.rollout.sampling import Sampling
from megakd.rollout.selection import most_different
from megakd.run import Run
from megakd.teacher.scoring import score_signals
from megakd.train import train

logger = logging.getLogger("megakd")

SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class StageResult:
    """What goes into the stage's manifest, the same on every rank."""

    tokens: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seconds_before: float = 0.0
    """Time of what earlier starts did and this one went on from; on rank 0."""


def run_stage(run: Run, stage: AnyStage, fingerprint: str) -> StageResult:
    """Does one stage. Every rank calls it."""
    match stage:
        case TrainStage():
            return _train(run, stage, fingerprint)
        case GenerateStage():
            return _generate(run, stage)
        case ScoreStage():
            return _score(run, stage)
        case EvalStage():
            return _evaluate(run, stage)
        case WinRateStage():
            return _by_label(run, stage, *win_rate(run, stage))
        case AnswersStage():
            return StageResult(*answer_questions(run, stage))
        case LmEvalStage():
            return _by_label(run, stage, 0, _run_tasks(run, stage))
        case ExportStage():
            return _export(run, stage)
        case ReportStage():
            return _report(run)


def _train(run: Run, stage: TrainStage, fingerprint: str) -> StageResult:
    _remove_unfinished_model(run, stage.save_as)
    result = train(run, stage, fingerprint)
    if run.is_root:
        # The model is written; its training state is of no more use.
        shutil.rmtree(run.folder(stage.name) / "checkpoints", ignore_errors=True)
    return StageResult(result.tokens, result.metrics, result.seconds_before)


def _generate(run: Run, stage: GenerateStage) -> StageResult:
    limit = run.recipe.data.max_length - 1
    prompts, too_long = tokenised_prompts(run.train_rows, run.tokenizer, limit, too_long=run.recipe.data.too_long)
    model = freeze(run.load_model(stage.role, stage.model))
    sampling = Sampling(
        temperature=stage.temperature, top_k=stage.top_k, top_p=stage.top_p, n=stage.n,
        max_new_tokens=stage.max_new_tokens, stop_ids=run.tokenizer.stop_ids, seed=run.recipe.seed,
    )
    asked = [Prompt(sample_id(prompt.key), prompt.tokens) for prompt in prompts]
    answers = generate_on_replicas(run, model, asked, sampling, stage.slots)
    rows = [
        row
        for number, prompt in enumerate(prompts)
        for row in _kept_answers(run, stage, prompt, answers[number * stage.n : (number + 1) * stage.n])
    ]
    alike = sum(row.finish_reason == "alike" for row in rows)
    if alike:
        logger.warning("%d of %d prompts left out: fewer than %d of %d answers differ", alike, len(prompts),
                       stage.keep, stage.n)
    if alike == len(prompts):
        raise DataError(run.recipe.data.train[0], None, None, f"no prompt has {stage.keep} different answers out of "
                        f"{stage.n}", f"Raise stages.{stage.name}.temperature or n")
    if run.is_root:
        directory = run.recipe.path_of_model(stage.model)
        settings = stage.model_dump(include={"n", "keep", "temperature", "top_k", "top_p", "max_new_tokens"})
        settings["seed"] = run.recipe.seed
        header = artefacts.RolloutsHeader(hash_path(directory), run.tokenizer.fingerprint, settings)
        rows += [left_out(prompt) for prompt in too_long]
        artefacts.write_rollouts(run.folder(stage.name) / ROLLOUTS, header, rows)
    tokens = sum(len(answer.tokens) for answer in answers)
    stopped = sum(answer.finish_reason == "stop" for answer in answers)
    return StageResult(tokens, {"answers": len(answers), "stopped": stopped / len(answers),
                                "mean_tokens": tokens / len(answers), "prompts_alike": alike})


def _kept_answers(
    run: Run, stage: GenerateStage, prompt: KeyedPrompt, answers: Sequence[Answer]
) -> list[artefacts.Rollout]:
    """What the rollout file says about a prompt and its answers."""
    texts = [run.tokenizer.decode(answer.tokens) for answer in answers]
    kept = list(range(len(answers))) if stage.keep is None else most_different(texts, stage.keep)
    if kept is None:
        return [skipped(prompt, "alike")]
    return [
        artefacts.Rollout(prompt.key, index, prompt.hash, answers[place].tokens, texts[place],
                          answers[place].finish_reason, answers[place].log_probs)
        for index, place in enumerate(kept)
    ]


def _score(run: Run, stage: ScoreStage) -> StageResult:
    if stage.signal.kind != "preferences":
        return StageResult(*score_signals(run, stage))
    directory, file = run.recipe.path_of_model(stage.model), run.folder(stage.rollouts) / ROLLOUTS
    _, rollouts = artefacts.read_rollouts(file, run.tokenizer, keys=[row.key for row in run.train_rows])
    rows = {row.key: row for row in run.train_rows if rollouts[row.key][0].finish_reason not in artefacts.SKIPPED}
    answers = [rollouts[key] for key in rows]
    if not rows:
        raise DataError(file, None, None, "no prompt has answers", "Generate on other data, or with other settings")
    if len(answers[0]) < 2:
        raise DataError(file, None, None, "one answer to each prompt: preferences need at least 2",
                        f"Raise stages.{stage.rollouts}.n")
    # The teacher reads texts, by its own template.
    tokenizer = load_tokenizer(directory)
    model = freeze(run.load_model(stage.role, stage.model))
    scores, report = score_rollouts(run, stage, model, tokenizer, list(rows.values()), answers)
    if run.is_root:
        settings = stage.signal.model_dump(exclude={"kind"})
        header = ScoresHeader(hash_path(directory), hash_path(file), settings)
        write_scores(run.folder(stage.name) / SCORES, header, scores)
    return StageResult(0, report)


def _evaluate(run: Run, stage: EvalStage) -> StageResult:
    evaluation = Evaluation(run, stage)
    summary: dict[str, Any] = {}
    answers: dict[str, list[str]] = {}
    for label, model in stage.models.items():
        summary[label], answers[label] = evaluation.measure(freeze(run.load_model("student", model)))
        if run.is_root:
            logger.info("%s: %s", label, ", ".join(f"{name} {value:.4f}" for name, value in summary[label].items()))
    if run.is_root:
        lines = [
            {"prompt": row.prompt[-1]["content"], **{label: texts[number] for label, texts in answers.items()},
             row.answer_field: row.answer}
            for number, row in enumerate(evaluation.prompt_rows)
        ]
        with atomic_writer(run.folder(stage.name) / SAMPLES) as stream:
            stream.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    return _by_label(run, stage, evaluation.tokens, summary)


def _run_tasks(run: Run, stage: LmEvalStage) -> dict[str, dict[str, float]]:
    def work() -> dict[str, dict[str, float]]:
        return {
            label: run_tasks(stage, label, run.recipe.path_of_model(model), run.folder(stage.name),
                             device=run.recipe.device, seed=run.recipe.seed)
            for label, model in stage.models.items()
        }

    return on_one_rank(work, 0, dist.group.WORLD, run.world.device)


def _by_label(run: Run, stage: AnyStage, tokens: int, metrics: dict[str, dict[str, Any]]) -> StageResult:
    """The result of a stage that measures models by label, which goes into the run's summary, too."""
    if run.is_root:
        write_summary(run.recipe, stage.name, metrics)
    return StageResult(tokens, metrics)


def _export(run: Run, stage: ExportStage) -> StageResult:
    _remove_unfinished_model(run, stage.save_as)
    model = freeze(run.load_model("student", stage.model, "copy"))
    parameters = [model.parameters_of(chunk) for chunk in range(len(model.chunks))]
    directory = run.export(model, parameters, stage.model, stage.save_as, stage.dtype)
    return StageResult(0, {"path": str(directory)})


def _report(run: Run) -> StageResult:
    if run.is_root:
        write_report(run.recipe.output)
    return StageResult()


def _remove_unfinished_model(run: Run, name: str) -> None:
    """A model without its stage's manifest was left by a run that was killed between the two; it is made again."""
    directory = run.recipe.output / "models" / name
    if run.is_root and directory.exists():
        shutil.rmtree(directory)
    dist.barrier(group=dist.group.WORLD)
