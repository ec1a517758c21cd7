"""How many tokens go through the model at once: fewer after memory ran out, and more again once it has been enough for a
while."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from luthier.engine.request import Request

# Steps for which memory must be enough before more is tried; twice as many each time that it ran out again.
CALM = 128


class Tide:
    """Tokens of a step, at most as many as were asked for."""

    def __init__(self, tokens: int):
        self.tokens = self._most = tokens
        self.fallen = self.risen = 0
        """How often there came to be fewer, and more."""
        self._wait, self._calm = CALM, 0

    def fall(self, tokens: int) -> None:
        """Memory ran out; so many go from here on."""
        if self.risen:
            self._wait *= 2
        self.tokens, self._calm = tokens, 0
        self.fallen += 1

    def hold(self) -> int:
        """Memory was enough for a step. Where that was so for long, twice as many go from here on: after how many steps, else
        0."""
        if self.tokens >= self._most:
            return 0
        self._calm += 1
        if self._calm < self._wait:
            return 0
        self.tokens, calm = min(self._most, 2 * self.tokens), self._calm
        self._calm = 0
        self.risen += 1
        return calm


def halved(planned: Sequence[tuple[Request, int]], size: int) -> list[tuple[Request, int]]:
    """The first `size` tokens of a step; nothing is guessed in it."""
    found = []
    for request, count in planned:
        count, size = min(count - len(request.drafts), size), size - count + len(request.drafts)
        request.drafts.clear()
        if count > 0:
            found.append((request, count))
    return found


def first_whole(planned: Sequence[tuple[Request, int]], size: int) -> list[tuple[Request, int]]:
    """The first texts of a step with `size` tokens in all, and one in any case: no source can be cut."""
    sums = accumulate(count for _, count in planned)
    return [one for at, (one, held) in enumerate(zip(planned, sums)) if held <= size or not at]
