"""An answer on its way: in one piece or as server-sent events, and over as soon as nobody waits for it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, suppress
from json.encoder import encode_basestring
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from luthier.faces.server.refusals import Refusal, body_of, refusal_of, speaks_messages
from luthier.faces.server.wire import ENCODE

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


def new_id(prefix: str) -> str:
    """A name for something that is made here."""
    return f"{prefix}-{secrets.token_hex(12)}"


async def while_here(request: Request, work: Awaitable[T], seconds: float) -> T:
    """What comes of `work`, which is left when the client leaves. Raises Refusal where it takes longer than `seconds`."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({doing, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        if leaving.done():
            raise Refusal(499, "the client left")
        raise _late(seconds)
    finally:
        for task in (doing, leaving):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _late(seconds: float) -> Refusal:
    return Refusal(504, f"the answer was not written within {seconds:.0f} s; ask for fewer tokens", code="timeout")


async def stream_events(request: Request, events: AsyncIterator[bytes], seconds: float) -> StreamingResponse:
    """Server-sent events, once the first is there: what is wrong before that is an answer of its own."""
    first = await while_here(request, anext(events), seconds)

    def wrong(refusal: Refusal) -> bytes:
        path = request.url.path
        return event(body_of(refusal, path), "error" if speaks_messages(path) else None)

    async def flow() -> AsyncIterator[bytes]:
        async with aclosing(events):  # type: ignore[type-var]
            try:
                async with asyncio.timeout(seconds):
                    yield first
                    async for one in events:
                        yield one
            except TimeoutError:
                yield wrong(_late(seconds))
            except Exception as err:
                yield wrong(refusal_of(err))

    return StreamingResponse(flow(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def event(content: dict[str, Any] | BaseModel, name: str | None = None) -> bytes:
    """One server-sent event."""
    if isinstance(content, BaseModel):
        text = content.model_dump_json(exclude_none=True)
    else:
        text = ENCODE(content)
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode("utf-8", "replace")


class TextEvents:
    """Events that are alike but for one text, which is the string HERE in `content`, and a number after it where there is
    NUMBER: all around them is written once."""

    HERE, NUMBER = "\0", "\1"

    def __init__(self, content: dict[str, Any], name: str | None = None):
        self._head, rest = event(content, name).decode().split(ENCODE(self.HERE))
        self._middle, _, self._tail = rest.partition(ENCODE(self.NUMBER))

    def tell(self, text: str, number: int | str = "") -> bytes:
        """The event with this text, and this number, as `event` writes it."""
        return f"{self._head}{encode_basestring(text)}{self._middle}{number}{self._tail}".encode("utf-8", "replace")
