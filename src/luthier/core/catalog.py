"""Parts and catalogs: the one way to swap a piece of behaviour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, cast

from pydantic import BeforeValidator, SerializeAsAny, model_serializer

from luthier.core.config import Config
from luthier.core.errors import ConfigError, did_you_mean


class Part(Config):
    """A swappable strategy. Its fields are its knobs, its methods are its behaviour, `kind` is its name."""

    kind: ClassVar[str]

    @model_serializer(mode="wrap")
    def _with_kind(self, dump: Any) -> dict[str, Any]:
        # A ClassVar is not dumped; without its kind a dumped Part could not be parsed again.
        return {"kind": self.kind, **dump(self)}


P = TypeVar("P", bound=Part)


@cache
def _plugins(noun: str) -> dict[str, str]:
    return {entry.name: entry.value for entry in entry_points(group=f"luthier.{noun}")}


class Catalog(Generic[P]):
    """Names to lazily imported Parts of one noun. Listing names imports nothing.

    `parts` maps a name to "module:Class", the module relative to `package` when it starts with a dot. Other packages
    join through entry points of the group "luthier.<noun>".
    """

    def __init__(self, noun: str, parts: Mapping[str, str], package: str):
        self.noun, self.package = noun, package
        self._own = dict(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> list[str]:
        """Every known name, sorted."""
        return sorted(_plugins(self.noun) | self._own)

    def load(self, kind: str) -> type[P]:
        """The class called `kind`. Raises ConfigError with the nearest names when there is none."""
        where = (_plugins(self.noun) | self._own).get(kind)
        if where is None:
            raise ConfigError(f"unknown {self.noun} {kind!r}; {did_you_mean(kind, self.names())}")
        module, _, name = where.partition(":")
        part = getattr(import_module(module, self.package), name)
        if part.kind != kind:
            raise ConfigError(f"{where} calls itself {part.kind!r} but is listed as {kind!r}")
        return cast(type[P], part)

    def parse(self, value: Any) -> P:
        """ "lora" | {"kind": "lora", "rank": 8} | Lora(rank=8) -> Lora. Raises ConfigError."""
        if isinstance(value, Part):
            return cast(P, value)
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping) or "kind" not in value:
            raise ConfigError(f"{self.noun} needs a `kind`, one of: {', '.join(self.names())}")
        knobs = {key: inner for key, inner in value.items() if key != "kind"}
        return self.load(str(value["kind"])).make(knobs, where=f"{self.noun} {value['kind']!r}")

    @property
    def field(self) -> Any:
        """Use as an annotation: `objective: OBJECTIVES.field`."""
        return Annotated[SerializeAsAny[Part], BeforeValidator(self.parse)]

    @property
    def field_or_auto(self) -> Any:
        """The same, but the word "auto" passes through: the verb decides, and records why."""
        return Annotated[
            SerializeAsAny[Part] | Literal["auto"],
            BeforeValidator(lambda value: value if value == "auto" else self.parse(value)),
        ]
