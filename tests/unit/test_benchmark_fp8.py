"""benchmarks/fp8_emulation.py: its recipes are good ones, its table compares what belongs together."""

from __future__ import annotations

from benchmarks import fp8_emulation
from benchmarks.fp8_emulation import PRECISIONS, Case, recipe_of, table
from megakd.config import parse


def options(tmp_path, *more: str):
    return fp8_emulation.parser().parse_args(
        ["--model", str(tmp_path / "model"), "--data", "rows.jsonl", "--out", str(tmp_path / "out"), *more])


def test_every_case_is_a_recipe_and_differs_from_the_others_in_precision_and_layout_alone(tmp_path):
    recipes = {(precision, tensor): parse(recipe_of(Case(precision, tensor), options(tmp_path)))
               for precision in PRECISIONS for tensor in (1, 2)}
    assert len({recipe.output for recipe in recipes.values()}) == len(recipes) == 12
    assert len({(recipe.data, recipe.stages, recipe.seed) for recipe in recipes.values()}) == 1
    assert {name: recipe.precision.emulate for (name, _), recipe in recipes.items()} == {
        name: name not in ("fp32", "bf16") for name in PRECISIONS}


def test_the_table_compares_with_bf16_and_float32_of_the_same_layout(tmp_path):
    def figures(tensor: int, losses: list[float]) -> dict:
        return {"tensor": tensor, "loss": losses, "tokens": [250, 260]}

    record = {"settings": {"steps": 6}, "machine": {"cpu": "a CPU"},
              "runs": {"fp32-tp1": figures(1, [4.0] * 6), "fp32-tp2": figures(2, [4.0] + [2.0] * 5),
                       "bf16-tp2": figures(2, [7.0] + [2.2] * 5), "mxfp8-tp2": figures(2, [6.0] + [2.4] * 5),
                       "mxfp8-tp4": figures(4, [4.4] * 6)}}
    lines = table(record).splitlines()
    against_bf16, against_fp32 = "+9.09 ± 0.00 % | +0.00 ± 3.90 %", "+20.00 ± 0.00 % | +28.57 ± 5.00 %"
    assert f"| mxfp8-tp2 | 2.40000 | {against_bf16} | {against_fp32} | 255 |" in lines
    assert "| mxfp8-tp4 | 4.40000 |  |  |  |  | 255 |" in lines
    assert "| 1 | 4.00000 | 2.00000 | 2.20000 | 2.40000 | 4.40000 |" in lines
