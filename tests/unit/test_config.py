"""Recipes: precedence, overrides, and one clear error for each known mistake. Imports no torch."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import yaml

from megakd.config import Precision, dump, load, parse
from megakd.config_checks import check_world
from megakd.config_stages import TrainStage
from megakd.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(ROOT.glob("examples/*/recipe.yaml"))

RECIPE = """
name: small
output: runs/small
student: {model: models/student, parallel: {tensor: 2}}
teacher: {model: "run:teacher", micro_batch: 2}
reference: {model: models/reference, micro_batch: 2}
data: {train: [train.jsonl], eval: [eval.jsonl]}
stages:
  - {name: align, kind: dpo, trains: teacher, init: models/reference, save_as: teacher, steps: 5, global_batch: 8,
     objective: {kind: dpo}}
  - {name: dckd, kind: distill, init: models/student, save_as: halfway, steps: 5, global_batch: 8,
     objective: {kind: dckd, alpha: 0.5}}
  - {name: answers, kind: generate, model: "run:halfway"}
  - {name: adpa, kind: distill, init: "run:halfway", save_as: trained, steps: 5, global_batch: 8, rollouts: answers,
     objective: {kind: adpa}, optimizer: {lr: 1e-5}}
  - {name: eval, kind: eval, models: {start: models/student, final: "run:trained"}}
  - {name: export, kind: export, model: "run:trained", save_as: student}
"""
DELETE = object()
EMULATED = {"dtype": "fp8", "emulate": True}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def changed(setting: str, value: object) -> dict:
    """The recipe with one setting changed or deleted; list items by number: `stages.0.steps`."""
    raw = yaml.safe_load(RECIPE)
    node = raw
    *parents, leaf = setting.split(".")
    for key in parents:
        if isinstance(node, list):
            node = node[int(key)]
        else:
            node = node.setdefault(key, {})
    leaf = int(leaf) if isinstance(node, list) else leaf
    if value is DELETE:
        del node[leaf]
    else:
        node[leaf] = value
    return raw


def refused(raw: dict) -> ConfigError:
    before = copy.deepcopy(raw)
    with pytest.raises(ConfigError) as caught:
        parse(raw)
    assert raw == before
    assert "\n" not in str(caught.value)
    return caught.value


def told(error: ConfigError) -> tuple[str, object, str, str]:
    return error.field, error.value, error.rule, error.fix


def with_pad(answers: dict, scored: str = "answers", objective: dict | None = None) -> dict:
    """The recipe with PAD in the place of ADPA."""
    raw = yaml.safe_load(RECIPE)
    align, dckd, generate, adpa, *rest = raw["stages"]
    generate |= {"temperature": 1.0, **answers}
    other = {**generate, "name": "others"}
    score = {"name": "score", "kind": "score", "model": "run:teacher", "rollouts": scored}
    adpa |= {"scores": "score", "objective": {"kind": "pad", **(objective or {})}}
    raw["stages"] = [align, dckd, generate, other, score, adpa, *rest]
    return raw


# ------------------------------------------------------------------------------------------------------ precedence
def test_defaults_then_file_then_overrides(file):
    recipe = load(file)
    assert recipe.student.micro_batch == 4  # default
    assert recipe.teacher.micro_batch == 2  # file
    assert load(file, ("teacher.micro_batch=8",)).teacher.micro_batch == 8
    assert load(file, ("teacher.micro_batch=8", "teacher.micro_batch=16")).teacher.micro_batch == 16  # the last one


def test_an_override_adds_a_section_that_the_file_leaves_out(file):
    assert load(file, ("reference.parallel.pipeline=2",)).reference.parallel.pipeline == 2
    assert load(file, ("stages.align.optimizer.lr=1e-3",)).stages[0].optimizer.lr == 1e-3  # YAML 1.1 reads 1e-3 as text


def test_an_override_names_a_stage(file):
    recipe = load(file, ("stages.adpa.steps=20", "stages.adpa.objective.gamma=0.5"))
    assert [s.steps for s in recipe.stages if isinstance(s, TrainStage)] == [5, 5, 20]
    assert recipe.stages[3].objective.gamma == 0.5


def test_override_values_are_yaml(file):
    recipe = load(file, ("data.train=[a.jsonl, b.parquet]", "wandb=true", "data.train_rows=null", "name=a=b"))
    assert recipe.data.train == (Path("a.jsonl"), Path("b.parquet"))
    assert recipe.wandb is True and recipe.data.train_rows is None and recipe.name == "a=b"


@pytest.mark.parametrize("text, overrides", [
    ("precision: bf16", ()),
    ("precision: {dtype: bf16}", ()),
    ("precision: fp32", ("precision.dtype=bf16",)),
    ("", ("precision=bf16",)),
    ("", ("precision.dtype=bf16",)),
])
def test_precision_may_be_one_word(tmp_path, text, overrides):
    (tmp_path / "recipe.yaml").write_text(RECIPE + text)
    assert load(tmp_path / "recipe.yaml", overrides).precision.dtype == "bf16"


def test_dump_and_load_give_the_same_recipe(file, tmp_path):
    recipe = load(file, ("precision=bf16", "data.chat_template=template.jinja"))
    again = tmp_path / "again.yaml"
    again.write_text(dump(recipe))
    assert load(again) == recipe
    assert dump(load(again)) == dump(recipe)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.parent.name)
def test_examples_load_and_fit_their_processes(example):
    recipe = load(example)
    check_world(recipe, recipe.processes)


def test_there_are_examples():
    assert EXAMPLES


# -------------------------------------------------------------------------------------------------- file, overrides
@pytest.mark.parametrize("content, problem", [
    (b"name: [a", "line 1, column 9: expected ',' or ']'"),
    (b"name: a\nname: b\n", "line 2, column 1: the key 'name' comes twice"),
    (b"student: {model: a}\nteacher:\n  model: a\n  model: b\n", "line 4, column 3: the key 'model' comes twice"),
    (b"- a\n", "holds no mapping of keys"),
    (b"", "holds no mapping of keys"),
    (b"name: \xff\n", "can't decode byte 0xff"),
    (b"name: \x07\n", "special characters are not allowed"),
])
def test_a_file_that_is_no_recipe(tmp_path, content, problem):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        load(path)
    assert (caught.value.field, caught.value.value) == ("recipe", str(path))
    assert "\n" not in str(caught.value)


def test_merged_keys_are_not_taken_for_doubled_ones(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("name: small\n", "name: small\nprecision: {<<: {dtype: bf16}, dtype: fp32}\n"))
    assert load(path).precision.dtype == "fp32"


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="there is no such file"):
        load(tmp_path)


@pytest.mark.parametrize("override, field, problem", [
    ("student.parallel.tensor", "override", "is not of the form key.key=value. Write e.g. student.parallel.tensor=2"),
    ("=2", "override", "is not of the form key.key=value"),
    ("stages.adap.steps=3", "stages.adap.steps", "no stage has this name. There are: align, dckd, answers, adpa, eval"),
    ("stages.adpa=3", "stages.adpa", "names a stage, not a setting of it. Write stages.adpa.<setting>=3"),
    ("student.model.path=3", "student.model.path", "'model' is a value, not a section"),
    ("data.train.0=a.jsonl", "data.train.0", "one item of a list cannot be set. Write the whole list: train=[...]"),
    ("name=[a", "name", "the value is not YAML. Quote it"),
    ("studnt.micro_batch=2", "studnt", "there is no such setting. Did you mean 'student'?"),
    ("stages.adpa.objective.gama=2", "stages.adpa.objective.gama", "Did you mean 'gamma'?"),
])
def test_a_wrong_override(file, override, field, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        load(file, (override,))
    assert caught.value.field == field


# ------------------------------------------------------------------------------------------------------ one setting
@pytest.mark.parametrize("setting, field, near", [
    ("devise", "devise", "device"),
    ("student.micro_bach", "student.micro_bach", "micro_batch"),
    ("teacher.parallel.pipline", "teacher.parallel.pipline", "pipeline"),
    ("precision.dtyp", "precision.dtyp", "dtype"),
    ("data.trian", "data.trian", "train"),
    ("stages.0.globl_batch", "stages.align.globl_batch", "global_batch"),
    ("stages.2.temprature", "stages.answers.temprature", "temperature"),
    ("stages.3.objective.gama", "stages.adpa.objective.gama", "gamma"),
    ("stages.3.optimizer.warm_up", "stages.adpa.optimizer.warm_up", "warmup"),
])
def test_an_unknown_key_is_told_with_the_nearest_known_one(setting, field, near):
    error = refused(changed(setting, 1))
    assert (error.field, error.value, error.fix) == (field, 1, f"Did you mean {near!r}?")
    assert error.rule.endswith("no such setting")


@pytest.mark.parametrize("setting, field, rule, known", [
    ("zzz", "zzz", "there is no such setting", "name, output, device"),
    ("data.zzz", "data.zzz", "there is no such setting", "train, eval, text"),
    ("stages.2.steps", "stages.answers.steps", "the kind 'generate' has no such setting", "name, kind, role, model"),
    ("stages.1.objective.gamma", "stages.dckd.objective.gamma", "the kind 'dckd' has no such setting", "kind, top_k"),
])
def test_an_unknown_key_like_none_is_told_with_all(setting, field, rule, known):
    error = refused(changed(setting, 1))
    assert (error.field, error.rule) == (field, rule)
    assert error.fix.startswith(f"Write one of {known}")


@pytest.mark.parametrize("setting, field, name", [
    ("name", "name", "name"),
    ("output", "output", "output"),
    ("student", "student", "student"),
    ("reference.model", "reference.model", "model"),
    ("data", "data", "data"),
    ("stages", "stages", "stages"),
    ("stages.1.name", "stages[1].name", "name"),
    ("stages.1.objective", "stages.dckd.objective", "objective"),
    ("stages.2.model", "stages.answers.model", "model"),
])
def test_a_missing_key(setting, field, name):
    error = refused(changed(setting, DELETE))
    assert told(error) == (field, None, "has to be set and is not", f"Add {name!r} to the recipe")


KINDS = "Write one of sft, dpo, distill, generate, score, eval, win_rate, answers, lm_eval, export, report"
OBJECTIVES = "Write one of sft, kd, dpo, ipo, cpo, simpo, dckd, adpa, dpkd, dpkd_token, minillm, pad"


@pytest.mark.parametrize("setting, value, field, rule, fix", [
    ("stages.3.kind", DELETE, "stages.adpa.kind", "has to be set and is not", KINDS),
    ("stages.3.kind", "distil", "stages.adpa.kind", "there is no such kind", "Did you mean 'distill'?"),
    ("stages.3.kind", "train", "stages.adpa.kind", "there is no such kind", KINDS),
    ("stages.3.objective.kind", DELETE, "stages.adpa.objective.kind", "has to be set and is not", OBJECTIVES),
    ("stages.3.objective.kind", "apda", "stages.adpa.objective.kind", "there is no such kind", "Did you mean 'adpa'?"),
    ("stages.3.objective.kind", "kto", "stages.adpa.objective.kind", "there is no such kind", OBJECTIVES),
    ("stages.0.objective.kind", "sft", "stages.align.objective.kind",
     "a stage of kind 'dpo' takes dpo, ipo, cpo, simpo", "Change the stage's kind or its objective"),
    ("device", "gpu", "device", "is not one of the known values", "Write 'cpu' or 'cuda'"),
    ("precision", "fp16", "precision.dtype", "is not one of the known values", "Write 'fp32', 'bf16' or 'fp8'"),
    ("data.too_long", "cut", "data.too_long", "is not one of the known values", "Write 'error' or 'drop'"),
])
def test_an_unknown_value(setting, value, field, rule, fix):
    error = refused(changed(setting, value))
    assert told(error) == (field, None if value is DELETE else value, rule, fix)


SECTION = "has to be a section of settings"


@pytest.mark.parametrize("setting, value, rule", [
    ("student.parallel.tensor", "two", "has to be a whole number"),
    ("student.parallel.tensor", 1.5, "has to be a whole number"),
    ("student.parallel.tensor", None, "has to be a whole number"),
    ("student.parallel.tensor", [1], "has to be a whole number"),
    ("student.parallel.tensor", 0, "has to be at least 1"),
    ("student.parallel.sequence", "maybe", "has to be true or false"),
    ("student.parallel", 2, SECTION),
    ("student", "models/student", SECTION),
    ("data", None, SECTION),
    ("precision", 16, SECTION),
    ("name", 7, "has to be text (quote a number)"),
    ("name", "", "must not be empty"),
    ("output", 7, "has to be a path"),
    ("seed", -1, "has to be at least 0"),
    ("seed", 2**32, "has to be less than 4294967296"),
    ("processes", 0, "has to be at least 1"),
    ("data.train", "train.jsonl", "has to be a list"),
    ("data.max_length", 1, "has to be at least 2"),
    ("stages", {}, "has to be a list"),
    ("stages", [], "must not be empty"),
    ("stages.adpa.steps", 0, "has to be at least 1"),
    ("stages.adpa.objective", "adpa", SECTION),
    ("stages.adpa.objective.beta", 0, "has to be more than 0.0"),
    ("stages.adpa.objective.gamma", float("inf"), "has to be a finite number"),
    ("stages.align.objective.label_smoothing", 0.5, "has to be less than 0.5"),
    ("stages.adpa.optimizer.lr", "1e-5x", "has to be a number"),
    ("stages.adpa.optimizer.lr", float("nan"), "has to be a finite number"),
    ("stages.adpa.optimizer.warmup", 1.5, "has to be at most 1.0"),
    ("stages.adpa.save_as", "a/b", "it becomes the name of a file or folder"),
    ("stages.answers.top_p", 0, "has to be more than 0.0"),
    ("stages.eval.models", {}, "must not be empty"),
    ("stages.eval.models", ["run:trained"], SECTION),
    ("stages.eval.models.final", 3, "has to be text (quote a number)"),
])
def test_a_wrong_type_or_range(setting, value, rule):
    by_number = setting
    for number, name in enumerate(("align", "dckd", "answers", "adpa", "eval")):
        by_number = by_number.replace(f"stages.{name}", f"stages.{number}")
    error = refused(changed(by_number, value))
    assert (error.field, error.rule) == (setting, rule)
    assert error.value == value or value != value


@pytest.mark.parametrize("setting, value, field", [
    ("stages.1", "dckd", "stages[1]"),
    ("stages.1.name", 3, "stages[1].name"),
    ("stages.1.name", "a b", "stages.a b.name"),
    ("data.train", [3], "data.train[0]"),
])
def test_places_without_a_name(setting, value, field):
    assert refused(changed(setting, value)).field == field


def test_a_key_that_is_no_text():
    raw = changed("name", "small")
    assert told(refused({**raw, 1: 2})) == ("1", 1, "a setting's name has to be text", "Correct or quote it")


# --------------------------------------------------------------------------------------------------- settings together
NONE_EARLIER = "Earlier stages save: none"


@pytest.mark.parametrize("setting, value, field, rule, fix", [
    ("stages.1.name", "align", "stages.align.name", "two stages have this name", "Rename one"),
    ("stages.1.save_as", "teacher", "stages.dckd.save_as", "an earlier stage saves a model by this name",
     "Choose another name"),
    ("stages.0.init", "run:start", "stages.align.init",
     "the stage 'align' reads it, and no earlier stage saves a model as 'start'", NONE_EARLIER),
    ("stages.0.init", "run:teacher", "stages.align.init",
     "the stage 'align' reads it, and no earlier stage saves a model as 'teacher'", NONE_EARLIER),
    ("stages.2.model", "run:trained", "stages.answers.model",
     "the stage 'answers' reads it, and no earlier stage saves a model as 'trained'",
     "Move 'adpa', which saves it, before 'answers'"),
    ("stages.4.models.best", "run:best", "stages.eval.models.best",
     "the stage 'eval' reads it, and no earlier stage saves a model as 'best'",
     "Earlier stages save: halfway, teacher, trained"),
    ("teacher.model", "run:trained", "teacher.model",
     "the stage 'dckd' reads it, and no earlier stage saves a model as 'trained'",
     "Move 'adpa', which saves it, before 'dckd'"),
    ("reference.model", "run:halfway", "reference.model",
     "the stage 'align' reads it, and no earlier stage saves a model as 'halfway'",
     "Move 'dckd', which saves it, before 'align'"),
    ("student.model", "run:nobody", "student.model", "no stage saves a model under this name",
     "Stages save: halfway, student, teacher, trained"),
    ("stages.3.rollouts", "answer", "stages.adpa.rollouts", "has to name an earlier stage of kind 'generate'",
     "There are: answers"),
    ("stages.3.rollouts", DELETE, "stages.adpa.rollouts", "has to name an earlier stage of kind 'generate'",
     "There are: answers"),
    ("stages.3.rollouts", "dckd", "stages.adpa.rollouts", "has to name an earlier stage of kind 'generate'",
     "There are: answers"),
    ("stages.1.rollouts", "answers", "stages.dckd.rollouts", "the objective 'dckd' takes no rollouts, as it is set",
     "Leave it out"),
    ("stages.1.steps", DELETE, "stages.dckd.steps",
     "a training stage takes either steps or tokens, and neither is given (tokens = None)",
     "Write stages.dckd.steps or stages.dckd.tokens, not both"),
    ("stages.1.tokens", 1000, "stages.dckd.steps",
     "a training stage takes either steps or tokens, and both are given (tokens = 1000)",
     "Write stages.dckd.steps or stages.dckd.tokens, not both"),
    ("stages.1.reference", "models/student", "stages.dckd.reference",
     "the objective 'dckd' takes no reference, as it is set", "Leave it out"),
    ("stages.0.reference", "run:halfway", "stages.align.reference",
     "the stage 'align' reads it, and no earlier stage saves a model as 'halfway'",
     "Move 'dckd', which saves it, before 'align'"),
    ("stages.1.trains", "teacher", "stages.dckd.trains", "a teacher cannot be distilled from itself",
     "Write trains: student"),
    ("stages.3.optimizer.min_lr", 1e-4, "stages.adpa.optimizer.min_lr", "has to be at most lr, 1e-05",
     "Lower it or raise lr"),
    ("stages.2.n", 4, "stages.answers.n", "greedy decoding (temperature 0) gives n equal answers",
     "Write n: 1, or a temperature above 0"),
    ("stages.2.keep", 2, "stages.answers.keep", "only 1 are drawn", "Raise n or lower keep"),
    ("stages.3.teacher_answers", "answers", "stages.adpa.teacher_answers",
     "the objective 'adpa' takes no teacher_answers, as it is set", "Leave it out"),
    ("stages.3.objective", {"kind": "dpkd"}, "stages.adpa.teacher_answers",
     "has to name an earlier stage of kind 'generate'", "There are: answers"),
    ("stages.3.objective", {"kind": "pad"}, "stages.adpa.scores", "has to name an earlier stage of kind 'score'",
     "There are: none"),
    ("precision", "fp8", "precision.dtype",
     "FP8 layers need Transformer Engine and a CUDA device (device is 'cpu')",
     "Write precision: bf16 or fp32, or device: cuda on a machine that has both, or precision.emulate=true to study "
     "FP8's arithmetic on any device"),
    ("precision", {"dtype": "bf16", "fp8_recipe": "blockwise"}, "precision.fp8_recipe",
     "is about FP8, and dtype is 'bf16'", "Leave it out, or write precision.dtype=fp8"),
    ("precision", {"emulate": True}, "precision.emulate", "is about FP8, and dtype is 'fp32'",
     "Leave it out, or write precision.dtype=fp8"),
    ("precision", {"fp8_weights": "all"}, "precision.fp8_weights", "is about FP8, and dtype is 'fp32'",
     "Leave it out, or write precision.dtype=fp8"),
    ("precision", EMULATED | {"amax_history": 16}, "precision.amax_history",
     "the recipe 'tensorwise' takes its scales from the numbers at hand",
     "Leave it out, or write precision.fp8_recipe=delayed"),
    ("precision", EMULATED | {"fp8_weights": "teachers"}, "precision.fp8_weights",
     "emulated layers keep bf16 weights and round them in every product", "Write none"),
    ("precision", EMULATED | {"fp8_recipe": "delayed", "first_last_bf16": 1}, "precision.first_last_bf16",
     "delayed scaling takes all layers in one FP8 region (megatron-core)", "Write 0, or another fp8_recipe"),
    ("teacher.cuda_graphs", True, "teacher.cuda_graphs", "device is 'cpu', which has no CUDA graphs",
     "Leave it out, or write device: cuda"),
    ("student.decode_graphs", True, "student.decode_graphs", "device is 'cpu', which has no CUDA graphs",
     "Leave it out, or write device: cuda"),
    ("reference.graph_tokens", 512, "reference.graph_tokens",
     "says how rows are filled up for reference.cuda_graphs, which is false",
     "Leave it out, or write reference.cuda_graphs=true"),
    ("teacher.parallel.virtual_pipeline", 2, "teacher.parallel.virtual_pipeline", "interleaving needs pipeline > 1",
     "Raise teacher.parallel.pipeline or leave it out"),
    ("reference.parallel.sequence", True, "reference.parallel.sequence", "sequence parallelism needs tensor > 1",
     "Raise reference.parallel.tensor or leave it out"),
])
def test_settings_that_do_not_fit_together(setting, value, field, rule, fix):
    error = refused(changed(setting, value))
    assert (error.field, error.rule, error.fix) == (field, rule, fix)


@pytest.mark.parametrize("role, precision, field, fix", [
    ({"name": "student"}, "bf16", "student.cuda_graphs", "Write teacher.cuda_graphs or reference.cuda_graphs"),
    ({}, "fp32", "teacher.cuda_graphs", "Leave it out, or write precision: bf16 or fp8"),
    ({}, EMULATED, "teacher.cuda_graphs", "Leave it out, or precision.emulate"),
    ({"parallel": {"pipeline": 2, "virtual_pipeline": 2}}, "bf16", "teacher.cuda_graphs",
     "teacher.parallel.virtual_pipeline=1"),
])
def test_cuda_graphs_that_cannot_be_recorded(role, precision, field, fix):
    raw = yaml.safe_load(RECIPE) | {"device": "cuda", "precision": precision}
    raw[role.get("name", "teacher")] |= {"cuda_graphs": True} | {name: role[name] for name in role if name != "name"}
    error = refused(raw)
    assert error.field == field and fix in error.fix


def test_cuda_graphs_of_teachers():
    raw = yaml.safe_load(RECIPE) | {"device": "cuda"}
    raw["teacher"]["cuda_graphs"], raw["reference"] = True, raw["reference"] | {"cuda_graphs": True, "graph_tokens": 64}
    for precision in ("bf16", {"dtype": "fp8", "fp8_recipe": "delayed", "fp8_weights": "teachers"}):
        recipe = parse(raw | {"precision": precision})
        assert (recipe.teacher.graph_tokens, recipe.reference.graph_tokens) == (256, 64)


def test_decode_graphs():
    raw = yaml.safe_load(RECIPE) | {"device": "cuda"}
    for name in ("student", "teacher", "reference"):
        raw[name] |= {"decode_graphs": True}
    for precision in ("fp32", "bf16", {"dtype": "fp8"}):
        assert parse(raw | {"precision": precision}).student.decode_graphs
    delayed = {"precision": {"dtype": "fp8", "fp8_recipe": "delayed"}}
    error = refused(raw | delayed)
    assert (error.field, error.fix) == ("student.decode_graphs", "Leave it out, or take another fp8_recipe")
    raw["student"]["decode_graphs"] = False
    error = refused(raw | delayed)
    assert error.field == "teacher.decode_graphs"  # a stage trains it
    raw["teacher"]["decode_graphs"] = False
    assert parse(raw | delayed).reference.decode_graphs


def test_context_ranks_on_a_gpu_need_16_bits():
    raw = yaml.safe_load(RECIPE)
    raw["student"]["parallel"] = {"context": 2}
    parse(raw)
    parse(raw | {"device": "cuda", "precision": "bf16"})
    error = refused(raw | {"device": "cuda"})
    assert (error.field, error.value) == ("student.parallel.context", 2) and "Write precision: bf16" in error.fix


def test_fp8_settings_of_a_device_or_another_section():
    raw = yaml.safe_load(RECIPE) | {"device": "cuda"}
    error = refused(raw | {"precision": {"dtype": "fp8", "fp8_recipe": "mxfp8", "fp8_weights": "all"}})
    assert (error.field, error.fix) == ("precision.fp8_weights", "Write teachers, or another fp8_recipe")
    raw["student"]["recompute"] = "mlp"
    error = refused(raw | {"precision": EMULATED | {"fp8_recipe": "delayed"}})
    assert (error.field, error.value, error.fix) == ("student.recompute", "mlp", "Write none, or another fp8_recipe")
    for precision in (EMULATED, {"dtype": "fp8", "fp8_recipe": "delayed", "amax_history": 16, "fp8_weights": "all"},
                      {"dtype": "fp8", "fp8_recipe": "mxfp8", "fp8_weights": "teachers", "first_last_bf16": 2}):
        recipe = parse(raw | {"precision": precision})
        assert parse(yaml.safe_load(dump(recipe))) == recipe


def test_what_a_role_has_of_the_precision():
    precision = Precision(dtype="fp8", fp8_recipe="delayed", fp8_weights="teachers")
    assert [precision.scaling_of(trained=trained) for trained in (True, False)] == ["delayed", "tensorwise"]
    assert [precision.holds_fp8_weights(trained=trained) for trained in (True, False)] == [False, True]


def test_an_evaluation_reads_the_teacher_too():
    raw = yaml.safe_load(RECIPE)
    raw["stages"] = [raw["stages"][4] | {"models": {"start": "models/student"}}, raw["stages"][0]]
    error = refused(raw)
    assert (error.field, error.fix) == ("teacher.model", "Move 'align', which saves it, before 'eval'")


@pytest.mark.parametrize("given", ["runs/small/models/trained", "./runs/small/models/../models/trained",
                                   "runs/small/models/trained/hf", str(Path("runs/small/models/trained").absolute())])
@pytest.mark.parametrize("setting", ["student.model", "stages.1.init", "stages.4.models.start"])
def test_a_stage_never_overwrites_a_given_model(setting, given):
    error = refused(changed(setting, given))
    assert told(error) == ("stages.adpa.save_as", "trained", f"it would overwrite {given}, which the run reads",
                           "Choose another name, or write run:trained there if this stage's model is meant")


def test_a_given_model_may_lie_beside_the_ones_that_are_made():
    parse(changed("stages.1.init", "runs/small/models/trained_elsewhere"))


# ------------------------------------------------------------------------------------------------------------- world
def with_roles(**settings: object) -> dict:
    """The recipe with settings of roles: `student__micro_batch=5` or `teacher__pipeline=2`."""
    raw = yaml.safe_load(RECIPE)
    for setting, value in settings.items():
        role, _, name = setting.partition("__")
        section = raw[role] if name == "micro_batch" else raw[role].setdefault("parallel", {})
        section[name] = value
    return raw


def wrong_world(raw: dict, world: int) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_world(parse(raw), world)
    return caught.value


def test_worlds_that_fit():
    recipe = parse(yaml.safe_load(RECIPE))
    for world in (2, 4):
        check_world(recipe, world)


@pytest.mark.parametrize("world, settings, field, ranks", [
    (1, {}, "student.parallel", 2),
    (3, {}, "student.parallel", 2),
    (2, {"teacher__pipeline": 3}, "teacher.parallel", 3),
    (2, {"reference__tensor": 2, "reference__pipeline": 2}, "reference.parallel", 4),
])
def test_a_layout_that_does_not_divide_the_world(world, settings, field, ranks):
    error = wrong_world(with_roles(**settings), world)
    assert error.field == field
    assert error.rule == f"{ranks} ranks for one copy do not divide the world of {world} ranks"
    assert f"Start a multiple of {ranks} ranks" in error.fix


@pytest.mark.parametrize("world, settings, stage, rule, number", [
    # The first stage whose roles' micro-batches do not fit is told; the number works for all its roles together.
    (2, {"teacher__micro_batch": 3}, "align",
     "has to be a multiple of teacher's data-parallel size 2 x teacher.micro_batch 3", 12),
    (4, {"student__micro_batch": 5}, "dckd",
     "has to be a multiple of student's data-parallel size 2 x student.micro_batch 5", 40),
    (4, {"teacher__pipeline": 2, "teacher__virtual_pipeline": 2, "teacher__micro_batch": 4, "reference__pipeline": 2},
     "align", "has to be a multiple of teacher's data-parallel size 2 x teacher.micro_batch 4 x its pipeline size 2 "
     "(the interleaved schedule)", 16),
])
def test_a_global_batch_that_does_not_divide(world, settings, stage, rule, number):
    raw = with_roles(**settings)
    error = wrong_world(raw, world)
    assert (error.field, error.value, error.rule) == (f"stages.{stage}.global_batch", 8, rule)
    assert error.fix.startswith(f"Use {number}, or another ")
    for one in raw["stages"]:
        if "global_batch" in one:
            one["global_batch"] = number if one["name"] == stage else 240
    check_world(parse(raw), world)


def test_roles_that_a_stage_does_not_use_do_not_bind_its_batch():
    error = wrong_world(with_roles(student__micro_batch=16), 2)  # the student has no part in `align`
    assert error.field == "stages.dckd.global_batch"


# ------------------------------------------------------------------------------------------------- generated answers
def test_pad_needs_several_answers_and_their_scores():
    assert parse(with_pad({"n": 5, "keep": 4})).stages[2].answers == 4
    assert told(refused(with_pad({"n": 1}))) == (
        "stages.answers.n", 1, "preferences over a prompt's answers need at least 2", "Write n: 4, temperature: 1.0")
    error = refused(with_pad({"n": 8}))
    assert error.rule == "the probabilistic loss counts all rankings: at most 6 answers"
    assert parse(with_pad({"n": 8}, objective={"loss": "vanilla"})).stages[2].answers == 8
    assert told(refused(with_pad({"n": 4}, scored="others"))) == (
        "stages.adpa.scores", "score", "it scores the rollouts of 'others', this stage trains on 'answers'",
        "Name the same rollouts in both")
    rule = "has to name an earlier stage of kind 'generate'"
    assert told(refused(with_pad({"n": 4}, scored="dckd"))) == (
        "stages.score.rollouts", "dckd", rule, "There are: answers, others")


def test_dpkd_pairs_as_many_answers_of_both():
    raw = with_pad({"n": 2})
    del raw["stages"][5]["scores"]
    raw["stages"][5] |= {"objective": {"kind": "dpkd"}, "teacher_answers": "others"}
    parse(raw)
    raw["stages"][3]["n"] = 3
    error = refused(raw)
    assert (error.field, error.value) == ("stages.answers.n", 2) and "of which there are 3" in error.rule
