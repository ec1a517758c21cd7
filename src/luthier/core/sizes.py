"""Sizes of memory, as people write them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

UNITS = {"gb": 1.0, "gib": 2**30 / 1e9, "mb": 1e-3, "mib": 2**20 / 1e9}
_SIZE = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*(GB|GiB|MB|MiB)?", re.IGNORECASE)


def read_size(value: Any) -> Any:
    """A text as a number of GB (1e9 bytes), which it is in where it names no unit; "auto", and what is no text, comes back as
    it is. Raises ValueError for any other text."""
    if not isinstance(value, str) or value == "auto":
        return value
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError(
            f"{value!r} is no size; write auto, a number of GB, or a number with GB, GiB, MB or MiB behind it"
        )
    return float(found[1]) * UNITS[(found[2] or "GB").lower()]


Gigabytes = Annotated[Annotated[float, Field(gt=0)] | Literal["auto"], BeforeValidator(read_size)]
