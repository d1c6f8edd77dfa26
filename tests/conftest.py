"""Fixtures of the whole test session."""

import pytest

from tests import ranks


@pytest.fixture(scope="session", autouse=True)
def _close_pools():
    """Ends the pools of ranks that the session's tests have started."""
    yield
    ranks.close_pools()
