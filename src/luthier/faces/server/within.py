"""Asking the server from within: the addresses that write, without who may ask and how much."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import FastAPI
from starlette.types import Message

from luthier.faces.server import chat, completions, embeddings
from luthier.faces.server.keys import Key
from luthier.faces.server.refusals import explain
from luthier.faces.server.server import Server


class Within:
    """Answers requests as the server would, in the name of a key that was let in before."""

    def __init__(self, server: Server):
        self._app = FastAPI(openapi_url=None)
        self._app.state.server = server
        explain(self._app)
        for one in (chat, completions, embeddings):
            self._app.include_router(one.routes)

    async def post(self, path: str, body: dict[str, Any], key: Key) -> tuple[int, dict[str, Any]]:
        """(status, answer)."""
        content = json.dumps(body).encode()
        asked, status, answer = False, 0, b""

        async def receive() -> Message:
            nonlocal asked
            if asked:
                # Nobody leaves before the answer.
                await asyncio.Event().wait()
            asked = True
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status, answer
            status = message.get("status", status)
            answer += message.get("body", b"")

        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers,
            "client": None, "server": None, "state": {"key": key, "facts": {}},
        }  # fmt: skip
        try:
            await self._app(scope, receive, send)
        except Exception:
            # A bug is answered with 500, and raised for the log of a server.
            if not status:
                raise
        return status, json.loads(answer)
