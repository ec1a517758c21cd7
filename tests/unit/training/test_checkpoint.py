"""Checkpoints: whole or not there, and the last good one is found."""

import os

import pytest
import torch

from luthier.core.errors import RunError
from luthier.training.checkpoint import Checkpoints, read_checkpoint


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3, 4), value)}


def test_only_the_newest_are_kept_and_the_best_beside_them(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(f"step-{step:08d}", weights(step), {"step": step})
    store.save("best", weights(9), {"step": 2})
    store.save("best", weights(8), {"step": 3})
    assert [path.name for path in store.steps()] == ["step-00000002", "step-00000003"]
    path, found, state = next(store.newest())
    assert path.name == "step-00000003" and state == {"step": 3} and torch.equal(found["w"], weights(3)["w"])
    assert torch.equal(read_checkpoint(tmp_path / "best")[0]["w"], weights(8)["w"])
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["cut", "flip", "lose", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    store = Checkpoints(tmp_path)
    store.save("step-00000001", weights(1), {"step": 1})
    newest = store.save("step-00000002", weights(2), {"step": 2})
    file = newest / ("manifest.json" if damage == "manifest" else "weights.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "lose":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2])
    assert [path.name for path, _, _ in store.newest()] == ["step-00000001"]


def test_a_half_written_directory_is_not_a_checkpoint(tmp_path):
    store = Checkpoints(tmp_path)
    store.save("step-00000001", weights(1), {"step": 1})
    half = tmp_path / ".step-00000002.part"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    assert [path.name for path, _, _ in store.newest()] == ["step-00000001"]
    store.save("step-00000002", weights(2), {"step": 2})
    assert next(store.newest())[0].name == "step-00000002"


def test_a_full_disk_is_one_sentence_and_keeps_the_earlier_ones(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path / "run" / "checkpoints")
    store.save("step-00000001", weights(1), {"step": 1})

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match=r"No space left on device.*--resume run:run"):
        store.save("step-00000002", weights(2), {"step": 2})
    monkeypatch.undo()
    assert [path.name for path, _, _ in store.newest()] == ["step-00000001"]
    assert not list(store.directory.glob(".*"))
