"""tools/scaling_study.py on a few cases: its table holds the planner's numbers, its page the figures."""

from __future__ import annotations

import csv
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from megakd.planning.candidate import GIB
from megakd.planning.cluster import load_cluster
from megakd.planning.memory import training_memory
from megakd.planning.search import Limits, search
from megakd.planning.sizes import parameter_count
from megakd.planning.timing import training_time
from tests.unit.test_planning import PUBLISHED

ROOT = Path(__file__).parents[2]
H100 = ROOT / "slurm" / "clusters" / "h100.yaml"

@pytest.fixture(scope="module")
def tool() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        made = importlib.import_module("scaling_study")
        # Few layouts, to be quick; what is found has to fit all the same.
        patch.setattr(made, "LIMITS", Limits(virtual_pipeline=1, context=1, micro_batch=2, pipeline=4,
                                             recompute=("none",), best=1))
        yield made


@pytest.fixture(scope="module")
def study(tool, tmp_path_factory) -> tuple[list[dict[str, str]], str]:
    """The rows and the page of a small sweep."""
    out = tmp_path_factory.mktemp("study")
    assert tool.main(["--cluster", str(H100), "--out", str(out), "--teachers", "8B,405B", "--students", "1B",
                      "--worlds", "8,64", "--lengths", "4096", "--vocabularies", "32000", "--dtypes", "fp8",
                      "--methods", "sft,dpo", "--teacher", "8B", "--student", "1B", "--world", "64"]) == 0
    with (out / "study.csv").open() as file:
        return list(csv.DictReader(file)), (out / "study.html").read_text()


def total(row: dict[str, str], prefix: str) -> float:
    return sum(float(value) for name, value in row.items() if name.startswith(prefix) and value)


def test_the_parts_of_every_row_add_up(study):
    rows, _ = study
    fitting = [row for row in rows if row["place"] != "none fits"]
    assert len(fitting) > 10
    for row in fitting:
        assert total(row, "time: ") == pytest.approx(float(row["training seconds"]), rel=1e-9)
        assert total(row, "memory: ") == pytest.approx(float(row["memory GiB"]), rel=1e-9)
        assert float(row["seconds"]) == float(row["training seconds"]) + float(row["scoring seconds"])
        assert (float(row["scoring seconds"]) > 0) == (row["place"] == "before")
        assert 0 <= total(row, "messages: ") < float(row["training seconds"])
        hours = 1e9 / float(row["tokens a step"]) * float(row["seconds"]) * int(row["world"]) / 3600
        assert float(row["GPU-hours"]) == pytest.approx(hours)


def test_every_case_has_a_row(study):
    rows, _ = study
    assert {row["figure"] for row in rows} == {"weak", "strong", "length", "vocabulary", "precision", "method"}
    assert {(row["method"], row["place"]) for row in rows if row["figure"] == "method"} == {
        ("sft", "beside"), ("dpo", "beside"), ("dpo", "before")}
    # A 405B teacher needs more than 8 GPUs; that it does not fit is said.
    assert [row["place"] for row in rows if row["teacher"] == "405B" and row["world"] == "8"] == ["none fits"]
    assert {row["place"] for row in rows if row["teacher"] == "405B" and row["world"] == "64"} >= {"beside"}


def test_a_row_is_what_the_planner_says(tool):
    cluster = load_cluster(H100)
    case = tool.Case("weak", "8B", "1B", 64, 128, method="dckd")
    rows = tool.rows_of(case, cluster, 1e9)
    found = search(case.question("cuda"), cluster, tool.LIMITS)
    assert len(rows) == len(found) == 2
    for row, candidate in zip(rows, found, strict=True):
        time = training_time(cluster, candidate.setup)
        assert {name: row[f"time: {name}"] for name in time.parts} == time.parts
        memory = training_memory(candidate.setup, candidate.pipeline_rank)
        assert {name: row[f"memory: {name}"] * GIB for name in memory.parts} == pytest.approx(memory.parts)
    [before] = [row for row in rows if row["place"] == "before"]
    # Teachers on GPUs of their own: as many GPU-hours as scoring before, and what the messages take.
    assert before["separate: GPU-hours"] == pytest.approx(before["GPU-hours"], rel=0.05)
    assert before["separate: GPU-hours"] > before["GPU-hours"]


def test_the_page_holds_its_figures_and_loads_nothing(study):
    _, page = study
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == ["Time of a step", "Memory of the fullest GPU", "GPU-hours, and where the teachers run",
                      "Communication", "Weak scaling", "Strong scaling", "Length, vocabulary, precision, method",
                      "Hidden states, logits or top-k", "What does not fit"]
    assert page.count("<svg") == page.count("</svg>") == 8
    assert "405B into 1B on 8 GPUs" in page and "16 times fewer bytes" not in page and "nan" not in page
    assert "<script" not in page and "<link" not in page and "src=" not in page
    assert set(re.findall(r"https?://[^\"]*", page)) == {"http://www.w3.org/2000/svg"}


def test_sizes_are_the_published_ones(tool):
    names = {"1B": "Llama 3.2 1B", "3B": "Llama 3.2 3B", "8B": "Llama 3 8B", "70B": "Llama 3 70B",
             "405B": "Llama 3.1 405B"}
    for name, published in names.items():
        assert parameter_count(tool.MODELS[name]) == PUBLISHED[published][2]


def test_what_cannot_be_is_refused(tool, tmp_path, capsys):
    assert tool.main(["--cluster", str(H100), "--out", str(tmp_path), "--teachers", "7B"]) == 2
    assert "--teachers = '7B'" in (said := capsys.readouterr().err) and "1B, 3B, 8B" in said
    assert tool.main(["--cluster", str(H100), "--out", str(tmp_path), "--measure"]) == 2
    assert "device_type: cpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_measured_step_beside_its_plan(tool, tmp_path):
    described = yaml.safe_load(H100.read_text()) | {"device_type": "cpu", "devices_per_node": 2}
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump(described))
    assert tool.main(["--cluster", str(tmp_path / "cpu.yaml"), "--out", str(tmp_path), "--measure", "--sizes", "tiny",
                      "--ranks", "1", "--measured-methods", "sft"]) == 0
    with (tmp_path / "measured.csv").open() as file:
        [row] = csv.DictReader(file)
    assert (row["method"], row["world"], row["steps"], row["parameters"]) == ("sft", "1", "5", "1311872")
    assert 0 < float(row["fastest"]) <= float(row["measured seconds"]) <= float(row["slowest"])
    assert total(row, "time: ") == pytest.approx(float(row["planned seconds"]))
    page = (tmp_path / "measured.html").read_text()
    assert "Measured and planned" in page and page.count("<svg") == 1
