"""Checkpoints that are whole or not there: written to the side, flushed, renamed; damaged ones are passed over."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.core.errors import RunError
from luthier.training.world import ALONE, World

# With less than this many bytes free, a write that failed did so because the disk is full.
LITTLE_DISK = 2**20


@dataclass(slots=True)
class Progress:
    """Where training stands between two steps: all that an interrupted run needs beside weights and optimiser."""

    step: int = 0
    tokens: int = 0
    best_value: tuple[float, float] | None = None
    """The best validation: its metric, more being better, and minus its loss."""
    best_step: int = 0
    stale: int = 0
    """Validations since the best one."""
    first_loss: float | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    """Every validation so far."""
    place: dict[str, Any] | None = None
    """Where the feed stands, for one that does not know by the step."""
    drawn: dict[str, int] = field(default_factory=dict)
    """Rows learned from of each source, where there are several."""


@dataclass(slots=True)
class Checkpoints:
    """The checkpoints of one run, in its `checkpoints/` directory: the newest `keep`, and the best."""

    directory: Path
    keep: int = 2
    world: World = ALONE

    def save(self, name: str, weights: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write checkpoint `name` (such as "step-00000100" or "best"); raises RunError when it cannot be written.

        Files go into a directory beside the final one and are flushed to the disk; a manifest of their digests is
        written last; then the directory takes its name. Older step checkpoints beyond `keep` are removed after that.
        Of several processes the first writes.
        """
        final, side = self.directory / name, self.directory / f".{name}.part"
        if not self.world.leads:
            return final
        try:
            self._open(side)
            save_file(
                {key: value.detach().contiguous().cpu() for key, value in weights.items()}, side / "weights.safetensors"
            )
            torch.save(state, side / "state.pt")
            self._finish(side, final, {file.name: digest_of(file) for file in sorted(side.iterdir())})
        except (OSError, RuntimeError, SafetensorError) as err:
            raise self._refusal(side, final, err) from err
        return final

    def _open(self, side: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(side, ignore_errors=True)
        side.mkdir()

    def _finish(self, side: Path, final: Path, manifest: dict[str, str]) -> None:
        """Flush what lies in `side`, give it its name, and remove what is too old."""
        (side / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        for file in (*side.iterdir(), side):
            _flush(file)
        if final.exists():
            old = self.directory / f".{final.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
            side.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            side.rename(final)
        _flush(self.directory)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _refusal(self, side: Path, final: Path, err: Exception) -> RunError:
        # torch reports a full disk as a RuntimeError that does not say so, safetensors as an error of its own.
        full = self.directory.is_dir() and shutil.disk_usage(self.directory).free < LITTLE_DISK
        shutil.rmtree(side, ignore_errors=True)
        why = "No space left on device" if full else getattr(err, "strerror", None) or str(err).splitlines()[0]
        return RunError(
            f"{final}: the checkpoint could not be written ({why}); earlier ones are untouched: "
            f"make room, then go on with `luthier tune --resume run:{self.directory.parent.name}`"
        )

    def steps(self) -> list[Path]:
        """Step checkpoints, oldest first, whole or not."""
        return sorted(self.directory.glob("step-*")) if self.directory.is_dir() else []

    def newest(self) -> Iterator[tuple[Path, dict[str, Tensor], dict[str, Any]]]:
        """Whole checkpoints, newest first; damaged ones are passed over."""
        for name in self.world.spread([path.name for path in reversed(self.steps())]):
            found = self.read(name)
            if found is not None:
                yield self.directory / name, *found

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Weights and state of a checkpoint, in every process, or None when it is damaged. The first process reads."""
        return self.world.spread(read_checkpoint(self.directory / name) if self.world.leads else None)  # type: ignore[no-any-return]


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Weights and state of a checkpoint, or None when a file is missing or does not match its digest."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if any(digest_of(path / name) != digest for name, digest in manifest.items()):
            return None
        # Our own file, checked against its digest; it holds containers, tensors, states of random generators, and rows.
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=False)
        return load_file(path / "weights.safetensors"), state
    except (OSError, ValueError):
        return None


def digest_of(path: Path) -> str:
    """BLAKE2b of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
