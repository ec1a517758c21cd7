"""Rows from wherever they are: files, tables in memory, the hub, the shipped sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

from luthier.core.errors import DataError
from luthier.data.sources.row import Row as Row

Bad: TypeAlias = Callable[[str, str], None]
"""Told of each row that cannot be read: where, and why."""

SHIPPED = {"sms_spam": "sms_spam/data.jsonl.gz"}


def read_rows(source: Any, *, bad: Bad) -> Iterator[Row]:
    """The rows of `source`, in order; broken ones go to `bad` instead.

    `source` is a file or a directory of files (jsonl, json, csv, tsv, parquet, txt, each also .gz), the shipped
    "sms_spam", hub:owner/name[:config][:split], a list of dicts or strings, or a pandas or datasets table. Raises
    DataError for a source that is missing, empty or of an unknown kind.
    """
    if isinstance(source, str) and source.startswith("hub:"):
        from luthier.data.sources.hub import read_hub

        yield from _some(read_hub(source), source)
    elif isinstance(source, str | Path):
        from luthier.data.sources.files import read_file

        for path in list_files(source):
            yield from _some(read_file(path, bad), str(path), bad)
    else:
        from luthier.data.sources.tables import read_table

        yield from _some(read_table(source, bad), "the table of rows")


def describe_source(source: Any) -> str:
    """A source as one line for a record; tables in memory by kind and size."""
    if isinstance(source, str | Path):
        return str(source)
    size = f" of {len(source)} rows" if hasattr(source, "__len__") else ""
    return f"<{type(source).__name__}{size}>"


def list_files(source: str | Path) -> list[Path]:
    """The files of a path or of a shipped name, in order. Raises DataError where there is none."""
    if str(source) in SHIPPED:
        return [Path(str(resources.files("luthier"))) / "assets" / SHIPPED[str(source)]]
    path = Path(source).expanduser()
    if path.is_dir():
        from luthier.data.sources.files import kind_of

        found = sorted(one for one in path.iterdir() if one.is_file() and kind_of(one) is not None)
        if not found:
            raise DataError(f"{source}: no data file in this directory (jsonl, json, csv, tsv, parquet, txt)")
        return found
    if not path.exists():
        shipped = ", ".join(SHIPPED)
        raise DataError(
            f"{source}: no such file; check the path, or use the shipped sample ({shipped}) or hub:owner/name"
        )
    return [path]


def _some(rows: Iterator[Row], name: str, bad: Bad | None = None) -> Iterator[Row]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty and bad is None:
        raise DataError(f"{name}: there are no rows")
