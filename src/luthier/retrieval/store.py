"""An index on the disk: one folder, replaced as a whole and opened without reading it all."""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from luthier.core.config import Config
from luthier.core.errors import RunError
from luthier.core.run import find_run, hold_lock, write_atomically
from luthier.retrieval.bm25 import Words
from luthier.retrieval.chunks import Chunking
from luthier.retrieval.passage import Passage
from luthier.retrieval.readers.questions import Columns
from luthier.retrieval.refuse import Measured, Script

Vectors: TypeAlias = NDArray[Any]

Stamp: TypeAlias = tuple[int, int, int]
"""Which state of an index lies in a folder: nanoseconds since the epoch at which it was written, its file's number and size."""

META, PASSAGES, TERMS = "index.json", "passages.jsonl", "terms.txt"
FORM = 1


class Held(Config):
    """A file in an index: what it was, and which passages are its own."""

    hash: str
    """SHA-256 of its bytes."""
    first: int
    """The place of its first passage."""
    passages: int
    """How many it has."""


class Meta(Config):
    """What an index is: `index.json`, written last."""

    form: int = FORM
    """Another form is not read."""
    part: str
    """The folder of this state of the index, within it."""
    sizes: dict[str, int]
    """Bytes of each file in that folder."""
    files: dict[str, Held]
    """The files that are indexed, in order."""
    chunking: Chunking
    """How they were cut."""
    columns: Columns = Columns()
    """The columns of questions and answers that were asked for."""
    encoder: str | None = None
    """Where the encoder was loaded from; None: words alone."""
    fingerprint: str | None = None
    """That of the encoder, as `Encoder.fingerprint`."""
    measured: dict[Script, Measured] = Field(default_factory=dict)
    """What was measured for each kind of writing."""
    passages: int = Field(gt=0)
    """How many there are."""


@dataclass(slots=True)
class Stored:
    """An index as it lies on the disk. Arrays and texts are mapped, and read where they are touched."""

    path: Path
    meta: Meta
    words: Words
    vectors_NE: Vectors | None
    _starts_N1: NDArray[np.int64]
    _content: Any

    def __len__(self) -> int:
        return self.meta.passages

    def passage(self, at: int) -> Passage:
        """The passage at this place. Raises RunError where the file is damaged."""
        start, end = int(self._starts_N1[at]), int(self._starts_N1[at + 1])
        try:
            held = json.loads(self._content[start:end])
            return Passage(**{**held, "heading": tuple(held["heading"])})
        except (ValueError, TypeError, KeyError):
            raise _damaged(self.path, PASSAGES) from None

    def all_passages(self) -> list[Passage]:
        """Every passage, in order."""
        return [self.passage(at) for at in range(len(self))]


def find_index(reference: str | Path) -> Path:
    """The folder of an index: its own path, or that of the run which made it (run:<id>, <id>). Raises RunError."""
    path = Path(reference)
    if (path / META).is_file():
        return path
    run = find_run(reference)
    if not (run / "artefacts" / "index" / META).is_file():
        raise RunError(f"{reference}: this run holds no index; `luthier index DOCS --name NAME` makes one")
    return run / "artefacts" / "index"


def read_meta(path: Path) -> Meta:
    """What the index in `path` is. Raises RunError where there is none, where it is damaged, or of another form."""
    try:
        found = json.loads((path / META).read_text(encoding="utf-8"))
        form = found["form"]
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise _damaged(path, META) from None
    if form != FORM:
        raise RunError(
            f"{path}: the index is of form {form}, and this version of Luthier reads form {FORM}; make it anew with "
            "`luthier index`"
        )
    try:
        return Meta.model_validate(found)
    except ValidationError:
        raise _damaged(path, META) from None


def stamp_of(path: Path) -> Stamp:
    """What changes whenever the index in `path` is replaced, to be had without reading it. Raises RunError where there is
    none."""
    try:
        found = (path / META).stat()
    except OSError:
        raise _missing(path) from None
    return found.st_mtime_ns, found.st_ino, found.st_size


def open_stored(path: Path) -> Stored:
    """The index in `path`. Raises RunError as `read_meta` does, and for files that are missing or of another size."""
    meta = read_meta(path)
    for _ in range(3):
        try:
            return _open(path, meta)
        except FileNotFoundError as err:
            again = read_meta(path)
            if again.part == meta.part:
                raise _damaged(path, Path(err.filename).name) from None
            meta = again  # it was replaced while we looked
    raise RunError(f"{path}: the index is being replaced over and over; try again")


def _open(path: Path, meta: Meta) -> Stored:
    folder = path / meta.part
    for name, size in meta.sizes.items():
        if (folder / name).stat().st_size != size:
            raise _damaged(path, name)

    def load(name: str) -> NDArray[Any]:
        try:
            return np.load(folder / f"{name}.npy", mmap_mode="r")  # type: ignore[no-any-return]
        except ValueError:
            raise _damaged(path, f"{name}.npy") from None

    try:
        names = (folder / TERMS).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise _damaged(path, TERMS) from None
    terms = {term: at for at, term in enumerate(names) if term}
    words = Words(terms, load("starts"), load("postings"), load("scores"), meta.passages)
    vectors_NE = None if meta.fingerprint is None else load("vectors")
    starts_N1 = load("places")
    rows = [len(words.starts_V1) - 1 - len(terms), len(starts_N1) - 1 - meta.passages]
    if vectors_NE is not None:
        rows.append(len(vectors_NE) - meta.passages)
    if any(rows) or len(words.passages_P) != len(words.scores_P):
        raise _damaged(path, "arrays")
    with open(folder / PASSAGES, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return Stored(path, meta, words, vectors_NE, starts_N1, content)


def write_index(
    path: Path, passages: Sequence[Passage], words: Words, vectors_NE: Vectors | None, **about: Any
) -> Meta:
    """Put an index in place of the one in `path`, if any: what reads the old one goes on, and a reader finds the old one or
    the new one whole. `about` are the other fields of Meta. Raises RunError where it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with hold_lock(path / "lock"):
            folder = path / f"part-{_next_part(path)}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            lines = [(json.dumps(asdict(one), ensure_ascii=False) + "\n").encode("utf-8") for one in passages]
            places_N1 = np.concatenate([[0], np.cumsum([len(line) for line in lines])]).astype(np.int64)
            arrays: dict[str, NDArray[Any]] = {
                "places": places_N1,
                "starts": words.starts_V1,
                "postings": words.passages_P,
                "scores": words.scores_P,
            }
            if vectors_NE is not None:
                arrays["vectors"] = vectors_NE
            for name, array in arrays.items():
                with open(folder / f"{name}.npy", "wb") as file:
                    np.save(file, array)
                    _flush(file)
            for name, parts in ((PASSAGES, lines), (TERMS, ["\n".join(words.terms).encode("utf-8")])):
                with open(folder / name, "wb") as file:
                    file.writelines(parts)
                    _flush(file)
            sizes = {one.name: one.stat().st_size for one in sorted(folder.iterdir())}
            meta = Meta(part=folder.name, sizes=sizes, passages=len(passages), **about)
            write_atomically(path / META, meta.model_dump_json(indent=2))
            for other in path.glob("part-*"):
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
            return meta
    except OSError as err:
        raise RunError(
            f"{path}: the index cannot be written ({err.strerror}); the earlier one, if any, is untouched"
        ) from None


def _next_part(path: Path) -> int:
    taken = [one.name.removeprefix("part-") for one in path.glob("part-*")]
    return max((int(one) for one in taken if one.isdigit()), default=0) + 1


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _missing(path: Path) -> RunError:
    return RunError(f"{path}: there is no index here ({META} is missing); `luthier index` makes one")


def _damaged(path: Path, name: str) -> RunError:
    return RunError(f"{path}: {name} of the index is missing or damaged; make it anew with `luthier index`")
