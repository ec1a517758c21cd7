"""The indexes that are served, each under its name, and the process that holds them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.core.errors import did_you_mean
from luthier.faces.server.engines import EngineProcess, Gone, Refused
from luthier.faces.server.refusals import Refusal
from luthier.faces.server.settings import Serve
from luthier.faces.server.shelf import names_of
from luthier.retrieval.passage import Hit, Passage

if TYPE_CHECKING:
    from luthier.faces.server.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Found:
    """A passage, and the index that it is from."""

    index: str
    hit: Hit


class Indexes:
    """What is searched. All of them share a process, so that one encoder is there once."""

    def __init__(self, settings: Serve, metrics: Metrics, tell: Callable[[dict[str, Any]], None]):
        self._named, self._metrics = dict(names_of(settings.indexes)), metrics
        order = {"source": ", ".join(self._named), "indexes": self._named}
        self.process = EngineProcess(order, tell) if self._named else None

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """Of each index, as it was when the process began."""
        return {} if self.process is None else self.process.facts["indexes"]

    async def start(self) -> None:
        """Open them. Raises Refused for one that cannot be opened."""
        if self.process is not None:
            await self.process.start()

    async def close(self) -> None:
        """End the process."""
        if self.process is not None:
            await self.process.stop()

    def check_names(self, names: Sequence[str], param: str) -> None:
        """Raises Refusal for an index that is not served; `param` is where it was named."""
        for name in names:
            if name not in self._named:
                hint = (
                    did_you_mean(name, self._named) if self._named else "luthier serve MODEL --indexes NAME serves one"
                )
                raise Refusal(
                    404, f"{param}: the index {name!r} is not served here; {hint}", param=param, code="index_not_found"
                )

    async def describe(self) -> dict[str, dict[str, Any]]:
        """What each holds now, or its `trouble`. Raises Gone."""
        return {} if self.process is None else await self.process.ask("describe")

    async def search(
        self, names: Sequence[str], queries: Sequence[str | Sequence[str]], k: int
    ) -> tuple[list[Found], bool]:
        """The `k` passages of the named indexes that fit the queries best, and whether they are enough to answer from: of
        those indexes alone that know enough, where there is one. Raises Refusal, Refused for a query without words, Gone."""
        found = {name: await self._search(name, queries, k) for name in names}
        knowing = [name for name, answers in found.items() if any(one["known"] for one in answers)]
        best: dict[tuple[str, str], Found] = {}
        for name in knowing or found:
            for hit in (_hit(row) for one in found[name] for row in one["hits"]):
                before = best.get((name, hit.passage.id))
                if before is None or before.hit.score < hit.score:
                    best[name, hit.passage.id] = Found(name, hit)
        return sorted(best.values(), key=lambda one: -one.hit.score)[:k], bool(knowing)

    async def _search(self, name: str, queries: Sequence[str | Sequence[str]], k: int) -> list[dict[str, Any]]:
        assert self.process is not None
        began = time.monotonic()
        try:
            answer = await self.process.ask("search", index=name, queries=list(queries), k=k)
        except Refused as err:
            if err.kind not in ("RunError", "ModelError"):
                raise
            # It was there when the server began.
            raise Refusal(503, str(err), code="index_unavailable") from None
        found: list[dict[str, Any]] = answer["found"]
        self._metrics.searched(name, [one["known"] for one in found], time.monotonic() - began)
        return found

    async def check(self, seconds: float = 10.0) -> dict[str, str]:
        """What is wrong with each."""
        try:
            async with asyncio.timeout(seconds):
                found = await self.describe()
        except TimeoutError:
            return dict.fromkeys(self._named, f"no answer within {seconds:.0f} s")
        except Gone as err:
            return dict.fromkeys(self._named, str(err))
        return {name: one["trouble"] for name, one in found.items() if "trouble" in one}


def _hit(row: dict[str, Any]) -> Hit:
    held = row["passage"]
    return Hit(**{**row, "passage": Passage(**{**held, "heading": tuple(held["heading"])})})
