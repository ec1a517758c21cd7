"""Look at data before tuning on it: as the model sees it, and as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from luthier.core.config import Config, Resolved, resolve
from luthier.core.events import Events, Sink
from luthier.data.load import Data, load_data
from luthier.text.answers import split_answers
from luthier.training.objectives import OBJECTIVES


class Prepare(Config):
    """Which rows to look at, and through which model's eyes."""

    data: Data
    """A file, a directory, "sms_spam", hub:owner/name, or a table of settings, as for tune."""
    model: str = "mini"
    """Whose tokenizer and chat template read the rows."""
    objective: OBJECTIVES.field_or_auto = "auto"  # type: ignore[name-defined]
    """What would be learned; auto goes by the shape of the rows."""
    rows: int = Field(3, gt=0)
    """How many rows to show."""
    template: str = "auto"
    """Chat template, as for tune."""
    max_length: int | None = Field(None, gt=1)
    """Longest row in tokens; by default the model's context."""
    truncate: bool = False
    """Cut rows that are too long instead of refusing them."""


def show(
    asked: Resolved[Prepare] | Prepare | None = None, *, sinks: Sequence[Sink] = (), **settings: Any
) -> list[dict[str, Any]]:
    """The first rows as `tune` would feed them: {"id", "tokens": [(text, weight)], "gold"}. Raises LuthierError."""
    from luthier.verbs.tune import Tune, encode_for

    config = asked if isinstance(asked, Prepare) else (asked or resolve(Prepare, values=settings)).config
    names = ("data", "model", "objective", "template", "max_length", "truncate")
    tune = resolve(Tune, values={name: getattr(config, name) for name in names})
    rows, model = encode_for(tune, Events(sinks=sinks), limit=config.rows)
    shown = [one for row in rows for one in split_answers(row)]
    return [{"id": row.id, "tokens": model.renderer.describe(row), "gold": row.gold} for row in shown]


def profile(
    asked: Resolved[Prepare] | Prepare | None = None, *, sinks: Sequence[Sink] = (), **settings: Any
) -> dict[str, Any]:
    """Rows, duplicates, lengths, scripts, labels, and the split as tune would make it. Raises LuthierError."""
    config = asked if isinstance(asked, Prepare) else (asked or resolve(Prepare, values=settings)).config
    return load_data(config.data, Events(sinks=sinks)).profile
