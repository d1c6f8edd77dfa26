"""The order of a run: every epoch a permutation, no gap between epochs, nothing to remember but the step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.data import sampler
from megakd.data.sampler import StepSampler
from megakd.errors import ConfigError


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(0, 2**64 - 1))
def test_the_steps_joined_are_permutations_joined(data, count, seed):
    global_batch = data.draw(st.integers(1, count))
    run = StepSampler(count, global_batch, seed)
    steps = -(-3 * count // global_batch)
    stream = [index for step in range(steps) for index in run.indices(step)]
    assert len(stream) == steps * global_batch
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_a_step_is_a_pure_function_of_seed_and_number():
    run = StepSampler(1000, 37, seed=5)
    forwards = [run.indices(step) for step in range(60)]
    sampler._permutation.cache_clear()
    resumed = StepSampler(1000, 37, seed=5)
    assert [resumed.indices(step) for step in reversed(range(60))] == forwards[::-1]
    assert StepSampler(1000, 37, seed=6).indices(0) != forwards[0]
    stream = sum(forwards, [])
    assert stream[:1000] != stream[1000:2000], "each epoch has its own order"


def test_the_order_never_changes():
    """Runs that resume with another version of this program or of NumPy must go on as they began."""
    assert StepSampler(10, 10, seed=1234).indices(0) == ORDER_0
    assert StepSampler(10, 10, seed=1234).indices(1) == ORDER_1


ORDER_0 = [8, 9, 7, 3, 0, 1, 4, 2, 5, 6]
ORDER_1 = [0, 9, 5, 6, 4, 2, 8, 1, 7, 3]


@pytest.mark.parametrize(
    ("count", "global_batch", "seed", "words"),
    [(3, 4, 0, ["global_batch = 4", "the data, 3"]), (0, 1, 0, ["global_batch = 1", "the data, 0"]),
     (3, 0, 0, ["global_batch = 0"]), (3, 1, -1, ["seed = -1"]), (3, 1, 2**64, ["seed = "])],
)
def test_settings_that_cannot_be_are_refused(count, global_batch, seed, words):
    with pytest.raises(ConfigError) as error:
        StepSampler(count, global_batch, seed)
    assert all(word in str(error.value) for word in words)
