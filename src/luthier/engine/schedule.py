"""Which texts go through the model in a step, and with how many tokens."""

from __future__ import annotations

from collections.abc import Callable

from luthier.engine.blocks import Blocks, Name, names_of
from luthier.engine.line import Line
from luthier.engine.request import Request


class Schedule(Line[Request]):
    """Texts that wait and texts that run, over a number of blocks.

    A step takes the next token of every running text first, then as much of the prompts as `tokens` at once leave room for:
    long prompts are read in pieces, between which the others go on. A text waits while another reads the beginning that
    both have. Where blocks run out the last in order (`Line`) gives its up, and is read anew later. At most `streams` run at
    once.
    """

    def __init__(self, blocks: Blocks, streams: int, tokens: int):
        super().__init__()
        self.blocks, self.streams, self.tokens = blocks, streams, tokens
        self.preempted = 0

    def plan(self, guess: Callable[[Request], object] | None = None) -> list[tuple[Request, int]]:
        """The texts of the next step and how many tokens of each; they hold blocks for them. `guess` may give drafts to a text
        whose prompt is read to its end."""
        planned: dict[Request, int] = {}
        budget = self.tokens
        for request in self.running:
            self.charge(request)
        for request in self._in_order():
            if request not in self.running:  # it gave its blocks up for an earlier one
                continue
            left = request.length - request.read
            count = min(left, budget)
            if count and self._hold(request, count, planned):
                if guess is not None and 1 < left == count:
                    guess(request)
                count += self._hold_drafts(request, budget - count)
                planned[request] = count
                budget -= count
        if not budget or len(self.running) >= self.streams or self.closed:
            # Thousands may wait, and putting them in order takes its time.
            return list(planned.items())
        coming = {name for one in self.running for name in one.names[one.read // self.blocks.size :]}
        for request in self.in_turn():
            if not budget or len(self.running) >= self.streams:
                break
            if self._awaits(request, coming):
                continue
            self._recall(request)
            left = request.length - request.read
            count = min(left, budget)
            # Only what is free: a text that runs is not stopped for one that waits.
            if self._missing(request, left) > self.blocks.free:
                self.release(request)
                break
            self.take_up(request)
            request.charged = max(request.charged, request.read)
            self.charge(request)
            coming.update(request.names[request.read // self.blocks.size :])
            self._hold(request, count, planned)
            if guess is not None and left == count:
                guess(request)
                count += self._hold_drafts(request, budget - count)
            planned[request] = count
            budget -= count
        return list(planned.items())

    def _in_order(self) -> list[Request]:
        """The texts that run, those first that go on by one token; as they are where all of them do, and have room."""
        some = self.running
        if len(some) <= min(self.tokens, self.blocks.free) and all(one.length - one.read == 1 for one in some):
            return list(some)
        return sorted(some, key=lambda one: (one.length - one.read > 1, self.order(one)))

    def advance(self, request: Request, count: int) -> None:
        """So many more of its tokens are read; blocks that are full get their names."""
        before, request.read = request.read, request.read + count
        if request.read // self.blocks.size == before // self.blocks.size:
            return
        for at, name in enumerate(names_of(request.ids(0, request.read), request.salt, self.blocks.size)):
            if at >= before // self.blocks.size:
                self.blocks.name(request.table[at], name, request.adapter)

    def finish(self, request: Request) -> None:
        """Let go of a text, whether it waits or runs."""
        super().finish(request)
        self.release(request)

    def release(self, request: Request) -> None:
        """Give back its blocks, the last first, so that beginnings are remembered longest."""
        for block in reversed(request.table):
            self.blocks.drop(block)
        request.table.clear()
        request.drafts.clear()
        request.read = 0

    def _awaits(self, request: Request, coming: set[Name]) -> bool:
        """Whether another text is about to read what this one would read next."""
        if request.own < len(request.prompt) - 1:
            return False
        names = request.names[: (len(request.prompt) - 1) // self.blocks.size]
        return next((name for name in names if not self.blocks.knows(name)), None) in coming

    def _recall(self, request: Request) -> None:
        """Take over what another text has read of the same beginning; what it must read for itself is left."""
        for name in names_of(request.ids(0, request.own), request.salt, self.blocks.size):
            block = self.blocks.find(name)
            if block is None:
                break
            request.table.append(block)
        request.read = len(request.table) * self.blocks.size
        request.reused = min(request.read, len(request.prompt))

    def _hold_drafts(self, request: Request, budget: int) -> int:
        """How many of its drafts it has room for, without taking any from others."""
        if request.drafts:
            room = (len(request.table) + self.blocks.free) * self.blocks.size - request.length
            del request.drafts[max(0, min(budget, room)) :]
            missing = -(-(request.length + len(request.drafts)) // self.blocks.size) - len(request.table)
            request.table += [self.blocks.take() for _ in range(missing)]
        return len(request.drafts)

    def _missing(self, request: Request, count: int) -> int:
        return -(-(request.read + count) // self.blocks.size) - len(request.table)

    def _hold(self, request: Request, count: int, planned: dict[Request, int]) -> bool:
        """Blocks for its next tokens; False where it had to give up its own."""
        missing = self._missing(request, count)
        while missing > self.blocks.free:
            last = max(self.running, key=self.order)
            planned.pop(last, None)
            self.release(last)
            self.running.remove(last)
            self.waiting.append(last)
            self.preempted += 1
            if last is request:
                return False
        request.table += [self.blocks.take() for _ in range(missing)]
        return True
