"""Roles read from disk on tiny models, as a user runs them: one chain on two ranks, and what is refused afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from megakd.batch import Kind
from megakd.config import load
from megakd.data.readers import read_preferences
from megakd.data.signals import Name, SignalsReader
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import ConfigError
from megakd.manifest import finished_stage
from megakd.mcore.runtime import World
from megakd.objectives import build_objective
from megakd.provenance import stage_config, stage_inputs
from megakd.run import Run
from megakd.teacher import cached
from megakd.train import generated_before, training_groups
from tests.e2e.test_chain import curve
from tests.recipes import run_in_pool, tiny_recipe, write_recipe

ANSWERED = {"answers": ["rollout"], "rollouts": "answers"}
BOTH = {"answers": ["teacher_answer", "rollout"], "rollouts": "answers", "teacher_answers": "teacher_answers"}
OF_REFERENCE = {"role": "reference", **ANSWERED}
SCORES: dict[str, dict[str, Any]] = {
    "pairs_hidden": {"signal": {"kind": "hidden_states"}},
    "answers_hidden": {"signal": {"kind": "hidden_states"}, **ANSWERED},
    "reference_hidden": {"signal": {"kind": "hidden_states"}, **OF_REFERENCE},
    "tokens": {"signal": {"kind": "token_log_probs"}, **BOTH},
    "listed": {"signal": {"kind": "top_k", "k": 12}, "answers": ["rejected", "chosen", "rollout"],
               "rollouts": "answers"},
    "reference_listed": {"signal": {"kind": "top_k", "at": "listed"}, **OF_REFERENCE},
    "reference_own": {"signal": {"kind": "top_k", "k": 8}, **OF_REFERENCE},
}
"""Score stages in the layouts of the tiny recipe: the teacher over two pipeline stages, the reference in two copies."""
DPKD = {"objective": {"kind": "dpkd"}, "rollouts": "answers", "teacher_answers": "teacher_answers"}
LISTED = {"kind": "adpa", "top_k": 8}
TRAININGS: dict[str, dict[str, Any]] = {
    "dckd": {"objective": {"kind": "dckd"}, "signals": {"teacher": "pairs_hidden"}},
    "dpkd": {**DPKD, "signals": {"teacher": "tokens"}},
    "dckd_listed": {"objective": {"kind": "dckd", "top_k": 8}, "signals": {"teacher": "listed"}},
    "adpa": {"objective": {"kind": "adpa"}, "rollouts": "answers",
             "signals": {"teacher": "answers_hidden", "reference": "reference_hidden"}},
    "adpa_listed": {"objective": LISTED, "rollouts": "answers",
                    "signals": {"teacher": "listed", "reference": "reference_listed"}},
    "adpa_released": {"objective": {**LISTED, "released": True}, "rollouts": "answers",
                      "signals": {"teacher": "answers_hidden", "reference": "reference_own"}},
}
"""Trainings with all their roles from disk; each also runs with its roles beside the student."""


def stages(student: str, reference: str) -> list[dict[str, Any]]:
    drawn = {"kind": "generate", "max_new_tokens": 6, "slots": 8, "temperature": 1.0}
    training = {"kind": "distill", "init": student, "steps": 2, "global_batch": 4, "chunk_tokens": 16,
                "optimizer": {"lr": 1e-2}}
    found = [
        {"name": "answers", "model": student, **drawn},
        {"name": "teacher_answers", "role": "teacher", "model": "run:teacher", **drawn},
    ]
    for name, settings in SCORES.items():
        model = reference if name.startswith("reference") else "run:teacher"
        found.append({"name": name, "kind": "score", "model": model, "chunk_tokens": 16, **settings})
    for name, settings in TRAININGS.items():
        online = {key: value for key, value in settings.items() if key != "signals"}
        found += [{"name": f"{name}_online", "save_as": f"{name}_online", **training, **online},
                  {"name": name, "save_as": name, **training, **settings}]
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """A run of all score stages and trainings."""
    folder = tmp_path_factory.mktemp("signals")
    raw = tiny_recipe(folder)
    raw["stages"] = [raw["stages"][0], *stages(raw["student"]["model"], raw["reference"]["model"])]
    recipe = write_recipe(folder, raw)
    run_in_pool(recipe)
    return raw, recipe


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    """What each step of a training reports, but its speed."""
    lines = (folder / "stages" / name / "metrics.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in json.loads(line) if key != "seconds"} for line in lines]


@pytest.mark.parametrize("name", TRAININGS)
def test_a_role_from_disk_gives_the_curve_of_one_beside_the_student(finished, name):
    folder = Path(finished[0]["output"])
    beside, from_disk = (metrics(folder, each) for each in (f"{name}_online", name))
    assert len(beside) == 2 and {"loss", "grad_norm"} <= set(beside[0])
    for ours, theirs in zip(from_disk, beside, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def reader_of(folder: Path, name: str) -> SignalsReader:
    return SignalsReader(folder / "stages" / name / "signals")


def test_every_answer_is_there_once_and_as_transformers_has_it(finished):
    """The teacher ran over two pipeline stages, packed; here one sequence at a time in one process."""
    folder = Path(finished[0]["output"])
    teacher = folder / "models" / "teacher"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher), load_tokenizer(teacher)
    rows = read_preferences(folder.parent / "train.jsonl")
    hidden, listed = reader_of(folder, "pairs_hidden"), reader_of(folder, "listed")
    assert set(hidden.entries) == {Name(row.key, kind, 0) for row in rows for kind in (Kind.CHOSEN, Kind.REJECTED)}
    assert len(listed.entries) == 3 * len(rows)
    for row in rows[:3]:
        tokens, prompt = tokenizer.encode(row.prompt, row.rejected, close=True)
        with torch.no_grad():
            output = model(torch.tensor([tokens]), output_hidden_states=True)
        name = Name(row.key, Kind.REJECTED, 0)
        values = hidden.read([hidden.entries[name]])["hidden"]
        torch.testing.assert_close(values, output.hidden_states[-1][0, prompt - 1 : -1], rtol=1e-4, atol=1e-5)
        top = output.logits[0, prompt - 1 : -1].double().log_softmax(-1).topk(12)
        found = listed.read([listed.entries[name]])
        assert torch.equal(found["ids"].long(), top.indices)
        torch.testing.assert_close(found["log_probs"].double(), top.values, rtol=1e-5, atol=1e-6)


def test_the_artefact_is_safetensors_and_json_of_each_replica(finished):
    folder = Path(finished[0]["output"]) / "stages"
    assert sorted(path.name for path in (folder / "reference_hidden" / "signals").iterdir()) == [
        "header.json", "index.jsonl", "shard-00000.safetensors", "shard-00001.safetensors"]
    header = json.loads((folder / "reference_listed" / "signals" / "header.json").read_text())
    assert set(header["inputs"]) == {"rollouts", "at"} and header["columns"] == {"log_probs": ["float32", 12]}
    with safe_open(folder / "tokens" / "signals" / "shard-00000.safetensors", "pt") as file:
        assert file.get_slice("log_probs").get_dtype() == "F32"
    manifest = json.loads((folder / "listed" / "manifest.json").read_text())
    assert manifest["metrics"]["bytes"] == manifest["metrics"]["positions"] * 12 * 8
    assert not list(folder.rglob("*.partial"))


# ------------------------------------------------------------------------------------------------------------ refusals
def problem(finished, name: str, role: str) -> str | None:
    """What is told of a role's signals when the training `name` is to begin on the run as it is now."""
    raw, recipe = finished
    run = Run(load(recipe), World(0, 1, torch.device("cpu")))
    training = next(stage for stage in run.recipe.stages if stage.name == name)
    objective = build_objective(training.objective)
    groups = training_groups(run, objective.requires, generated_before(run, training))
    return cached.find_problem(run, training, role, objective.requires.teacher_kinds[role], groups)


@contextmanager
def spoilt(path: Path, change: Callable[[bytes], bytes]) -> Iterator[Path]:
    """A file with another content for a while."""
    content = path.read_bytes()
    path.write_bytes(change(content))
    try:
        yield path
    finally:
        path.write_bytes(content)


def in_capitals(content: bytes) -> bytes:
    return content.replace(b"There are", b"THERE ARE", 1)


def test_the_run_as_it_is_has_no_problem(finished):
    assert [problem(finished, name, role) for name in TRAININGS for role in TRAININGS[name]["signals"]] == [None] * 9


@pytest.mark.parametrize(
    ("name", "role", "file", "change", "words"),
    [
        ("dckd", "teacher", "models/teacher/config.json", lambda text: text + b" ",
         "the teacher's model {file.parent} is no longer what these signals were made with. Make them again: --redo "),
        ("adpa", "reference", "stages/answers/rollouts.jsonl", lambda text: text + b"\n",
         "{file} is no longer what these signals were made with. Make them again: --redo reference_hidden"),
        ("adpa_listed", "reference", "stages/listed/signals/header.json", lambda text: text + b" ",
         "{file} is no longer what these signals were made with. Make them again: --redo reference_listed"),
        ("dckd", "teacher", "../train.jsonl", in_capitals,
         "run/stages/pairs_hidden/signals: row train.jsonl:1, chosen answer 0: its tokens differ from those that "),
        ("dckd", "teacher", "stages/pairs_hidden/signals/shard-00000.safetensors", lambda data: data[:-4],
         "{file}: has "),
        ("dpkd", "teacher", "stages/tokens/signals/index.jsonl", lambda data: data[: len(data) // 2],
         "{file}: is not the one that was written: it is cut or damaged. Score again"),
        ("dpkd", "teacher", "stages/tokens/signals/header.json", lambda data: data[: len(data) // 2],
         "stages/tokens/signals: header.json is not that of 'megakd signals 1'"),
    ],
)
def test_what_has_changed_or_is_cut_is_refused_by_name(finished, name, role, file, change, words):
    with spoilt(Path(finished[0]["output"]) / file, change) as path:
        assert words.format(file=path) in problem(finished, name, role)


def test_a_finished_stage_says_which_input_has_changed(finished):
    """Its manifest, as of every stage: the score stage names the rollouts, the training the signals."""
    recipe = load(finished[1])
    by_name = {stage.name: stage for stage in recipe.stages}
    folder = recipe.output / "stages"
    for name, file, word in (("tokens", "answers/rollouts.jsonl", "inputs.rollouts"),
                             ("reference_listed", "listed/signals/index.jsonl", "inputs.at"),
                             ("adpa_listed", "listed/signals/index.jsonl", "inputs.signals.teacher")):
        stage = by_name[name]
        with spoilt(folder / file, lambda content: content + b"\n"), pytest.raises(ConfigError, match=word):
            finished_stage(folder / name, stage=name, kind=stage.kind, config=stage_config(recipe, stage),
                           inputs=stage_inputs(recipe, stage))


# --------------------------------------------------------------------------------------- the last: they change the run
@pytest.mark.parametrize("axis", ["context", "data"])
def test_another_layout_and_micro_batch_read_the_same(finished, axis):
    """Written by a teacher of two pipeline stages and two copies of the reference for TP2; here read at TP1 by two
    replicas, or by two ranks that share each sequence."""
    raw, recipe = finished
    folder, names = Path(raw["output"]), ("dckd", "adpa_listed", "adpa_released")
    right = {name: curve(folder, name) for name in names}
    parallel = "{context: 2}" if axis == "context" else "{}"
    run_in_pool(recipe, f"student.parallel={parallel}", "student.micro_batch=1", only=names, redo=names)
    for name in names:
        manifest = json.loads((folder / "stages" / name / "manifest.json").read_text())
        assert manifest["layout"]["student"][axis] == 2
        assert curve(folder, name) == pytest.approx(right[name], rel=1e-5)


def test_a_killed_stage_begins_anew_and_another_layout_writes_the_same(finished):
    """The teacher and the reference at TP2, over what a stage leaves that is killed in the middle or at its end."""
    raw, recipe = finished
    folder = Path(raw["output"])
    stages, names = folder / "stages", ("listed", "reference_listed", "answers_hidden")
    right = {name: everything_in(folder, name) for name in names}
    curve_before = curve(folder, "adpa_listed")
    for name in names:
        (stages / name / "manifest.json").unlink()
    (stages / "listed" / "signals").rename(stages / "listed" / "signals.partial")
    (stages / "listed" / "signals.partial" / "shard-00007.safetensors").write_bytes(b"half")
    cut = "parallel={tensor: 2, pad_heads: true}"
    run_in_pool(recipe, f"teacher.{cut}", f"reference.{cut}", "teacher.micro_batch=4", redo=["adpa_listed"],
                only=(*names, "adpa_listed"))
    for name in names:
        found = everything_in(folder, name)
        assert found.keys() == right[name].keys()
        for answer, columns in found.items():
            for column, values in columns.items():
                torch.testing.assert_close(values, right[name][answer][column], rtol=1e-5, atol=1e-5)
        assert not (stages / name / "signals.partial").exists()
        assert not (stages / name / "signals" / "shard-00007.safetensors").exists()
    assert curve(folder, "adpa_listed") == pytest.approx(curve_before, rel=1e-5)


def everything_in(folder: Path, name: str) -> dict[Name, dict[str, torch.Tensor]]:
    reader = reader_of(folder, name)
    return {answer: {key: values.clone() for key, values in reader.read([entry]).items()}
            for answer, entry in reader.entries.items()}
