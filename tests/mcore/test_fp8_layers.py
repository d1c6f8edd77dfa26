"""What FP8 asks of a model on CUDA, as far as it runs without Transformer Engine, whose modules have stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron.core import fp8_utils

from megakd.config import Parallel, Precision
from megakd.config_stages import Optimizer
from megakd.hf.families import Architecture
from megakd.hf.pieces import stage_shards
from megakd.mcore import optimizer
from megakd.mcore.decoder import _of_packed_rows
from megakd.mcore.fp8_layers import amax_states, fill_rows, fill_rows_of, forget_delayed_scaling, make_quantizers
from megakd.mcore.model import transformer_config
from tests.mcore.cases import build
from tests.mcore.tiny import make_llama
from tests.ranks import run_ranks


class Linear(torch.nn.Linear):
    """Gives a bias, too, as megatron-core's do, and notes what it is given."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.shapes.append(tuple(hidden.shape))
        return super().forward(hidden), None


def test_rows_are_filled_up_in_passes_without_gradients_and_taken_away_again():
    plain, filled = Linear(5, 3), Linear(5, 3)
    filled.load_state_dict(plain.state_dict())
    fill_rows(filled, 16)
    with torch.no_grad():
        for shape in ((1, 9, 5), (4, 8, 5), (3, 7, 5)):
            hidden = torch.randn(shape)
            assert torch.allclose(filled(hidden)[0], plain(hidden)[0], atol=1e-6)
    filled(torch.randn(3, 1, 5))
    assert filled.shapes == [(16, 1, 5), (4, 8, 5), (32, 1, 5), (3, 1, 5)]


def test_the_linears_of_transformer_engine_are_the_ones_that_are_filled_up(monkeypatch):
    monkeypatch.setattr(fp8_utils, "TE_LINEAR_TYPES", (Linear,))
    chunk = torch.nn.Sequential(Linear(4, 4), torch.nn.Linear(4, 4))
    fill_rows_of(chunk, 32)
    with torch.no_grad():
        chunk[0](torch.randn(1, 2, 4))
        chunk[1](torch.randn(1, 2, 4))
    assert chunk[0].shapes == [(32, 1, 4)]


# ------------------------------------------------------------------------------------------------------------- weights
def passes_for_fp8(tensor: torch.Tensor) -> bool:
    """Whether a parameter is a matrix; gives it what Transformer Engine does (module/base.py, `reset_parameters`): the
    quantizer's record of the largest number, and what it was made of, both of memory that nobody has written."""
    if tensor.ndim == 2 and not hasattr(tensor, "_quantizer"):
        tensor._quantizer = SimpleNamespace(amax=torch.full((1,), torch.nan))
        tensor._high_precision_init_val = torch.full_like(tensor.detach(), torch.nan)
    return tensor.ndim == 2


def filled_and_exported(directory: str) -> dict[str, bool]:
    """A model whose matrices pass for FP8 parameters, beside those whose do not: what of it is the same."""
    exact = build(directory, Parallel(), Precision(dtype="fp32")).parameters_of(0)
    plain = build(directory, Parallel(), Precision(dtype="bf16")).parameters_of(0)
    with mock.patch.object(fp8_utils, "is_float8tensor", passes_for_fp8):
        model = build(directory, Parallel(), Precision(dtype="bf16"))
    found = model.parameters_of(0)
    same = {"values": all(torch.equal(found[name], values) for name, values in plain.items())}
    matrices = [each for each in found.values() if each.ndim == 2]
    same["history"] = not any(each._quantizer.amax for each in matrices)
    same["begin of masters"] = all(torch.equal(each._high_precision_init_val, each) for each in matrices)
    trainer = optimizer.make_trainer(model, Optimizer(), 1)
    for parameter in model.parameters_of(0).values():
        parameter.data.zero_()  # as if rounding had left nothing: the masters are what is written
    trainer.fill_masters(Path(directory))
    [whole] = trainer.whole_parameters()
    if model.grid.at.data == 0:
        same["exported"] = all(torch.equal(whole[name], values) for name, values in exact.items())
        same["dtype"] = {values.dtype for values in whole.values()} == {torch.float32}
    return same


def test_fp8_weights_are_filled_from_the_files_and_written_from_their_masters(tmp_path):
    directory = str(make_llama(tmp_path / "model", seed=1, layers=1))
    for same in run_ranks(2, filled_and_exported, directory):
        assert all(same.values()), same


def processed(directory: str, overlap: bool) -> list[bool]:
    """Whether each gather by force makes the other form of all FP8 weights, where all matrices are said to be such."""
    model, calls = build(directory, Parallel(), Precision(dtype="bf16")), []
    trainer = optimizer.make_trainer(model, Optimizer(overlap=overlap), 1)
    names = {id(parameter): name for name, parameter in model.parameters_of(0).items()}
    with (mock.patch.object(optimizer, "is_float8tensor", lambda tensor: tensor.ndim == 2),
          mock.patch.object(optimizer, "post_all_gather_processing",
                            lambda weights: calls.append(sorted(names[id(each)] for each in weights)))):
        trainer.gather_parameters()
        trainer.publish_parameters()
    matrices = sorted(name for name, parameter in model.parameters_of(0).items() if parameter.ndim == 2)
    assert len(matrices) > 4
    return [call == matrices for call in calls]


def test_fp8_weights_that_no_forward_pass_waits_for_are_made_ready(tmp_path):
    directory = str(make_llama(tmp_path / "model", seed=1, layers=1))
    # Without overlap megatron-core does it at once.
    assert run_ranks(2, processed, directory, True) == [[True, True]] * 2
    assert run_ranks(2, processed, directory, False) == [[]] * 2


# -------------------------------------------------------------------------------------------------------------- states
class Scaling:
    def __init__(self):
        self.scale, self.amax_history = torch.ones(3), torch.zeros(4, 3)


class EngineLinear(torch.nn.Module):
    """What `TransformerEngineBaseModule` has for FP8 (module/base.py): made once, as the region and the module are."""

    def __init__(self):
        super().__init__()
        self.sequence_parallel = True
        self.fp8_meta: dict[str, object] = {}
        self.quantizers: dict[str, object] = {"scaling_fwd": {}, "scaling_bwd": {}}

    def init_fp8_metadata(self) -> None:
        assert not torch.is_grad_enabled()
        if not self.fp8_meta:
            self.fp8_meta = {"scaling_fwd": Scaling(), "scaling_bwd": Scaling(), "layer": REGION[-1]}
            quantizers = [SimpleNamespace(with_amax_reduction=self.sequence_parallel), SimpleNamespace(amax=None)]
            self.quantizers = {"scaling_fwd": quantizers, "scaling_bwd": [SimpleNamespace(all_gather_usage=True)]}


REGION: list[int] = []


@contextmanager
def region(config: object, layer: int) -> Iterator[None]:
    """`get_fp8_context`."""
    REGION.append(layer)
    yield
    REGION.pop()


@pytest.fixture
def engine_chunk(monkeypatch) -> torch.nn.Module:
    """A chunk whose layers, the third and fourth of the model, have a linear of Transformer Engine's and one other."""
    monkeypatch.setattr(fp8_utils, "TE_LINEAR_TYPES", (EngineLinear,))
    monkeypatch.setattr(fp8_utils, "get_fp8_context", region)
    chunk = torch.nn.Module()
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList(
        torch.nn.Sequential(EngineLinear(), torch.nn.Linear(2, 2)) for _ in range(2))
    for number, layer in enumerate(chunk.decoder.layers, start=3):
        layer.layer_number = number
    return chunk


def test_quantizers_are_made_for_packed_rows_and_a_rollout_goes_without_what_they_do_for_them(engine_chunk):
    config = config_of("tensorwise", trained=True)
    model = SimpleNamespace(config=config, chunks=[engine_chunk])
    linears = [layer[0] for layer in engine_chunk.decoder.layers]
    assert all(owner in linears for owner, _ in _of_packed_rows(model))
    make_quantizers(engine_chunk, config)
    assert [linear.fp8_meta["layer"] for linear in linears] == [2, 3] and not REGION
    found = _of_packed_rows(model)
    assert [name for _, name in found] == ["sequence_parallel"] * 2 + ["with_amax_reduction", "all_gather_usage"] * 2
    assert all(getattr(owner, name) is True for owner, name in found)


def test_a_training_with_delayed_scaling_forgets_those_before_it(monkeypatch):
    resets = []
    monkeypatch.setattr(fp8_utils, "FP8GlobalStateManager", SimpleNamespace(reset=lambda: resets.append(True)),
                        raising=False)
    for recipe, emulate in (("tensorwise", False), ("delayed", True), ("delayed", False)):
        forget_delayed_scaling(config_of(recipe, trained=True, emulate=emulate))
    assert resets == [True]


def test_delayed_scaling_s_states_are_those_of_transformer_engine_s_linears(engine_chunk):
    config = config_of("delayed", trained=True)
    make_quantizers(engine_chunk, config)
    states = amax_states(engine_chunk, config)
    assert {name: tuple(values.shape) for name, values in states.items()} == {
        f"decoder.layers.{layer}.0.{name}": shape for layer in range(2) for name, shape in (
            ("forward_scale", (3,)), ("forward_history", (4, 3)), ("backward_scale", (3,)),
            ("backward_history", (4, 3)))}
    states["decoder.layers.0.0.backward_scale"].fill_(5.0)
    assert engine_chunk.decoder.layers[0][0].fp8_meta["scaling_bwd"].scale.tolist() == [5.0] * 3
    assert amax_states(engine_chunk, config_of("tensorwise", trained=True)) == {}
    # megatron-core's configuration says "delayed" without FP8, too.
    assert amax_states(engine_chunk, replace(config, fp8=None)) == {}

SIZES = Architecture(
    family="llama", hidden_size=64, layers=4, heads=8, kv_heads=4, head_dim=8, ffn_size=128, vocab_size=300,
    norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, tied_embeddings=True, qkv_bias=False, max_positions=64)


def config_of(recipe: str, *, trained: bool, **settings: object):
    precision = Precision(dtype="fp8", fp8_recipe=recipe, **settings)
    shards = stage_shards(SIZES, tensor_rank=0, tensor_size=1, pipeline_rank=0, pipeline_size=1, spec="te")
    return transformer_config(SIZES, Parallel(), shards, "none", precision, torch.device("cpu"), trained=trained)

@pytest.mark.parametrize("recipe, trained, expected", [
    ("tensorwise", True, ("hybrid", "tensorwise")), ("delayed", True, ("hybrid", "delayed")),
    ("delayed", False, ("hybrid", "tensorwise")), ("blockwise", True, ("e4m3", "blockwise")),
    ("mxfp8", False, ("e4m3", "mxfp8"))])
def test_what_megatron_core_is_told(recipe, trained, expected):
    config = config_of(recipe, trained=trained, fp8_weights="teachers", amax_history=7)
    assert (config.fp8, config.fp8_recipe) == expected
    assert config.fp8_param is not trained
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (7, "max")
    ends = config_of("tensorwise", trained=trained, first_last_bf16=1)
    assert (ends.first_last_layers_bf16, ends.num_layers_at_start_in_bf16, ends.num_layers_at_end_in_bf16) == (
        True, 1, 1)
    assert config_of("mxfp8", trained=trained, emulate=True).fp8 is None
