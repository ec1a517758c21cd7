"""What the addresses of a server share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from fastapi import Depends, Request

from luthier.faces.server.indexes import Indexes
from luthier.faces.server.keys import Key
from luthier.faces.server.limits import Taken
from luthier.faces.server.settings import Serve
from luthier.faces.server.shelf import Shelf

if TYPE_CHECKING:
    from luthier.faces.server.metrics import Metrics


@dataclass
class Server:
    """The settings, the models, the indexes, and whether it goes on."""

    settings: Serve
    shelf: Shelf
    metrics: Metrics
    indexes: Indexes
    taken: dict[str, Taken] = field(default_factory=dict)
    """What each key took, by its name."""
    started: float = field(default_factory=time.time)
    draining: bool = False
    """Nothing new is taken up; what is being answered goes on for a while."""
    going: int = 0
    """Requests that are being answered."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    parts: dict[str, Any] = field(default_factory=dict)
    """What belongs to some addresses alone."""


def make_server(settings: Serve, tell: Callable[[dict[str, Any]], None]) -> Server:
    """One that serves nothing yet; `tell` gets what happens in its engines."""
    from luthier.faces.server.metrics import Metrics

    metrics = Metrics()
    server = Server(settings, Shelf(settings, tell), metrics, Indexes(settings, metrics, tell))
    server.idle.set()
    return server


def server_of(request: Request) -> Server:
    """Of a request."""
    found: Server = request.app.state.server
    return found


def key_of(request: Request) -> Key:
    """Whose request it is."""
    found: Key = request.state.key
    return found


# Plain functions would be run on threads.
async def _server(request: Request) -> Server:
    return server_of(request)


async def _key(request: Request) -> Key:
    return key_of(request)


TheServer: TypeAlias = Annotated[Server, Depends(_server)]
TheKey: TypeAlias = Annotated[Key, Depends(_key)]
