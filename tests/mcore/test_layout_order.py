"""The order of ranks in a layout is megatron-core's own."""

import pytest

from megakd.layout import Layout


def test_the_order_is_megatron_cores():
    """Against mcore's own RankGenerator."""
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    layout = Layout(24, tensor=2, pipeline=3, context=2)
    theirs = parallel_state.RankGenerator(tp=2, ep=1, dp=2, pp=3, cp=2, order="tp-cp-ep-dp-pp")
    axes = {"tensor": "tp", "context": "cp", "data": "dp", "pipeline": "pp"}
    for axis, name in axes.items():
        ours = {}
        for rank in range(layout.world):
            at = layout.coordinates(rank)
            others = tuple(getattr(at, other) for other in axes if other != axis)
            ours.setdefault(others, []).append(rank)
        assert sorted(ours.values()) == sorted(theirs.get_ranks(name))
