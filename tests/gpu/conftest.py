"""A file's ranks end with it (tests/ranks.py)."""

import pytest

from tests import ranks


@pytest.fixture(scope="module", autouse=True)
def _no_groups_are_left():
    yield
    ranks.close_pools()
