"""The whole chain on one GPU: Transformer Engine layers, NCCL, bf16 and FP8. Skipped where there is no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.recipes import tiny_recipe, write_recipe

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
    ),
]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_chain_on_one_gpu(tmp_path, precision):
    raw = tiny_recipe(tmp_path)
    raw |= {"processes": 1, "device": "cuda", "precision": precision}
    for role in ("student", "teacher", "reference"):
        raw[role]["parallel"] = {}
    command = [sys.executable, "-m", "megakd.cli", "run", str(write_recipe(tmp_path, raw))]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert all(torch.isfinite(torch.tensor(figures["kl_to_teacher"])) for figures in summary.values())
