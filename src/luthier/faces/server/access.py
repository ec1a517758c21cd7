"""Who may ask what: before any address, and for those that do not exist too."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from luthier.faces.server.keys import ANYONE, Key, find_key
from luthier.faces.server.keys import Scope as KeyScope
from luthier.faces.server.refusals import Refusal, answer_of

# What everybody may see: that the process lives, and the page, in which there is nothing of anybody.
OPEN = ("/", "/health/live")
OPEN_FOLDER = "/page/"
# What the others need; anything that is not here needs `infer`.
NEEDED: tuple[tuple[str, KeyScope | None], ...] = (
    ("/health/", None),
    ("/docs", None),
    ("/openapi.json", None),
    ("/v1/models", None),
    ("/metrics", "metrics"),
    ("/admin", "admin"),
    ("/v1/files", "tune"),
    ("/v1/fine_tuning", "tune"),
    ("/v1/batches", "tune"),
)
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1", "[::1]")


class Access:
    """Lets nobody in without a key that may do what is asked for.

    A server without keys serves this machine alone, and asks that browsers be sent by its own pages: a page from elsewhere
    could otherwise ask in the name of whoever looks at it.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[Key] | None, origins: Sequence[str]):
        self._app, self._keys, self._origins = app, keys, set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # There are no websockets here.
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            scope.setdefault("state", {})["key"] = self._let_in(request)
        except Refusal as err:
            await answer_of(err, scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _let_in(self, request: Request) -> Key:
        path = request.url.path
        if self._keys is None:
            self._check_sender(request)
            return ANYONE
        if path in OPEN or path.startswith(OPEN_FOLDER) or _asks_for_leave(request):
            return Key(name="", sha256="", scopes=())
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        # The clients of some other APIs send it so.
        given = given if kind.lower() == "bearer" else request.headers.get("x-api-key", "")
        key = find_key(self._keys, given.strip()) if given else None
        if key is None:
            why = "this key is not known" if given else "a key is needed"
            raise Refusal(
                401, f"{why}; send it as: Authorization: Bearer KEY, or x-api-key: KEY", code="invalid_api_key"
            )
        need = _need(request.method, path)
        if need is not None and need not in key.scopes:
            raise Refusal(403, f"the key {key.name!r} may not do this: it has no scope {need!r}", code="scope")
        return key

    def _check_sender(self, request: Request) -> None:
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if name not in LOCAL_HOSTS:
            raise Refusal(
                403, f"this server is for this machine alone, and is not asked for as {host!r}; use 127.0.0.1"
            )
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host and origin not in self._origins:
            raise Refusal(403, f"pages from {origin} may not ask this server; allow them with --origins {origin}")


def _need(method: str, path: str) -> KeyScope | None:
    if method == "DELETE" and path.startswith("/v1/models/"):
        return "tune"
    return next(
        (scope for start, scope in NEEDED if path == start or path.startswith(start.rstrip("/") + "/")), "infer"
    )


def _asks_for_leave(request: Request) -> bool:
    """Whether a browser asks what it may send; it sends no key with that."""
    return request.method == "OPTIONS" and "access-control-request-method" in request.headers
