"""What the process of the indexes can do, by the names in which the server asks for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from luthier.core.config import Config
from luthier.core.errors import ConfigError, LuthierError
from luthier.core.events import Event, Events
from luthier.retrieval.answer import Retrieved, retrieve_all
from luthier.retrieval.embed import Encoder
from luthier.retrieval.search import Index, open_index
from luthier.retrieval.store import Stamp, find_index, read_meta, stamp_of

Parts: TypeAlias = AsyncIterator[dict[str, Any]]


class Order(Config):
    """Which indexes: the reference of each name."""

    source: str
    indexes: dict[str, str]


@dataclass(slots=True)
class Opened:
    """An index, as it was when it was opened."""

    index: Index
    stamp: Stamp


def load(order: dict[str, Any], tell: Callable[[Event], None]) -> Finder:
    """The indexes that were ordered, open. Raises what `open_index` raises."""
    return Finder(Order.make(order, where="indexes"), Events(sinks=[tell]))


class Finder:
    """Indexes that are searched, one question after the other."""

    def __init__(self, order: Order, events: Events):
        self._references, self._events = order.indexes, events
        self._opened: dict[str, Opened] = {}
        self._work = ThreadPoolExecutor(1)
        self.facts: dict[str, Any] = {"indexes": {name: self._describe(name) for name in self._references}}

    def close(self) -> None:
        """Leave what waits, and end."""
        self._work.shutdown(cancel_futures=True)

    def do(self, message: dict[str, Any], tell: object = None) -> Parts:
        """The parts of the answer to a message; no text comes piece by piece, to `tell`. Raises ConfigError for what there is
        no name for."""
        name = message["do"]
        if name not in DOINGS:
            raise ConfigError(f"an index cannot {name}")
        return DOINGS[name](self, message)

    async def search(self, message: dict[str, Any]) -> Parts:
        """The `k` best passages of `index` for each of `queries`, and whether they are enough to answer from."""
        found = await self._run(self._search, message["index"], message["queries"], message["k"])
        yield {"end": {"found": [_row(one) for one in found]}}

    async def describe(self, message: dict[str, Any]) -> Parts:
        """What each index holds now, or what is wrong with it."""
        yield {"end": {name: await self._run(self._look, name) for name in self._references}}

    async def _run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._work, partial(work, *arguments))

    def _search(self, name: str, queries: Sequence[str | Sequence[str]], k: int) -> list[Retrieved]:
        return retrieve_all(self._index(name), queries, k)

    def _look(self, name: str) -> dict[str, Any]:
        try:
            return self._describe(name)
        except LuthierError as err:
            return {"trouble": str(err)}

    def _describe(self, name: str) -> dict[str, Any]:
        meta, stamp = self._index(name).stored.meta, self._opened[name].stamp
        return {
            "made": stamp[0] // 10**9,
            "files": len(meta.files),
            "passages": meta.passages,
            "bytes": sum(meta.sizes.values()),
            "encoder": meta.encoder,
        }

    def _index(self, name: str) -> Index:
        """The index as it is on the disk now: one that was updated is opened anew."""
        path = find_index(self._references[name])
        # Looked at before it is opened: what is replaced in between is seen the next time.
        stamp, opened = stamp_of(path), self._opened.get(name)
        if opened is None or opened.stamp != stamp:
            opened = self._opened[name] = Opened(
                open_index(path, encoder=self._encoder(path), events=self._events), stamp
            )
        return opened.index

    def _encoder(self, path: Path) -> Encoder | None:
        """The encoder of an index, where another one has it already."""
        wanted = read_meta(path).fingerprint
        found = (one.index.encoder for one in self._opened.values())
        return next((one for one in found if one is not None and one.fingerprint == wanted), None)


def _row(found: Retrieved) -> dict[str, Any]:
    return {"known": found.known, "hits": [asdict(one.hit) for one in found.sources]}


DOINGS: dict[str, Callable[[Finder, dict[str, Any]], Parts]] = {"search": Finder.search, "describe": Finder.describe}
