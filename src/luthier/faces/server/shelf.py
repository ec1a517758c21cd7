"""The models that are served, each under its names, and the processes that hold them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from luthier.core.errors import LuthierError
from luthier.faces.server.beside import base_of, same_model
from luthier.faces.server.engines import EngineProcess, Gone, Refused, Tap
from luthier.faces.server.refusals import Refusal, unknown
from luthier.faces.server.settings import Serve
from luthier.models.sources import settle

# Models that may rest of which so many, those asked last, stay loaded.
AWAKE = 2


@dataclass
class Served:
    """A model under a name."""

    name: str
    source: str
    process: EngineProcess
    created: int = field(default_factory=lambda: int(time.time()))
    parent: str | None = None
    """The name of the base beside which it is an adapter."""
    parameters: int = 0
    """Of that adapter."""

    async def ask(self, do: str, **asked: Any) -> dict[str, Any]:
        """As `EngineProcess.ask`, by its own name and with its adapter."""
        return await self.process.ask(do, **asked, **self._names())

    def stream(
        self, do: str, tap: Tap | None = None, **asked: Any
    ) -> AsyncIterator[tuple[Literal["piece", "end"], dict[str, Any]]]:
        """As `EngineProcess.stream`, by its own name and with its adapter."""
        return self.process.stream(do, tap, **asked, **self._names())

    def _names(self) -> dict[str, str]:
        return {"model": self.name, **({"adapter": self.name} if self.parent is not None else {})}


class Shelf:
    """What is served. Names of one source share its process."""

    def __init__(self, settings: Serve, tell: Callable[[dict[str, Any]], None]):
        self._settings, self._tell = settings, tell
        self.models: dict[str, Served] = {}
        self._lock = asyncio.Lock()
        self._resting: set[asyncio.Task[None]] = set()

    @property
    def processes(self) -> list[EngineProcess]:
        """Each once."""
        return list(dict.fromkeys(one.process for one in self.models.values()))

    def find(self, name: str) -> Served:
        """The model of a name. Raises Refusal for one that is not served."""
        if name not in self.models:
            raise unknown(name, list(self.models))
        return self.models[name]

    async def load(
        self, source: str, name: str | None = None, *, rests: bool = False, facts: dict[str, Any] | None = None
    ) -> Served:
        """Serve a model, under its own name or another. Raises Refusal for a name that is taken, and what loading raises.

        One that `rests` stays loaded while it is among the last AWAKE such models that were asked; with `facts`, what an
        earlier loading found, it is loaded when it is first asked.
        """
        # An engine that is started again loads what it was, whatever was tuned since.
        name, source = name or source, settle(source)
        async with self._lock:
            if name in self.models:
                raise Refusal(409, f"a model is served as {name!r} already; unload it first, or choose another name")
            beside = await self._load_beside(source, name)
            if beside is not None:
                self.models[name] = beside
                return beside
            process = next((one for one in self.processes if one.source == source), None)
            if process is None:
                process = EngineProcess(self._order(source), self._tell, self._let_rest if rests else None)
                if facts is None:
                    await process.start()
                else:
                    process.sleep(facts)
            served = self.models[name] = Served(name, source, process)
            self._let_rest()
            return served

    async def _load_beside(self, source: str, name: str) -> Served | None:
        """An adapter whose base is served becomes a model beside it, in its process; None for anything else."""
        base = await asyncio.to_thread(base_of, source)
        if base is None:
            return None
        for one in self.models.values():
            if one.parent is None and one.process.state == "ready" and same_model(one.source, base):
                try:
                    found = await one.process.ask("load_adapter", name=name, source=source)
                except Refused as why:
                    self._tell(
                        {"event": "warning", "message": f"{name}: {why}; it gets a process of its own", "count": 1}
                    )
                    return None
                one.process.order["adapters"][name] = source
                return Served(name, source, one.process, parent=one.name, parameters=found["parameters"])
        return None

    def _let_rest(self) -> None:
        """Let those go that were not asked for longest."""
        awake = [one for one in self.processes if one.rests and one.state == "ready"]
        for one in sorted(awake, key=lambda one: one.used)[:-AWAKE]:
            task = asyncio.create_task(one.rest())
            self._resting.add(task)
            task.add_done_callback(self._resting.discard)

    async def unload(self, name: str) -> None:
        """Serve a model no longer. Raises Refusal for one that is not served."""
        async with self._lock:
            served = self.find(name)
            beside = [one.name for one in self.models.values() if one.parent == name]
            if beside:
                raise Refusal(409, f"{name!r} is the base of {', '.join(map(repr, beside))}; unload them first")
            del self.models[name]
            if served.parent is not None:
                served.process.order["adapters"].pop(name, None)
                with suppress(Gone):
                    await served.process.ask("unload_adapter", name=name)
            elif served.process not in self.processes:
                await served.process.stop()

    async def close(self) -> None:
        """End all processes."""
        await asyncio.gather(*(one.stop() for one in self.processes))

    async def check(self) -> dict[str, str]:
        """What is wrong with each model; one that writes a token, and that alone, has nothing wrong with it."""
        found = await asyncio.gather(*(_beat(one.process) for one in self.models.values()))
        return {name: trouble for name, trouble in zip(self.models, found) if trouble}

    def _order(self, source: str) -> dict[str, Any]:
        wanted = self._settings.model_dump(mode="json", include={"execution", "context", "streams", "waiting"})
        return {"source": source, "adapters": {}, **wanted}


async def _beat(process: EngineProcess, seconds: float = 10.0) -> str:
    if process.state == "asleep":
        return ""
    try:
        async with asyncio.timeout(seconds):
            await process.ask("beat")
    except TimeoutError:
        return f"no token within {seconds:.0f} s"
    except (Gone, LuthierError) as err:
        return str(err)
    return ""


def names_of(models: Sequence[str]) -> list[tuple[str, str]]:
    """(name, source) of each `MODEL` or `NAME=MODEL`."""
    found = []
    for one in models:
        name, given, source = one.partition("=")
        found.append((name, source) if given else (one, one))
    return found
