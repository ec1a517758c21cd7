"""Which texts of an encoder-decoder go through it in a step: sources whole, answers a token each."""

from __future__ import annotations

from collections.abc import Callable

from luthier.engine.blocks import Blocks
from luthier.engine.line import Line
from luthier.engine.request import Request


class Seats(Line[Request]):
    """Texts whose prompts are sources, which an encoder reads at once or not at all.

    A step takes the next token of every running text first, then as many sources as `tokens` leave room for, and one in any
    case. A text is taken up where there is room for its source and the longest answer it may get, so none is ever read anew;
    nothing is shared. At most `streams` run at once. `drop` is told the first block of a text that is let go.
    """

    def __init__(self, blocks: Blocks, streams: int, tokens: int, drop: Callable[[int], None]):
        super().__init__()
        self.blocks, self.streams, self.tokens, self._drop = blocks, streams, tokens, drop
        self.preempted = 0

    def plan(self, guess: Callable[[Request], object] | None = None) -> list[tuple[Request, int]]:
        """The texts of the next step and how many tokens of each; nothing is guessed."""
        planned: list[tuple[Request, int]] = []
        budget, sources = self.tokens, 0
        for request in self.running:
            self.charge(request)
        for request in sorted(self.running, key=lambda one: (one.read == 0, self.order(one))):
            count = request.length - request.read
            if count <= budget or not (planned if request.read else sources):
                planned.append((request, count))
                budget -= count
                sources += request.read == 0
        if len(self.running) >= self.streams or self.closed:
            return planned
        for request in self.in_turn():
            if len(self.running) >= self.streams or (request.length > budget and sources):
                break
            needed = -(-(len(request.prompt) + request.room) // self.blocks.size)
            if needed > self.blocks.free:
                break
            self.take_up(request)
            self.charge(request)
            request.table += [self.blocks.take() for _ in range(needed)]
            planned.append((request, request.length))
            budget -= request.length
            sources += 1
        return planned

    def advance(self, request: Request, count: int) -> None:
        """So many more of its tokens are read."""
        request.read += count

    def finish(self, request: Request) -> None:
        """Let go of a text, whether it waits or runs."""
        super().finish(request)
        if request.table:
            self._drop(request.table[0])
            for block in request.table:
                self.blocks.drop(block)
            request.table.clear()
