"""Every test draws the same random numbers, on one thread, asks no hub, and has a place of its own for runs."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LUTHIER_LANG", "en")


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
    """A cache that holds nothing yet. Not for every test: what is compiled lies there too."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
