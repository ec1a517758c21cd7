"""Encoded rows on the disk: written once, read in place by every process and by the next run on the same data.

An entry is a directory named after everything that its rows depend on. A column of the rows lies in plain numpy files,
which are mapped, not read: what no row asks for never comes into memory. Nothing in it is executed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from hashlib import file_digest
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, overload

import numpy as np

from luthier.core.types import Encoded
from luthier.native.build import cache_directory

# Bytes that all entries together may take; beyond that those unused for longest are removed.
LIMIT = 20 * 2**30


class NotStorable(ValueError):
    """Rows that would not come back as they were."""


class Stored(Sequence[Encoded]):
    """The rows of an entry, each made when it is asked for."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        module, _, name = manifest["class"].partition(":")
        self._make: type[Encoded] = attrgetter(name)(import_module(module))
        if not issubclass(self._make, Encoded):
            raise ValueError(f"{manifest['class']} is no kind of row")
        self._count: int = manifest["rows"]
        self._columns = {name: _reader(path, name, column) for name, column in manifest["columns"].items()}
        self._sizes = [_sizes(path, name, manifest["columns"][name]) for name in ("ids", "target")]

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> Encoded: ...
    @overload
    def __getitem__(self, at: slice) -> list[Encoded]: ...
    def __getitem__(self, at: int | slice) -> Encoded | list[Encoded]:
        if isinstance(at, slice):
            return [self[one] for one in range(*at.indices(self._count))]
        if not -self._count <= at < self._count:
            raise IndexError(at)
        at %= self._count
        return self._make(**{name: read(at) for name, read in self._columns.items()})

    def lengths(self) -> list[int]:
        """Tokens of each row, of both sides, without making the rows."""
        total = np.zeros(self._count, dtype=np.int64) + sum(self._sizes)
        return total.tolist()  # type: ignore[no-any-return]


def lengths_of(rows: Sequence[Encoded]) -> list[int]:
    """Tokens of each row, of both sides."""
    return rows.lengths() if isinstance(rows, Stored) else [len(row.ids) + len(row.target) for row in rows]


def entry_path(key: str) -> Path:
    """Where the rows of `key` lie, or would."""
    return cache_directory() / "encoded" / key


def write_entry(key: str, rows: Sequence[Encoded], notes: Sequence[dict[str, Any]]) -> Path:
    """Store `rows`, and `notes` (what was said while they were made): to the side first, then under its name.

    Raises OSError where the place cannot be written, and NotStorable.
    """
    final = entry_path(key)
    final.parent.mkdir(parents=True, exist_ok=True)
    side = Path(tempfile.mkdtemp(prefix=".part-", dir=final.parent))
    try:
        kind = type(rows[0])
        if any(type(row) is not kind for row in rows):
            raise NotStorable("rows of several kinds")
        names = [field.name for field in fields(kind)]
        columns = {name: _write(side, name, [getattr(row, name) for row in rows]) for name in names}
        manifest: dict[str, Any] = {"class": f"{kind.__module__}:{kind.__qualname__}", "rows": len(rows)}
        manifest |= {"columns": columns, "notes": list(notes)}
        manifest["digests"] = {file.name: _digest(file) for file in sorted(side.iterdir())}
        (side / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")
        # A directory that stands there is damaged, or was written by another process a moment ago: ours is as good.
        shutil.rmtree(final, ignore_errors=True)
        os.rename(side, final)
    except OSError:
        if not (final / "manifest.json").is_file():
            raise
    finally:
        shutil.rmtree(side, ignore_errors=True)
    _prune(final)
    return final


def read_entry(path: Path, *, check: bool = True) -> tuple[Stored, list[dict[str, Any]]] | None:
    """The rows and notes of an entry; None where it is not there, or (with `check`) differs from what was written."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if check and any(_digest(path / name) != digest for name, digest in manifest["digests"].items()):
            return None
        os.utime(path)
        return Stored(path, manifest), manifest["notes"]
    except (OSError, ValueError, KeyError, AttributeError, ImportError):
        return None


def _write(folder: Path, name: str, values: list[Any]) -> dict[str, Any]:
    """Write one column and say how to read it."""
    if all(value == values[0] and type(value) is type(values[0]) for value in values):
        plain = list(values[0]) if isinstance(values[0], tuple) else values[0]
        return {"kind": "constant", "value": _checked(plain), "tuple": isinstance(values[0], tuple)}
    if all(type(value) is tuple for value in values):
        arrays = [np.asarray(value) for value in values]
        kinds = {array.dtype.kind for array in arrays if array.size}
        if kinds <= {"i"} or kinds <= {"f"}:
            np.save(folder / f"{name}.npy", _narrow(np.concatenate([array for array in arrays if array.size])))
            _save_offsets(folder, name, [len(value) for value in values])
            return {"kind": "numbers", "float": kinds == {"f"}}
    if all(type(value) is float for value in values) or all(type(value) is int for value in values):
        np.save(folder / f"{name}.npy", np.asarray(values))
        return {"kind": "number"}
    text = all(type(value) is str for value in values)
    lines = [value if text else json.dumps(_checked(value), ensure_ascii=False) for value in values]
    pieces = [line.encode("utf-8", "surrogatepass") for line in lines]
    np.save(folder / f"{name}.npy", np.frombuffer(b"".join(pieces), dtype=np.uint8))
    _save_offsets(folder, name, [len(piece) for piece in pieces])
    return {"kind": "text" if text else "json"}


def _reader(folder: Path, name: str, column: dict[str, Any]) -> Callable[[int], Any]:
    """What gives the value of one row of a column."""
    kind = column["kind"]
    if kind == "constant":
        value = tuple(column["value"]) if column["tuple"] else column["value"]
        return lambda at: value
    flat = np.load(folder / f"{name}.npy", mmap_mode="r")
    if kind == "number":
        return lambda at: flat[at].item()
    ends = np.load(folder / f"{name}.ends.npy", mmap_mode="r")
    if kind == "numbers" and column["float"]:
        return lambda at: tuple(flat[ends[at] : ends[at + 1]].astype(np.float64).tolist())
    if kind == "numbers":
        return lambda at: tuple(flat[ends[at] : ends[at + 1]].tolist())

    def text(at: int) -> str:
        content: bytes = flat[ends[at] : ends[at + 1]].tobytes()
        return content.decode("utf-8", "surrogatepass")

    return text if kind == "text" else lambda at: json.loads(text(at))


def _sizes(folder: Path, name: str, column: dict[str, Any]) -> Any:
    if column["kind"] == "constant":
        return len(column["value"])
    return np.diff(np.load(folder / f"{name}.ends.npy", mmap_mode="r"))


def _save_offsets(folder: Path, name: str, lengths: list[int]) -> None:
    np.save(folder / f"{name}.ends.npy", np.cumsum([0, *lengths], dtype=np.int64))


def _narrow(flat: Any) -> Any:
    """The same numbers in the smallest type that holds them all."""
    for kind in ("uint8", "int32") if flat.dtype.kind == "i" else ("uint8", "float32"):
        low, high = float(flat.min()), float(flat.max())
        limits = np.finfo(kind) if kind == "float32" else np.iinfo(kind)
        if low >= limits.min and high <= limits.max and np.array_equal(flat.astype(kind), flat):
            return flat.astype(kind)
    return flat


def _checked(value: Any) -> Any:
    """`value`, if JSON gives it back as it is. Raises NotStorable."""
    try:
        same = json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        same = False
    if not same:
        raise NotStorable(f"a {type(value).__name__} cannot be stored")
    return value


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return file_digest(file, "blake2b").hexdigest()


def _prune(kept: Path) -> None:
    """Remove the entries unused for longest until all take no more than LIMIT; `kept` stays."""
    sizes: list[tuple[float, int, Path]] = []
    for path in kept.parent.iterdir():
        try:
            sizes.append((path.stat().st_mtime, sum(file.stat().st_size for file in path.iterdir()), path))
        except OSError:
            continue  # another process removed it
    total = sum(size for _, size, _ in sizes)
    for _, size, path in sorted(sizes):
        if total <= LIMIT:
            break
        if path != kept and not path.name.startswith("."):
            shutil.rmtree(path, ignore_errors=True)
            total -= size
