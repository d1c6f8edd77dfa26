"""Every method's stages on tiny models, as a user runs them: one chain on two ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megakd.data.readers import PreferenceRow, read_preferences
from megakd.data.tokenizers import load_tokenizer
from megakd.evaluation.preferences import REQUEST, letter_ids
from tests.recipes import run_in_pool, tiny_recipe, write_recipe, write_rows, write_tiny_model
from tests.tiny_tokenizer import PLAIN, write_tokenizer

METHODS: dict[str, dict[str, Any]] = {
    "sft": {"objective": {"kind": "sft"}},
    "kd": {"objective": {"kind": "kd"}},
    "reverse_kl": {"objective": {"kind": "kd", "divergence": "reverse_kl", "weight": 1.0}},
    "akl": {"objective": {"kind": "kd", "divergence": "akl", "weight": 1.0}},
    "gkd": {"objective": {"kind": "kd", "divergence": "jsd", "weight": 1.0, "on_policy": 0.5}, "rollouts": "answers"},
    "seqkd": {"objective": {"kind": "sft", "answers": "teacher"}, "teacher_answers": "teacher_answers"},
    "ipo": {"objective": {"kind": "ipo"}},
    "cpo": {"objective": {"kind": "cpo"}},
    "simpo": {"objective": {"kind": "simpo"}},
    "dckd_reference": {"objective": {"kind": "dckd", "teacher": "reference"}},
    "adpa": {"objective": {"kind": "adpa"}, "rollouts": "answers"},
    "adpa_no_reference": {"objective": {"kind": "adpa", "reference": False}, "rollouts": "answers"},
    "dpkd": {"objective": {"kind": "dpkd"}, "rollouts": "answers", "teacher_answers": "teacher_answers"},
    "dpkd_token": {"objective": {"kind": "dpkd_token"}},
    "minillm": {"objective": {"kind": "minillm"}, "steps": 4,
                "online": {"every": 2, "passes": 2, "teacher_mix": 0.3, "max_new_tokens": 6, "slots": 4}},
    "dpkd_online": {"objective": {"kind": "dpkd"}, "online": {"max_new_tokens": 6}},
    "dpkd_text": {"objective": {"kind": "dpkd", "lm_on": "text"}, "rollouts": "answers",
                  "teacher_answers": "teacher_answers"},
    "gkd_online": {"objective": {"kind": "kd", "divergence": "jsd", "on_policy": 0.5},
                   "online": {"every": 2, "max_new_tokens": 6}},
    "pad_vanilla": {"objective": {"kind": "pad", "loss": "vanilla"}, "rollouts": "several", "scores": "score"},
    "pad": {"objective": {"kind": "pad", "beta": 2.0}, "rollouts": "several", "scores": "score"},
}


def generating_stages(start: str) -> list[dict[str, Any]]:
    drawn = {"kind": "generate", "max_new_tokens": 6, "slots": 8, "temperature": 1.0}
    return [
        {"name": "answers", "model": start, **drawn},
        {"name": "teacher_answers", "role": "teacher", "model": "run:teacher", **drawn},
        {"name": "several", "model": start, **drawn, "n": 4, "keep": 3},
        {"name": "score", "kind": "score", "model": "run:teacher", "rollouts": "several", "chunk_tokens": 16,
         "signal": {"kind": "preferences", "likelihood_weight": 0.5, "max_length": 512}},
    ]


def training_stage(name: str, start: str) -> dict[str, Any]:
    kind = METHODS[name]["objective"]["kind"]
    stage_kind = {"sft": "sft", "ipo": "dpo", "cpo": "dpo", "simpo": "dpo"}.get(kind, "distill")
    if name == "seqkd":
        stage_kind = "distill"
    return {"name": name, "kind": stage_kind, "init": start, "save_as": f"student_{name}", "steps": 2,
            "global_batch": 4, "chunk_tokens": 16, "optimizer": {"lr": 1e-3}, **METHODS[name]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run of all methods."""
    folder = tmp_path_factory.mktemp("methods")
    raw = tiny_recipe(folder, context=512)
    start = raw["student"]["model"]
    raw["data"]["text"] = [str(write_rows(folder / "text.jsonl", [{"text": "Boats and cats and kites. " * n} for n in
                                                                  range(1, 9)]))]
    raw["stages"] = [
        raw["stages"][0], *generating_stages(start), *(training_stage(name, start) for name in METHODS)
    ]
    run_in_pool(write_recipe(folder, raw))
    return Path(raw["output"])


def test_every_method_trains(finished):
    for name, method in METHODS.items():
        lines = [json.loads(line) for line in (finished / "stages" / name / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == method.get("steps", 2)
        assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
        assert (finished / "models" / f"student_{name}" / "config.json").is_file()


def rows_of(folder: Path, stage: str, file: str) -> list[dict]:
    """An artefact's rows, without its header."""
    _, *lines = map(json.loads, (folder / "stages" / stage / file).read_text().splitlines())
    return lines


def test_scores_are_there_for_every_kept_answer(finished):
    answers = rows_of(finished, "several", "rollouts.jsonl")
    scores = rows_of(finished, "score", "scores.jsonl")
    kept = {(row["key"], row["index"]) for row in answers if row["finish_reason"] != "alike"}
    assert {(row["key"], row["index"]) for row in scores} == kept and {index for _, index in kept} == {0, 1, 2}
    for row in scores:
        if row["score"] is not None:
            assert row["score"] == pytest.approx(0.5 * row["likelihood"] + 0.5 * row["selection"])
            assert math.log(1e-8 / 2) - 1e-9 <= row["selection"] <= 0.0
    manifest = json.loads((finished / "stages" / "score" / "manifest.json").read_text())
    assert manifest["metrics"]["questions"] == len(kept) // 3 * 6 and manifest["metrics"]["unscored"] < len(kept)


def test_scores_are_those_of_transformers(finished):
    """The teacher ran over two pipeline stages, packed; here one sequence at a time in one process."""
    teacher = finished / "models" / "teacher"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher), load_tokenizer(teacher)
    rows = {row.key: row for row in read_preferences(finished.parent / "train.jsonl")}
    answers = rows_of(finished, "several", "rollouts.jsonl")
    scores = {(row["key"], row["index"]): row for row in rows_of(finished, "score", "scores.jsonl")}

    def log_probs(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)

    def letter(row: PreferenceRow, first: str, second: str, which: str) -> float:
        [message] = row.prompt
        content = REQUEST.format(request=message["content"], first=first, second=second)
        tokens, _ = tokenizer.encode([{"role": "user", "content": content}], None, close=False)
        return log_probs(tokens)[-1, letter_ids(tokenizer, which)].exp().sum().item()

    for key in sorted({key for key, _ in scores})[:2]:
        row, own = rows[key], [answer for answer in answers if answer["key"] == key]
        for answer in own:
            tokens, prompt = tokenizer.encode(row.prompt, answer["text"], close=answer["finish_reason"] == "stop")
            labels = torch.tensor(tokens[prompt:])[:, None]
            score = scores[key, answer["index"]]
            if len(labels):
                exact = log_probs(tokens)[prompt - 1 : -1].gather(1, labels).mean().item()
                assert score["likelihood"] == pytest.approx(exact, rel=1e-5)
            mass = 1e-8 + sum(
                (letter(row, answer["text"], other["text"], "A") + letter(row, other["text"], answer["text"], "B")) / 2
                for other in own if other is not answer
            )
            assert score["selection"] == pytest.approx(math.log(mass / 2), rel=1e-5)


def test_a_pad_teacher_with_another_tokenizer(tmp_path):
    """It reads texts: its vocabulary, merges, template and context are its own."""
    raw = tiny_recipe(tmp_path)
    start = raw["student"]["model"]
    foreign = write_tiny_model(tmp_path / "foreign", seed=3, vocab_size=640, max_positions=512)
    # Words behind blanks and bytes where there is no word, in place of bytes; another template.
    write_tokenizer(foreign, template=PLAIN, metaspace=True)
    ours, theirs = load_tokenizer(Path(start)), load_tokenizer(foreign)
    text = "There are 12 boats."
    assert ours.encode_text(text) != theirs.encode_text(text) and ours.vocab_size != theirs.vocab_size
    raw["teacher"]["model"] = str(foreign)
    several, score = generating_stages(start)[2:]
    score["model"] = str(foreign)
    raw["stages"] = [several, score, training_stage("pad", start)]
    run_in_pool(write_recipe(tmp_path, raw))
    manifest = json.loads((Path(raw["output"]) / "stages" / "pad" / "manifest.json").read_text())
    assert math.isfinite(manifest["metrics"]["pad"])
