"""Questions of benchmarks in their own files, and answers in their tools' forms."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megakd.config_evaluation import AnswersStage
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import ConfigError, DataError
from megakd.evaluation.benchmarks import Turn, answer_file
from megakd.evaluation.lm_harness import task_metrics
from megakd.evaluation.questions import check_questions, read_questions
from tests.tiny_tokenizer import write_tokenizer

USER = [{"role": "user", "content": "q"}]


def stage(folder: Path, rows: list[dict], style: str = "mt_bench", **settings) -> AnswersStage:
    file = folder / "questions.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return AnswersStage(name="mt", kind="answers", models={"m": "x"}, questions=file, format=style, **settings)


def test_the_forms_that_questions_come_in(tmp_path):
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["one", "two"], "reference": None},
        {"question_id": "ab", "turns": [{"content": "three"}], "system": "Be brief."},
        {"uid": "cd", "prompt": "four"},
        {"uid": "ef", "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *USER]},
    ]
    first, second, third, fourth = read_questions(stage(tmp_path, rows))
    assert (first.identity, first.category, first.before, first.turns) == (81, "writing", (), ("one", "two"))
    assert [message["content"] for message in first.prompt(["yes"])] == ["one", "yes", "two"]
    assert second.before == ({"role": "system", "content": "Be brief."},) and second.turns == ("three",)
    assert (third.identity, third.turns) == ("cd", ("four",))
    assert [message["content"] for message in fourth.prompt([])] == ["a", "b", "q"]
    assert len({question.name for question in (first, second, third, fourth)}) == 4
    # AlpacaEval's have no ids: the line names them.
    plain = read_questions(stage(tmp_path, [{"instruction": "five"}, {"prompt": USER}], "alpaca_eval"))
    assert [question.name for question in plain] == ["line:1", "line:2"]
    assert [question.turns for question in plain] == [("five",), ("q",)]


@pytest.mark.parametrize(
    ("rows", "style", "problem"),
    [
        ([{"prompt": "q"}], "mt_bench", ":1: field 'question_id': missing; the row has prompt. Add question_id"),
        ([{"question_id": [1], "prompt": "q"}], "arena_hard", "field 'question_id': a list, neither a string nor"),
        ([{"uid": 1, "prompt": "q"}, {"uid": 1, "prompt": "r"}], "mt_bench", ":2: field 'question_id': 1 is"),
        ([{"question_id": 1}], "mt_bench", ":1: field 'prompt': missing; the row has question_id"),
        ([{"question_id": 1, "turns": []}], "mt_bench", ":1: field 'turns': not texts, or an empty one"),
        ([{"question_id": 1, "turns": ["a", 3]}], "mt_bench", ":1: field 'turns': not texts"),
        ([{"turns": ["a", "b"]}], "alpaca_eval", ":1: field 'turns': a conversation of several messages"),
        ([{"instruction": " "}], "alpaca_eval", ":1: field 'instruction': not texts, or an empty one"),
    ],
)
def test_questions_that_cannot_be_asked(tmp_path, rows, style, problem):
    with pytest.raises(DataError) as caught:
        read_questions(stage(tmp_path, rows, style))
    assert problem in str(caught.value)


def test_a_conversation_has_to_fit_however_long_the_answers_are(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    rows = [{"question_id": 1, "category": "math", "turns": ["one", "two"]}]
    bare = len(tokenizer.encode([{"role": "user", "content": "one"}, {"role": "assistant", "content": ""},
                                 {"role": "user", "content": "two"}], None, close=False)[0])
    check_questions(stage(tmp_path, rows, max_new_tokens=20), tokenizer, bare + 21)
    with pytest.raises(DataError) as caught:
        check_questions(stage(tmp_path, rows, max_new_tokens=20), tokenizer, bare + 20)
    assert f"its last prompt may have {bare + 20} tokens, 1 answers of 20 among them" in str(caught.value)
    with pytest.raises(ConfigError, match="no question has this category. There are: math"):
        check_questions(stage(tmp_path, rows, category_temperatures={"maths": 0.5}), tokenizer, 500)


def test_answer_files(tmp_path):
    questions = read_questions(stage(tmp_path, [{"question_id": 81, "turns": ["one", "two"]}]))
    answers = [[Turn("first é", 3, True), Turn("second", 2, False)]]
    text = answer_file("mt_bench", "m", questions, answers)
    row = json.loads(text)
    assert row == {"question_id": 81, "answer_id": row["answer_id"], "model_id": "m", "tstamp": 0.0,
                   "choices": [{"index": 0, "turns": ["first é", "second"]}]}
    assert len(row["answer_id"]) == 22 and text == answer_file("mt_bench", "m", questions, answers)
    other = json.loads(answer_file("arena_hard", "n", questions, answers))
    turns = [{"content": "first é", "token_len": 3}, {"content": "second", "token_len": 2}]
    assert other["choices"][0]["turns"] == turns
    assert other["answer_id"] != row["answer_id"]
    outputs = json.loads(answer_file("alpaca_eval", "m", questions, [[Turn("x", 1, True)]]))
    assert outputs == [{"instruction": "one", "output": "x", "generator": "m"}]


def test_results_of_lm_eval_as_metrics():
    results = {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 4, "acc_norm,none": 1},
               "gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A"}}
    assert task_metrics(results) == {"arc/acc": 0.5, "arc/acc_error": 0.1, "arc/acc_norm": 1,
                                     "gsm8k/exact_match,strict-match": 0.25}
