"""The judge of a win rate: what a program is asked, and every way in which it can fail to answer."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from megakd.config_evaluation import CommandJudge
from megakd.data.dataset import sample_id
from megakd.errors import ConfigError, DataError, MegakdError, ModelError
from megakd.evaluation.external import run_program
from megakd.evaluation.judges import Comparison, ask_command, read_verdicts
from megakd.evaluation.reward_model import check_reward_model
from tests.tiny_tokenizer import write_tokenizer

PROMPT = ({"role": "user", "content": "q"},)
FIELD = "stages.win.judge.command"
# Prefers the text that comes later in the alphabet; equal ones tie.
LATER = """
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
win = lambda a, b: "tie" if a == b else "a" if a > b else "b"
out = [json.dumps({"id": row["id"], "winner": win(row["a"], row["b"])}) for row in reversed(rows)]
open(sys.argv[2], "w").write("\\n".join(out))
"""
ALWAYS_FIRST = LATER.replace('"tie" if a == b else "a" if a > b else "b"', '"a"')


def comparison(number: int, answer: str, other: str) -> Comparison:
    return Comparison(f"eval.jsonl:{number}", PROMPT, "final", answer, "start", other)


def judge(folder: Path, text: str, **settings) -> CommandJudge:
    (folder / "judge.py").write_text(text)
    return CommandJudge(kind="command", command=(sys.executable, str(folder / "judge.py")), **settings)


COMPARISONS = [comparison(1, "b", "a"), comparison(2, "a", "b"), comparison(3, "c", "c")]


def test_both_orders(tmp_path):
    found = ask_command(judge(tmp_path, LATER), FIELD, COMPARISONS, tmp_path)
    assert found == [{"wins": [1.0, 1.0]}, {"wins": [0.0, 0.0]}, {"wins": [0.5, 0.5]}]
    asked = [json.loads(line) for line in (tmp_path / "comparisons.jsonl").read_text().splitlines()]
    assert asked[0] == {"id": "0", "prompt": list(PROMPT), "a": "b", "b": "a"}
    assert asked[3] == {"id": "3", "prompt": list(PROMPT), "a": "a", "b": "b"}
    assert "final" not in json.dumps(asked) and "start" not in json.dumps(asked)


def test_a_judge_that_likes_what_it_reads_first(tmp_path):
    """In both orders that is worth nothing; in one, chosen by the rows' names, it is worth half on many rows."""
    first = judge(tmp_path, ALWAYS_FIRST)
    assert ask_command(first, FIELD, COMPARISONS, tmp_path) == [{"wins": [1.0, 0.0]}] * 3
    many = [comparison(number, "x", "y") for number in range(200)]
    once = ask_command(first.model_copy(update={"both_orders": False}), FIELD, many, tmp_path)
    assert [row["wins"] for row in once] == [[0.0] if sample_id(each.key) % 2 else [1.0] for each in many]
    assert 70 < sum(row["wins"][0] for row in once) < 130


def refused(kind: type[MegakdError], call, *args) -> str:
    with pytest.raises(kind) as caught:
        call(*args)
    return str(caught.value)


def test_a_program_that_fails(tmp_path):
    broken = judge(tmp_path, "import sys; print('quota exceeded'); sys.exit(3)")
    message = refused(ConfigError, ask_command, broken, FIELD, COMPARISONS, tmp_path)
    assert message.startswith(f"{FIELD} = ") and "ended with exit code 3 (quota exceeded)" in message
    message = refused(ConfigError, run_program, FIELD, ["/nowhere/judge"], tmp_path / "log", None)
    assert "cannot be started" in message
    silent = judge(tmp_path, "")
    message = refused(DataError, ask_command, silent, FIELD, COMPARISONS, tmp_path)
    assert message == f"{tmp_path}/verdicts.jsonl: the judge has not written it. It gets this name as its last argument"


def test_a_program_that_takes_too_long_is_killed_with_its_children(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    slow = judge(tmp_path, f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", timeout=1.0)
    message = refused(ConfigError, ask_command, slow, FIELD, COMPARISONS, tmp_path)
    assert "did not end within 1 seconds and was killed" in message
    time.sleep(3.5)
    assert not mark.exists()


def test_a_program_hears_nothing_of_the_launcher(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    script = "import os; print(sorted(set(os.environ) & {'RANK', 'WORLD_SIZE', 'TORCHELASTIC_RUN_ID', 'JUDGE_KEY'}))"
    run_program(FIELD, [sys.executable, "-c", script], tmp_path / "log", None)
    assert (tmp_path / "log").read_text() == "['JUDGE_KEY']\n"


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (['{"id": "0", "winner": "a"}'], "verdicts.jsonl: field 'id': no verdict on 1 of 2 comparisons: 1. "),
        (['{"id": "0", "winner": "A"}'], "verdicts.jsonl:1: field 'winner': 'A' is none of a, b, tie. "),
        (['{"id": "0", "winner": "a"}', '{"id": "0", "winner": "b"}'], ":2: field 'id': '0' comes twice. "),
        (['{"id": "7", "winner": "a"}'], ":1: field 'id': '7' was not asked. "),
        (['{"id": 0, "winner": "a"}'], ":1: field 'id': 0 was not asked. "),
        (['{"id": "0"}'], ":1: field 'winner': missing; the line has id. "),
        (['{"id": "0", "winner": ["a"]}'], ":1: field 'winner': ['a'] is none of a, b, tie. "),
        (['{"id": "0", "winner": "a"}', "tie"], ":2: not JSON"),
        ([], "the file has no rows"),
    ],
)
def test_damaged_verdicts(tmp_path, lines, problem):
    file = tmp_path / "verdicts.jsonl"
    file.write_text("\n".join(lines))
    assert problem in refused(DataError, read_verdicts, file, ["0", "1"])


def test_what_is_no_reward_model(tmp_path):
    assert "there is no such directory" in refused(ConfigError, check_reward_model, "f", str(tmp_path / "nowhere"))
    directory = write_tokenizer(tmp_path / "model")

    def problem(**config) -> str:
        (directory / "config.json").write_text(json.dumps(config))
        return refused(ModelError, check_reward_model, "f", str(directory))

    assert "no sequence classifier" in problem(architectures=["LlamaForCausalLM"])
    kind = {"architectures": ["LlamaForSequenceClassification"]}
    assert "a classifier of 2 labels" in problem(**kind)
    assert "a classifier of 3 labels" in problem(**kind, id2label={"0": "a", "1": "b", "2": "c"})
    (directory / "pytorch_model.bin").write_bytes(b"")
    assert "neither model.safetensors nor" in problem(**kind, id2label={"0": "LABEL_0"})
