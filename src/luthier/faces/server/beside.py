"""Which model an adapter belongs to, from its files alone: nothing heavy is imported for it."""

from __future__ import annotations

import json
from pathlib import Path

from luthier.core.errors import LuthierError
from luthier.models.sources import resolve_source

CONFIG, SPEC = "adapter_config.json", "luthier.json"


def base_of(source: str) -> str | None:
    """The source of the base to which the adapter at `source` belongs; None where that is a whole model, or cannot be read."""
    try:
        place = resolve_source(source)
        if isinstance(place, str) or not (place / CONFIG).is_file():
            return None
        spec = place / SPEC
        own = json.loads(spec.read_text(encoding="utf-8")).get("base") if spec.is_file() else None
        found = own or json.loads((place / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (LuthierError, OSError, ValueError):
        # Whoever loads it says what is wrong.
        return None
    return str(found) if found else None


def same_model(one: str, other: str) -> bool:
    """Whether two sources are one."""
    return one == other or _place(one) == _place(other)


def _place(source: str) -> str:
    try:
        place = resolve_source(source)
    except LuthierError:
        return source
    return str(place.resolve()) if isinstance(place, Path) else place
