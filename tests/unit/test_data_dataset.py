"""Rows to groups: closing tokens, rollouts, limits, and that nothing is left out without being counted."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from megakd.batch import Kind
from megakd.data.artefacts import Rollout, prompt_hash
from megakd.data.dataset import Generated, held_out_groups, left_out, preference_groups, prompts, read_rows
from megakd.data.files import Place
from megakd.data.readers import PreferenceRow
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import DataError
from tests.tiny_tokenizer import INSTRUCT, write_tokenizer

PAIR, ADPA = (Kind.CHOSEN, Kind.REJECTED), (Kind.CHOSEN, Kind.ROLLOUT)
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
LIMITS = dict(max_length=200, too_long="error")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), generation={"eos_token_id": [5, 2]}))


def row(number, prompt="q", chosen="good", rejected="bad"):
    return PreferenceRow(Place(Path("a.jsonl"), number), ({"role": "user", "content": prompt},), chosen, rejected, None)


def rollout(tokenizer, its_row, tokens, reason, index=0):
    prompt = tokenizer.encode(its_row.prompt, None, close=False)[0]
    return Rollout(its_row.key, index, prompt_hash(prompt), tuple(tokens), "", reason, None)


def students(*rollouts, scores=None) -> Generated:
    answers: dict = {}
    for each in rollouts:
        answers[each.key] = (*answers.get(each.key, ()), each)
    return Generated({Kind.ROLLOUT: answers}, scores)


def refused(call, *args, **kwargs) -> str:
    with pytest.raises(DataError) as error:
        call(*args, **kwargs)
    return str(error.value)


def test_pairs_become_groups_of_closed_sequences(tokenizer):
    rows = [row(1), row(2, prompt="another question", chosen="yes, twelve", rejected="no")]
    groups = preference_groups(rows, tokenizer, PAIR, **LIMITS)
    assert [group.key for group in groups] == ["a.jsonl:1", "a.jsonl:2"]
    for its_row, group in zip(rows, groups, strict=True):
        assert tuple(sample.kind for sample in group.samples) == PAIR
        prompt = tokenizer.encode(its_row.prompt, None, close=False)[0]
        for sample, text in zip(group.samples, (its_row.chosen, its_row.rejected), strict=True):
            assert list(sample.tokens[: sample.prompt_length]) == prompt
            response = sample.tokens[sample.prompt_length :]
            assert response[-1] == 5 and response.count(5) == 1 and tokenizer.decode(response) == text


@pytest.mark.parametrize(
    ("tokens", "reason", "expected"),
    [
        ((60, 61, 5), "stop", (60, 61, 5)),
        ((60, 61, 2), "stop", (60, 61, 2)),  # another stop id that the student drew
        ((60, 61), "stop", (60, 61, 5)),  # an engine that keeps the stop id to itself
        ((), "stop", (5,)),
        ((60, 61), "length", (60, 61)),  # a closing token would teach to stop at the limit
    ],
)
def test_a_rollout_ends_as_it_was_drawn(tokens, reason, expected, tokenizer):
    rows = [row(1)]
    rollouts = students(rollout(tokenizer, rows[0], tokens, reason))
    [group] = preference_groups(rows, tokenizer, ADPA, generated=rollouts, **LIMITS)
    sample = group.samples[1]
    assert (group.samples[0].kind, sample.kind) == ADPA
    assert sample.tokens[sample.prompt_length :] == expected
    assert sample.tokens[: sample.prompt_length] == group.samples[0].tokens[: sample.prompt_length]


def test_a_sequence_that_is_too_long(tokenizer, caplog):
    rows = [row(1), row(2, rejected="bad " * 60), row(3)]
    longest = len(tokenizer.encode(rows[1].prompt, rows[1].rejected, close=True)[0])
    prompt = len(tokenizer.encode(rows[1].prompt, None, close=False)[0])
    message = refused(preference_groups, rows, tokenizer, PAIR, max_length=longest - 1, too_long="error")
    parts = f"prompt {prompt}, response {longest - prompt}"
    assert message == (f"a.jsonl:2: field 'rejected': {longest} tokens ({parts}), more than max_length {longest - 1}. "
                       f"Raise max_length to {longest} or more, or set too_long to drop")
    assert len(preference_groups(rows, tokenizer, PAIR, max_length=longest, too_long="error")) == 3
    with caplog.at_level(logging.WARNING, logger="megakd"):
        groups = preference_groups(rows, tokenizer, PAIR, max_length=longest - 1, too_long="drop")
    assert [group.key for group in groups] == ["a.jsonl:1", "a.jsonl:3"]
    assert [record.getMessage() for record in caplog.records] == [
        f"1 of 3 groups left out: 1 longer than max_length {longest - 1}"]
    message = refused(preference_groups, rows, tokenizer, PAIR, max_length=3, too_long="drop")
    assert message.startswith("a.jsonl: no groups are left: 3 longer than max_length 3")


def test_pairs_that_are_the_same_tokens_are_left_out(tmp_path, caplog):
    """A template may strip what the texts differ in."""
    template = INSTRUCT.replace("' ' + message['content']", "' ' + message['content'] | trim")
    stripping = load_tokenizer(write_tokenizer(tmp_path, template=template, config=NAMED))
    with caplog.at_level(logging.WARNING, logger="megakd"):
        groups = preference_groups([row(1), row(2, rejected="good ")], stripping, PAIR, **LIMITS)
    assert len(groups) == 1 and "1 chosen and rejected are the same tokens" in caplog.text
    assert len(preference_groups([row(1, rejected="good ")], stripping, (Kind.CHOSEN,), **LIMITS)) == 1


def test_what_is_missing_is_named(tokenizer, tmp_path):
    rows = [row(1), row(2), replace(row(3), rejected=None)]
    assert "a.jsonl:3: field 'rejected': missing" in refused(preference_groups, rows, tokenizer, PAIR, **LIMITS)
    message = refused(preference_groups, rows, tokenizer, ADPA, **LIMITS)
    assert message.startswith("a.jsonl:1: field 'rollout': 3 of 3 rows have none: a.jsonl:1, a.jsonl:2, a.jsonl:3")
    first, second = (rollout(tokenizer, its, (60, 5), "stop") for its in rows[:2])
    rollouts = students(first, second)
    assert "1 of 3 rows have none: a.jsonl:3" in refused(
        preference_groups, rows, tokenizer, ADPA, generated=rollouts, **LIMITS)
    moved = students(replace(first, prompt_hash="0"))
    assert "generated on another prompt" in refused(
        preference_groups, rows[:1], tokenizer, ADPA, generated=moved, **LIMITS)
    assert "no groups are left: there was no row" in refused(preference_groups, [], tokenizer, PAIR, **LIMITS)
    instruct = load_tokenizer(write_tokenizer(tmp_path, template=INSTRUCT, config=NAMED))
    talk = replace(row(4), prompt=({"role": "system", "content": "s"}, *row(4).prompt))
    message = refused(preference_groups, [talk], instruct, PAIR, **LIMITS)
    assert message.startswith("a.jsonl:4: field 'prompt': ") and "no system message, please" in message


def test_a_group_holds_all_answers_of_a_prompt_with_their_scores(tokenizer):
    rows = [row(1), row(2)]
    answers = [rollout(tokenizer, its, (60, 70 + n, 5), "stop", n) for its in rows for n in range(3)]
    scores = {(answer.key, answer.index): float(number) for number, answer in enumerate(answers)}
    groups = preference_groups(rows, tokenizer, (Kind.ROLLOUT,), generated=students(*answers, scores=scores), **LIMITS)
    assert [[sample.score for sample in group.samples] for group in groups] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert [sample.tokens[-2] for sample in groups[0].samples] == [70, 71, 72]


def test_answers_that_teach_nothing_are_counted(tokenizer, caplog):
    rows = [row(number) for number in range(1, 5)]
    answers = [rollout(tokenizer, its, (60, 70 + n, 5), "stop", n) for its in rows[:2] for n in range(2)]
    answers += [rollout(tokenizer, rows[2], (60, 5), "stop", n) for n in range(2)]
    answers.append(rollout(tokenizer, rows[3], (), "alike"))
    scores = {(answer.key, answer.index): 0.5 for answer in answers}
    scores["a.jsonl:2", 1] = None
    with caplog.at_level(logging.WARNING, logger="megakd"):
        groups = preference_groups(
            rows, tokenizer, (Kind.ROLLOUT,), generated=students(*answers, scores=scores), **LIMITS)
    assert [group.key for group in groups] == ["a.jsonl:1"]
    assert "3 of 4 groups left out" in caplog.text
    for reason in ("1 an answer that the teacher could not score", "1 too few different answers",
                   "1 two of its scored answers are the same tokens"):
        assert reason in caplog.text
    del scores["a.jsonl:1", 1]
    message = refused(preference_groups, rows, tokenizer, (Kind.ROLLOUT,), generated=students(*answers, scores=scores),
                      **LIMITS)
    assert message.startswith("a.jsonl:1: field 'score': the teacher's scores lack answer 1")


def test_a_share_of_the_rows_is_on_policy_by_its_key(tokenizer):
    rows = [row(number) for number in range(1, 201)]
    generated = students(*(rollout(tokenizer, its, (60, 5), "stop") for its in rows))
    kinds = []
    for share in (0.25, 0.75):
        groups = preference_groups(rows, tokenizer, (Kind.CHOSEN,), generated=generated, on_policy=share, **LIMITS)
        kinds.append([group.samples[0].kind for group in groups])
        assert abs(kinds[-1].count(Kind.ROLLOUT) / len(rows) - share) < 0.1
    # What is the student's own at a smaller share is so at a larger one.
    assert all(more is Kind.ROLLOUT for less, more in zip(*kinds, strict=True) if less is Kind.ROLLOUT)


# ----------------------------------------------------------------------------------------------- prompts

def test_prompts_are_what_the_groups_begin_with(tokenizer):
    rows = [row(1), row(2, prompt="another question")]
    kept, left = prompts(rows, tokenizer, 100, too_long="error")
    groups = preference_groups(rows, tokenizer, PAIR, **LIMITS)
    assert left == [] and [prompt.key for prompt in kept] == [group.key for group in groups]
    for prompt, group in zip(kept, groups, strict=True):
        assert prompt.tokens == group.samples[0].tokens[: group.samples[0].prompt_length]
        assert prompt.hash == prompt_hash(prompt.tokens)


def test_prompts_that_are_too_long(tokenizer, caplog):
    rows = [row(1), row(2, prompt="long " * 50)]
    length = len(tokenizer.encode(rows[1].prompt, None, close=False)[0])
    message = refused(prompts, rows, tokenizer, length - 1, too_long="error")
    assert message.startswith(f"a.jsonl:2: field 'prompt': {length} tokens, more than the limit of {length - 1}")
    with caplog.at_level(logging.WARNING, logger="megakd"):
        kept, left = prompts(rows, tokenizer, length - 1, too_long="drop")
    assert ([prompt.key for prompt in kept], [prompt.key for prompt in left]) == (["a.jsonl:1"], ["a.jsonl:2"])
    assert f"1 of 2 prompts left out: 1 longer than {length - 1} tokens" in caplog.text

    rollouts = students(rollout(tokenizer, rows[0], (60, 5), "stop"), left_out(left[0]))
    message = refused(preference_groups, rows, tokenizer, ADPA, max_length=500, too_long="error", generated=rollouts)
    assert message.startswith("a.jsonl:2: field 'rollout': the generator left this row out")
    caplog.clear()
    groups = preference_groups(rows, tokenizer, ADPA, max_length=500, too_long="drop", generated=rollouts)
    assert [group.key for group in groups] == ["a.jsonl:1"]
    assert "1 of 2 groups left out: 1 prompt too long for the generator" in caplog.text


def test_one_key_is_one_prompt(tokenizer):
    assert len(prompts([row(1), row(1)], tokenizer, 100, too_long="error")[0]) == 1
    message = refused(prompts, [row(1), row(1, prompt="other")], tokenizer, 100, too_long="error")
    assert "two files of this name have different prompts" in message


def instruction(number, reference="yes, twelve"):
    return PreferenceRow(Place(Path("a.jsonl"), number), ({"role": "user", "content": "q"},), None, None, reference)


def test_the_answer_is_the_field_that_is_set(tokenizer, tmp_path):
    """Instruction files have a reference and no chosen answer."""
    file = tmp_path / "rows.jsonl"
    lines = ['{"prompt": "q", "reference": "yes, twelve"}', '{"prompt": "r", "reference": "no", "chosen": "other"}']
    file.write_text("\n".join(lines))
    rows = read_rows([file], None, 1, "reference")
    assert [row.answer for row in rows] == ["yes, twelve", "no"]
    groups = preference_groups(rows, tokenizer, (Kind.CHOSEN,), **LIMITS)
    [sample] = groups[1].samples
    assert sample.kind is Kind.CHOSEN and tokenizer.decode(sample.tokens[sample.prompt_length :]) == "no"
    message = refused(preference_groups, read_rows([file], None, 1, "chosen"), tokenizer, (Kind.CHOSEN,), **LIMITS)
    assert message == (f"{file}:1: field 'chosen': missing, and it is needed to train on or to compare with. "
                       "Add it to every row, or write data.answer: reference, which the row has")
    message = refused(preference_groups, rows, tokenizer, (Kind.CHOSEN,), max_length=3, too_long="error")
    assert message.startswith(f"{file}:1: field 'reference': ")


def test_rows_of_prompts_alone(tokenizer, tmp_path):
    """A generator asks for no answer; an objective names the row and the field."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "q", "chosen": "a"}\n{"prompt": "r"}\n')
    rows = read_rows([file], None, 1, "chosen")
    kept, _ = prompts(rows, tokenizer, 100, too_long="error")
    assert [prompt.key for prompt in kept] == ["rows.jsonl:1", "rows.jsonl:2"]
    message = refused(preference_groups, rows, tokenizer, (Kind.CHOSEN,), **LIMITS)
    assert message.startswith(f"{file}:2: field 'chosen': missing") and message.endswith("Add it to every row")


def test_held_out_rows_with_and_without_a_rejected_answer(tokenizer):
    rows = [instruction(1), row(2), instruction(3)]
    rows = [replace(each, answer_field="chosen" if each.chosen else "reference") for each in rows]
    groups = held_out_groups(rows, tokenizer, **LIMITS)
    assert [(group.key, tuple(sample.kind for sample in group.samples)) for group in groups] == [
        ("a.jsonl:2", PAIR), ("a.jsonl:1", (Kind.CHOSEN,)), ("a.jsonl:3", (Kind.CHOSEN,))]
