"""The adapters that an engine's texts can be written with, by name: put beside the base and taken out while others write."""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError, ModelError, did_you_mean
from luthier.core.events import Events
from luthier.engine.paged import Paged
from luthier.engine.reader import Reader
from luthier.engine.request import Request
from luthier.models.adapters.additions import Additions, Line, read_additions
from luthier.models.decoder import lows_of
from luthier.models.rules import Unlike
from luthier.models.spec import LoadedModel
from luthier.native.cached import Cached
from luthier.native.packed import Packed

if TYPE_CHECKING:
    from luthier.engine.pooler import Reading

# The adapter that a model which is tuned has beside its packed base (`engine.native.natively`).
OWN = "own"
# Of texts without an adapter.
NONE = -1


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter beside the base. `notes` are what is not as it was in its tuning."""

    name: str
    source: str
    layers: tuple[Line, ...]
    parameters: int
    notes: tuple[str, ...]
    slot: int
    """Its number in a step."""
    serial: int
    """Of all that were ever loaded: a later one of the same name has another."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class Lent:
    """An adapter that something reads with over several steps: while that lives, nothing takes the adapter's number."""

    slot: int
    gone: ModelError | None = None
    """Why it is not read with any more."""

    def check(self) -> None:
        """Raises ModelError where it was taken out meanwhile."""
        if self.gone is not None:
            raise self.gone


class Adapters:
    """What lies beside the base of one engine; packed weights, which several engines may read, keep nothing of one that is
    gone."""

    def __init__(self, model: LoadedModel, reader: Reader):
        self._model, self._reader = model, reader
        self._named: dict[str, Loaded] = {}
        self._leaving: list[Loaded] = []
        self._serials = count()
        self._slots: set[int] = set()
        self._lent: weakref.WeakSet[Lent] = weakref.WeakSet()
        if isinstance(reader, Cached):
            _take_out_left(reader.packed)
            weakref.finalize(self, _leave, weakref.ref(reader.packed), self._slots).atexit = False
        if model.native is not None and model.spec.adapter is not None and model.native.adapters:
            self._named[OWN] = Loaded(OWN, model.spec.source, (), 0, (), 0, next(self._serials))

    @property
    def named(self) -> Mapping[str, Loaded]:
        """Those that a text can be added with."""
        return MappingProxyType(self._named)

    def load(self, name: str, source: str | Path | LoadedModel | Additions, events: Events | None) -> Loaded:
        """Put one beside the base. Raises ConfigError for a name that is taken, ModelError as `read_additions` does."""
        if not name:
            raise ConfigError("an adapter needs a name of one character at least")
        reader = self._reader
        if not isinstance(reader, Cached | Paged):
            raise ModelError(
                f"{self._model.spec.source}: an encoder-decoder is written with no adapter beside it; merge the adapter, and "
                "load the merged model"
            )
        if name in self._named:
            raise ConfigError(f"an adapter called {name!r} is there already; unload it first, or choose another name")
        if isinstance(reader, Cached):
            _take_out_left(reader.packed)
        read = source if isinstance(source, Additions) else read_additions(self._model, source)
        try:
            # A reader takes what adds to the products it makes, or to the layers it calls.
            if isinstance(reader, Cached):
                slot = reader.put_adapter(lows_of(self._model, read.layers))
            else:
                slot = reader.put_adapter(read.layers)
        except (Unlike, ValueError) as why:
            if isinstance(why, ModelError):
                raise
            raise ModelError(
                f"{read.source}: this adapter cannot be added beside packed weights: it {why}; set execution: model"
            ) from None
        self._slots.add(slot)
        made = Loaded(name, read.source, read.report, read.parameters, read.notes, slot, next(self._serials))
        self._named[name] = made
        for note in read.notes:
            if events is not None:
                events.warn(note, 1)
            else:
                warnings.warn(note, stacklevel=4)
        return made

    def unload(self, name: str) -> Loaded:
        """From here on no text is added with it; `let_go` frees it once none is written with it. Raises ConfigError."""
        found = self.find(name)
        del self._named[name]
        self._leaving.append(found)
        return found

    def find(self, name: str) -> Loaded:
        """The adapter of that name. Raises ConfigError where there is none."""
        if name not in self._named:
            hint = did_you_mean(name, self._named) if self._named else "none is loaded"
            raise ConfigError(f"adapter: there is no adapter {name!r} beside this model; {hint}")
        return self._named[name]

    def lend(self, name: str) -> Lent:
        """An adapter for what is no text of the engine's. Raises ConfigError where there is none of that name."""
        lent = Lent(self.find(name).slot)
        self._lent.add(lent)
        return lent

    def call_back(self, slot: int, error: ModelError) -> None:
        """Whoever reads with it ends with this error."""
        for one in self._lent:
            if one.slot == slot:
                one.gone = error

    def let_go(self, texts: Sequence[Request | Reading]) -> list[Loaded]:
        """Free those that were unloaded and that none of these texts, and nothing else, is read with; returns them."""
        if not self._leaving:
            return []
        held = {one.adapter for one in texts} | {one.slot for one in self._lent if one.gone is None}
        gone = [one for one in self._leaving if one.slot not in held]
        for one in gone:
            self._leaving.remove(one)
            if isinstance(self._reader, Cached | Paged):
                self._reader.drop_adapter(one.slot)
            self._slots.discard(one.slot)
        return gone


# Of engines that went away in the middle of a step: numbers that the next one takes out.
_LEFT: weakref.WeakKeyDictionary[Packed, deque[int]] = weakref.WeakKeyDictionary()


def _leave(held: weakref.ref[Packed], slots: set[int]) -> None:
    """Take these out, after the engine that put them in. The collector may call this anywhere, even where this very thread holds
    the lock."""
    packed = held()
    if packed is None:
        return
    if slots and packed.lock.locked():
        _LEFT.setdefault(packed, deque()).extend(slots)
        return
    for slot in slots:
        packed.drop_adapter(slot)


def _take_out_left(packed: Packed) -> None:
    left = _LEFT.get(packed, deque())
    while left:
        packed.drop_adapter(left.popleft())
