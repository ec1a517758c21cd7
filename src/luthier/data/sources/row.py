"""One row as it was read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """The values of a row by column, and where it stands ("tickets.jsonl:17")."""

    values: dict[str, Any]
    where: str
