"""/: the page on which people chat with what is served, and its files."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from typing import NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

routes = APIRouter(include_in_schema=False)

KINDS = {
    ".html": "text/html;charset=utf-8",
    ".css": "text/css;charset=utf-8",
    ".js": "text/javascript;charset=utf-8",
    ".svg": "image/svg+xml",
}
# The page runs its own scripts alone and talks to its own server alone, whatever a model writes into it.
POLICY = {
    "default-src": ("'none'",),
    "script-src": ("'self'",),
    "style-src": ("'self'",),
    "connect-src": ("'self'",),
    "img-src": ("'self'", "data:"),
    "frame-ancestors": ("'none'",),
    "base-uri": ("'none'",),
    "form-action": ("'none'",),
}
HEADERS = {
    "Content-Security-Policy": "; ".join(" ".join((name, *places)) for name, places in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Kept, and asked for again each time: after an update of the package nothing old is shown.
    "Cache-Control": "no-cache",
}


class PageFile(NamedTuple):
    """A file of the page."""

    kind: str
    content: bytes
    tag: str


@cache
def page_files() -> dict[str, PageFile]:
    """Every file of the page under its name. What is asked for is looked up here, and never becomes a path."""
    found = {}
    for one in (resources.files("luthier.faces.server") / "page").iterdir():
        kind = KINDS.get(one.name[one.name.rfind(".") :])
        if kind is not None:
            content = one.read_bytes()
            found[one.name] = PageFile(kind, content, f'"{hashlib.sha256(content).hexdigest()[:20]}"')
    return found


@routes.api_route("/", methods=["GET", "HEAD"])
async def read_page(request: Request) -> Response:
    """The page."""
    return _answer(request, "index.html")


@routes.api_route("/page/{file}", methods=["GET", "HEAD"])
async def read_file(request: Request, file: str) -> Response:
    """A file of it."""
    return _answer(request, file)


def _answer(request: Request, name: str) -> Response:
    if name not in page_files():
        raise HTTPException(404)
    found = page_files()[name]
    headers = HEADERS | {"ETag": found.tag}
    if found.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.kind, headers=headers)
