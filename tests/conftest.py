"""Every test draws the same random numbers, on one thread, asks no hub, and has a place of its own for runs."""

import gc
import os
from contextlib import suppress

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LUTHIER_LANG", "en")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported and collected stays to the end, and nobody looks through it for what could go."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items):
    """Tests of real servers come first: they wait for processes, and the last to end should be a short one."""
    items.sort(key=lambda item: "/faces/server/" not in item.path.as_posix())


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.set_num_threads(1)  # the test before may have asked for more
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    """Where the runs of a test lie, also those of the processes that it starts, which have one thread each."""
    monkeypatch.setenv("LUTHIER_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "runs"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that holds nothing but what is compiled, which each process of a test would do again for half a minute."""
    from luthier.native.build import NoLibrary, library_path, load_library

    place = tmp_path / "cache"
    place.mkdir()
    for name in ("kernels", "decoder"):
        with suppress(NoLibrary):
            load_library(name)
            (place / library_path(name).name).symlink_to(library_path(name))
    monkeypatch.setenv("LUTHIER_CACHE", str(place))
