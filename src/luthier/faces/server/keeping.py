"""What goes on beside the answers, from a server's start to its end: tuned models, fine-tuning jobs, batches."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager

from luthier.core.errors import RunError
from luthier.core.run import hold_lock
from luthier.faces.server.batching import Batching
from luthier.faces.server.refusals import Refusal
from luthier.faces.server.server import Server
from luthier.faces.server.store import store_of
from luthier.faces.server.tuning import Tuning, serve_tuned


@asynccontextmanager
async def working(server: Server, say: Callable[[str], None]) -> AsyncIterator[None]:
    """While a server runs. Where another one works in the same runs directory, or nothing can be kept there, this one serves
    its models all the same, and says so."""
    with ExitStack() as held:
        try:
            store = store_of(server)
            held.callback(store.close)
            await serve_tuned(server)
            held.enter_context(hold_lock(store.folder / "lock"))
        except (RunError, Refusal) as err:
            say(f"warning: no fine-tuning jobs and batches are carried out here: {err}")
            yield
            return
        tuning, batching = Tuning(server), Batching(server)
        server.parts |= {"tuning": tuning, "batching": batching}
        for one in (tuning, batching):
            one.begin()
        try:
            yield
        finally:
            for one in (batching, tuning):
                await one.end()
