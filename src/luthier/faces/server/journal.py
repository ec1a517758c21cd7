"""The log of a server: a JSON line for each request, on standard output; prompts and answers only where they are asked for."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier.faces.server.metrics import Metrics


class Journal:
    """Writes down every request: when, who, what, how it ended, how long it took, and what its address noted in
    `request.state.facts`."""

    def __init__(self, app: ASGIApp, write: Callable[[str], None], metrics: Metrics):
        self._app, self._write, self._metrics = app, write, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, id = time.monotonic(), 499, f"req-{secrets.token_hex(8)}"
        state = scope.setdefault("state", {})
        facts: dict[str, Any] = state.setdefault("facts", {})

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            seconds = time.monotonic() - began
            # The pattern of the address, not what somebody put into it.
            route = scope.get("route")
            address = getattr(route, "path", "other")
            self._metrics.answered(address, status, seconds)
            if address not in ("/health/live", "/metrics"):
                key = state.get("key")
                line = {
                    "time": round(time.time(), 3), "id": id, "key": getattr(key, "name", None),
                    "method": scope["method"], "path": scope["path"], "status": status, "seconds": round(seconds, 4), **facts,
                }  # fmt: skip
                self._write(json.dumps(line, ensure_ascii=False))
