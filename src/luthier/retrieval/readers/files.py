"""Which files are read, and how: each by the kind that its name says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from luthier.core.errors import ConfigError, DataError
from luthier.core.events import Events
from luthier.data.sources.files import kind_of, to_text
from luthier.retrieval.passage import Section
from luthier.retrieval.readers.pdf import read_pdf
from luthier.retrieval.readers.plain import read_markdown, read_plain
from luthier.retrieval.readers.questions import Columns, read_questions
from luthier.retrieval.readers.web import read_html

TEXTS = {"txt": "plain", "text": "plain", "rst": "plain", "md": "markdown", "markdown": "markdown"}
TEXTS |= {"html": "html", "htm": "html", "xhtml": "html", "pdf": "pdf"}
READ = "txt, md, html, pdf, csv, tsv, json, jsonl, parquet"


def list_documents(roots: Sequence[Path], events: Events) -> dict[str, Path]:
    """The files below `roots` (directories and files) that are read, by the name under which they are cited, in order.

    Hidden files are left aside; others of a kind that is not read are counted. Raises ConfigError where a root is missing,
    where nothing is left, and where two files have one name.
    """
    found: dict[str, Path] = {}
    unread: dict[str, list[Path]] = {}
    for root in roots:
        for path in _walk(root):
            if _kind(path) is None:
                unread.setdefault(path.suffix.lower() or "no suffix", []).append(path)
                continue
            name = path.name if path == root else path.relative_to(root).as_posix()
            if name in found and found[name] != path:
                name = f"{root.name}/{name}"
            if name in found and found[name].resolve() != path.resolve():
                raise ConfigError(f"docs: {found[name]} and {path} would both be cited as {name}; rename one of them")
            found[name] = path
    for suffix, paths in sorted(unread.items()):
        events.warn(f"files of a kind that is not read ({suffix}), {paths[0]} first; read are {READ}", len(paths))
    if not found:
        raise ConfigError(f"docs: there is no file to read in {', '.join(map(str, roots))}; read are {READ}")
    return found


def read_document(path: Path, content: bytes, columns: Columns, events: Events) -> list[Section]:
    """The sections of one file, whose bytes are `content`; none where it holds no text. Raises DataError where it cannot be
    read, and MissingExtra where a package is missing for its kind."""
    kind = _kind(path)
    if not content:
        return []
    if kind == "pdf":
        return read_pdf(path, content, events)
    if kind == "table":
        return read_questions(path, columns, events)
    if kind == "html":
        content = _recode(content)
    text = to_text(path, content)
    if not text.strip():
        return []
    if kind == "html":
        return read_html(text)
    return read_markdown(text) if kind == "markdown" else read_plain(text)


def _walk(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    if not root.is_dir():
        raise ConfigError(f"docs: {root}: no such file or directory; check the path")
    for path in sorted(root.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            yield path


def _kind(path: Path) -> str | None:
    found = TEXTS.get(path.suffix.lower().lstrip("."))
    if found is None and kind_of(path) is not None:
        return "plain" if kind_of(path) == "txt" else "table"
    return found


def _recode(content: bytes) -> bytes:
    """A page in the encoding that it names, as UTF-8; as it is where it names none, or one that does not fit."""
    named = re.search(rb"<meta[^>]+charset=[\"']?([\w-]+)", content[:2048], re.IGNORECASE)
    if named is None:
        return content
    try:
        return content.decode(named[1].decode("ascii")).encode("utf-8")
    except (LookupError, UnicodeDecodeError):
        return content


def explain(path: Path, name: str, err: DataError | OSError) -> str:
    """Why a file was left out, beginning with its name."""
    if isinstance(err, OSError):
        return f"{name}: cannot be read ({err.strerror or type(err).__name__})"
    return str(err).replace(str(path), name, 1)
