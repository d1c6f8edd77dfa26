"""The emulation's operands against a GPU's (tests/gpu/test_fp8_operands_cuda.py): the goldens where there are some, and
what makes and compares them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megakd.mcore.fp8_emulation import E4M3, E5M2, GRADIENT_FORMATS, in_blocks
from tests.fp8_operands import (
    GOLDENS,
    GRADIENT_EXPONENT,
    LARGEST,
    PRODUCTS,
    Records,
    decoded,
    differences,
    digest_differences,
    digests,
    distances,
    gradient_of,
    input_of,
    make_model,
    read_goldens,
    run_linear,
    weight_of,
    write_goldens,
)
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> dict[str, Records]:
    directory = make_model(tmp_path_factory.mktemp("models") / "model")
    return {recipe: run_ranks(1, run_linear, directory, recipe)[0] for recipe in GRADIENT_FORMATS}


@pytest.mark.skipif(not GOLDENS.exists(), reason=f"{GOLDENS.name}: no GPU has made goldens yet (docs/gpu_status.md)")
def test_the_emulation_is_the_goldens(emulated):
    for recipe, golden in read_goldens(GOLDENS).items():
        assert "transformer_engine" in golden["made by"], "the emulation is no golden for itself"
        off = digest_differences(digests(emulated[recipe].operands), golden["operands"])
        assert not off, "\n".join([f"{recipe}, made by {golden['made by']}:", *off])


@pytest.mark.parametrize("recipe", GRADIENT_FORMATS)
def test_what_is_recorded_is_what_was_multiplied(emulated, recipe):
    records = emulated[recipe]
    for number in range(len(LARGEST)):
        taken = {(name, operand): records.operands[f"micro-batch {number + 1}: {name}, {operand}"].values_RC.double()
                 for name, operands in PRODUCTS.items() for operand in operands}
        right = {"y": taken["y", "input"] @ taken["y", "weight"].t(),
                 "dx": taken["dx", "gradient"] @ taken["dx", "weight"],
                 "dw": taken["dw", "gradient"].t() @ taken["dw", "input"]}
        for name, expected in right.items():
            found = records.results[f"micro-batch {number + 1}: {name}"]
            allowed = 2.0**-8 * expected.abs() + 1e-5 * expected.abs().max()
            assert ((found - expected).abs() <= allowed).all(), (number, name)
        # Each is near what it was made of; under delayed scaling outliers are cut, and gradients at first too small.
        given = {"input": input_of(number), "weight": weight_of(0 if number < 2 else 2),
                 "gradient": gradient_of(number)}
        for (name, operand), values_RC in taken.items():
            part = given[operand][:-1, :-1].double()
            near = 0.5 if recipe == "delayed" and operand == "gradient" and number == 0 else 0.1
            assert float((values_RC[:-1, :-1] - part).norm() / part.norm()) < near, (number, name, operand)
    assert all(apart == 0.0 and allowed < 0.004 for apart, allowed in distances(records, records).values())


def test_delayed_scales_have_moved(emulated):
    """By the largest numbers of the micro-batches before; a weight's by that of the step before."""
    inverse = {name: taken.inverse for name, taken in emulated["delayed"].operands.items()}
    shrunk = 2.0**GRADIENT_EXPONENT
    expected = {"input": (1, 47 / 448, 47 / 448), "weight": (1, 1, 28 / 448),
                "gradient": (1, 47 * shrunk / 57344, 47 * shrunk / 57344)}
    for name, operands in PRODUCTS.items():
        for operand in operands:
            scales = [inverse[f"micro-batch {number + 1}: {name}, {operand}"] for number in range(3)]
            assert scales == pytest.approx(expected[operand], rel=1e-6), (name, operand)


def test_the_numbers_are_hard_ones(emulated):
    """Half way, subnormal, gone to zero, cut: some of each."""
    given, taken = input_of(1).float(), emulated["tensorwise"].operands["micro-batch 2: y, input"]
    fp8, scaled = taken.values_RC / taken.inverse, given / taken.inverse
    _, exponent = torch.frexp(scaled)  # of 0.5 to 1; the spacing of E4M3 is 2^-4 of it, at least 2^-9
    half = torch.ldexp(torch.ones_like(scaled), (exponent - 5).clamp(min=-10))
    assert ((fp8 - scaled).abs() == half).sum() > 1000
    assert ((fp8 != 0) & (fp8.abs() < 2.0**-6)).sum() > 1000
    assert ((fp8 == 0) & (scaled != 0)).sum() > 1000
    assert (given[:128, :128] == 0).all()
    cut = emulated["delayed"].operands["micro-batch 3: y, input"]
    assert cut.values_RC[-1, -1].item() == pytest.approx(47) and input_of(2)[-1, -1] == 75
    small = emulated["delayed"].operands["micro-batch 1: dx, gradient"].values_RC.abs()
    assert ((small != 0) & (small < 2.0**-14)).sum() > 1000


def test_one_step_of_one_number_is_named(emulated, tmp_path):
    file, name = tmp_path / "some" / "goldens.json", "micro-batch 3: dx, gradient"
    for recipe, records in emulated.items():
        write_goldens(file, recipe, records)
    goldens = read_goldens(file)
    for recipe, records in emulated.items():
        assert digest_differences(digests(records.operands), goldens[recipe]["operands"]) == []
        assert differences(records.operands, records.operands) == []
    records = emulated["tensorwise"]
    taken = records.operands[name]
    fp8 = (taken.values_RC / taken.inverse).to(E5M2).view(torch.uint8)
    fp8[150, 140] += 1
    changed = records.operands | {name: replace(taken, values_RC=fp8.view(E5M2).float() * taken.inverse)}
    [line] = differences(changed, records.operands)
    assert line.startswith(f"{name}: 1 of 30720 numbers differ: ") and line.endswith("at [150, 140]")
    [line] = digest_differences(digests(changed), goldens["tensorwise"]["operands"])
    assert line.startswith(f"{name}: sha256 ") and "largest" not in line
    [line] = differences(records.operands, {**records.operands, name: replace(taken, inverse=2 * taken.inverse)})
    assert "1 / scale" in line and "0 of" in line
    del changed[name]
    assert differences(changed, records.operands) == [f"{name}: only one side has it"]
    assert digest_differences(digests(changed), goldens["tensorwise"]["operands"]) == [f"{name}: only one side has it"]


# ------------------------------------------------------------------ stand-ins of Transformer Engine's quantized tensors
def laid_out(values_RC: torch.Tensor, kind: str, by_rows: bool) -> SimpleNamespace:
    """A matrix of [192, 320] in E4M3 as Transformer Engine's kernels lay it out, block by block."""
    side, rows, columns = "rowwise" if by_rows else "columnwise", 192, 320
    fields = {"_fp8_dtype": SimpleNamespace(name="kFloat8E4M3")}
    if kind == "tensor":
        fp8 = (values_RC.float() * 8).to(E4M3).view(torch.uint8)
        return SimpleNamespace(**fields, _data=fp8.view(rows, 1, columns) if by_rows else None, _transpose=fp8.t(),
                               _transpose_invalid=by_rows, _scale_inv=torch.tensor([0.125]))
    if kind == "mxfp8":
        data = torch.zeros(rows, columns, dtype=torch.uint8)
        inverse = torch.full((256, 12) if by_rows else (8, 384), 255, dtype=torch.uint8)
        size, across = (1, 32) if by_rows else (32, 1), False
    else:
        across = not by_rows
        given = values_RC.t() if across else values_RC
        data = torch.zeros(given.shape, dtype=torch.uint8)
        high, wide = given.shape
        summed = -(-wide // 128)
        inverse = torch.full((-(-high // 128), 4) if kind == "2d" else (summed, high), torch.nan)
        size = (128, 128) if kind == "2d" else (1, 128)
    given = values_RC.t() if across else values_RC
    for top in range(0, given.shape[0], size[0]):
        for left in range(0, given.shape[1], size[1]):
            block = given[top : top + size[0], left : left + size[1]].float()
            exponent = (top // size[0] + 2 * left // size[1]) % 5
            data[top : top + size[0], left : left + size[1]] = (block * 2**exponent).to(E4M3).view(torch.uint8)
            place = (left // 128, top) if kind == "1d" else (top // size[0], left // size[1])
            inverse[place] = 127 - exponent if kind == "mxfp8" else 2.0**-exponent
    if kind != "mxfp8":
        fields["_is_2D_scaled"] = kind == "2d"
    return SimpleNamespace(**fields, **{f"_{side}_data": data, f"_{side}_scale_inv": inverse})


@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("kind", ["tensor", "1d", "2d", "mxfp8"])
def test_tensors_of_transformer_engine_are_read_by_rows_and_by_columns(kind, by_rows):
    # Numbers that E4M3 has, whatever power of two is their scale.
    values_RC = in_blocks(input_of(0)[:, :320].clamp(-2, 2), (192, 320), "blockwise", E4M3).values_RC
    values_RC = torch.where(values_RC.abs() < 2.0**-5, 0.0, values_RC)
    taken = decoded(laid_out(values_RC, kind, by_rows), by_rows=by_rows)
    assert torch.equal(taken.values_RC, values_RC)
    assert taken.inverse == (0.125 if kind == "tensor" else None)
