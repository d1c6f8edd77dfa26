"""Reading config.json: the old and the new form, and what is refused."""

import json
from pathlib import Path

import pytest

from megakd.errors import ModelError
from megakd.hf.families import Architecture, RopeScaling
from tests.hf_models import architecture, config_json


def _read(folder: Path, config: dict) -> Architecture:
    (folder / "config.json").write_text(json.dumps(config))
    return Architecture.read(folder)


def _without(config: dict, *fields: str) -> dict:
    return {field: value for field, value in config.items() if field not in fields}


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_old_form(tmp_path):
    assert _read(tmp_path, config_json(architecture())) == architecture()


def test_new_form(tmp_path):
    config = _without(config_json(architecture()), "rope_theta", "rope_scaling", "torch_dtype")
    config |= {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "float32"}
    assert _read(tmp_path, config) == architecture(rope_theta=5e5)


def test_llama3_scaling_in_both_forms(tmp_path):
    config = config_json(architecture())
    old = _read(tmp_path, config | {"rope_theta": 5e5, "rope_scaling": _LLAMA3})
    parameters = {"rope_parameters": _LLAMA3 | {"rope_theta": 5e5}}
    new = _read(tmp_path, _without(config, "rope_theta", "rope_scaling") | parameters)
    assert old == new == architecture(rope_theta=5e5, rope_scaling=RopeScaling(32.0))
    both = _read(tmp_path, config | {"rope_scaling": _LLAMA3, "rope_parameters": _LLAMA3})
    assert both.rope_scaling == RopeScaling(32.0)


def test_fields_left_out_take_the_familys_defaults(tmp_path):
    left_out = ("num_key_value_heads", "rope_theta", "tie_word_embeddings", "head_dim")
    read = _read(tmp_path, _without(config_json(architecture()), *left_out))
    assert (read.kv_heads, read.rope_theta, read.tied_embeddings, read.head_dim) == (6, 10000.0, False, 2)


def test_qwen2_has_a_bias(tmp_path):
    config = config_json(architecture(family="qwen2")) | {"sliding_window": 4096, "use_sliding_window": False}
    config |= {"layer_types": ["full_attention"] * 4}
    assert _read(tmp_path, config).qkv_bias


def test_qwen3_normalises_queries_and_keys(tmp_path):
    # Qwen3-8B's config.json, as its page has it.
    config = {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960,
        "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    }
    read = _read(tmp_path, config)
    assert read == Architecture("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, 1e-6, 1e6, None, False, False, 40960)
    assert read.qk_norm and not architecture().qk_norm and not architecture(family="qwen2").qk_norm
    assert _read(tmp_path, _without(config, "head_dim") | {"hidden_size": 5120}).head_dim == 128  # not hidden / heads


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "gemma2"}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": "12"}, "hidden_size"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": _LLAMA3 | {"high_freq_factor": 8.0}}, "rope_scaling"),
        ({"rope_scaling": _LLAMA3 | {"original_max_position_embeddings": 4096}}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ({"rope_parameters": _LLAMA3, "rope_scaling": _LLAMA3 | {"factor": 8.0}}, "rope_scaling"),
        ({"model_type": "mistral"}, "sliding_window"),  # absent there means 4096
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"model_type": "qwen3", "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                                                  "original_max_position_embeddings": 32768}}, "rope_scaling"),
        ({"model_type": "qwen3_moe"}, "model_type"),
    ],
)
def test_refused(tmp_path, changes, field):
    with pytest.raises(ModelError) as error:
        _read(tmp_path, config_json(architecture()) | changes)
    message = str(error.value)
    assert str(tmp_path) in message and f"{field} = " in message and "Supported: " in message


@pytest.mark.parametrize(("family", "field", "off"), [("mistral", "sliding_window", None),
                                                       ("qwen3", "use_sliding_window", False)])
def test_a_refused_window_says_what_to_write(tmp_path, family, field, off):
    config = config_json(architecture()) | {"model_type": family, field: True}
    with pytest.raises(ModelError, match=f"write {json.dumps(off)} in config.json"):
        _read(tmp_path, config)
    _read(tmp_path, config | {field: off})


def test_missing_field_and_file(tmp_path):
    with pytest.raises(ModelError, match="field vocab_size is missing"):
        _read(tmp_path, _without(config_json(architecture()), "vocab_size"))
    with pytest.raises(ModelError, match=r"no config\.json there"):
        Architecture.read(tmp_path / "elsewhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        Architecture.read(tmp_path)


def test_mistral_without_a_window(tmp_path):
    config = config_json(architecture()) | {"model_type": "mistral", "sliding_window": None}
    assert _read(tmp_path, config) == architecture(family="mistral")
