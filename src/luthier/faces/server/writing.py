"""Asking an engine to write, or to read: counted, charged to the key, and noted."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import Request

from luthier.faces.server.engines import Tap
from luthier.faces.server.limits import Taken
from luthier.faces.server.server import key_of, server_of
from luthier.faces.server.shelf import Served


async def write(request: Request, served: Served, asked: dict[str, Any]) -> dict[str, Any]:
    """The whole answers to a prompt. Raises Refused, Gone."""
    began = time.monotonic()
    do = "search" if asked["sampling"].get("beams", 1) > 1 else "write"
    found = await served.ask(do, **asked)
    _note(request, served, asked, found["usage"], began, [one["text"] for one in found["answers"]])
    return found


async def read(request: Request, served: Served, do: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What comes of texts that are read once. Raises Refused, Gone."""
    began = time.monotonic()
    found = await served.ask(do, **asked)
    _note(request, served, {"text": asked.get("inputs", asked.get("pairs"))}, found["usage"], began, [])
    return found


async def write_pieces(
    request: Request, served: Served, asked: dict[str, Any], tap: Tap | None = None
) -> AsyncIterator[tuple[Literal["piece", "end"], dict[str, Any]]]:
    """The same, piece by piece, with `tap` as in `EngineProcess.stream`."""
    began, texts = time.monotonic(), dict[int, str]()
    keep = server_of(request).settings.log_prompts
    # Texts that are kept are all seen here.
    passed = None if keep else tap
    async for kind, part in served.stream("write", passed, **asked):
        if kind == "end":
            _note(request, served, asked, part["usage"], began, list(texts.values()))
        elif keep:
            texts[part["which"]] = texts.get(part["which"], "") + part["text"]
        yield kind, part


def _note(
    request: Request, served: Served, asked: dict[str, Any], usage: dict[str, Any], began: float, texts: list[str]
) -> None:
    server, key = server_of(request), key_of(request)
    server.metrics.wrote(served.name, usage, time.monotonic() - began)
    server.taken.setdefault(key.name, Taken()).spend(usage["prompt"] + usage["written"])
    facts: dict[str, Any] = request.state.facts
    facts["model"] = served.name
    for name in ("prompt", "reused", "written"):
        facts[name] = facts.get(name, 0) + usage[name]
    facts.setdefault("first_seconds", usage.get("first_seconds"))
    if server.settings.log_prompts:
        said = next(asked[name] for name in ("messages", "text", "ids") if name in asked)
        facts.setdefault("prompts", []).append(said)
        facts.setdefault("answers", []).extend(texts)
