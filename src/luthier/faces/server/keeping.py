"""What goes on beside the answers, from a server's start to its end: tuned models, fine-tuning jobs, batches."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress

from luthier.core.errors import LuthierError, RunError
from luthier.core.run import hold_lock
from luthier.faces.server.batching import Batching
from luthier.faces.server.engines import Gone
from luthier.faces.server.refusals import Refusal
from luthier.faces.server.server import Server
from luthier.faces.server.store import Store, store_of
from luthier.faces.server.tuning import Tuning, serve_tuned

# Seconds between two looks whether another server ended, and what it tuned.
LOOK = 2.0


@asynccontextmanager
async def working(server: Server, say: Callable[[str], None]) -> AsyncIterator[None]:
    """While a server runs. Of several in one runs directory one carries out jobs and batches: the others serve their models,
    refuse new ones, say so, and take over when it ends. Where nothing can be kept at all, models are served all the same."""
    with ExitStack() as held:
        try:
            store = store_of(server)
            held.callback(store.close)
            await serve_tuned(server)
        except (RunError, Refusal) as err:
            say(f"warning: no fine-tuning jobs and batches are carried out here: {err}")
            yield
            return
        queue = Queue(server, store, held, say)
        queue.begin()
        following = asyncio.create_task(_follow(server, store, say))
        try:
            yield
        finally:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
            await queue.end()


async def _follow(server: Server, store: Store, say: Callable[[str], None]) -> None:
    """Serve what another server tunes, and no longer what is deleted there."""
    seen = version = -1
    while True:
        await asyncio.sleep(LOOK)
        try:
            version = store.version
            if version == seen:
                continue
            await serve_tuned(server)
            seen = version
        except Gone:
            continue
        except (LuthierError, OSError, sqlite3.Error) as err:
            say(f"warning: what another server tuned or deleted is not followed here: {err}")
            seen = version


class Queue:
    """Jobs and batches, from when this server holds their lock."""

    def __init__(self, server: Server, store: Store, held: ExitStack, say: Callable[[str], None]):
        self._server, self._store, self._held, self._say = server, store, held, say
        self._working: tuple[Tuning, Batching] | None = None
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Hold it, or wait for that."""
        if self._take():
            return
        self._server.parts["elsewhere"] = True
        self._say(
            f"warning: another server works in {self._store.folder.parent} and holds the queue: no fine-tuning jobs and batches "
            "are taken here until that one ends"
        )
        self._task = asyncio.create_task(self._wait())

    async def end(self) -> None:
        """Leave off where it is."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        for one in self._working[::-1] if self._working is not None else ():
            await one.end()

    async def _wait(self) -> None:
        while not self._take():
            await asyncio.sleep(LOOK)
        del self._server.parts["elsewhere"]
        self._say("the other server ended: fine-tuning jobs and batches are carried out here now")

    def _take(self) -> bool:
        try:
            self._held.enter_context(hold_lock(self._store.folder / "lock"))
        except RunError:
            return False
        self._working = tuning, batching = Tuning(self._server), Batching(self._server)
        self._server.parts |= {"tuning": tuning, "batching": batching}
        for one in self._working:
            one.begin()
        return True
