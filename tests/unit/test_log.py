"""metrics.jsonl, the progress bar and the optional loggers."""

from __future__ import annotations

import io
import json
import sys

import pytest

from megakd import log as log_module
from megakd.errors import ConfigError, DataError
from megakd.log import RunLog, read_metrics


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = _Clock()
    monkeypatch.setattr(log_module, "time", made)
    return made


def _run(folder, steps, clock, *, seconds=2.0, stop=None, **options):
    settings = {"rank": 0, "total_steps": 10, "stage": "adpa", "progress": False, **options}
    with RunLog(folder, **settings) as run:
        for step in steps:
            clock.now += seconds
            run.step(step, {"loss": 5.0 - step, "kl": 0.5}, tokens=100)
            if step == stop:
                raise KeyboardInterrupt
    return folder / "metrics.jsonl"


def test_a_line_a_step(tmp_path, clock):
    path = _run(tmp_path / "stages" / "adpa", range(3), clock)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": step, "loss": 5.0 - step, "kl": 0.5, "tokens": 100, "seconds": 2.0} for step in range(3)]
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_lines_are_on_disk_at_once_and_other_ranks_are_silent(tmp_path, clock, capfd):
    with RunLog(tmp_path / "a", rank=0, total_steps=2, stage="s", progress=False) as run:
        run.step(0, {"loss": 1.0}, 1)
        assert len(read_metrics(tmp_path / "a/metrics.jsonl")) == 1
    with RunLog(tmp_path / "b", rank=1, total_steps=2, stage="s", progress=True) as run:
        run.step(0, {"loss": 1.0}, 1)
        run.note("nothing")
    assert not (tmp_path / "b").exists() and capfd.readouterr() == ("", "")


def test_a_resume_cuts_what_comes_again(tmp_path, clock):
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, range(10), clock, stop=6)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed in the middle of a write
    seconds = sum(line["seconds"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["step"] < 4)
    with RunLog(tmp_path, rank=0, total_steps=10, stage="x", progress=False, first_step=4) as log:
        assert log.seconds_before == seconds > 0
    path = _run(tmp_path, range(4, 10), clock, first_step=4)
    assert [line["step"] for line in read_metrics(path)] == list(range(10))
    _run(tmp_path, range(2), clock)  # from the beginning: nothing of the old one stays
    assert [line["step"] for line in read_metrics(path)] == [0, 1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("text", ['{"step": 0}\nnonsense\n', '{"loss": 1}\n', "[1]\n"])
def test_foreign_lines_are_refused(tmp_path, clock, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"metrics.jsonl:\d: "):
        _run(tmp_path, range(1), clock)


def test_what_is_not_finite_is_null_and_named(tmp_path):
    with RunLog(tmp_path, rank=0, total_steps=1, stage="s", progress=False) as run:
        run.step(0, {"loss": float("nan"), "kl": float("-inf"), "nll": 2.0}, 1)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (line["loss"], line["kl"], line["nll"]) == (None, None, 2.0)
    assert line["non_finite"] == {"loss": "nan", "kl": "-inf"}


def test_plain_lines_every_ten_seconds(tmp_path, clock):
    stream = io.StringIO()
    _run(tmp_path, range(10), clock, seconds=4.0, progress=True, stream=stream)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "adpa: step 1/10  loss 5  25 tokens/s  ETA 0:00:36"
    assert [line.split()[2] for line in lines] == ["1/10", "4/10", "7/10", "10/10"]
    assert lines[-1].endswith("ETA 0:00:00")


def test_a_bar_on_a_terminal(tmp_path):
    stream = _Terminal()
    with RunLog(tmp_path, rank=0, total_steps=6, stage="dckd", progress=True, first_step=2, stream=stream) as run:
        for step in range(2, 6):
            run.step(step, {"loss": 0.12345}, tokens=50)
        run.note("saved")
    shown = stream.getvalue()
    assert "dckd" in shown and "6/6" in shown and "loss 0.1235" in shown and "tokens/s" in shown and "saved" in shown


def test_missing_loggers_are_named(tmp_path, monkeypatch):
    real = log_module.importlib.util.find_spec
    monkeypatch.setattr(log_module.importlib.util, "find_spec",
                        lambda name: None if name in ("wandb", "tensorboard") else real(name))
    settings = {"rank": 3, "total_steps": 1, "stage": "s", "progress": False}
    with pytest.raises(ConfigError, match=r"wandb = True: the package wandb is not installed. Run `pip install wandb`"):
        RunLog(tmp_path / "x", wandb_project="p", **settings)
    with pytest.raises(ConfigError, match="package tensorboard is not installed"):
        RunLog(tmp_path / "x", tensorboard=True, **settings)
    assert not (tmp_path / "x").exists()


_WANDB = """
calls = []
class _Run:
    def log(self, values, step): calls.append(("log", step, values))
    def finish(self): calls.append(("finish",))
def init(**options):
    calls.append(("init", options))
    return _Run()
"""


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch, clock):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(_WANDB)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for steps, first in [(range(2), 0), (range(2, 3), 2), (range(1), 0)]:
        _run(tmp_path / "run", steps, clock, first_step=first, wandb_project="megakd")
    calls = sys.modules["wandb"].calls
    monkeypatch.delitem(sys.modules, "wandb")
    ids = [call[1]["id"] for call in calls if call[0] == "init"]
    assert ids[0] == ids[1] != ids[2]
    assert [call[1] for call in calls if call[0] == "log"] == [0, 1, 2, 0]
    assert calls[1][2] == {"loss": 5.0, "kl": 0.5, "tokens": 100, "seconds": 2.0}
    assert [call[0] for call in calls].count("finish") == 3
