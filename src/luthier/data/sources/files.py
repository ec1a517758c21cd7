"""Rows from files. Text is UTF-8, with or without a byte-order mark."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from luthier.core.errors import DataError, MissingExtra, did_you_mean
from luthier.data.sources.row import Row

Bad: TypeAlias = Callable[[str, str], None]
KINDS = ("jsonl", "json", "csv", "tsv", "parquet", "txt")
# Guesses for text that is not UTF-8, tried in this order; latin-1 reads anything, so it is no guess.
ENCODINGS = ("gb18030", "utf-16", "big5", "shift_jis")


def kind_of(path: Path) -> str | None:
    """The kind of a data file by its name, ".gz" left aside; None for other files."""
    suffixes = [suffix.lstrip(".").lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == "gz":
        suffixes.pop()
    last = {"ndjson": "jsonl", "text": "txt"}.get(suffixes[-1], suffixes[-1]) if suffixes else ""
    return last if last in KINDS else None


def read_file(path: Path, bad: Bad) -> Iterator[Row]:
    """The rows of one file; broken ones go to `bad`. Raises DataError when the file as a whole cannot be used."""
    kind = kind_of(path)
    if kind is None:
        raise DataError(f"{path}: unknown kind of file; {did_you_mean(path.suffix.lstrip('.'), KINDS)} (each also .gz)")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
        if kind == "parquet":
            yield from _read_parquet(path)
            return
        text = to_text(path, path.read_bytes())
    except OSError as err:
        raise DataError(f"{path}: cannot be read ({err.strerror or err})") from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    if kind == "json":
        yield from _read_json(path, text, bad)
    elif kind == "txt":
        lines = text.splitlines()
        yield from read_txt(path, lines, paragraphs=any(not line.strip() for line in lines[:-1]))
    elif kind == "jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            row = read_line(line, f"{path.name}:{number}", bad)
            if row is not None:
                yield row
    else:
        yield from read_csv(path, io.StringIO(text, newline=""), bad)


def to_text(path: Path, content: bytes) -> str:
    """The text in the bytes of `path`, unpacked where they are gzip. Raises DataError where they are not UTF-8."""
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as err:
            raise DataError(f"{path}: the gzip file is damaged ({err}); fetch it again") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = content[: err.start].count(b"\n") + 1
        guess = next((name for name in ENCODINGS if _decodes(content, name)), None)
        hint = f"it reads as {guess}: iconv -f {guess} -t UTF-8 {path.name}" if guess else "save it as UTF-8"
        raise DataError(f"{path}: line {line} is not UTF-8; {hint}") from None


def _decodes(content: bytes, name: str) -> bool:
    try:
        content.decode(name)
    except UnicodeDecodeError:
        return False
    return True


def read_line(line: str, where: str, bad: Bad) -> Row | None:
    """The row in one line of JSON; None for a blank or a broken one, which `bad` hears of."""
    if not line.strip():
        return None
    try:
        value = json.loads(line)
    except json.JSONDecodeError as err:
        bad(where, f"broken JSON at column {err.colno}: {err.msg}")
        return None
    return _as_row(value, where, bad)


def _read_json(path: Path, text: str, bad: Bad) -> Iterator[Row]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as err:
        raise DataError(f"{path}: line {err.lineno}, column {err.colno}: broken JSON: {err.msg}") from None
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of rows, found a {type(value).__name__}; one row a line is .jsonl")
    for number, inner in enumerate(value, 1):
        row = _as_row(inner, f"{path.name}:{number}", bad)
        if row is not None:
            yield row


def _as_row(value: Any, where: str, bad: Bad) -> Row | None:
    if isinstance(value, str):
        return Row({"text": value}, where)
    if isinstance(value, dict):
        return Row(value, where)
    bad(where, f"expected an object with columns, found a {type(value).__name__}")
    return None


def read_txt(path: Path, lines: Iterable[str], *, paragraphs: bool) -> Iterator[Row]:
    """A row a paragraph where blank lines part them, else a row a line."""
    held: list[str] = []
    start = 1
    for number, line in enumerate(chain(lines, ("",)), 1):
        if line.strip():
            if not held:
                start = number
            held.append(line)
            if paragraphs:
                continue
        if held:
            yield Row({"text": "\n".join(held)}, f"{path.name}:{start}")
            held = []


def read_csv(path: Path, lines: Iterable[str], bad: Bad) -> Iterator[Row]:
    """Rows of lines with their ends; the first names the columns. Raises DataError for broken quoting."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, delimiter="\t" if kind_of(path) == "tsv" else ",", strict=True)
    header: list[str] = []
    before = 0
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as err:
            raise DataError(f"{path}: line {reader.line_num}: broken quoting ({err})") from None
        line, before = before + 1, reader.line_num
        if not values:
            continue
        if not header:
            header = [name.strip() for name in values]
            twice = [name for name in header if header.count(name) > 1]
            if twice:
                raise DataError(f"{path}: the column {twice[0]!r} stands twice in the first line")
            continue
        where = f"{path.name}:{line}"
        if len(values) != len(header):
            bad(where, f"{len(values)} values for {len(header)} columns")
            continue
        yield Row(dict(zip(header, values)), where)


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "parquet", f"{path}: reading parquet") from None
    try:
        content: Any = path
        if path.suffix == ".gz":
            content = io.BytesIO(gzip.decompress(path.read_bytes()))
        table = pyarrow.parquet.ParquetFile(content)
        number = 0
        for batch in table.iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(values, f"{path.name}:{number}")
    except pyarrow.ArrowException as err:
        raise DataError(f"{path}: cannot be read as parquet ({str(err).splitlines()[0]})") from None
