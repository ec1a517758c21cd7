"""An engine's process: loads one model, or opens the indexes, and does what the server asks for, all at once.

Started by `faces.server.engines`, with a socket in place of its arguments; it ends when the other side of that is gone.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from luthier.core.errors import LuthierError
from luthier.faces.server import loops, wire
from luthier.faces.server.wire import Message, Outbox

if TYPE_CHECKING:
    from luthier.faces.server.finder import Finder
    from luthier.faces.server.hands import Hands

# Seconds for which one thread may keep the other from Python.
SWITCH = 0.0005


def main(descriptor: int) -> int:
    """Serve the socket of this number until it closes."""
    from luthier.models.lean import import_lean

    import_lean()
    # The engine's thread comes back from a step to Python some fifty times a second, and must not wait for that of the loop.
    sys.setswitchinterval(SWITCH)
    loops.run(_serve(socket.socket(fileno=descriptor)))
    return 0


async def _serve(sock: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=sock)
    first = await wire.read(reader)
    if first is None:
        return
    (order,) = first
    loop = asyncio.get_running_loop()

    def tell(event: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(wire.write, writer, {"said": event})

    if "indexes" in order:
        from luthier.faces.server.finder import load
    else:
        from luthier.faces.server.hands import load  # type: ignore[assignment]

    try:
        hands = await asyncio.to_thread(load, order, tell)
    except Exception as err:
        wire.write(writer, _error(err))
        await writer.drain()
        return
    wire.write(writer, {"facts": hands.facts})
    await _work(hands, reader, writer)
    await asyncio.to_thread(hands.close)


async def _work(hands: Hands | Finder, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    going: dict[int, asyncio.Task[None]] = {}

    # Who reads slowly gets longer pieces, instead of a queue of short ones.
    out = Outbox(writer)
    while (messages := await wire.read(reader)) is not None:
        for message in messages:
            if "leave" in message:
                task = going.get(message["leave"])
                if task is not None:
                    task.cancel()
                continue
            task = asyncio.create_task(_do(hands, message, out))
            going[message["id"]] = task
            task.add_done_callback(partial(_forget, going, message["id"]))
    for task in list(going.values()):
        task.cancel()


def _forget(going: dict[int, asyncio.Task[None]], id: int, _: asyncio.Task[None]) -> None:
    going.pop(id, None)


async def _do(hands: Hands | Finder, message: Message, out: Outbox) -> None:
    id = message["id"]
    try:
        async for part in hands.do(message, partial(out.put_text, id)):
            await out.send({"id": id, **part})
    except asyncio.CancelledError:
        raise
    except ConnectionError:
        return
    except Exception as err:
        await out.send({"id": id, **_error(err)})


def _error(err: Exception) -> Message:
    known = isinstance(err, LuthierError)
    message = str(err) if known else f"this is a bug in Luthier: {type(err).__name__}: {err}"
    if not known and "--debug" in sys.argv:
        import traceback

        traceback.print_exception(err)
    return {"error": {"kind": type(err).__name__ if known else "Bug", "message": message}}


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1])))
