"""Readers: every usual form of a preference row, and every way that a file can be wrong."""

from __future__ import annotations

import gzip
import json
import logging
import os
from pathlib import Path

import pytest

from megakd.data.readers import read_preferences, read_preferences_counted
from megakd.errors import DataError

PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def write(file: Path, *rows) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def parsed(tmp_path, row, require=("prompt", "chosen", "rejected")):
    [result] = read_preferences(write(tmp_path / "row.jsonl", row), require=require)
    return result


def refused(paths, require=("prompt", "chosen", "rejected")) -> str:
    with pytest.raises(DataError) as error:
        read_preferences(paths, require=require)
    return str(error.value)


# ----------------------------------------------------------------------------------------------- forms of a row

TURNS = [user("one"), assistant("two"), user("three")]
SAME_PROMPT = [
    {"prompt": TURNS, "chosen": "good", "rejected": "bad"},
    {"prompt": TURNS, "chosen": [assistant("good")], "rejected": [assistant("bad")]},
    {"prompt": TURNS, "chosen": assistant("good"), "rejected": "bad"},
    {"prompt": TURNS, "chosen": [*TURNS, assistant("good")], "rejected": [*TURNS, assistant("bad")]},
    {"prompt": "one", "chosen": [*TURNS, assistant("good")], "rejected": [*TURNS, assistant("bad")]},
    {"prompt": " one\n", "chosen": [*TURNS, assistant("good")], "rejected": "bad"},
    {"chosen": [*TURNS, assistant("good")], "rejected": [*TURNS, assistant("bad")]},
    {"prompt": None, "chosen": [*TURNS, assistant("good")], "rejected": "bad", "system": ""},
]


@pytest.mark.parametrize("number", range(len(SAME_PROMPT)))
def test_every_form_gives_the_same_row(number, tmp_path):
    row = parsed(tmp_path, {**SAME_PROMPT[number], "source": "somewhere"})
    assert row.prompt == tuple(TURNS)
    assert (row.key, row.chosen, row.rejected, row.reference) == ("row.jsonl:1", "good", "bad", None)


@pytest.mark.parametrize(
    "form",
    [
        {"prompt": "q", "system": "be brief"},
        {"prompt": [user("q")], "system": "be brief"},
        {"prompt": [system("be brief"), user("q")]},
        {"prompt": [system("be brief"), user("q")], "system": "be brief"},
        {"chosen": [system("be brief"), user("q"), assistant("good")]},
        {"prompt": "q", "chosen": [system("be brief"), user("q"), assistant("good")]},
        {"prompt": [system("be brief"), user("q")], "chosen": [user("q"), assistant("good")]},
    ],
)
def test_a_system_message_comes_first(form, tmp_path):
    row = parsed(tmp_path, {"chosen": "good", "rejected": "bad", **form})
    assert row.prompt == (system("be brief"), user("q"))


def test_only_what_is_required_must_be_there(tmp_path):
    row = parsed(tmp_path, {"prompt": "q", "reference": "r"}, require=("prompt", "reference"))
    assert (row.chosen, row.rejected, row.reference) == (None, None, "r")
    assert parsed(tmp_path, {"prompt": "q"}, require=("prompt",)).prompt == (user("q"),)
    # The prompt is the same whatever is required of the responses.
    assert parsed(tmp_path, SAME_PROMPT[4], require=("prompt",)).prompt == tuple(TURNS)


# ----------------------------------------------------------------------------------------------- files

def test_all_kinds_of_files_hold_the_same_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": [user(f"q{number}")], "chosen": "é 日本", "rejected": "no"} for number in range(3)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines.replace("\n", "\r\n"), encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (tmp_path / "c.json").write_text(json.dumps(rows), encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "notes.txt").write_text("not data")
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.parquet"):
        read = read_preferences(str(tmp_path / name))
        assert [row.key for row in read] == [f"{name}:{number}" for number in (1, 2, 3)]
        assert [(row.prompt[0]["content"], row.chosen) for row in read] == [(f"q{n}", "é 日本") for n in range(3)]
    whole = read_preferences(tmp_path)
    assert [row.key.split(":")[0] for row in whole] == sorted(["a.jsonl", "b.jsonl.gz", "c.json", "d.parquet"] * 3)
    both = read_preferences([tmp_path / "c.json", tmp_path / "a.jsonl"])
    assert [row.key for row in both][::3] == ["c.json:1", "a.jsonl:1"]


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"\n{json.dumps(PAIR)}\n  \n{json.dumps(PAIR)}\n\n")
    assert [row.key for row in read_preferences(tmp_path / "a.jsonl")] == ["a.jsonl:2", "a.jsonl:4"]


def test_pairs_of_one_text_are_left_out_and_counted(tmp_path, caplog):
    same = {**PAIR, "rejected": "good"}
    file = write(tmp_path / "a.jsonl", PAIR, same, {**PAIR, "prompt": "other"}, same)
    with caplog.at_level(logging.WARNING, logger="megakd"):
        read = read_preferences_counted(file)
    assert [row.key for row in read.rows] == ["a.jsonl:1", "a.jsonl:3"]
    assert (read.read, read.identical) == (4, 2)
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 pairs left out: chosen and rejected are the same text (a.jsonl:2, a.jsonl:4)"]
    assert len(read_preferences(file, require=("prompt", "chosen"))) == 4, "no pair is asked for"
    assert "in every pair chosen and rejected are the same text" in refused(write(tmp_path / "b.jsonl", same))


def test_a_missing_file_is_told_with_what_is_there(tmp_path):
    write(tmp_path / "pairs.jsonl", PAIR)
    (tmp_path / "more").mkdir()
    message = refused(tmp_path / "pair.jsonl")
    assert message.startswith(f"{tmp_path}/pair.jsonl: there is no such file") and "holds more/, pairs.jsonl" in message
    assert f"{tmp_path}/ holds more/, pairs.jsonl" in refused(tmp_path / "absent" / "deeper" / "x.jsonl")
    for number in range(20):
        (tmp_path / f"f{number:02}.txt").touch()
    assert "and 14 more" in refused(tmp_path / "pair.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", ["a.jsonl: the file has no rows"]),
        ("a.jsonl", b"\n \n", ["no rows"]),
        ("a.json", b"", ["no rows"]),
        ("a.json", b"[]", ["no rows"]),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), ["no rows"]),
        ("a.jsonl", b'{"prompt": "\xff"}\n', ["a.jsonl:1:", "byte 0xff at position 12 is not UTF-8"]),
        ("a.jsonl", json.dumps(PAIR).encode() + b"\n{\n", ["a.jsonl:2:", "not JSON", "column"]),
        ("a.jsonl", b"[" * 100_000, ["a.jsonl:1:", "not JSON"]),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", ["a.jsonl:1:", "not JSON"]),
        ("a.jsonl", b'["prompt"]\n', ["a.jsonl:1:", "a list, not an object"]),
        ("a.jsonl", b"null\n", ["null, not an object"]),
        ("a.json", b'{"data": []}', ["a.json: the file holds an object, not a list"]),
        ("a.json", b'[{"prompt": "q"}, 3]', ["a.json:1", "missing"]),
        ("a.json", b"{}\n{}\n", ["not JSON", ".jsonl"]),
        ("a.jsonl.gz", b"no gzip", ["a.jsonl.gz: not readable"]),
        ("a.jsonl.gz", gzip.compress(json.dumps(PAIR).encode() * 50, mtime=0)[:-12], ["a.jsonl.gz", "not readable"]),
        ("a.parquet", b"PAR1", ["a.parquet: not readable as Parquet"]),
        ("a.csv", b"prompt", ["unknown kind of file '.csv'", ".jsonl.gz"]),
    ],
)
def test_a_file_that_cannot_be_read(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name)
    assert all(word in message for word in words), message


def test_folders_that_hold_no_data(tmp_path):
    assert "holds no data file but nothing" in refused(tmp_path)
    (tmp_path / "readme.txt").touch()
    assert "readme.txt" in refused(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    assert "save_to_disk" in refused(tmp_path)
    assert "no data file is given" in refused([])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    write(tmp_path / "a.jsonl", PAIR).chmod(0)
    assert "not readable" in refused(tmp_path / "a.jsonl")


# ----------------------------------------------------------------------------------------------- wrong rows

@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"chosen": None}, "chosen", "missing; the row has prompt, chosen, rejected"),
        ({"prompt": None}, "prompt", "missing; the row has"),
        ({"prompt": 3}, "prompt", "a number, not a string or messages"),
        ({"prompt": {"role": "user"}}, "prompt", "an object, not"),
        ({"chosen": 1.5}, "chosen", "a number, not a string or messages"),
        ({"chosen": True}, "chosen", "a boolean, not"),
        ({"reference": ["r"]}, "reference", "a list, not a string"),
        ({"system": ["r"]}, "system", "a list, not a string"),
        ({"rejected": " \n"}, "rejected", "the text is empty"),
        ({"rejected": [assistant("")]}, "rejected", "the text is empty"),
        ({"reference": ""}, "reference", "the text is empty"),
        ({"prompt": "  "}, "prompt", "the text is empty"),
        ({"prompt": [user(" ")]}, "prompt", "the last user turn is empty"),
        ({"prompt": []}, "prompt", "an empty list of messages"),
        ({"prompt": ["q"]}, "prompt", "message 1 is a string, not an object"),
        ({"prompt": [{"from": "human", "value": "q"}]}, "prompt", "message 1 has no 'role'; it has from, value"),
        ({"prompt": [{"role": "user", "text": "q"}]}, "prompt", "message 1 has no 'content'"),
        ({"prompt": [user("q"), {"role": "human", "content": "q"}]}, "prompt",
         "message 2 has the unknown role 'human'"),
        ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "prompt", "content of message 1 is a list"),
        ({"prompt": [user("q"), system("s"), user("q")]}, "prompt", "message 2 is a system message"),
        ({"prompt": [user("q"), assistant("a")]}, "prompt", "it ends with the assistant's message"),
        ({"prompt": [system("s")]}, "prompt", "it ends with the system's message"),
        ({"prompt": [system("s"), user("q")], "system": "other"}, "system", "another system message"),
        ({"chosen": [user("q")]}, "chosen", "the last message is the user's, not the assistant's"),
        ({"chosen": [user("other"), assistant("a")]}, "chosen", "first user turn is not the prompt"),
        ({"prompt": TURNS, "chosen": [user("one"), assistant("a")]}, "chosen", "first 1 messages are not the prompt"),
        ({"prompt": None, "chosen": [assistant("x"), assistant("a")]}, "prompt", "it ends with the assistant's"),
        ({"prompt": None, "chosen": [*TURNS, assistant("a")], "rejected": [user("one"), assistant("a")]}, "rejected",
         "parts from chosen's at message 2, before the response (of 4 and 2 messages)"),
        ({"prompt": None, "chosen": [user("one"), assistant("a")], "rejected": [*TURNS, assistant("a")]}, "rejected",
         "parts from chosen's at message 2"),
        ({"chosen": "half \ud83d"}, "chosen", "half a surrogate pair (\\ud83d) at character 5"),
        ({"prompt": [user("\udc00")]}, "prompt", "half a surrogate pair"),
    ],
)
def test_a_row_that_cannot_be_used(change, field, words, tmp_path):
    file = write(tmp_path / "a.jsonl", PAIR, {**PAIR, **change}, {})
    message = refused(file)
    assert message.startswith(f"{file}:2: field {field!r}: ") and words in message, message


def test_the_first_bad_row_wins(tmp_path):
    first = write(tmp_path / "a.jsonl", PAIR)
    bad = write(tmp_path / "b.jsonl", PAIR, {"prompt": "q", "response": "x"}, {"prompt": 3})
    message = refused([first, bad, tmp_path / "b.jsonl"])
    assert message.startswith(f"{bad}:2: field 'chosen': missing; the row has prompt, response.")


# ----------------------------------------------------------------------------------------------- real data

def test_all_real_preference_files_parse():
    if "MEGAKD_DATA" not in os.environ:
        pytest.skip("MEGAKD_DATA is not set: no folder with real preference files")
    files = sorted(Path(os.environ["MEGAKD_DATA"]).glob("pref_*.jsonl.gz"))
    assert files
    read = read_preferences_counted(files)
    lines = sum(gzip.open(file, "rb").read().count(b"\n") for file in files)  # noqa: SIM115
    assert read.read == lines == len(read.rows) + read.identical
    for file in sorted(Path(os.environ["MEGAKD_DATA"]).glob("inst_*.jsonl.gz")):
        assert read_preferences(file, require=("prompt", "reference"))
