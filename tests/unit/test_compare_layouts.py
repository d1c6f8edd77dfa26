"""What tools/compare_layouts.py says of gradients that differ; tests/e2e/test_chain.py runs it on two layouts."""

from __future__ import annotations

import argparse
import json
import runpy
from pathlib import Path

import pytest
import torch

REPORT = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "compare_layouts.py"))["report"]


def report(tmp_path: Path, one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> int:
    options = argparse.Namespace(stage="adpa", other=["a=1"], limit=1e-5, json=tmp_path / "figures.json")
    return REPORT([({"loss": 1.0}, one), ({"loss": 1.0}, two)], options)


def test_another_gradient_is_told(tmp_path):
    one = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 12.0])}
    assert report(tmp_path, one, dict(one)) == 0
    assert report(tmp_path, one, one | {"a": torch.tensor([3.0, 4.0 + 2e-5])}) == 0  # 2e-5 of 13
    assert report(tmp_path, one, one | {"a": torch.tensor([3.0, 4.13])}) == 1
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["relative_error"] == pytest.approx(0.01, rel=1e-5) and figures["worst_tensor"] == "a"
    assert figures["worst_relative_error"] == pytest.approx(0.026, rel=1e-5)


@pytest.mark.parametrize("other", [{"a": torch.tensor([1.0, float("nan")])}, {"b": torch.tensor([1.0, 2.0])}])
def test_a_gradient_that_is_missing_is_told(tmp_path, other):
    assert report(tmp_path, {"a": torch.tensor([1.0, 2.0])}, other) == 1
