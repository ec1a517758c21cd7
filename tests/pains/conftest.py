"""Each test has a place of its own for cached rows."""

import pytest


@pytest.fixture(autouse=True)
def _own_cache(cache):
    return
