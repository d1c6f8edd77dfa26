"""Rows to groups: closing tokens, rollouts, limits, and that nothing is left out without being counted."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from megakd.batch import Kind
from megakd.data.artefacts import Rollout, prompt_hash
from megakd.data.dataset import left_out, preference_groups, prompts
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
    return PreferenceRow(f"a.jsonl:{number}", ({"role": "user", "content": prompt},), chosen, rejected, None)


def rollout(tokenizer, its_row, tokens, reason):
    prompt = tokenizer.encode(its_row.prompt, None, close=False)[0]
    return Rollout(its_row.key, prompt_hash(prompt), tuple(tokens), "", reason, None)


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
    rollouts = {rows[0].key: rollout(tokenizer, rows[0], tokens, reason)}
    [group] = preference_groups(rows, tokenizer, ADPA, rollouts=rollouts, **LIMITS)
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
    rollouts = {its.key: rollout(tokenizer, its, (60, 5), "stop") for its in rows[:2]}
    assert "1 of 3 rows have none: a.jsonl:3" in refused(
        preference_groups, rows, tokenizer, ADPA, rollouts=rollouts, **LIMITS)
    moved = {rows[0].key: replace(rollouts[rows[0].key], prompt_hash="0")}
    assert "generated on another prompt" in refused(
        preference_groups, rows[:1], tokenizer, ADPA, rollouts=moved, **LIMITS)
    assert "no groups are left: there was no row" in refused(preference_groups, [], tokenizer, PAIR, **LIMITS)
    instruct = load_tokenizer(write_tokenizer(tmp_path, template=INSTRUCT, config=NAMED))
    talk = replace(row(4), prompt=({"role": "system", "content": "s"}, *row(4).prompt))
    message = refused(preference_groups, [talk], instruct, PAIR, **LIMITS)
    assert message.startswith("a.jsonl:4: field 'prompt': ") and "no system message, please" in message


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

    rollouts = {"a.jsonl:1": rollout(tokenizer, rows[0], (60, 5), "stop"), "a.jsonl:2": left_out(left[0])}
    message = refused(preference_groups, rows, tokenizer, ADPA, max_length=500, too_long="error", rollouts=rollouts)
    assert message.startswith("a.jsonl:2: field 'rollout': the generator left this row out")
    caplog.clear()
    groups = preference_groups(rows, tokenizer, ADPA, max_length=500, too_long="drop", rollouts=rollouts)
    assert [group.key for group in groups] == ["a.jsonl:1"]
    assert "1 of 2 groups left out: 1 prompt too long for the generator" in caplog.text


def test_one_key_is_one_prompt(tokenizer):
    assert len(prompts([row(1), row(1)], tokenizer, 100, too_long="error")[0]) == 1
    message = refused(prompts, [row(1), row(1, prompt="other")], tokenizer, 100, too_long="error")
    assert "two files of this name have different prompts" in message
