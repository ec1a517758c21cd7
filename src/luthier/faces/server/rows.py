"""What an uploaded file must hold: JSON line by line, in rows that can be learned from or answered."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core.errors import DataError
from luthier.data.shapes import Columns, Shape, recognise, to_example
from luthier.data.sources.row import Row
from luthier.faces.server.refusals import Refusal

# How many mistakes an error names before it only counts.
NAMED = 10
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


@dataclass(frozen=True, slots=True)
class Checked:
    """What a file holds: `shape` is that of its rows, or the address that its requests are for."""

    rows: int
    shape: str


class _Mistakes:
    def __init__(self) -> None:
        self.named: list[str] = []
        self.count = 0

    def add(self, line: int, why: str) -> None:
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append(f"line {line}: {why}")

    def raise_any(self) -> None:
        if not self.count:
            return
        what = "1 line" if self.count == 1 else f"{self.count} lines"
        more = f"\n  ... and {self.count - NAMED} more" if self.count > NAMED else ""
        listed = "".join(f"\n  {one}" for one in self.named)
        raise Refusal(400, f"file: {what} cannot be used:{listed}{more}", param="file", code="invalid_file")


def check_rows(path: Path, purpose: str) -> Checked:
    """Read a whole file for its `purpose`. Raises Refusal with the first mistakes, each with its line, and their number."""
    mistakes = _Mistakes()
    checked = (_check_requests if purpose == "batch" else _check_examples)(path, mistakes)
    mistakes.raise_any()
    if not checked.rows:
        raise Refusal(400, "file: there is no row in it", param="file", code="invalid_file")
    return checked


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, what it holds, or why it holds no object) of each line that is not blank; the file may begin with a byte-order
    mark."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(BOM_UTF8)
            if line.strip():
                yield number, _object(line)


def _object(line: bytes) -> dict[str, Any] | str:
    try:
        found = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as err:
        return f"not UTF-8 (byte {err.start + 1} is 0x{line[err.start]:02x})"
    except json.JSONDecodeError as err:
        return f"not valid JSON ({err.msg}, at character {err.pos + 1})"
    except (ValueError, RecursionError) as err:
        return f"not valid JSON ({err})"
    return found if isinstance(found, dict) else f"holds a {type(found).__name__}, expected an object"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number there")


def _check_examples(path: Path, mistakes: _Mistakes) -> Checked:
    """Rows that a tuning learns from, by the very reading that the tuning does."""
    columns, rows = Columns(), 0
    known: tuple[Shape, dict[str, str]] | None = None
    for line, found in read_lines(path):
        if isinstance(found, str):
            mistakes.add(line, found)
            continue
        row = Row(found, f"line {line}")
        try:
            known = known or recognise(row, columns)
            to_example(row, *known)
        except DataError as err:
            mistakes.add(line, str(err).removeprefix(f"line {line}: "))
            continue
        rows += 1
    return Checked(rows, known[0] if known is not None else "")


def _check_requests(path: Path, mistakes: _Mistakes) -> Checked:
    """Requests of a batch, all for one address."""
    seen: dict[str, int] = {}
    shape = ""
    for line, found in read_lines(path):
        why = found if isinstance(found, str) else _wrong(found, seen, shape)
        if why or isinstance(found, str):
            mistakes.add(line, why)
            continue
        shape = shape or found["url"]
        seen[found["custom_id"]] = line
    return Checked(len(seen), shape)


def _wrong(row: dict[str, Any], seen: dict[str, int], shape: str) -> str:
    """What is wrong with a request, or nothing."""
    id, url, body = row.get("custom_id"), row.get("url"), row.get("body")
    strange = sorted(row.keys() - {"custom_id", "method", "url", "body"})
    if strange:
        return f"there is no field {strange[0]!r}; a request has custom_id, method, url and body"
    if not isinstance(id, str) or not id:
        return "custom_id: is required, a text that no other request has"
    if id in seen:
        return f"custom_id: {id!r} is that of line {seen[id]} too"
    if row.get("method") != "POST":
        return f"method: is {row.get('method')!r}, expected 'POST'"
    if url not in ENDPOINTS:
        return f"url: is {url!r}, expected one of {', '.join(ENDPOINTS)}"
    if shape and url != shape:
        return f"url: is {url!r}, and that of the lines before is {shape!r}; make a file for each"
    if not isinstance(body, dict):
        return "body: is required, an object"
    if not isinstance(body.get("model"), str):
        return "body.model: is required, the name of a model"
    if body.get("stream"):
        return "body.stream: an answer of a batch does not come in pieces; leave it out"
    return ""
