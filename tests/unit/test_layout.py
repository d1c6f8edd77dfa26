"""Ranks and coordinates: each other's inverse, tensor fastest and pipeline slowest."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.layout import Coordinates, Layout

SIZES = st.integers(1, 5)


@settings(max_examples=100, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES)
def test_ranks_and_coordinates_are_inverse(tensor, pipeline, context, data):
    layout = Layout(tensor * pipeline * context * data, tensor, pipeline, context)
    assert (layout.data, layout.model_ranks) == (data, tensor * pipeline * context)
    seen = []
    # Tensor fastest, then context, then data, pipeline slowest: the rank numbers come out in order.
    for p, d, c, t in itertools.product(range(pipeline), range(data), range(context), range(tensor)):
        rank = layout.rank(tensor=t, context=c, data=d, pipeline=p)
        assert layout.coordinates(rank) == Coordinates(t, c, d, p)
        seen.append(rank)
    assert seen == list(range(layout.world))


def test_the_defaults_are_the_first_rank_of_an_axis():
    layout = Layout(16, tensor=2, pipeline=2, context=2)
    assert layout.rank() == 0 and layout.rank(pipeline=1) == 8 and layout.rank(data=1) == 4
    assert [layout.rank(tensor=1, data=d) for d in range(layout.data)] == [1, 5]


@pytest.mark.parametrize("sizes", [(2, 1, 1), (4, 1, 1), (1, 4, 1), (2, 2, 1), (1, 1, 4), (8, 1, 1)])
def test_a_world_that_does_not_divide_is_refused(sizes):
    product = sizes[0] * sizes[1] * sizes[2]
    with pytest.raises(ValueError, match=f"world 3 is not a multiple of tensor x pipeline x context = {product}"):
        Layout(3, *sizes)


def test_importing_it_imports_no_torch():
    code = "import sys, megakd.layout; print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
