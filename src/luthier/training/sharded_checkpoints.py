"""Checkpoints of weights that are shared out: every process writes its own rows, and any number of processes reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

from luthier.core.errors import RunError
from luthier.training.checkpoint import Checkpoints, digest_of
from luthier.training.world import World


@dataclass(frozen=True, slots=True)
class _Piece:
    """The place of a tensor that lies in the processes' files."""

    key: str
    shape: tuple[int, ...]


@dataclass(slots=True)
class ShardedCheckpoints(Checkpoints):
    """Checkpoints to which every process writes its own rows, into a directory that all of them see.

    `rank-0000-of-0002.safetensors` holds the rows of one process, with where each piece begins; `state.pt` all else. Any
    number of processes can go on from it: each reads the rows that are its own then. `parameters` are what learns.
    """

    parameters: Sequence[tuple[str, Parameter]] = ()

    def save(self, name: str, weights: dict[str, Tensor], state: dict[str, Any]) -> Path:
        world, final, side = self.world, self.directory / name, self.directory / f".{name}.part"
        failed: Exception | None = None
        digest: tuple[str, str] | None = None
        pieces: dict[str, tuple[Tensor, int]] = {}
        shapes = {tuple(parameter.shape) for _, parameter in self.parameters}
        skeleton = _cut({"weights": weights, "state": state}, "", pieces, shapes, world)
        try:
            if world.leads:
                self._open(side)
        except OSError as err:
            failed = err
        if not world.any(failed is not None):
            try:
                file = side / f"rank-{world.rank:04}-of-{world.size:04}.safetensors"
                starts = {key: start for key, (_, start) in pieces.items()}
                save_file({key: rows for key, (rows, _) in pieces.items()}, file, {"starts": json.dumps(starts)})
                digest = (file.name, digest_of(file))
            except (OSError, SafetensorError) as err:
                failed = err
        digests = dict(found for found in world.gather(digest) if found is not None)
        whole = not world.any(failed is not None)
        if world.leads and whole:
            try:
                torch.save(skeleton, side / "state.pt")
                digests["state.pt"] = digest_of(side / "state.pt")
                lost = [name for name in digests if not (side / name).is_file()]
                if lost:
                    raise OSError(f"{lost[0]} was written, and is not there; every machine must see the same directory")
                self._finish(side, final, digests)
            except (OSError, RuntimeError) as err:
                failed = err
        reasons = [reason for reason in world.gather(str(failed) if failed else None) if reason]
        if reasons:
            raise self._refusal(side, final, failed or RunError(reasons[0]))
        return final

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path, world = self.directory / name, self.world
        manifest: dict[str, str] = {}
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            # Each process checks its share of the files, and nobody reads one before all are checked.
            whole = all(digest_of(path / name) == manifest[name] for name in sorted(manifest)[world.rank :: world.size])
        except (OSError, ValueError):
            whole = False
        if world.any(not whole):
            return None
        skeleton = torch.load(path / "state.pt", map_location="cpu", weights_only=False)
        rows = _Rows([path / name for name in manifest if name.endswith(".safetensors")])
        tree = _mend(skeleton, rows, self.parameters[0][1], world)
        return tree["weights"], tree["state"]


class _Rows:
    """The rows of every tensor, over the files that hold them."""

    def __init__(self, files: Sequence[Path]):
        self._pieces: dict[str, list[tuple[int, Any]]] = {}
        for path in files:
            file = safe_open(path, "pt")
            told: dict[str, Any] = file.metadata()  # type: ignore[no-untyped-call]
            for key, start in json.loads(told["starts"]).items():
                self._pieces.setdefault(key, []).append((start, file))

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the tensor `key`."""
        found = []
        for begin, file in sorted(self._pieces[key], key=lambda piece: piece[0]):
            piece = file.get_slice(key)
            end = begin + piece.get_shape()[0]
            low, high = max(start, begin), min(stop, end)
            if low < high or begin == end == start == stop:
                found.append(piece[low - begin : high - begin])
        return torch.cat(found) if found else self._pieces[key][0][1].get_slice(key)[0:0]


def _cut(
    tree: Any, path: str, pieces: dict[str, tuple[Tensor, int]], shapes: set[tuple[int, ...]], world: World
) -> Any:
    """`tree` with every tensor shaped like a learning weight replaced by its place; what this process holds of it goes
    into `pieces`, with its first row. A tensor that is not sharded belongs to the leader."""
    if isinstance(tree, DTensor):
        local = tree.to_local()
        pieces[path] = (local.detach().cpu().contiguous(), _own_rows(tree.shape[0], world)[0])
        return _Piece(path, tuple(tree.shape))
    if isinstance(tree, Tensor) and tree.is_floating_point() and tree.ndim and tuple(tree.shape) in shapes:
        if world.leads:
            pieces[path] = (tree.detach().cpu().contiguous(), 0)
        return _Piece(path, tuple(tree.shape))
    if isinstance(tree, dict):
        return {key: _cut(value, f"{path}/{key}", pieces, shapes, world) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([_cut(value, f"{path}/{at}", pieces, shapes, world) for at, value in enumerate(tree)])
    return tree


def _mend(tree: Any, rows: _Rows, like: Tensor, world: World) -> Any:
    """`tree` with its pieces: the rows of this process as sharded tensors where `like` is one, else whole ones."""
    if isinstance(tree, _Piece):
        if not isinstance(like, DTensor):
            return rows.read(tree.key, 0, tree.shape[0])
        local = rows.read(tree.key, *_own_rows(tree.shape[0], world)).to(like.device)
        whole = torch.empty(tree.shape, device="meta")
        return DTensor.from_local(
            local, like.device_mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
    if isinstance(tree, dict):
        return {key: _mend(value, rows, like, world) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([_mend(value, rows, like, world) for value in tree])
    return tree


def _own_rows(count: int, world: World) -> tuple[int, int]:
    """First and last row (exclusive) that `fully_shard` gives this process: equal runs, the last ones short or empty."""
    run = math.ceil(count / world.size)
    return min(world.rank * run, count), min((world.rank + 1) * run, count)
