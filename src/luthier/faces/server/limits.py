"""What a key may take: requests and tokens in a minute, and requests at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from luthier.faces.server.keys import Key
from luthier.faces.server.refusals import Refusal, answer_of
from luthier.faces.server.settings import Limits

MINUTE = 60.0
# Addresses that cost nothing.
FREE = ("/", "/health/", "/metrics", "/docs", "/openapi.json", "/page/", "/v1/models")


class Taken:
    """What one key took within the last minute, and takes now."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._requests: deque[float] = deque()
        self._tokens: deque[tuple[float, int]] = deque()
        self._sum = self._going = 0

    @contextmanager
    def request(self, limits: Limits) -> Iterator[None]:
        """While a request is answered. Raises Refusal where it is one too many, with the seconds until it is not."""
        self._forget()
        self._check(limits)
        self._requests.append(self._clock())
        self._going += 1
        try:
            yield
        finally:
            self._going -= 1

    def spend(self, tokens: int) -> None:
        """Tokens that a request took, known at its end alone."""
        self._tokens.append((self._clock(), tokens))
        self._sum += tokens

    def _check(self, limits: Limits) -> None:
        if limits.at_once is not None and self._going >= limits.at_once:
            raise _refuse(f"{self._going} requests of this key are being answered, the most that may be at once", 1.0)
        if limits.requests_a_minute is not None and len(self._requests) >= limits.requests_a_minute:
            wait = self._requests[-limits.requests_a_minute] + MINUTE - self._clock()
            raise _refuse(f"this key may ask {limits.requests_a_minute} times a minute", wait)
        if limits.tokens_a_minute is not None and self._sum >= limits.tokens_a_minute:
            raise _refuse(
                f"this key may take {limits.tokens_a_minute} tokens a minute", self._until(limits.tokens_a_minute)
            )

    def _until(self, most: int) -> float:
        """Seconds until less than `most` tokens were taken in the minute before."""
        left = self._sum
        for when, tokens in self._tokens:
            left -= tokens
            if left < most:
                return when + MINUTE - self._clock()
        return MINUTE

    def _forget(self) -> None:
        start = self._clock() - MINUTE
        while self._requests and self._requests[0] <= start:
            self._requests.popleft()
        while self._tokens and self._tokens[0][0] <= start:
            self._sum -= self._tokens.popleft()[1]


def _refuse(why: str, wait: float) -> Refusal:
    return Refusal(429, f"{why}; ask again in {max(1, round(wait))} s", code="rate_limit_exceeded", wait=wait)


class Counted:
    """Lets each key take what it may."""

    def __init__(self, app: ASGIApp, limits: Limits, taken: dict[str, Taken]):
        self._app, self._limits, self._taken = app, limits, taken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or any(path == free or (free != "/" and path.startswith(free)) for free in FREE):
            await self._app(scope, receive, send)
            return
        key: Key = scope["state"]["key"]
        try:
            with self._taken.setdefault(key.name, Taken()).request(key.limits or self._limits):
                await self._app(scope, receive, send)
        except Refusal as err:
            await answer_of(err, path)(scope, receive, send)
