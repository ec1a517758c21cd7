"""Files to an index: only what changed is read, cut and embedded again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from luthier.core.errors import DataError, RunError
from luthier.core.events import Events
from luthier.retrieval.bm25 import index_words
from luthier.retrieval.chunks import Chunking, count_words, cut_sections
from luthier.retrieval.embed import Encoder, name_encoder
from luthier.retrieval.measure import measure
from luthier.retrieval.passage import Passage
from luthier.retrieval.readers.files import explain, list_documents, read_document
from luthier.retrieval.readers.questions import Columns
from luthier.retrieval.store import META, Held, Meta, Stored, Vectors, open_stored, write_index

# The share of halves of sentences that are refused where their own file is left out. Higher refuses more of what has no
# answer, and more of what has one (benchmarks/retrieval.py).
REFUSED = 0.75


@dataclass(frozen=True, slots=True)
class Built:
    """What an indexing did: files now in the index, passages, passages embedded now, files taken over unread, files that left
    since the last time, and files left out with the reason."""

    files: int
    passages: int
    embedded: int
    unchanged: int
    removed: int
    left_out: dict[str, str]


def build_index(
    path: Path,
    docs: Sequence[Path],
    *,
    encoder: Encoder | None,
    chunking: Chunking | None = None,
    columns: Columns | None = None,
    questions: Path | None = None,
    refuse: float = REFUSED,
    vectors: Literal["float32", "float16"] = "float32",
    events: Events | None = None,
) -> Built:
    """Make the index in `path` hold the files of `docs` as they are now, and measure it (`measure.measure`).

    A file that cannot be read or holds no text is left out, and named in a warning. Raises ConfigError and DataError where
    there is nothing to index, MissingExtra where a package is missing for a kind of file, and RunError where the index
    cannot be written.
    """
    events, chunking, columns = events or Events(), chunking or Chunking(), columns or Columns()
    old = _open_old(path, events)
    same = old is not None and _same(old.meta, encoder, chunking, columns, events)
    before = {} if old is None else old.meta.files
    events.stage("reading the documents")
    found = list_documents(docs, events)
    files: dict[str, Held] = {}
    passages: list[Passage] = []
    left_out: dict[str, str] = {}
    unchanged = 0
    for done, (name, source) in enumerate(found.items(), 1):
        try:
            content = source.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            held = before.get(name) if same else None
            if old is not None and held is not None and held.hash == digest:
                own = [old.passage(at) for at in range(held.first, held.first + held.passages)]
                unchanged += 1
            else:
                sections = read_document(source, content, columns, events)
                own = cut_sections(name, sections, chunking, encoder.count if encoder is not None else count_words)
                if not own:
                    raise DataError(f"{source}: the file holds no text")
        except (DataError, OSError) as err:
            left_out[name] = explain(source, name, err)
            events.warn(f"left out: {left_out[name]}")
            continue
        files[name] = Held(hash=digest, first=len(passages), passages=len(own))
        passages += own
        events.emit("progress", name="reading", done=done, total=len(found))
    if not passages:
        raise DataError(f"none of the {len(found)} files can be indexed; the first: {next(iter(left_out.values()))}")
    made, embedded = _embed(passages, encoder, old if same else None, vectors, events)
    words = index_words([one.searched for one in passages])
    events.stage("measuring when it does not know")
    measured = measure(passages, words, made, encoder, share=refuse, questions=questions, events=events)
    write_index(
        path,
        passages,
        words,
        made,
        measured=measured,
        files=files,
        chunking=chunking,
        columns=columns,
        encoder=None if encoder is None else name_encoder(encoder),
        fingerprint=None if encoder is None else encoder.fingerprint,
    )
    return Built(len(files), len(passages), embedded, unchanged, len(set(before) - set(files)), left_out)


def _open_old(path: Path, events: Events) -> Stored | None:
    """The index that is there; None where there is none, or one that cannot be gone on from, which is said."""
    if not (path / META).is_file():
        return None
    try:
        return open_stored(path)
    except RunError as err:
        events.warn(f"all files are indexed anew: {err}")
        return None


def _same(meta: Meta, encoder: Encoder | None, chunking: Chunking, columns: Columns, events: Events) -> bool:
    """Whether passages and vectors of before are what they would be now."""
    now = (chunking, columns, None if encoder is None else encoder.fingerprint)
    changed = [
        name
        for name, one, other in zip(
            ("chunking", "columns", "encoder"), now, (meta.chunking, meta.columns, meta.fingerprint)
        )
        if one != other
    ]
    if changed:
        events.choose("index", "all files anew", f"{', '.join(changed)} changed since the last time")
    return not changed


def _embed(
    passages: Sequence[Passage], encoder: Encoder | None, old: Stored | None, dtype: str, events: Events
) -> tuple[Vectors | None, int]:
    """Vectors of all passages, and how many were computed: what is compared by the same text as before keeps its vector."""
    if encoder is None:
        return None, 0
    known: dict[str, int] = {}
    kept_NE = None if old is None else old.vectors_NE
    if old is not None and kept_NE is not None and kept_NE.dtype == dtype:
        known = {one.compared: at for at, one in enumerate(old.all_passages())}
    new = list(dict.fromkeys(one.compared for one in passages if one.compared not in known))
    events.stage(f"embedding {len(new)} passages")
    made_ME = encoder.embed(
        new,
        events=events,
        on_progress=lambda done, total: events.emit("progress", name="embedding", done=done, total=total),
    ).astype(dtype)
    place = {text: at for at, text in enumerate(new)}
    rows = [
        kept_NE[known[one.compared]] if kept_NE is not None and one.compared in known else made_ME[place[one.compared]]
        for one in passages
    ]
    return np.stack(rows), len(new)
