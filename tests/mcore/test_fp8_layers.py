"""What FP8 asks of a model on CUDA, as far as it runs without Transformer Engine, whose modules have stand-ins."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core import fp8_utils

from megakd.config import Parallel, Precision
from megakd.config_stages import Optimizer
from megakd.hf.families import Architecture
from megakd.hf.pieces import stage_shards
from megakd.mcore import optimizer
from megakd.mcore.fp8_layers import amax_states, fill_rows, fill_rows_of
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
def filled_and_exported(directory: str) -> dict[str, bool]:
    """A model whose matrices pass for FP8 parameters, beside those whose do not: what of it is the same."""
    exact = build(directory, Parallel(), Precision(dtype="fp32")).parameters_of(0)
    plain = build(directory, Parallel(), Precision(dtype="bf16")).parameters_of(0)
    kept = fp8_utils.is_float8tensor
    fp8_utils.is_float8tensor = lambda tensor: tensor.ndim == 2
    try:
        model = build(directory, Parallel(), Precision(dtype="bf16"))
    finally:
        fp8_utils.is_float8tensor = kept
    found = model.parameters_of(0)
    same = {"values": all(torch.equal(found[name], values) for name, values in plain.items())}
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
    """What `TransformerEngineBaseModule` has for delayed scaling (module/base.py, `fp8_meta`)."""

    def __init__(self):
        super().__init__()
        self.fp8_meta: dict[str, object] = {}

    def init_fp8_meta_tensors(self, recipe: str) -> None:
        assert (self.fp8_meta["num_gemms"], self.fp8_meta["recipe"]) == (1, recipe)
        self.fp8_meta |= {"scaling_fwd": Scaling(), "scaling_bwd": Scaling()}


def test_the_states_of_transformer_engines_linears_are_made_where_there_are_none_yet(monkeypatch):
    monkeypatch.setattr(fp8_utils, "TE_LINEAR_TYPES", (EngineLinear,))
    monkeypatch.setattr(fp8_utils, "get_fp8_recipe", lambda config: config.fp8_recipe)
    chunk = torch.nn.Sequential(EngineLinear(), torch.nn.Linear(2, 2))
    config = config_of("delayed", trained=True)
    states = amax_states(chunk, config)
    assert {name: tuple(values.shape) for name, values in states.items()} == {
        "0.forward_scale": (3,), "0.forward_history": (4, 3), "0.backward_scale": (3,), "0.backward_history": (4, 3)}
    states["0.backward_scale"].fill_(5.0)
    assert torch.equal(amax_states(chunk, config)["0.backward_scale"], torch.full((3,), 5.0))
    assert chunk[0].fp8_meta["scaling_bwd"].scale.tolist() == [5.0] * 3
    assert amax_states(chunk, config_of("tensorwise", trained=True)) == {}


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
