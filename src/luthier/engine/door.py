"""The door to an engine before which many wait: a thread of its own writes, or reads, and each who asked gets what comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeAlias, TypedDict, TypeVar, Unpack

from torch import Tensor

from luthier.core.errors import ConfigError, LuthierError
from luthier.core.events import Events
from luthier.core.types import Completion
from luthier.engine.adapters import Loaded
from luthier.engine.engine import Engine
from luthier.engine.generate import add_answer
from luthier.engine.pooler import Embedding, Pooler, Reading
from luthier.engine.sampling import Sampling
from luthier.engine.streaming import Answer, Outcome, Work, Writing
from luthier.models.adapters.additions import read_additions
from luthier.models.spec import LoadedModel

T = TypeVar("T")
# Texts that wait at most, and the tokens of their prompts, where nobody says.
WAITING, WAITING_TOKENS = 256, 2**18
# What the engine's thread is to do between two steps; or what keeps it from that, to be told.
Task: TypeAlias = Callable[[BaseException | None], None]
# What puts texts into the engine, on its thread.
Entry: TypeAlias = Callable[[], Work]


class Busy(LuthierError, RuntimeError):
    """As many texts wait as may: so many, with so many tokens to read."""

    def __init__(self, texts: int, tokens: int):
        super().__init__(f"{texts} texts with {tokens} tokens to read wait already; ask again later")
        self.texts, self.tokens = texts, tokens


class Closed(LuthierError, RuntimeError):
    """Nothing more is written behind this door."""


class Settings(TypedDict, total=False):
    """Of a text, beside its sampling, as in `Engine.add`."""

    priority: int
    salt: str
    tenant: str
    adapter: str
    expected: Sequence[int]


class Door:
    """Writes what is asked for on any event loop, all of it together, on one thread, which sleeps while there is nothing to
    write. A thread without a loop has one in `asyncio.run(door.complete(...))`. Behind it is an `Engine`, which writes and makes
    vectors, or a `Pooler`, which makes vectors and scores.

    At most `waiting` texts wait to be taken up, with `waiting_tokens` tokens of prompts. From here on nobody else may touch the
    engine, or the model while something is written, but by `ask`. `close` it in the end.
    """

    def __init__(self, engine: Engine | Pooler, *, waiting: int = WAITING, waiting_tokens: int = WAITING_TOKENS):
        self._engine, self._most = engine, (waiting, waiting_tokens)
        # A queue into which the collector may put something while this very thread does.
        self._tasks: SimpleQueue[Task] = SimpleQueue()
        self._open: dict[Work, Writing] = {}
        self._ending = False
        self._lock = Lock()
        self._closed: Closed | None = None
        # Texts and tokens: handed over, entered of those since the last count, waiting in the engine at the last count.
        self._coming, self._entered, self._standing = (0, 0), (0, 0), (0, 0)
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stream(self, prompt: Iterable[int], sampling: Sampling, **settings: Unpack[Settings]) -> Answer:
        """The answers to a prompt (tokens, as `model.renderer.prompt` makes them), piece by piece: `async for` over it.

        Raises Busy at once where too many wait, Closed where nothing more is written, and ConfigError for what could never
        wait, or where the model writes no text. Whatever else is wrong is raised in place of the next piece.
        """
        return self.begin(prompt, sampling, piecewise=True, **settings)

    async def complete(self, prompt: Iterable[int], sampling: Sampling, **settings: Unpack[Settings]) -> Completion:
        """The first answer to a prompt, which holds the others that were asked for. Raises as `stream` does."""
        return await self.begin(prompt, sampling, piecewise=False, **settings).whole()

    def begin(
        self, prompt: Iterable[int], sampling: Sampling, *, piecewise: bool, **settings: Unpack[Settings]
    ) -> Answer:
        """The answers to a prompt, for who takes them piece by piece, or else as a whole (`Answer.whole`), which wakes its reader
        at the end alone. Raises as `stream` does."""
        engine, ids = self._engine, tuple(prompt)
        if not isinstance(engine, Engine):
            raise ConfigError(f"{engine.model.spec.source}: this model writes no text; ask for its scores or vectors")
        entries = [partial(add_answer, engine, ids, sampling, 0, which, **settings) for which in range(sampling.n)]
        return Answer(engine.model, self._let_in(entries, len(ids), piecewise), sampling, self._left)

    async def pool(
        self,
        ids: Iterable[int],
        embedding: Embedding | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        adapter: str = "",
    ) -> Tensor:
        """What comes of a text that is read once (tokens, as `pooled.encode_item` or `renderer.framed` makes them): raw scores
        [C] of a head, which `pooled.prediction_of` puts into words, or the vector [E] that `embedding` says. Raises as `complete`
        and `Pooler.pool` do.
        """
        engine, prompt = self._engine, tuple(ids)
        if isinstance(engine, Engine) and embedding is None:
            raise ConfigError("embedding: this model writes and has no scores to give; say which vector is asked for")

        def enter() -> Reading:
            if isinstance(engine, Pooler):
                return engine.pool(prompt, embedding, priority=priority, tenant=tenant)
            return engine.pool(prompt, embedding or Embedding(), priority=priority, tenant=tenant, adapter=adapter)

        writing = self._let_in([enter], len(prompt), piecewise=False)
        return await Outcome(writing, self._left).whole()

    async def ask(self, question: Callable[[Any], T]) -> T:
        """What `question` finds between two steps, after all that was asked for, or left, before."""
        answer: Future[T] = Future()
        with self._lock:
            self._refuse_closed()
            self._tasks.put(partial(_tell, answer, partial(question, self._engine)))
        return await asyncio.wrap_future(answer)

    def tell(self, what: Callable[[Any], object]) -> None:
        """Let `what` be done between two steps; nobody waits for it."""

        def do(trouble: BaseException | None) -> None:
            if trouble is None:
                what(self._engine)

        self._tasks.put(do)

    async def load_adapter(self, name: str, source: str | Path | LoadedModel) -> Loaded:
        """`Engine.load_adapter` between two steps; it is read and checked before, while texts go on being written."""
        read = await asyncio.to_thread(read_additions, self._engine.model, source)
        return await self.ask(lambda engine: engine.load_adapter(name, read, Events()))

    async def unload_adapter(self, name: str, *, now: bool = False) -> Loaded:
        """`Engine.unload_adapter` between two steps."""
        return await self.ask(lambda engine: engine.unload_adapter(name, now=now))

    def close(self, *, drain: bool = True) -> None:
        """Let nothing more in, and wait until all is written; without `drain`, those who still read get Closed instead. This
        blocks: on a loop that goes on meanwhile, use `asyncio.to_thread`."""
        with self._lock:
            self._closed = self._closed or Closed("the engine is closed, and nothing more is written")
            self._tasks.put(partial(self._end, drain))
        self._thread.join()

    def __enter__(self) -> Door:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(drain=kind is None)

    def _left(self, writing: Writing) -> None:
        self._tasks.put(partial(self._abort, writing))

    def _let_in(self, entries: Sequence[Entry], length: int, piecewise: bool) -> Writing:
        more = len(entries), len(entries) * length
        if _beyond(more, self._most):
            raise ConfigError(
                f"{more[0]} texts with {more[1]} tokens to read are asked for at once, and at most {self._most[0]} with "
                f"{self._most[1]} may wait; set n lower, or shorten the prompt"
            )
        writing = Writing(len(entries), piecewise)
        with self._lock:
            self._refuse_closed()
            waiting = _sum(self._coming, self._standing)
            if _beyond(_sum(waiting, more), self._most):
                raise Busy(*waiting)
            self._coming = _sum(self._coming, more)
            self._tasks.put(partial(self._enter, writing, entries, more))
        return writing

    def _refuse_closed(self) -> None:
        if self._closed is not None:
            raise Closed(str(self._closed)) from self._closed.__cause__

    # What follows runs on the engine's thread alone.

    def _run(self) -> None:
        try:
            while self._engine.busy or not self._ending:
                self._take_tasks()
                found = self._engine.step() if self._engine.busy else []
                # Whoever is woken by what was found may ask for more at once.
                self._count()
                self._hand_out(found)
        except BaseException as err:
            self._break(err)

    def _take_tasks(self) -> None:
        """All that was handed over; where there is nothing to write, sleep until something is."""
        sleep = not self._engine.busy
        while True:
            try:
                task = self._tasks.get(block=sleep)
            except Empty:
                return
            task(None)
            sleep = False

    def _enter(
        self, writing: Writing, entries: Sequence[Entry], more: tuple[int, int], trouble: BaseException | None
    ) -> None:
        self._entered = _sum(self._entered, more)
        found: list[Work] = []
        try:
            if trouble is not None:
                raise trouble
            for enter in [] if writing.left else entries:
                found.append(enter())
        except BaseException as err:
            writing.error = err
        writing.requests = found
        self._open.update(dict.fromkeys(found, writing))
        if writing.error is not None:
            self._end_with(writing, writing.error)

    def _abort(self, writing: Writing, _: BaseException | None = None) -> None:
        for request in writing.requests:
            self._engine.abort(request)  # type: ignore[arg-type]
            self._open.pop(request, None)

    def _hand_out(self, found: Iterable[Work]) -> None:
        """Wake those who wait for what a step brought; each loop once."""
        news: dict[asyncio.AbstractEventLoop, dict[Writing, None]] = {}
        for request in found:
            writing = self._open.get(request)
            if writing is None:
                continue
            if request.finish is not None:
                writing.ended.add(request)
                del self._open[request]
            if writing.piecewise or request.finish is not None:
                news.setdefault(writing.loop, {})[writing] = None
        for loop, writings in news.items():
            self._wake(loop, list(writings))

    def _wake(self, loop: asyncio.AbstractEventLoop, writings: list[Writing]) -> None:
        try:
            loop.call_soon_threadsafe(_ring, writings)
        except RuntimeError:
            # The loop is closed: nobody is left to read these.
            for one in writings:
                self._abort(one)

    def _end_with(self, writing: Writing, error: BaseException) -> None:
        writing.error = error
        self._abort(writing)
        self._wake(writing.loop, [writing])

    def _count(self) -> None:
        """How many wait, for those who ask to."""
        waiting = self._engine.waiting
        standing = len(waiting), sum(len(one.prompt) for one in waiting)
        with self._lock:
            self._standing = standing
            self._coming = self._coming[0] - self._entered[0], self._coming[1] - self._entered[1]
        self._entered = 0, 0

    def _end(self, drain: bool, _: BaseException | None) -> None:
        self._ending = True
        if not drain:
            for writing in dict.fromkeys(self._open.values()):
                self._end_with(writing, Closed("the engine was closed before this was written to its end"))

    def _break(self, error: BaseException) -> None:
        """Tell an error of the engine itself to all who wait, and to all who come."""
        closed = Closed(f"the engine stopped at an error of its own ({error!r}); nothing more is written")
        closed.__cause__ = error
        with self._lock:
            self._closed = closed
        told = list(dict.fromkeys(self._open.values()))
        for writing in told:
            writing.error = closed
            self._wake(writing.loop, [writing])
        while not self._tasks.empty():
            self._tasks.get()(closed)
        for writing in told:
            self._abort(writing)


def _tell(answer: Future[T], find: Callable[[], T], trouble: BaseException | None) -> None:
    if not answer.set_running_or_notify_cancel():
        return
    try:
        if trouble is not None:
            raise trouble
        answer.set_result(find())
    except BaseException as err:
        answer.set_exception(err)


def _ring(writings: list[Writing]) -> None:
    for one in writings:
        try:
            if one.pass_on is not None and one.pass_on():
                continue
        except Exception as err:
            # Its reader is told, and the others get theirs.
            one.error = err
        one.news.set()


def _sum(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]


def _beyond(one: tuple[int, int], most: tuple[int, int]) -> bool:
    return one[0] > most[0] or one[1] > most[1]
