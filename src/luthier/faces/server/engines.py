"""An engine's process, seen from the server: started, asked, and started again where it breaks."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Literal, TypeAlias

from luthier.core.errors import LuthierError
from luthier.faces.server import wire

State: TypeAlias = Literal["asleep", "loading", "ready", "broken", "stopped"]
# Takes a text of one of several answers; False where it cannot.
Tap: TypeAlias = Callable[[int, str], bool]
# Seconds before a start that follows on a broken one: they double until an engine has run for as long.
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
# What those are told whose answer is not written to its end.
BROKEN = "the engine ended while this was written, and is started again; ask again"
STOPPED = "this was not written to its end: the server is ending, or serves the model no longer; ask again later"
# Seconds that a process has for ending by itself.
GRACE = 5.0


class Refused(LuthierError):
    """The engine says no; `kind` is the class of its error."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Gone(LuthierError, RuntimeError):
    """The engine's process ended, or is not there yet."""


class Inbox:
    """What came for one reader; an `asyncio.Queue` is for many, and takes twice the time.

    Texts (which answer, and what came of it) go to `tap` at once where the reader waits here for them, and so has nothing left
    to do that comes before; where it returns False they are kept for the reader.
    """

    def __init__(self, tap: Tap | None = None) -> None:
        self._tap = tap
        self._messages: deque[wire.Message | None] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, message: wire.Message | None) -> None:
        """Wake the reader."""
        self._messages.append(message)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def put_text(self, which: int, text: str) -> None:
        """Give a text to the tap, or wake the reader."""
        if self._tap is not None and self._waiter is not None and not self._waiter.done() and not self._messages:
            # What goes wrong with one answer, its reader will meet too; the others' are read on.
            with suppress(Exception):
                if self._tap(which, text):
                    return
        self.put({"piece": {"which": which, "text": text}})

    async def get(self) -> wire.Message | None:
        """The next; None at the end."""
        if not self._messages:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._messages.popleft()


class EngineProcess:
    """One model in a process of its own.

    A process that ends by itself is started again, and whoever waited for it gets Gone at once. `start` returns when the model
    is loaded, and raises Refused where it cannot be: then nothing is started again.

    With `woke` it may rest: its process ends, and the model is loaded again when it is asked, of which `woke` is told.
    """

    def __init__(
        self,
        order: dict[str, Any],
        tell: Callable[[dict[str, Any]], None] = lambda event: None,
        woke: Callable[[], None] | None = None,
    ):
        self.order, self._tell = order, tell
        self._woke, self._resting = woke, asyncio.Lock()
        self._waking: asyncio.Task[None] | None = None
        self.used = time.monotonic()
        """When it was last asked."""
        self.state: State = "stopped"
        self.facts: dict[str, Any] = {}
        self.restarts = 0
        self.broke = ""
        """Why it is not ready, in a sentence."""
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._ids = itertools.count()
        self._waiting: dict[int, Inbox] = {}
        self._watch: asyncio.Task[None] | None = None

    @property
    def source(self) -> str:
        return str(self.order["source"])

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    @property
    def going(self) -> int:
        """Questions that are not answered."""
        return len(self._waiting)

    async def start(self) -> None:
        """Load the model. Raises Refused, and Gone where the process does not live as long."""
        reader = await self._launch()
        self._watch = asyncio.create_task(self._keep(reader))

    async def stop(self) -> None:
        """End the process, and with it all that is written."""
        self.state, self.broke = "stopped", "the server is ending"
        if self._process is None:
            return
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        await self._end()

    @property
    def rests(self) -> bool:
        """Whether it may rest."""
        return self._woke is not None

    def sleep(self, facts: dict[str, Any]) -> None:
        """Begin at rest, with what was known of the model when it was loaded before."""
        self.state, self.facts = "asleep", facts

    async def rest(self) -> None:
        """Let the model go until it is asked; not while it writes."""
        async with self._resting:
            if self.state == "ready" and not self.going:
                await self.stop()
                self.state, self.broke = "asleep", ""

    async def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a question that has one. Raises Refused, Gone."""
        async for kind, part in self.stream(do, **arguments):
            if kind == "end":
                return part
        raise Gone("the engine gave no answer")

    async def stream(
        self, do: str, tap: Tap | None = None, **arguments: Any
    ) -> AsyncIterator[tuple[Literal["piece", "end"], dict[str, Any]]]:
        """The parts of an answer. Leaving the iterator, or being cancelled, ends the work. Raises Refused, Gone.

        A piece that is a text alone goes to `tap` while the iterator is waited for; what it returns False for comes from there.
        """
        self.used = time.monotonic()
        if self.rests and self.state != "ready":
            await self._wake()
        if self._writer is None or self.state != "ready":
            why, name = self.broke or "the model is being loaded; ask again later", arguments.get("model", self.source)
            # An adapter beside its base, or a model by another name.
            raise Gone(why if name == self.source else f"{name}: {why}")
        id, inbox = next(self._ids), Inbox(tap)
        self._waiting[id] = inbox
        over = False
        try:
            wire.write(self._writer, {"id": id, "do": do, **arguments})
            while True:
                message = await inbox.get()
                if message is None:
                    over = True
                    raise self._gone()
                if "error" in message:
                    over = True
                    kind, text = message["error"]["kind"], message["error"]["message"]
                    if "model" in arguments and text.startswith(f"{self.source}: "):
                        text = arguments["model"] + text[len(self.source) :]
                    raise Refused(kind, text)
                if "end" in message:
                    over = True
                    yield "end", message["end"]
                    return
                yield "piece", message["piece"]
        finally:
            del self._waiting[id]
            if not over and self._writer is not None and not self._writer.is_closing():
                wire.write(self._writer, {"leave": id})

    def _gone(self) -> Gone:
        """Why an answer is not written to its end."""
        return Gone(STOPPED if self.state == "stopped" else BROKEN)

    async def _wake(self) -> None:
        """Load the model, once for all that ask; whoever leaves meanwhile does not end it."""
        if self._waking is None or self._waking.done():
            self._waking = asyncio.create_task(self._load_again())
        await asyncio.shield(self._waking)

    async def _load_again(self) -> None:
        async with self._resting:
            if self.state != "asleep":
                return
            try:
                await self.start()
            except (LuthierError, OSError):
                self.state = "asleep"
                raise
        assert self._woke is not None
        self._woke()

    async def _launch(self) -> asyncio.StreamReader:
        self.state = "loading"
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "luthier.faces.server.worker", str(theirs.fileno())]
            # A group of its own: Ctrl-C is for the server, which ends its engines when nobody waits for them.
            self._process = await asyncio.create_subprocess_exec(
                *command, pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, start_new_session=True
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        wire.write(writer, self.order)
        while (messages := await wire.read(reader)) is not None:
            # While it loads, each comes on its own.
            (message,) = messages
            if "said" in message:
                self._tell(message["said"])
            elif "error" in message:
                self.state, self.broke = "broken", message["error"]["message"]
                writer.close()
                await self._end()
                raise Refused(**message["error"])
            else:
                self.facts, self._writer = message["facts"], writer
                self.state, self.broke = "ready", ""
                return reader
        writer.close()
        code = await self._process.wait()
        self.state, self.broke = "broken", f"the engine of {self.source} ended while it loaded ({_how(code)})"
        raise Gone(self.broke)

    async def _keep(self, reader: asyncio.StreamReader) -> None:
        """Read what comes, and start again what broke."""
        wait = FIRST_WAIT
        while True:
            began = time.monotonic()
            await self._read(reader)
            code = await self._end()
            self.state, self.broke = "broken", f"the engine of {self.source} ended ({_how(code)}) and is started again"
            self._tell({"event": "warning", "message": self.broke, "count": 1})
            wait = FIRST_WAIT if time.monotonic() - began > LONGEST_WAIT else wait
            while True:
                await asyncio.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
                try:
                    reader = await self._launch()
                except (LuthierError, OSError) as err:
                    self._tell({"event": "warning", "message": f"{self.source}: {err}", "count": 1})
                else:
                    self.restarts += 1
                    break

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while (messages := await wire.read(reader)) is not None:
            for message in messages:
                if isinstance(message, list):
                    id, which, text = message
                    if id in self._waiting:
                        self._waiting[id].put_text(which, text)
                    continue
                if "said" in message:
                    self._tell(message["said"])
                    continue
                # Of what nobody waits for any more, some may be on its way.
                inbox = self._waiting.get(message["id"])
                if inbox is not None:
                    inbox.put(message)

    async def _end(self) -> int:
        """Let the process end, tell those who wait for it, and return its code."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        for inbox in self._waiting.values():
            inbox.put(None)
        assert self._process is not None
        try:
            return await asyncio.wait_for(self._process.wait(), GRACE)
        except TimeoutError:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, 9)
            return await self._process.wait()


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
