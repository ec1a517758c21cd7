"""Rows as they come, without holding a source in memory, from its start or from a place within."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

from luthier.core.errors import DataError, MissingExtra
from luthier.data.sources import Bad, list_files
from luthier.data.sources.files import kind_of, read_csv, read_line, read_txt
from luthier.data.sources.row import Row
from luthier.data.sources.tables import read_table

Place: TypeAlias = tuple[int, int, int]
"""Where a row begins: the number of the file in its source, of the row (or line) in the file, and of its first byte
where a reader can go there at once."""
START: Place = (0, 0, 0)


def stream_rows(source: Any, place: Place, bad: Bad) -> Iterator[tuple[Row, Place]]:
    """The rows of `source` from `place` on, each with the place after it; broken ones go to `bad` instead.

    What streams: jsonl, csv, tsv, txt (each also .gz), parquet, directories of them, hub:owner/name, and in Python
    anything that can be gone through again: a table, an object with `__iter__`, a function that returns an iterator.
    A place in jsonl is found by its byte; in csv and txt the lines before it are read and passed over, in parquet and on
    the hub they are skipped. Raises DataError for a source that cannot be read so.
    """
    if isinstance(source, str) and source.startswith("hub:"):
        from luthier.data.sources.hub import read_hub

        for number, row in enumerate(read_hub(source, stream_from=place[1]), place[1] + 1):
            yield row, (0, number, 0)
    elif isinstance(source, str | Path):
        for number, path in enumerate(list_files(source)):
            if number >= place[0]:
                start, byte = place[1:] if number == place[0] else (0, 0)
                for found, (line, after) in _stream_file(path, start, byte, bad):
                    yield found, (number, line, after)
    else:
        for number, row in enumerate(read_table(_again(source), bad), 1):
            if number > place[1]:
                yield row, (0, number, 0)


def _again(source: Any) -> Any:
    """What goes through a source in memory from its start."""
    made = source() if callable(source) and not isinstance(source, Iterable) else source
    if made is source and isinstance(source, Iterator):
        raise DataError(
            "an iterator can be gone through only once, and a stream is read from its start again; "
            "give a function that returns one"
        )
    return made


def _stream_file(path: Path, row: int, byte: int, bad: Bad) -> Iterator[tuple[Row, tuple[int, int]]]:
    kind = kind_of(path)
    if kind is None or kind == "json" or (kind == "parquet" and path.suffix == ".gz"):
        raise DataError(
            f"{path}: this kind of file cannot be read row by row; write it as .jsonl, or leave data.stream out"
        )
    try:
        if kind == "jsonl":
            yield from _stream_jsonl(path, row, byte, bad)
        elif kind == "parquet":
            yield from _stream_parquet(path, row)
        else:
            yield from _stream_text(path, kind, row, bad)
    except UnicodeDecodeError:
        raise DataError(f"{path}: the text is not UTF-8 throughout; save it as UTF-8 (iconv -t UTF-8)") from None
    except (gzip.BadGzipFile, EOFError) as err:
        raise DataError(f"{path}: the gzip file is damaged ({err}); fetch it again") from None
    except OSError as err:
        raise DataError(f"{path}: cannot be read ({err.strerror or err})") from None


def _open(path: Path) -> IO[bytes]:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else open(path, "rb")  # type: ignore[return-value]


def _stream_jsonl(path: Path, line: int, byte: int, bad: Bad) -> Iterator[tuple[Row, tuple[int, int]]]:
    with _open(path) as file:
        file.seek(byte)
        for content in file:
            line, byte = line + 1, byte + len(content)
            text = content.decode("utf-8-sig" if line == 1 else "utf-8")
            row = read_line(text.removesuffix("\n"), f"{path.name}:{line}", bad)
            if row is not None:
                yield row, (line, byte)


def _stream_text(path: Path, kind: str, skip: int, bad: Bad) -> Iterator[tuple[Row, tuple[int, int]]]:
    def lines(newline: str | None) -> Iterator[str]:
        with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline) as text:
            yield from text

    def seen(where: str, why: str) -> None:
        if past >= skip:
            bad(where, why)

    past = 0
    if kind == "txt":
        plain: Callable[[], Iterator[str]] = lambda: (part for line in lines(None) for part in line.splitlines())  # noqa: E731
        rows = read_txt(path, plain(), paragraphs=_has_paragraphs(plain()))
    else:
        rows = read_csv(path, lines(""), seen)
    for past, row in enumerate(rows, 1):
        if past > skip:
            yield row, (past, 0)


def _has_paragraphs(lines: Iterator[str]) -> bool:
    """Whether a blank line stands before the last one."""
    blank = False
    for line in lines:
        if blank:
            return True
        blank = not line.strip()
    return False


def _stream_parquet(path: Path, skip: int) -> Iterator[tuple[Row, tuple[int, int]]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "parquet", f"{path}: reading parquet") from None
    try:
        past = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            start, past = past, past + batch.num_rows
            if past > skip:
                first = max(0, skip - start)
                for number, values in enumerate(batch.slice(first).to_pylist(), start + first + 1):
                    yield Row(values, f"{path.name}:{number}"), (number, 0)
    except pyarrow.ArrowException as err:
        raise DataError(f"{path}: cannot be read as parquet ({str(err).splitlines()[0]})") from None
