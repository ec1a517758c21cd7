"""What no request may go beyond: the size of its body, and the end of the server."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier.faces.server.access import OPEN
from luthier.faces.server.refusals import Refusal, answer_of
from luthier.faces.server.server import Server

# Addresses that take whole files.
FILES = ("/v1/files",)


class Bounds:
    """Counts what is being answered, takes nothing new while the server ends, and no body that is too large."""

    def __init__(self, app: ASGIApp, server: Server):
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        server, path = self._server, scope["path"]
        if server.draining and path not in OPEN and not path.startswith("/health/"):
            refusal = Refusal(503, "the server is ending, and takes nothing new", code="draining", wait=5.0)
            await answer_of(refusal, scope["path"])(scope, receive, send)
            return
        megabytes = server.settings.file_megabytes if path in FILES else server.settings.body_megabytes
        server.going += 1
        server.idle.clear()
        try:
            await _Body(self._app, megabytes, server.settings.timeout).answer(scope, receive, send)
        finally:
            server.going -= 1
            if not server.going:
                server.idle.set()


class _Broken(Exception):
    """What reads a body may take this for a body that breaks off, and answer so: that answer is not sent."""


class _Body:
    def __init__(self, app: ASGIApp, megabytes: float, seconds: float):
        self._app, self._most, self._megabytes, self._seconds = app, int(megabytes * 2**20), megabytes, seconds

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        declared = next((int(v) for k, v in scope["headers"] if k == b"content-length" and v.isdigit()), 0)
        if declared > self._most:
            await self._refuse(self._too_large, scope, receive, send)
            return
        got, begun, whole = 0, False, False
        refusal: Refusal | None = None

        async def counted() -> Message:
            nonlocal got, whole, refusal
            try:
                # After its body nothing but the leaving of a client is waited for.
                async with asyncio.timeout(None if whole else self._seconds):
                    message = await receive()
            except TimeoutError:
                refusal = Refusal(408, f"nothing more of the body came within {self._seconds:g} s; send it again")
                raise _Broken from None
            got += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if got > self._most:
                refusal = self._too_large
                raise _Broken
            return message

        async def noted(message: Message) -> None:
            nonlocal begun
            if begun or refusal is None:
                begun = True
                await send(message)

        with suppress(_Broken):
            await self._app(scope, counted, noted)
        if not begun and refusal is not None:
            await self._refuse(refusal, scope, receive, send)

    @property
    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body is larger than {self._megabytes:g} MB, the most that is taken")

    async def _refuse(self, refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
        answer = answer_of(refusal, scope["path"])
        # The rest of the body is not read.
        answer.headers["Connection"] = "close"
        await answer(scope, receive, send)
