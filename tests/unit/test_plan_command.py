"""The command `megakd plan`: its numbers, what it measures, what it refuses; and the clusters that are described."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megakd.batch import Kind
from megakd.check import tokenizer_of
from megakd.cli import main
from megakd.config import load
from megakd.data.dataset import preference_groups, read_rows
from megakd.planning.candidate import room
from megakd.planning.cluster import DESCRIPTIONS, cluster_named, load_cluster
from megakd.planning.inference import generation_memory, generation_time
from megakd.planning.memory import training_memory
from megakd.planning.plan import TrainingPlan, plan_recipe
from megakd.planning.recipe import setup_of_stage
from megakd.planning.recipe_inference import (
    evaluation_memory,
    evaluation_of_stage,
    evaluation_time,
    generation_of_stage,
)
from megakd.planning.text import describe
from megakd.planning.timing import training_time
from megakd.planning.traffic import training_traffic
from megakd.planning.work import Lengths
from tests.planning_cases import LLAMA_8B, LLAMA_70B, cluster_fields, write_cluster, write_config
from tests.recipes import stage, tiny_recipe, write_recipe

RECIPE = Path(__file__).parents[2] / "slurm" / "adpa_70b_to_7b.yaml"
EXAMPLES = RECIPE.parents[1] / "examples"
GIVEN = ("--prompt-tokens", "300", "--answer-tokens", "300")


@pytest.fixture(autouse=True)
def _models(tmp_path, monkeypatch):
    """Of the models of the 70B recipe, the config.json alone."""
    monkeypatch.chdir(tmp_path)
    for role, model in (("student", LLAMA_8B), ("teacher", LLAMA_70B), ("reference", LLAMA_70B)):
        write_config(Path("models") / role, model)


def plan(capsys, recipe: Path, *words: str) -> str:
    assert main(["plan", str(recipe), *words]) == 0
    return capsys.readouterr().out


def refusal(capsys, *words: str, recipe: Path = RECIPE) -> str:
    assert main(["plan", str(recipe), *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("megakd: error: ")
    [line] = err.removeprefix("megakd: error: ").splitlines()
    return line


# --------------------------------------------------------------------------------------------------------- its numbers
def test_the_recipes_own_numbers_are_the_models(capsys):
    text = plan(capsys, RECIPE, "--cluster", "h100", "--nodes", "dckd=2,adpa=4", "--best", "1", *GIVEN, "--json",
                "plan.json")
    written = json.loads(Path("plan.json").read_text())
    recipe, cluster = load(RECIPE), cluster_named("h100")
    assert [(each["stage"], each["gpus"]) for each in written["stages"]] == [
        ("dckd", 16), ("generate", 16), ("adpa", 32), ("eval", 32)]
    for each in trainings(written):
        assert each["steps"] == 470
        setup = setup_of_stage(recipe, stage_of(recipe, each["stage"]), each["gpus"], Lengths(300, 300))
        memory, time, own = training_memory(setup, 0), training_time(cluster, setup), each["own"]
        assert own["memory"]["total"] == memory.total and own["memory"]["parts"] == memory.parts
        assert own["memory"]["room"] == room(cluster) and own["memory"]["fits"]
        assert own["time"]["parts"] == time.parts and own["time"]["total"] == time.total
        assert own["tokens_per_second"] == 128 * 2 * 600 / time.total
        assert own["gpu_hours"] == pytest.approx(470 * time.total * each["gpus"] / 3600)
        sent = sum(call.link_bytes for call in training_traffic(setup, 0))
        assert sum(volume["bytes"] for volume in own["traffic"]) == pytest.approx(sent)
        assert f"memory       {memory.total / 2**30:.1f} of {room(cluster) / 2**30:.1f} GiB" in text
        assert f"{each['own']['mfu']:.1%}" in text
        longest = setup_of_stage(recipe, stage_of(recipe, each["stage"]), each["gpus"], Lengths(512, 512))
        assert each["longest_sequences_bytes"] == training_memory(longest, 0).total
        for found in each["best"]:
            assert found["reason"] in text and found["memory"]["total"] <= room(cluster)
    assert "Not planned: export (export), report (report)" in text


def trainings(written: dict) -> list[dict]:
    return [each for each in written["stages"] if "own" in each]


def test_the_numbers_of_other_stages_are_the_models(capsys):
    text = plan(capsys, RECIPE, "--cluster", "h100", "--nodes", "generate=2,eval=1", "--best", "0", *GIVEN, "--json",
                "plan.json")
    recipe, cluster = load(RECIPE), cluster_named("h100")
    answers, _, evaluated = [each for each in json.loads(Path("plan.json").read_text())["stages"]
                             if each["stage"] in ("generate", "adpa", "eval")]
    # 470 steps of 128 rows; a row of the cache is as long as a sequence may be, 1,024.
    task = generation_of_stage(recipe, stage_of(recipe, "generate"), 16, 60160, Lengths(300, 300), 512)
    assert answers["rows"] == 60160 and answers["memory"]["parts"] == generation_memory(task, 0).parts
    assert answers["memory"]["parts"]["keys and values"] == 2 * 32 * 128 * 2 * 128 * 1024 * 2
    assert answers["seconds"]["parts"] == generation_time(cluster, task).parts
    assert answers["gpu_hours"] == pytest.approx(generation_time(cluster, task).total * 16 / 3600)
    assert "60,160 rows (the steps of its trainings, each row seen once); prompt 300 + answer 300 tokens" in text
    assert "generate (generate), 2 nodes = 16 GPUs\n" in text and "keys and values 4.0" in text
    setup = evaluation_of_stage(recipe, stage_of(recipe, "eval"), 8, 512, Lengths(300, 300), 512)
    assert evaluated["seconds"]["parts"] == evaluation_time(cluster, setup).parts
    assert evaluated["memory"]["total"] == max(evaluation_memory(setup, label, 0).total for label in setup.models)
    assert list(evaluated["layouts"]) == ["start", "dckd", "final", "teacher", "reference"]


@pytest.mark.parametrize(("words", "said", "fix"), [
    (("stages.generate.slots=4096",), "most of it is 'keys and values', 128.0 GiB", "stages.generate.slots=2048"),
    (("stages.generate.model=models/teacher", "student.parallel.tensor=1", "student.micro_batch=1"),
     "most of it is 'weights'", "Raise parallel.tensor"),
])
def test_answers_that_do_not_fit_are_told_what_helps(capsys, words, said, fix):
    line = refusal(capsys, "--cluster", "h100", "--nodes", "generate=1,adpa=64", *GIVEN, *words)
    assert line.startswith("stages.generate = 'student ") and said in line and fix in line
    if not fix.startswith("Raise"):
        again = plan(capsys, RECIPE, "--cluster", "h100", "--nodes", "generate=1", *GIVEN, "--best", "0", fix)
        assert "generate (generate), 1 node = 8 GPUs" in again


def stage_of(recipe, name):
    [found] = [each for each in recipe.stages if each.name == name]
    return found


def test_a_plan_says_what_it_leaves_out(capsys):
    arguments = (RECIPE, "--cluster", "h100", "--nodes", "adpa=2", *GIVEN)
    text = plan(capsys, *arguments, "--best", "0")
    assert "dckd (distill" not in text and "the best layouts" not in text
    assert "adpa (distill: adpa), 2 nodes = 16 GPUs\n" in text


def test_without_nodes_a_stage_gets_the_fewest_that_it_fits_on(capsys):
    text = plan(capsys, RECIPE, "--cluster", "h100", "--best", "0", *GIVEN)
    assert "dckd (distill: dckd), 1 node = 8 GPUs (the fewest; --nodes for others)" in text
    text = plan(capsys, RECIPE, "--cluster", "h100", "--best", "0", *GIVEN, "teacher.parallel.pipeline=2",
                "teacher.micro_batch=1")
    assert "adpa (distill: adpa), 2 nodes = 16 GPUs (the fewest; --nodes for others)" in text


def test_what_long_sequences_would_take_is_noted(capsys):
    words = ("--cluster", "h100", "--nodes", "adpa=1", "--best", "0")
    assert "memory is that of mean lengths" not in plan(capsys, RECIPE, *words, "--prompt-tokens", "300",
                                                        "--answer-tokens", "300", "student.micro_batch=1")
    cut = ("student.parallel.pipeline=2", "student.parallel.virtual_pipeline=3")
    assert "note: student: 32 layers make 2 x 3 parts of unequal sizes" in plan(capsys, RECIPE, *words, *GIVEN, *cut)
    text = plan(capsys, RECIPE, *words, *GIVEN, "data.max_length=4096")
    assert "note: memory is that of mean lengths; a micro-batch whose sequences all have data.max_length = 4096" in text


def test_a_training_by_tokens_and_one_that_draws_answers(tmp_path):
    raw = tiny_recipe(tmp_path)
    adpa = stage(raw, "adpa")
    del adpa["steps"], adpa["rollouts"]
    adpa |= {"steps": 5, "online": {"every": 1}, "checkpoint_every": 1}
    dckd = stage(raw, "dckd")
    del dckd["steps"]
    dckd["tokens"] = 1000
    recipe = load(write_recipe(tmp_path, raw))
    cluster = load_cluster(write_cluster(tmp_path / "two.yaml", devices_per_node=2))
    plans = {each.stage.name: each for each in plan_recipe(recipe, cluster, None, Lengths(20, 10), 2)}
    assert plans["dckd"].steps == 5  # of 4 x 2 x 30 tokens
    assert plans["adpa"].question.signal is None and not any(each.scoring for each in plans["adpa"].best)
    assert plans["adpa"].own.setup.draws.own_prompts == 4 and plans["adpa"].own.as_dict()["draw"]["every"] == 1
    text = describe(recipe, cluster, list(plans.values()), given_lengths=True, given_nodes=False)
    assert "dpo (dpo: dpo), 1 node = 2 GPUs" in text and "    teacher      TP1 x PP2 x DP1, micro-batch 2" in text


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/recipe.yaml")), ids=lambda file: file.parent.name)
def test_the_trainings_of_every_example_can_be_planned(monkeypatch, file):
    for module in ("recipe", "recipe_inference"):
        monkeypatch.setattr(f"megakd.planning.{module}.architecture_of", lambda recipe, model: LLAMA_8B)
    cluster = cluster_named("h100")
    roomy = cluster.device.model_copy(update={"memory_gib": 300.0})
    cluster = cluster.model_copy(update={"devices_per_node": 2, "device": roomy})
    recipe = load(file, ("device=cuda", "precision=bf16"))
    planned = plan_recipe(recipe, cluster, None, Lengths(60, 60), 1)
    left_out = {each.name for each in recipe.stages} - {each.stage.name for each in planned}
    assert {each.kind for each in recipe.stages if each.name in left_out} <= {"export", "report", "score"}
    plans = [each for each in planned if isinstance(each, TrainingPlan)]
    assert [each.stage.name for each in plans] == [each.name for each in recipe.stages if hasattr(each, "objective")]
    for each in planned:
        if not isinstance(each, TrainingPlan):
            assert each.time.total > 0 and each.memory.total <= room(cluster) and each.rows > 0
    for each in plans:
        assert each.own.fits and each.best and each.best[0].seconds <= each.own.seconds
        stored = each.stage.objective.signal_kinds and each.stage.online is None
        assert any(found.scoring for found in each.best) == bool(stored and each.question.teachers)
    text = describe(recipe, cluster, planned, given_lengths=True, given_nodes=False)
    assert text.count("throughput") >= 2 * len(plans) and text.count("the stage") == len(planned)


# ------------------------------------------------------------------------------------------------------------- lengths
def test_lengths_are_those_of_the_data(tmp_path, capsys):
    file = write_recipe(tmp_path, tiny_recipe(tmp_path))
    recipe = load(file)
    cluster = write_cluster(tmp_path / "two.yaml", devices_per_node=2)
    text = plan(capsys, file, "--cluster", str(cluster), "--best", "0", "--json", "plan.json")
    assert "measured in the data" in text
    rows = read_rows(recipe.data.train, None, recipe.seed, "chosen")
    for written in trainings(json.loads(Path("plan.json").read_text())):
        kinds = [Kind.CHOSEN] if written["stage"] == "adpa" else [Kind.CHOSEN, Kind.REJECTED]
        groups = preference_groups(rows, tokenizer_of(recipe), kinds, max_length=96, too_long="error")
        samples = [sample for group in groups for sample in group.samples]
        prompts = [sample.prompt_length for sample in samples]
        answers = [len(sample.tokens) - sample.prompt_length for sample in samples]
        assert written["lengths"] == {"prompt": pytest.approx(sum(prompts) / len(prompts)),
                                      "answer": pytest.approx(sum(answers) / len(answers))}


@pytest.mark.parametrize(("words", "message"), [
    ((), "data.train = 'data/train.jsonl': there is no such file, so that the lengths of prompts and answers cannot be "
     "measured. Give --prompt-tokens and --answer-tokens"),
    (("data.train=[]",), "data.train = []: names no file, so that"),
    (("data.train=[models]",), "reference.model = 'models/reference': holds no tokenizer, so that"),
    (("--prompt-tokens", "300"), "--answer-tokens = None: has to be given with the other one. Give both, or neither"),
    (("--prompt-tokens", "900", "--answer-tokens", "300"), "--prompt-tokens = 900.0: with the answer's 300 it is "
     "longer than the longest sequence of the recipe. Set data.max_length above 1024"),
    (("--prompt-tokens", "0", "--answer-tokens", "1"), "--prompt-tokens = 0.0: has to be more than 0."),
])
def test_lengths_that_are_not_known(capsys, words, message):
    assert refusal(capsys, "--cluster", "h100", *words).startswith(message)


# ------------------------------------------------------------------------------------------------------------ refusals
def test_a_stage_that_does_not_fit_is_told_the_smallest_change(capsys):
    arguments = ("--cluster", "h100", "--nodes", "adpa=1", *GIVEN, "student.micro_batch=64")
    line = refusal(capsys, *arguments)
    assert line.startswith("stages.adpa = 'student TP4 x PP1 x DP2, micro-batch 64; teacher TP8 x PP1 x DP1, sequence, "
                           "micro-batch 4; reference TP8 x PP1 x DP1, sequence, micro-batch 4; 8 GPUs': needs ")
    assert re.search(r" GiB of a GPU \(pipeline rank 0, '[\w ']+'\) and has 70\.6 "
                     r"\(79\.1 less 5 reserved, 5 % kept free\); most of it is 'activations', ", line), line
    fix = line.partition(". Set ")[2].split(" (")[0]
    assert fix.startswith("student.") and " " not in fix
    assert main(["plan", str(RECIPE), *arguments, fix, "--best", "0"]) == 0


def test_states_in_the_hosts_memory_may_be_what_helps(capsys):
    arguments = ("--cluster", "h100", "--nodes", "adpa=1", *GIVEN, "student.micro_batch=8")
    line = refusal(capsys, *arguments)
    # A rank's eighth of 8.03 billion parameters, 12 bytes each: 11.2 GiB.
    assert re.search(r"Set student\.\S+ \(.+\), or stages\.adpa\.optimizer\.offload=true "
                     r"\(64\.9 GiB, 11\.2 GiB of the host's memory a GPU\)$", line), line
    text = plan(capsys, RECIPE, *arguments, "stages.adpa.optimizer.offload=true", "--best", "0", "--json", "plan.json")
    assert "\n    memory       64.9 of 70.6 GiB" in text and "\n    host memory  11.2 GiB a GPU" in text
    assert "note: the optimizer's states travel" in text
    [adpa] = trainings(json.loads(Path("plan.json").read_text()))
    assert adpa["own"]["memory"]["host"] == pytest.approx(12 * 8.03e9 / 8, rel=0.001)


def test_where_no_layout_fits_more_nodes_are_asked_for(capsys, tmp_path):
    cluster = yaml.safe_load((DESCRIPTIONS / "h100.yaml").read_text())
    cluster["device"]["memory_gib"] = 16
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(cluster))
    line = refusal(capsys, "--cluster", "small.yaml", "--nodes", "1", *GIVEN)
    assert line.endswith("No layout of these models fits on 8 GPUs: give it more nodes")


@pytest.mark.parametrize(("words", "message"), [
    (("--cluster", "h1000"), "--cluster = 'h1000': there is no such file. Give one of a100, b200, h100, h200 or the "
     "path of a file (docs/cluster.md)"),
    (("--cluster", "bad.yaml"), "bad.yaml: device.memory_gb = 80: there is no such setting. Did you mean 'memory_gib'"),
    (("--cluster", "less.yaml"), "less.yaml: node_link = None: has to be set and is not. Add 'node_link' to the file"),
    (("--cluster", "h100", "device=cpu", "precision=fp32"), "device = 'cpu': H100 x 8 has devices of type cuda. Write "
     "device=cuda, or name another cluster"),
    (("--cluster", "a100", "precision=fp8", *GIVEN), "precision.dtype = 'fp8': A100 x 8 has no rate of fp8. Write one "
     "of fp32, bf16, or add"),
    (("--cluster", "h100", "precision={dtype: fp8, emulate: true}", *GIVEN), "precision.emulate = True: an emulation "
     "is float32 arithmetic, of which a plan in FP8 says nothing. Write false"),
    (("--cluster", "h100", "--nodes", "dkcd=1"), "--nodes = 'dkcd': the recipe has no such stage. There are: dckd, "),
    (("--cluster", "h100", "--nodes", "1", "teacher.parallel.pipeline=2", *GIVEN), "--nodes = 1: 1 x 8 = 8 ranks are "
     "fewer than one copy of the teacher takes in stage dckd: tensor 8 x pipeline 2 x context 1. Give it at least 2"),
    (("--cluster", "h100", "--nodes", "3", *GIVEN), "stages.dckd.global_batch = 128: has to be a multiple of "),
    (("--cluster", "h100", "student.parallel.tensor=3", *GIVEN), "student.parallel.tensor = 3: the model's "),
    (("--cluster", "h100", "teacher.model=models/none", *GIVEN), "models/none: no config.json there. Give a Hugging"),
])
def test_what_is_refused(capsys, words, message):
    Path("bad.yaml").write_text(yaml.safe_dump(cluster_fields(device={"memory_gb": 80})))
    less = cluster_fields()
    del less["node_link"]
    Path("less.yaml").write_text(yaml.safe_dump(less))
    assert refusal(capsys, *words).startswith(message)


# ------------------------------------------------------------------------------------------------------------ clusters
@pytest.mark.parametrize("file", sorted(DESCRIPTIONS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_described_cluster_loads_and_says_where_its_figures_come_from(file):
    cluster = load_cluster(file)
    assert cluster == cluster_named(file.stem)
    fields = yaml.safe_load(file.read_text())
    assert set(cluster.sources) == set(numbers_in({key: value for key, value in fields.items() if key != "sources"}))


def numbers_in(fields: dict, prefix: str = "") -> list[str]:
    names = []
    for key, value in fields.items():
        if isinstance(value, dict):
            names += numbers_in(value, f"{prefix}{key}.")
        elif not isinstance(value, str):
            names.append(f"{prefix}{key}")
    return names


def test_mistakes_are_told_before_torch_is_loaded():
    code = ("import sys; from megakd.cli import main; status = main(sys.argv[1:]); "
            "assert 'torch' not in sys.modules; sys.exit(status)")
    done = subprocess.run([sys.executable, "-c", code, "plan", str(RECIPE), "--cluster", "h1000"], capture_output=True,
                          text=True, timeout=120, cwd=RECIPE.parents[1])
    assert done.returncode == 2 and "--cluster = 'h1000'" in done.stderr
