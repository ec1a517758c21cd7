"""What a reader sees of the answers to a prompt while the engine's thread writes them; and of a text that it reads."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from luthier.core.types import Completion, TokenLog
from luthier.engine.generate import by_prompt, completed
from luthier.engine.logs import logs_of
from luthier.engine.pieces import Growing
from luthier.engine.pooler import Reading
from luthier.engine.request import Request
from luthier.engine.sampling import Sampling
from luthier.models.spec import LoadedModel

Work: TypeAlias = Request | Reading


@dataclass(frozen=True, slots=True)
class Piece:
    """What came of one answer since its piece before; those of an answer make up its `Completion`, put together."""

    which: int
    """Of the answers to the prompt (`Sampling.n`)."""
    text: str
    """Whole characters, and nothing of a stop text."""
    ids: tuple[int, ...]
    """Tokens that came; the text of the last few may be held back for the next piece."""
    logprobs: tuple[TokenLog, ...] | None
    """One for each of `ids`, where they are asked for."""
    finish: Literal["stop", "length"] | None
    """Set in the last piece of an answer."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that answers took: `written` of all of them; of the prompt those that were `reused`, read for another text
    before; guesses at what was written (`drafted`), and those that were right (`accepted`)."""

    written: int
    reused: int
    drafted: int
    accepted: int
    first_seconds: float | None
    """From the asking to the first token of any."""


class Writing:
    """The answers to one prompt, between the engine's thread and a reader on the event loop on which this is made."""

    def __init__(self, count: int, piecewise: bool):
        self.loop, self.news = asyncio.get_running_loop(), asyncio.Event()
        self.count, self.piecewise, self.asked_at = count, piecewise, time.monotonic()
        """How many answers, and whether the reader wants each token, not the end alone."""
        # Of the engine's thread, which rings on the loop after it changed them:
        self.requests: Sequence[Work] = ()
        self.ended: set[Work] = set()
        self.error: BaseException | None = None
        # Of the reader:
        self.left = False
        self.pass_on: Callable[[], bool] | None = None
        """Takes what came while the reader waits, in its place; False where it has to see to that itself."""


class Awaited:
    """What a task on the loop waits for; it can be left, and then nothing more is done for it."""

    def __init__(self, writing: Writing, leave: Callable[[Writing], None]):
        self._writing, self._leave = writing, leave

    def leave(self) -> None:
        """Write, or read, no further."""
        if not self._over:
            self._writing.left = True
            self._writing.news.set()
            self._leave(self._writing)

    __del__ = leave

    @property
    def usage(self) -> Usage:
        """What the answers took so far."""
        asked: Sequence[Any] = self._writing.requests
        return Usage(
            sum(len(one.written) for one in asked),
            sum(one.reused for one in asked[:1]),
            sum(one.drafted for one in asked),
            sum(one.accepted for one in asked),
            min((one.first_at - self._writing.asked_at for one in asked if one.written), default=None),
        )

    @property
    def _over(self) -> bool:
        return self._writing.left or len(self._writing.ended) == self._writing.count

    def _check(self) -> None:
        error = self._writing.error or next((one.error for one in self._writing.ended if one.error is not None), None)
        if error is not None:
            self.leave()
            raise error

    async def _wait(self, pass_on: Callable[[], bool] | None = None) -> None:
        """Until there is news. They are told on this loop, so none get lost between the last look and this."""
        self._writing.news.clear()
        # No longer than this waits: what is kept there would keep the answer from being dropped.
        self._writing.pass_on = pass_on
        try:
            await self._writing.news.wait()
        except BaseException:
            self.leave()
            raise
        finally:
            self._writing.pass_on = None

    async def _end(self) -> None:
        """Until all is there. Raises what went wrong."""
        self._check()
        while not self._over:
            await self._wait()
            self._check()


class Outcome(Awaited):
    """What comes of a text that is read once."""

    async def whole(self) -> Tensor:
        """Scores [C] or a vector [E]. Raises what went wrong."""
        await self._end()
        (reading,) = self._writing.requests
        assert isinstance(reading, Reading) and reading.found is not None
        return reading.found


class Answer(Awaited):
    """The answers to a prompt while they are written: an iterator over their pieces, those of several as they come.

    Who reads slowly gets longer pieces, and keeps nobody waiting. The writing ends where a task that waits for it is cancelled,
    where this is left as a context, or dropped; an exception that is kept keeps what it went through, so use `with`.

    Waking a task for each token takes longer than making its text. `tap`, where it is set, is called on the loop with what came
    while the iterator waits, in place of waking it, and in order with what the iterator gives; what it returns False for, what
    went wrong, and all from the first end of an answer on, comes from the iterator.
    """

    def __init__(self, model: LoadedModel, writing: Writing, sampling: Sampling, leave: Callable[[Writing], None]):
        super().__init__(writing, leave)
        self._model, self._sampling = model, sampling
        self._parts = [_Part(model, which, sampling) for which in range(sampling.n)]
        self.tap: Callable[[Piece], bool] | None = None
        self._held = deque[Piece]()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Piece:
        """Raises what went wrong."""
        while True:
            self._check()
            if self._held:
                return self._held.popleft()
            for part, request in zip(self._parts, self._requests):
                piece = part.next(request, request in self._writing.ended)
                if piece is not None:
                    return piece
            if self._over:
                raise StopAsyncIteration
            await self._wait(None if self.tap is None else self._pass_on)

    def _pass_on(self) -> bool:
        writing = self._writing
        if self.tap is None or self._held or writing.error is not None or writing.ended or writing.left:
            return False
        for part, request in zip(self._parts, self._requests):
            piece = part.next(request, False)
            if piece is not None and (self._held or not self.tap(piece)):
                self._held.append(piece)
        return not self._held

    async def whole(self) -> Completion:
        """The first answer once all are written; it holds the others. Raises what went wrong."""
        await self._end()
        found = [completed(self._model, one, self._sampling) for one in self._requests]
        return by_prompt(found, self._sampling.n)[0]

    @property
    def _requests(self) -> list[Request]:
        return [one for one in self._writing.requests if isinstance(one, Request)]


class _Part:
    """How much of one answer was shown."""

    def __init__(self, model: LoadedModel, which: int, sampling: Sampling):
        self._model, self._which, self._sampling = model, which, sampling
        self._growing = Growing(model, sampling)
        self._seen = self._told = 0
        self._over = False

    def next(self, request: Request, ended: bool) -> Piece | None:
        """What can be shown now and could not before; None where nothing can."""
        if self._over:
            return None
        growing, text = self._growing, ""
        while self._seen < len(request.written) and not growing.ended:
            text += growing.take(request.written[self._seen])
            self._seen += 1
        if ended:
            text, self._over = text + growing.rest(), True
        elif not text:
            return None
        start, self._told = self._told, len(growing.ids)
        logs = None if self._sampling.logprobs is None else logs_of(self._model, request, self._told, start)
        finish: Literal["stop", "length"] = "stop" if request.finish == "stop" else "length"
        return Piece(self._which, text, tuple(growing.ids[start:]), logs, finish if ended else None)
