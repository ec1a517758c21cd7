"""The order in which texts are served: those that wait and those that run, by priority, tenant, and when they came."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from luthier.engine.tenants import Tenants


class Served(Protocol):
    """What a line must know of a text."""

    number: int
    priority: int
    tenant: str
    charged: int

    @property
    def length(self) -> int: ...


T = TypeVar("T", bound=Served)


class Line(Generic[T]):
    """What comes first has the higher priority, or the tenant that was served less, or came earlier. Lines with the same
    `tenants` are fair to them together."""

    def __init__(self, tenants: Tenants | None = None) -> None:
        self.waiting: list[T] = []
        self.running: list[T] = []
        self.closed = False
        """Whether none that waits is taken up, so that what others hold becomes free."""
        self.tenants = tenants or Tenants()

    def add(self, request: T) -> None:
        """A text more that waits."""
        self.tenants.enter(request.tenant)
        self.waiting.append(request)

    def finish(self, request: T) -> None:
        """Let go of a text, whether it waits or runs."""
        if request in self.running:
            self.charge(request)
        for held in (self.waiting, self.running):
            if request in held:
                held.remove(request)
                self.tenants.leave(request.tenant)

    def take_up(self, request: T) -> None:
        """One that waited runs."""
        self.waiting.remove(request)
        self.running.append(request)

    def order(self, request: T) -> tuple[int, int, int]:
        """Lower comes first."""
        return -request.priority, self.tenants.served(request.tenant), request.number

    def in_turn(self) -> Iterator[T]:
        """Those that wait, in order, which changes as some of them are taken up and charged for."""
        lines: dict[tuple[int, str], deque[T]] = {}
        for one in sorted(self.waiting, key=lambda one: one.number):
            lines.setdefault((one.priority, one.tenant), deque()).append(one)
        while lines:
            line = min(lines.values(), key=lambda line: self.order(line[0]))
            one = line.popleft()
            if not line:
                del lines[one.priority, one.tenant]
            yield one

    def charge(self, request: T) -> None:
        """Its tenant is served all that is to be read of it, and all that was written; once, even if it is read anew."""
        self.tenants.serve(request.tenant, max(0, request.length - request.charged))
        request.charged = max(request.charged, request.length)
