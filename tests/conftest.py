"""Fixtures of the whole test session."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton's functions are defined, and megatron-core imports Triton where it finds it: hence before that.
    os.environ["TRITON_INTERPRET"] = "1"

from tests import ranks  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _close_pools():
    """Ends the pools of ranks that the session's tests have started."""
    yield
    ranks.close_pools()
