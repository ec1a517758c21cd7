"""Rows that are in memory already: lists, pandas data frames, datasets tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from luthier.core.errors import DataError
from luthier.data.sources.row import Row


def read_table(source: Any, bad: Callable[[str, str], None]) -> Iterator[Row]:
    """Rows of a list of dicts or strings, or of anything with `to_dict("records")` (pandas) or an iterator of dicts
    (datasets). Raises DataError for anything else."""
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        source = source.to_dict("records")
    if isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        hint = (
            "; a table of several splits needs one of them, such as data['train']"
            if isinstance(source, Mapping)
            else ""
        )
        raise DataError(
            f"a {type(source).__name__} is no table of rows: give a path, a list of dicts or strings, or a table{hint}"
        )
    for number, value in enumerate(source, 1):
        if isinstance(value, str):
            yield Row({"text": value}, f"row {number}")
        elif isinstance(value, Mapping):
            yield Row(dict(value), f"row {number}")
        else:
            bad(f"row {number}", f"expected a dict or a text, found a {type(value).__name__}")
