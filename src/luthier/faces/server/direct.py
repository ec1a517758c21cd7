"""Pieces of a streamed answer straight to its connection: through ASGI each would go through every layer, and wake a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

Write: TypeAlias = Callable[[bytes], bool]


class Direct:
    """Gives each request a way to its connection; around the whole application, for layers hide what they send through."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})["write"] = _writer(send)
        await self._app(scope, receive, send)


def writer_of(request: Request) -> Write | None:
    """Of a request; None where its answer goes through ASGI alone."""
    return getattr(request.state, "write", None)


def _writer(send: Any) -> Write | None:
    """Writes a piece of the body of the answer that `send` sends, behind all that it was given before; False, and nothing is
    written, where the client does not keep up or is gone, or nothing may be written yet: then it goes through `send`.

    `send` is that of uvicorn with httptools; None for any other. Nothing between it and the answer may change bodies.
    """
    try:
        from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
    except ImportError:
        return None
    cycle = getattr(send, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle):
        return None
    try:
        transport, flow = cycle.transport, cycle.flow
        # Unset until headers are sent, but there.
        _ = cycle.chunked_encoding, cycle.response_complete, cycle.disconnected, flow.write_paused
    except AttributeError:
        # Another version names them otherwise.
        return None

    def write(body: bytes) -> bool:
        # Headers that say another length, or a question for the head alone, are left to uvicorn.
        if not cycle.chunked_encoding or cycle.response_complete or cycle.disconnected:
            return False
        if flow.write_paused or transport.is_closing():
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True

    return write
