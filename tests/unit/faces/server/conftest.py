"""One real server for the tests that ask it from outside."""

from collections.abc import Iterator

import pytest

from running import Running


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[Running]:
    """`mini`, under its own name and as `twin`."""
    running = Running("mini", "twin=mini", runs=tmp_path_factory.mktemp("runs"))
    yield running
    assert running.stop() == 0
