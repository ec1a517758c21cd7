"""/health/live: the process lives. /health/ready: every model writes a token."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from luthier.faces.server.refusals import RESPONSES
from luthier.faces.server.server import TheServer

routes = APIRouter(tags=["health"])


class Live(BaseModel):
    status: Literal["live"] = "live"


class Ready(BaseModel):
    """Whether requests are answered, and what keeps each model or index from it."""

    status: Literal["ready", "not ready", "draining"]
    troubles: dict[str, str] = {}


@routes.get("/health/live", response_model=Live)
async def live() -> Live:
    """Answers as long as the process lives."""
    return Live()


@routes.get("/health/ready", response_model=Ready, responses={503: {"model": Ready}, 401: RESPONSES[401]})
async def ready(server: TheServer) -> JSONResponse:
    """Lets every model write a token, before all that waits, and looks at every index."""
    if server.draining:
        return JSONResponse(Ready(status="draining").model_dump(), 503)
    troubles = await server.shelf.check() | await server.indexes.check()
    found = Ready(status="not ready" if troubles else "ready", troubles=troubles)
    return JSONResponse(found.model_dump(), 503 if troubles else 200)
