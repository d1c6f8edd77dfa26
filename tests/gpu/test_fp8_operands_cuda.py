"""The operands that Transformer Engine's linear gives its FP8 products on a GPU are the emulation's, bit for bit.

The environment variable MEGAKD_FP8_GOLDENS names a file for their digests, which then tell a CPU the same
(tests/mcore/test_fp8_operands.py). It is written before anything is compared: a GPU is right.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megakd.check_precision import LEAST_CAPABILITY
from tests.fp8_operands import WRITES, differences, distances, make_model, run_linear, write_goldens
from tests.gpu.devices import lacking, on_cuda
from tests.ranks import run_ranks


@pytest.mark.parametrize("device, recipe", [on_cuda(recipe, unless=lacking(recipe)) for recipe in LEAST_CAPABILITY])
def test_operands_are_the_emulated_ones_bit_for_bit(tmp_path, device, recipe):
    # On the CPU: tests/mcore/test_fp8_operands.py.
    directory = make_model(tmp_path / "model")
    [found] = run_ranks(1, run_linear, directory, recipe, device=device, timeout=600)
    if WRITES in os.environ:
        write_goldens(Path(os.environ[WRITES]), recipe, found)
    [right] = run_ranks(1, run_linear, directory, recipe)
    off, results = differences(found.operands, right.operands), distances(found, right)
    print(f"{recipe}, {found.made_by}: {len(off)} of {len(found.operands)} operands differ; results apart",
          {name: f"{apart:.1e}, allowed {allowed:.1e}" for name, (apart, allowed) in results.items()})
    assert not off, "\n".join(off)
    assert all(apart <= allowed for apart, allowed in results.values())
