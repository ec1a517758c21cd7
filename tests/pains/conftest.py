"""Each test has a place of its own for runs and for cached rows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    return tmp_path / "runs"
