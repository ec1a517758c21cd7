"""Long lists in parts: so many after one that was seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from luthier.faces.server.refusals import Refusal

T = TypeVar("T")


def page_of(items: Sequence[T], id_of: Callable[[T], str], after: str | None, limit: int) -> tuple[list[T], bool]:
    """(the `limit` items that follow the one called `after`, whether there are more). Raises Refusal where it is not there."""
    start = 0
    if after is not None:
        found = next((at for at, one in enumerate(items) if id_of(one) == after), None)
        if found is None:
            raise Refusal(400, f"after: {after!r} is not in this list", param="after")
        start = found + 1
    return list(items[start : start + limit]), len(items) > start + limit
