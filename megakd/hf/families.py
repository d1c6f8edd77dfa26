"""What a Hugging Face model directory holds, read from its config.json. Imports no torch.

One entry of `FAMILIES` a family. A field or feature that the entry does not allow is refused: a model that is
computed in another way than it was trained gives wrong numbers without any error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megakd.errors import ModelError


@dataclass(frozen=True)
class Family:
    """How the config.json of one `model_type` is to be read."""

    qkv_bias: bool
    """Whether the query, key and value projections have a bias (the output projection has none)."""
    qk_norm: bool
    """Whether each head's queries and keys are normalised before they are rotated."""
    model_class: str
    """transformers' class of the models, which config.json names as `architectures`."""
    defaults: Mapping[str, object]
    """The value of a field that config.json leaves out: that of transformers' config class of the family."""
    required: Mapping[str, object]
    """The only value that is supported of a field that names a feature."""


_COMMON_DEFAULTS = {
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": 1.0,
    "layer_types": None,
    "quantization_config": None,
}
_COMMON_REQUIRED = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "quantization_config": None}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        qkv_bias=False,
        qk_norm=False,
        model_class="LlamaForCausalLM",
        defaults=_COMMON_DEFAULTS
        | {
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
        },
        required=_COMMON_REQUIRED | {"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        qkv_bias=False,
        qk_norm=False,
        model_class="MistralForCausalLM",
        defaults=_COMMON_DEFAULTS
        | {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        required=_COMMON_REQUIRED | {"sliding_window": None},
    ),
    "qwen2": Family(
        qkv_bias=True,
        qk_norm=False,
        model_class="Qwen2ForCausalLM",
        defaults=_COMMON_DEFAULTS
        | {
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
        },
        required=_COMMON_REQUIRED | {"use_sliding_window": False},
    ),
    "qwen3": Family(
        qkv_bias=False,
        qk_norm=True,
        model_class="Qwen3ForCausalLM",
        defaults=_COMMON_DEFAULTS
        | {
            "head_dim": 128,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "attention_bias": False,
            "use_sliding_window": False,
        },
        required=_COMMON_REQUIRED | {"attention_bias": False, "use_sliding_window": False},
    ),
}

# megatron-core's RotaryEmbedding._apply_scaling takes the factor and has these fixed.
_LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of the rotary frequencies (low 1, high 4, original context 8192)."""

    factor: float


@dataclass(frozen=True)
class Architecture:
    """The sizes and features of a decoder, as its config.json gives them."""

    family: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool
    max_positions: int

    @classmethod
    def read(cls, directory: str | Path) -> Architecture:
        """Read `directory`/config.json, of transformers before 5 or since.

        Raises:
            ModelError: no such file, unknown family, a field missing or a feature that is not supported.
        """
        fields = _Fields(Path(directory), read_config(directory))
        theta, scaling = _read_rope(fields)
        heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
        kv_heads = heads if fields["num_key_value_heads"] is None else fields.size("num_key_value_heads")
        if heads % kv_heads != 0:
            raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
        if fields["head_dim"] is None and hidden % heads != 0:
            raise fields.error("hidden_size", f"a multiple of num_attention_heads = {heads}, or a head_dim")
        layer_types = fields["layer_types"]
        if layer_types is not None and set(layer_types) != {"full_attention"}:
            raise fields.error("layer_types", "full_attention in every layer")
        return cls(
            family=fields["model_type"],
            hidden_size=hidden,
            layers=fields.size("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=hidden // heads if fields["head_dim"] is None else fields.size("head_dim"),
            ffn_size=fields.size("intermediate_size"),
            vocab_size=fields.size("vocab_size"),
            norm_eps=float(fields["rms_norm_eps"]),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=bool(fields["tie_word_embeddings"]),
            qkv_bias=fields.family.qkv_bias,
            max_positions=fields.size("max_position_embeddings"),
        )

    def with_layers(self, layers: int) -> Architecture:
        """The same architecture with another number of layers."""
        return replace(self, layers=layers)

    @property
    def qk_norm(self) -> bool:
        """Whether each head's queries and keys are normalised (RMS, one weight [head_dim] for all heads) before they
        are rotated."""
        return FAMILIES[self.family].qk_norm

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads // self.kv_heads


def read_config(directory: str | Path) -> dict:
    """The parsed config.json of a model directory.

    Raises:
        ModelError: the directory or the file is missing, or the file is not a JSON object.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory}: no config.json there. Give a Hugging Face model directory")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object")
    return config


class _Fields:
    """A config.json with its family's defaults filled in and its features checked."""

    def __init__(self, directory: Path, config: dict):
        self.directory, self.written = directory, config
        family = config.get("model_type")
        if family not in FAMILIES:
            raise self._refusal("model_type", family, " | ".join(FAMILIES))
        self.family = FAMILIES[family]
        self._values = {**self.family.defaults, **config}
        for field, value in self.family.required.items():
            if self._values[field] != value:
                raise self._refusal(field, self._values[field], json.dumps(value) + _hint(field))

    def __getitem__(self, field: str) -> object:
        if field not in self._values:
            raise ModelError(f"{self.directory}/config.json: field {field} is missing")
        return self._values[field]

    def size(self, field: str) -> int:
        """A field that has to be a positive integer."""
        value = self[field]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(field, "a positive integer")
        return value

    def error(self, field: str, supported: str) -> ModelError:
        """The refusal of a field's value."""
        return self._refusal(field, self[field], supported)

    def _refusal(self, field: str, value: object, supported: str) -> ModelError:
        origin = "" if field in self.written else " (the family's default, as the field is absent)"
        place = f"{self.directory}/config.json: {field} = {value!r}{origin}"
        return ModelError(f"{place} is not supported. Supported: {supported}")


def _hint(field: str) -> str:
    """What to do about a refused feature, where something can be done."""
    if field in ("sliding_window", "use_sliding_window"):
        off = {"sliding_window": "null", "use_sliding_window": "false"}[field]
        return f". A window does nothing to sequences that fit in it: for those, write {off} in config.json"
    if field == "quantization_config":
        return ". Convert the model to float32 or bfloat16 first"
    return ""


def _read_rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    given = [field for field in ("rope_parameters", "rope_scaling") if fields[field] is not None]
    parsed = {field: _parse_rope(fields, field) for field in given}
    if not parsed:
        return float(fields["rope_theta"]), None
    if len(set(parsed.values())) > 1:
        raise fields.error("rope_scaling", "the same scaling as in rope_parameters, or only one of the two")
    return next(iter(parsed.values()))


def _parse_rope(fields: _Fields, field: str) -> tuple[float, RopeScaling | None]:
    supported = (
        'rope_type "default", or "llama3" with a factor, low_freq_factor 1, high_freq_factor 4 and '
        "original_max_position_embeddings 8192 (megatron-core has these fixed)"
    )
    if not isinstance(fields[field], dict):
        raise fields.error(field, supported)
    rope = {"rope_theta": fields["rope_theta"], **fields[field]}
    theta = float(rope.pop("rope_theta"))
    kinds = {rope.pop(key) for key in ("rope_type", "type") if key in rope}
    if "partial_rotary_factor" in rope and rope.pop("partial_rotary_factor") != 1.0:
        raise fields.error(field, "partial_rotary_factor 1")
    if kinds == {"default"} and not rope:
        return theta, None
    if kinds == {"llama3"} and "factor" in rope:
        factor = float(rope.pop("factor"))
        if rope == _LLAMA3_FIXED:
            return theta, RopeScaling(factor)
    raise fields.error(field, supported)
