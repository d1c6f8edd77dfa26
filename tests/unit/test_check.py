"""What is found before a run starts: every way in which recipe, models, data and disk can be unfit for each other."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megakd import check, check_precision, manifest
from megakd.check import check_recipe
from megakd.check_signals import signals_bytes
from megakd.config import Parallel, Precision, Recipe, dump, parse
from megakd.errors import ConfigError, DataError, MegakdError, ModelError
from megakd.hf.families import Architecture
from megakd.provenance import stage_config, stage_inputs
from tests.recipes import CONTEXT, VOCABULARY, stage, tiny_recipe, tiny_rows, write_rows, write_tiny_model
from tests.tiny_tokenizer import CHATML

WORLD = 2


@pytest.fixture
def raw(tmp_path) -> dict[str, Any]:
    return tiny_recipe(tmp_path)


def below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refused(raw: dict[str, Any], tmp_path: Path, kind: type[MegakdError], world: int = WORLD) -> str:
    """The message of a refusal that leaves no trace: no file, no process group."""
    before = below(tmp_path)
    recipe = parse(raw)
    with pytest.raises(kind) as caught:
        check_recipe(recipe, world)
    assert below(tmp_path) == before
    assert not dist.is_initialized()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_good_recipe_passes_and_leaves_no_trace(raw, tmp_path):
    before = below(tmp_path)
    check_recipe(parse(raw), WORLD)
    assert below(tmp_path) == before
    assert not dist.is_initialized()


# ------------------------------------------------------------------------------------------------------------ models
@pytest.mark.parametrize("field", ["reference.model", "student.model", "stages.dckd.init", "stages.dpo.reference",
                                   "stages.eval.models.start"])
def test_a_missing_model_directory(raw, tmp_path, field):
    section, _, name = field.rpartition(".")
    node = raw[section] if section in raw else stage(raw, section.split(".")[1])
    node = node["models"] if section.endswith("models") else node
    node[name] = str(tmp_path / "nowhere")
    message = refused(raw, tmp_path, ConfigError)
    assert message == (
        f"{field} = '{tmp_path}/nowhere': there is no such directory. Give a Hugging Face model directory, or run:NAME"
    )


def test_heads_that_do_not_divide(raw, tmp_path):
    del raw["student"]["parallel"]["pad_heads"]
    message = refused(raw, tmp_path, ConfigError)
    rule = "the model's 6 query heads in 3 key/value groups do not divide by it"
    assert message.startswith(f"student.parallel.tensor = 2: {rule}. ")
    assert "Set student.parallel.pad_heads=true, which adds 2 zero heads = 33% more attention work" in message
    assert message.endswith("or use one of 1, 3")


def test_more_stages_than_layers(raw, tmp_path):
    raw["teacher"]["parallel"] = {"pipeline": 2, "virtual_pipeline": 3}
    message = refused(raw, tmp_path, ConfigError)
    assert message == ("teacher.parallel.pipeline x teacher.parallel.virtual_pipeline = 6: no part of a pipeline may "
                       "be without a layer, and the model has 4. Use at most 4")


def test_a_model_is_checked_in_the_layout_that_it_runs_in(raw, tmp_path):
    """What the teacher's stage starts from is cut like the teacher, though the same model as reference is not cut."""
    stage(raw, "dpo")["init"] = str(write_tiny_model(tmp_path / "shallow", seed=3, layers=1))
    message = refused(raw, tmp_path, ConfigError)
    assert message.startswith("teacher.parallel.pipeline = 2: no part of a pipeline may be without a layer, and ")


def test_feed_forward_size_that_does_not_divide(raw, tmp_path):
    raw["student"]["model"] = str(write_tiny_model(tmp_path / "odd", seed=3, layers=2, ffn_size=95))
    message = refused(raw, tmp_path, ConfigError)
    rule = "the model's intermediate_size 95 must be a multiple of it"
    assert message == f"student.parallel.tensor = 2: {rule}. Use one of 1"


def test_a_world_that_does_not_divide(raw, tmp_path):
    assert refused(raw, tmp_path, ConfigError, world=3).startswith("student.parallel = 'tensor 2 x pipeline 1")
    # Where a role is not trained, its context ranks are replicas.
    raw["student"]["parallel"]["context"] = 4
    assert refused(raw, tmp_path, ConfigError).startswith("student.parallel = 'tensor 2 x pipeline 1 x context 4'")
    check_recipe(parse(raw), WORLD, only=["generate", "eval"])


def test_a_model_of_an_unknown_family(raw, tmp_path):
    config = tmp_path / "student_start" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "mamba"}))
    assert refused(raw, tmp_path, ModelError).startswith(f"{config}: model_type = 'mamba' is not supported")


def test_a_model_without_weights(raw, tmp_path):
    (tmp_path / "student_start" / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json there" in refused(raw, tmp_path, ModelError)


def test_a_model_with_too_few_weights(raw, tmp_path):
    config = tmp_path / "student_start" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    message = refused(raw, tmp_path, ModelError)
    assert message == (
        f"{tmp_path}/student_start: its files lack model.layers.2.input_layernorm.weight and 8 more "
        "tensors. Give a directory with the whole model"
    )


def test_an_evaluated_model_is_checked_too(raw, tmp_path):
    other = write_tiny_model(tmp_path / "other", seed=4, template=CHATML.replace("helpful", "terse"))
    stage(raw, "eval")["models"]["other"] = str(other)
    assert "have different tokenizers" in refused(raw, tmp_path, ModelError)


# -------------------------------------------------------------------------------------------- tokenizers, vocabularies
def test_tokenizers_that_differ_in_a_token(raw, tmp_path):
    file = tmp_path / "student_start" / "tokenizer.json"
    file.write_text(file.read_text().replace('"<|eot|>"', '"<|over|>"'))
    message = refused(raw, tmp_path, ModelError)
    assert message.startswith(
        f"{tmp_path}/reference and {tmp_path}/student_start have different tokenizers: id 6 is '<|eot|>' and '<|over|>'"
    )


def test_a_teacher_with_another_tokenizer_is_no_bar_to_evaluation_without_it(raw, tmp_path):
    raw["teacher"]["model"] = str(write_tiny_model(tmp_path / "other", seed=4, template=CHATML.replace("helpful", "?")))
    raw["stages"] = [stage(raw, "eval") | {"models": {"start": raw["student"]["model"]}}]
    message = refused(raw, tmp_path, ModelError)
    assert "other have different tokenizers" in message
    assert message.endswith("Or write stages.eval.teacher: false, which leaves out KL and expected advantage")
    raw["stages"][0]["teacher"] = False
    recipe = parse(raw)
    check_recipe(recipe, WORLD)
    assert set(stage_inputs(recipe, recipe.stages[0])) == {"models.start", "eval.0"}
    # Where another stage compares tokens with the teacher, too, that setting alone would not help.
    raw["stages"] = [{"name": "kd", "kind": "distill", "init": raw["student"]["model"], "save_as": "kd", "steps": 1,
                      "global_batch": 4, "objective": {"kind": "kd"}}, raw["stages"][0] | {"teacher": True}]
    assert "teacher: false" not in refused(raw, tmp_path, ModelError)


def test_tokenizers_that_differ_in_the_chat_template(raw, tmp_path):
    (tmp_path / "student_start" / "chat_template.jinja").write_text(CHATML.replace("helpful", "terse"))
    message = refused(raw, tmp_path, ModelError)
    assert f"the chat templates differ from character {CHATML.index('helpful')}: " in message


def test_vocabularies_of_different_sizes(raw, tmp_path):
    shutil.rmtree(tmp_path / "student_start")
    write_tiny_model(tmp_path / "student_start", seed=2, layers=2, vocab_size=448)
    message = refused(raw, tmp_path, ModelError)
    assert f"student_start have vocabularies of {VOCABULARY} and 448 tokens (vocab_size in config.json)" in message


def test_a_head_narrower_than_the_tokenizer(raw, tmp_path):
    for name, layers in (("reference", 4), ("student_start", 2)):
        shutil.rmtree(tmp_path / name)
        write_tiny_model(tmp_path / name, seed=2, layers=layers, vocab_size=400)
    assert f"the tokenizer has {VOCABULARY} tokens, the models' heads 400" in refused(raw, tmp_path, ModelError)


def test_a_missing_chat_template(raw, tmp_path):
    raw["data"]["chat_template"] = str(tmp_path / "none.jinja")
    assert refused(raw, tmp_path, ModelError) == f"{tmp_path}/none.jinja: there is no such chat template file"


# -------------------------------------------------------------------------------------------------------------- data
def test_a_length_beyond_the_context(raw, tmp_path):
    raw["data"]["max_length"] = CONTEXT + 1
    message = refused(raw, tmp_path, ConfigError)
    assert message == (
        f"data.max_length = {CONTEXT + 1}: {tmp_path}/reference has a context of {CONTEXT} tokens. Use "
        f"at most {CONTEXT}"
    )


@pytest.mark.parametrize("name", ["train", "eval"])
def test_no_data_file_named(raw, tmp_path, name):
    raw["data"][name] = []
    message = refused(raw, tmp_path, ConfigError)
    assert message.startswith(f"data.{name} = []: a stage reads these rows and no file is named")


@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_missing_data_file(raw, tmp_path, name):
    raw["data"][name] = [str(tmp_path / "other.jsonl")]
    message = refused(raw, tmp_path, DataError)
    assert message.startswith(f"{tmp_path}/other.jsonl: there is no such file or folder. {tmp_path}/ holds eval.jsonl")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_data_file(raw, tmp_path, content):
    (tmp_path / "eval.jsonl").write_text(content)
    assert refused(raw, tmp_path, DataError).startswith(f"{tmp_path}/eval.jsonl: the file has no rows")


@pytest.mark.parametrize(("name", "field"), [("train", "prompt"), ("train", "chosen"), ("train", "rejected"),
                                             ("eval", "prompt"), ("eval", "chosen")])
def test_a_row_that_lacks_a_field(raw, tmp_path, name, field):
    rows = tiny_rows(10)
    del rows[2][field]
    write_rows(tmp_path / f"{name}.jsonl", rows)
    message = refused(raw, tmp_path, DataError)
    assert re.match(rf"\S*{name}\.jsonl:3: field '{field}': missing", message)


def test_held_out_rows_need_no_rejected_answer(raw, tmp_path):
    rows = [{"prompt": row["prompt"], "reference": row["chosen"]} for row in tiny_rows(4)]
    write_rows(tmp_path / "eval.jsonl", rows)
    message = refused(raw, tmp_path, DataError)
    assert message.endswith("or write data.answer: reference, which the row has")
    raw["data"]["answer"] = "reference"
    raw["stages"] = [stage(raw, "eval") | {"models": {"start": raw["student"]["model"]}}]
    raw["teacher"]["model"] = raw["reference"]["model"]
    check_recipe(parse(raw), WORLD)


def test_generating_on_rows_of_prompts_alone(raw, tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"prompt": row["prompt"]} for row in tiny_rows(4)])
    raw["stages"] = [stage(raw, "generate") | {"model": raw["student"]["model"]}]
    raw["teacher"]["model"] = raw["reference"]["model"]
    check_recipe(parse(raw), WORLD)


def test_a_line_that_is_not_utf8(raw, tmp_path):
    lines = (tmp_path / "train.jsonl").read_bytes().splitlines(keepends=True)
    lines[4] = lines[4].replace(b"eggs", b"\xe9ggs")
    (tmp_path / "train.jsonl").write_bytes(b"".join(lines))
    message = refused(raw, tmp_path, DataError)
    assert message.startswith(f"{tmp_path}/train.jsonl:5: byte 0xe9 at position ")
    assert message.endswith("is not UTF-8. Convert the file to UTF-8")


@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_sequence_that_is_too_long(raw, tmp_path, name):
    rows = tiny_rows(10)
    rows[6]["chosen"] = "no! " * 200
    write_rows(tmp_path / f"{name}.jsonl", rows)
    message = refused(raw, tmp_path, DataError)
    assert re.search(
        rf"{name}\.jsonl:7: field 'chosen': \d+ tokens \(prompt \d+, response \d+\), more than max_length "
        r"96. Raise max_length to \d+ or more, or set too_long to drop",
        message,
    )
    raw["data"]["too_long"] = "drop"
    check_recipe(parse(raw), WORLD)


def test_fewer_rows_than_a_step_takes(raw, tmp_path):
    stage(raw, "adpa")["global_batch"] = 12
    message = refused(raw, tmp_path, ConfigError)
    rule = "the data give 10 groups, fewer than one step takes"
    assert message == f"stages.adpa.global_batch = 12: {rule}. Lower it, or give more rows"


# ------------------------------------------------------------------------------------------------------------ output
def test_no_room_on_the_disk(raw, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(manifest.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    message = refused(raw, tmp_path, ConfigError)
    assert re.search(r"4 models and 2 checkpoints need \d+\.\d MiB, and its disk has 1\.0 MiB free", message)


def scoring(raw: dict[str, Any], **signal: Any) -> None:
    """Adds a score stage of the pairs and the rollouts."""
    raw["stages"].insert(3, {"name": "score", "kind": "score", "model": "run:teacher", "signal": signal,
                             "answers": ["chosen", "rollout"], "rollouts": "generate"})


@pytest.mark.parametrize(("signal", "size"), [
    ({"kind": "hidden_states"}, 48 * 4), ({"kind": "token_log_probs"}, 4), ({"kind": "top_k", "k": 7}, 56)])
def test_the_room_that_signals_take(raw, signal, size):
    """For the rollouts at most: 10 prompts of 8 new tokens each."""
    scoring(raw, **signal)
    recipe = parse(raw)
    tokenizer = check.tokenizer_of(recipe)
    lengths = [tokenizer.encode([{"role": "user", "content": row["prompt"]}], row["chosen"], close=True)
               for row in tiny_rows(10)]
    positions = sum(len(tokens) - prompt for tokens, prompt in lengths) + 10 * 8
    found = signals_bytes(recipe, tokenizer, lambda model: check.architecture_of(recipe, model))
    assert found == {"score": positions * size}
    finish(recipe, "score")
    assert signals_bytes(recipe, tokenizer, lambda model: check.architecture_of(recipe, model)) == {}


def test_no_room_for_signals(raw, tmp_path, monkeypatch):
    scoring(raw, kind="hidden_states")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(manifest.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    message = refused(raw, tmp_path, ConfigError)
    assert "4 models and 2 checkpoints and 1 stages of signals need" in message


def test_signals_that_are_not_there_yet(raw, tmp_path):
    """As when the training is to run alone before its score stage."""
    scoring(raw, kind="hidden_states")
    raw["stages"][3] |= {"answers": ["chosen", "rejected"], "rollouts": None}
    cached = {**stage(raw, "dckd"), "name": "cached", "save_as": "cached", "signals": {"teacher": "score"}}
    raw["stages"].insert(4, cached)
    raw["teacher"]["model"] = raw["stages"][3]["model"] = raw["reference"]["model"]
    recipe = parse(raw)
    with pytest.raises(ConfigError) as caught:
        stage_inputs(recipe, recipe.stages[4])
    rule = "this, which it reads as signals.teacher, is not there. Run the stage that makes it, or correct the path"
    assert str(caught.value) == f"stages.cached = '{tmp_path}/run/stages/score/signals': {rule}"


def test_a_list_longer_than_the_vocabulary(raw, tmp_path):
    scoring(raw, kind="top_k", k=VOCABULARY)
    check_recipe(parse(raw), WORLD)
    raw["stages"][3]["signal"]["k"] = VOCABULARY + 1
    message = refused(raw, tmp_path, ConfigError)
    assert message == f"stages.score.signal.k = {VOCABULARY + 1}: the vocabulary has {VOCABULARY} tokens. Lower it"
    del raw["stages"][3]
    stage(raw, "dckd")["objective"]["top_k"] = 1000
    assert refused(raw, tmp_path, ConfigError).startswith("stages.dckd.objective.top_k = 1000: the vocabulary has")


def finish(recipe: Recipe, name: str) -> None:
    """Writes the manifest that a finished stage leaves."""
    [made] = [made for made in recipe.stages if made.name == name]
    folder = recipe.output / "stages" / name
    folder.mkdir(parents=True)
    manifest.Manifest(
        stage=name,
        kind=made.kind,
        fingerprint="",
        inputs={},
        config=stage_config(recipe, made),
        versions={},
        layout={},
        ranks=WORLD,
        started="",
        finished="",
        seconds=0.0,
        tokens=0,
        metrics={},
    ).write(folder)


def test_finished_stages_need_no_room(raw, monkeypatch):
    recipe = parse(raw)
    for name in ("dpo", "dckd", "adpa", "export"):
        finish(recipe, name)
    usage = shutil.disk_usage(recipe.output)
    monkeypatch.setattr(manifest.shutil, "disk_usage", lambda path: usage._replace(free=2**10))
    check_recipe(recipe, WORLD)


def test_a_finished_stage_with_other_settings(raw):
    finish(parse(raw), "dckd")
    stage(raw, "dckd")["objective"]["alpha"] = 0.7
    changed = parse(raw)
    with pytest.raises(ConfigError, match=r"stages\.dckd = .*objective\.alpha: 0\.2 -> 0\.7.*--redo dckd"):
        check_recipe(changed, WORLD)
    check_recipe(changed, WORLD, redo=["dckd"])
    # How a stage is computed may change.
    raw["student"]["parallel"] = {}
    stage(raw, "dckd")["objective"]["alpha"] = 0.2
    check_recipe(parse(raw), WORLD)


def test_a_finished_stage_in_another_layout(raw):
    finish(parse(raw), "generate")
    stage(raw, "generate")["role"] = "teacher"  # whose layout the model has, not whose model it is
    check_recipe(parse(raw), WORLD)


def test_the_output_folder_of_another_recipe(raw, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump(parse(raw | {"name": "other"})))
    message = refused(raw, tmp_path, ConfigError)
    rule = "holds a run of the recipe 'other', this one is 'tiny'"
    assert message == f"output = {str(tmp_path / 'run')!r}: {rule}. Choose another folder"


def test_the_output_folder_of_the_same_recipe(raw, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump(parse(raw)))
    check_recipe(parse(raw), WORLD)


@pytest.mark.parametrize("content", [b"name: [", b"\xff", b"", b"- a", b"title: a"])
def test_an_output_folder_whose_recipe_cannot_be_read(raw, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_bytes(content)
    assert "its recipe.yaml cannot be read" in refused(raw, tmp_path, ConfigError)


def test_output_is_a_file_or_below_one(raw, tmp_path):
    file = tmp_path / "train.jsonl"
    raw["output"] = str(file)
    assert refused(raw, tmp_path, ConfigError) == f"output = {str(file)!r}: is a file. Name a folder"
    raw["output"] = str(file / "a" / "b")
    assert f"lies below {file}, which is a file. Name a folder" in refused(raw, tmp_path, ConfigError)


def test_output_cannot_be_written(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(check.os, "access", lambda path, mode: False)  # a superuser may write everywhere
    assert f"{tmp_path} cannot be written to. Choose another folder" in refused(raw, tmp_path, ConfigError)


# ----------------------------------------------------------------------------------------------------------- machine
def test_cuda_without_a_gpu(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused(raw | {"device": "cuda"}, tmp_path, ConfigError)
    assert message == "device = 'cuda': torch sees no CUDA device here. Write device: cpu, or see `megakd doctor`"


def without(monkeypatch, module: str) -> None:
    """Makes a package look as if it were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))


def test_cuda_without_transformer_engine(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    without(monkeypatch, "transformer_engine")
    assert "the layers on CUDA are Transformer Engine's, which is not installed" in refused(
        raw | {"device": "cuda"}, tmp_path, ConfigError
    )


def test_more_ranks_than_gpus(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "NCCL_MULTI_RANK_GPU_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    message = refused(raw | {"device": "cuda"}, tmp_path, ConfigError)
    assert message.startswith("device = 'cuda': every rank takes a GPU of its own; here are 2 ranks, and torch sees 1 ")


def test_cuda_without_triton(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else object())
    message = refused(raw | {"device": "cuda"}, tmp_path, ConfigError)
    assert message.startswith("device = 'cuda': the losses on CUDA are Triton's kernels, which is not installed")


def test_16_bit_losses_on_a_torch_that_cannot_add_them_up(raw, tmp_path, monkeypatch):
    """The last release that refuses, and the first that takes them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    for release, precision, field in (("2.9.1+cu130", "bf16", "precision.dtype = 'bf16': "),
                                      ("2.9.1+cu130", "fp32", "device = 'cuda': every rank takes a GPU of its own"),
                                      ("2.10.0", "bf16", "device = 'cuda': every rank takes a GPU of its own")):
        monkeypatch.setattr(torch, "__version__", release)
        message = refused(raw | {"device": "cuda", "precision": precision}, tmp_path, ConfigError)
        assert message.startswith(field), release
        assert "of torch 2.9 refuses" in message or field.startswith("device")


@pytest.mark.parametrize(
    "capability, recipe, cuda, field",
    [
        ((8, 0), "tensorwise", "13.0", "precision.dtype = 'fp8': this GPU has compute capability 8.0; FP8 needs 8.9"),
        ((9, 0), "mxfp8", "13.0", "precision.fp8_recipe = 'mxfp8': needs Blackwell"),
        ((12, 0), "mxfp8", "13.0", "precision.fp8_recipe = 'mxfp8': needs Blackwell (compute capability 10.0 or more, "
                                   "below 12.0); this GPU has 12.0"),
        ((8, 9), "blockwise", "13.0", "precision.fp8_recipe = 'blockwise': needs Hopper"),
        ((9, 0), "blockwise", "12.6", "precision.fp8_recipe = 'blockwise': needs CUDA 12.9 or later; torch is built for"
                                      " 12.6"),
    ],
)
def test_fp8_on_a_gpu_that_has_none(raw, tmp_path, monkeypatch, capability, recipe, cuda, field):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    asked = raw | {"device": "cuda", "precision": {"dtype": "fp8", "fp8_recipe": recipe}}
    assert refused(asked, tmp_path, ConfigError).startswith(field)


@pytest.mark.parametrize("capability, missing, rule", [
    ((8, 0), "flash_attn", "device = 'cuda': this GPU has compute capability 8.0, for which Transformer Engine's "),
    ((12, 0), "flash_attn", "device = 'cuda': this GPU has compute capability 12.0"), ((8, 0), None, None),
    ((9, 0), "flash_attn", None), ((10, 0), "flash_attn", None)])
def test_a_gpu_without_attention_to_packed_sequences(raw, monkeypatch, capability, missing, rule):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: WORLD)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else object())
    asked = parse(raw | {"device": "cuda", "precision": "bf16"})
    if rule is None:
        return check_precision.check_backend(asked, WORLD)
    with pytest.raises(ConfigError, match=re.escape(rule)):
        check_precision.check_backend(asked, WORLD)


EMULATED = {"dtype": "fp8", "emulate": True}


def test_sizes_that_fp8_products_cannot_take(raw, tmp_path):
    # 48 wide, 3 groups of 2 query heads of 8, an MLP of 96: the student on 2 tensor ranks, a padded group among them.
    check_recipe(parse(raw | {"precision": EMULATED | {"fp8_recipe": "blockwise"}}), WORLD)
    assert refused(raw | {"precision": EMULATED | {"fp8_recipe": "mxfp8"}}, tmp_path, ConfigError) == (
        "precision.fp8_recipe = 'mxfp8': the reference's hidden_size = 48 on a tensor rank (of 1) is no multiple of "
        "32, which its products need. Use another fp8_recipe or precision: bf16")
    sizes = Architecture.read(Path(raw["student"]["model"]))
    check_precision.check_sizes(sizes, Parallel(tensor=2), Precision(), "student")
    for changed, rule in (({"head_dim": 6}, "4 query heads x head_dim 6 = 24 on a tensor rank (of 2)"),
                          ({"heads": 12, "head_dim": 4}, ""),
                          ({"ffn_size": 80}, "share of intermediate_size = 40 on a tensor rank (of 2)")):
        cut = (dataclasses.replace(sizes, **changed), Parallel(tensor=2), Precision(dtype="fp8"), "student")
        if not rule:
            check_precision.check_sizes(*cut)
            continue
        with pytest.raises(ConfigError, match=re.escape(rule)) as caught:
            check_precision.check_sizes(*cut)
        assert caught.value.fix == "Use a smaller student.parallel.tensor or precision: bf16"
    # 2 tensor ranks share rows under sequence parallelism, where a rank's own rows are cut into blocks.
    cut = Parallel(tensor=2, sequence=True)
    rows = {recipe: [check_precision.rows_multiple(Precision(dtype="fp8", fp8_recipe=recipe), parallel)
                     for parallel in (Parallel(), cut)] for recipe in check_precision.FP8_MULTIPLES}
    assert rows == {"tensorwise": [16, 32], "delayed": [16, 32], "blockwise": [16, 256], "mxfp8": [32, 64]}
    assert check_precision.rows_multiple(Precision(**EMULATED), cut) == 2


@pytest.mark.parametrize("ends, rule", [
    (2, "layers none would be left in FP8. Use at most 1"),
    (5, "layers, and megatron-core allows no more. Use at most"),
])
def test_more_layers_left_out_of_fp8_than_there_are(raw, tmp_path, ends, rule):
    message = refused(raw | {"precision": EMULATED | {"first_last_bf16": ends}}, tmp_path, ConfigError)
    assert message.startswith(f"precision.first_last_bf16 = {ends}: ") and rule in message


def test_wandb_that_is_not_installed(raw, tmp_path, monkeypatch):
    without(monkeypatch, "wandb")
    message = refused(raw | {"wandb": True}, tmp_path, ConfigError)
    assert message.startswith("wandb = True: the package wandb is not installed. Run `pip install wandb`")


def test_how_replicas_exchange_and_where_states_lie_is_no_part_of_a_stage_s_result(raw):
    def config(**settings: object) -> dict[str, Any]:
        stage(raw, "dckd")["optimizer"] = {"lr": 1e-3, **settings}
        recipe = parse(raw)
        return stage_config(recipe, next(each for each in recipe.stages if each.name == "dckd"))

    assert config() == config(overlap=True) == config(overlap=False) == config(offload=True) != config(clip=2.0)
