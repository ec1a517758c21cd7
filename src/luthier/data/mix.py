"""Several sources where one may stand: how they are written, named and weighed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import field_serializer, field_validator

from luthier.core.config import Config
from luthier.core.errors import ConfigError
from luthier.core.types import Example
from luthier.data.plans import Weight
from luthier.data.shapes import Columns, Shape, to_example
from luthier.data.sources import SHIPPED, describe_source
from luthier.data.sources.files import kind_of
from luthier.data.sources.row import Row


class Source(Config):
    """One of several sources. What it leaves out is as for all of them."""

    source: Any
    """A file, a directory, "sms_spam", hub:owner/name, or a table of rows."""
    name: str | None = None
    """What its rows and numbers are called; by default the file's name."""
    weight: float | tuple[float, float] | None = None
    """Its part of all rows drawn, beside the weights of the others; a pair goes from the first to the second over the run."""
    columns: Columns | None = None
    """Which column holds what, in this source."""
    shape: Shape | Literal["auto"] | None = None
    """The shape of its rows."""

    @field_validator("weight")
    @classmethod
    def _check_weight(cls, weight: float | Weight | None) -> float | Weight | None:
        if isinstance(weight, tuple) and (min(weight) < 0 or max(weight) == 0):
            raise ValueError(
                f"a weight goes between two numbers of which neither is negative and one is above 0, not {weight}"
            )
        if isinstance(weight, float) and weight <= 0:
            raise ValueError(f"a weight is a number above 0, not {weight:g}; leave the source out instead")
        return weight

    @field_serializer("source")
    def _describe(self, source: Any) -> str:
        return describe_source(source)

    @property
    def weights(self) -> Weight:
        """The weight at the first step and at the last."""
        assert self.weight is not None
        return self.weight if isinstance(self.weight, tuple) else (self.weight, self.weight)


def list_sources(value: Any) -> Any:
    """`value` as a list of Sources where it is written as several sources, else `value` itself.

    A list means sources when its first entry is a path, a name that only a source has (hub:owner/name, a shipped
    sample, an existing file or folder, a word that ends like a data file), or a mapping with `source` and nothing that
    a Source does not have, or with such a name in it. Every other list is rows in memory. Raises ConfigError for
    entries that are no sources, names that stand twice, and weights that do not go together.
    """
    if (
        not isinstance(value, list | tuple)
        or not value
        or not (isinstance(value[0], Source) or _means_source(value[0]))
    ):
        return value
    found = []
    for number, entry in enumerate(value, 1):
        if isinstance(entry, str | Path):
            entry = {"source": entry}
        elif not isinstance(entry, Mapping | Source):
            raise ConfigError(
                f"source {number}: expected a path or a mapping with `source`, found a {type(entry).__name__}"
            )
        found.append(entry if isinstance(entry, Source) else Source.make(entry, where=f"source {number}"))
    _check_weights(found)
    return _name(found)


def weights_of(sources: Any) -> dict[str, Weight]:
    """The weights of a list of Sources by name; empty where there are none."""
    weighted = is_several(sources) and sources[0].weight is not None
    return {str(one.name): one.weights for one in sources} if weighted else {}


def is_several(value: Any) -> bool:
    """Whether `list_sources` made a list of Sources of what was given."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Source)


def _means_source(entry: Any) -> bool:
    if isinstance(entry, Mapping):
        return "source" in entry and (set(entry) <= set(Source.model_fields) or _means_source(entry["source"]))
    if not isinstance(entry, str):
        return isinstance(entry, Path)
    if entry.startswith("hub:") or entry in SHIPPED:
        return True
    if "\n" in entry or len(entry) > 1000:
        return False
    return (" " not in entry and kind_of(Path(entry)) is not None) or Path(entry).expanduser().exists()


def _check_weights(sources: Sequence[Source]) -> None:
    lacking = [number for number, one in enumerate(sources, 1) if one.weight is None]
    if lacking and len(lacking) < len(sources):
        raise ConfigError(
            f"source {lacking[0]}: it has no weight, while others do; give every source a weight, or none "
            "to take each row once"
        )
    if not lacking and any(sum(one.weights[end] for one in sources) == 0 for end in (0, 1)):
        raise ConfigError("the weights of all sources are 0 at one end of the run; leave one of them above 0")


def _name(sources: Sequence[Source]) -> list[Source]:
    """Each source with a name of its own: the given one, the file's, or its path where two files are called alike."""
    short = [one.name or next(_names(one.source, number)) for number, one in enumerate(sources, 1)]
    counts = Counter(short)
    named = [
        one.name or list(_names(one.source, number))[-1 if counts[name] > 1 else 0]
        for number, (one, name) in enumerate(zip(sources, short), 1)
    ]
    for name, count in Counter(named).items():
        if count > 1:
            raise ConfigError(f"the source {name!r} stands twice; give each a `name`, or take one out")
    return [one.model_copy(update={"name": name}) for one, name in zip(sources, named)]


def _names(source: Any, number: int) -> Iterator[str]:
    """What a source may be called, the shortest first."""
    if isinstance(source, str | Path):
        if not str(source).startswith("hub:"):
            yield Path(source).name
        yield str(source)
    else:
        yield f"source {number}"


def read_example(row: Row, shape: Shape, columns: Mapping[str, str], source: Source) -> Example:
    """`to_example`, with the name of the source, if it has one, in front of the row's id."""
    example = to_example(row, shape, columns)
    if source.name is None or example.id.startswith(f"{source.name}:"):
        return example
    file = Path(source.source).name if isinstance(source.source, str | Path) else ""
    return replace(example, id=f"{source.name}:{example.id.removeprefix(f'{file}:') if file else example.id}")
