"""What goes between the server and an engine's process: lists of JSON objects, each list behind its length."""

from __future__ import annotations

import asyncio
import json
import struct
from json.encoder import encode_basestring
from typing import Any, TypeAlias

from luthier.core.errors import DataError

Message: TypeAlias = dict[str, Any]
"""From the server: `id`, `do` (what is asked for) and its arguments; or `leave`, the id of what nobody waits for any more.

From the engine: `id`, and one of `piece` (a part of an answer), `end` (the last part, or the whole), `error` (`kind`, the
name of its class, and `message`); a piece that is a text and no more is `[id, which, text]`. Before all of them, without an
id, `facts` of the model, or the `error` of loading it; while it loads, `said`: an event as runs keep them.
"""

LENGTH = struct.Struct("!I")
ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
# Bytes that wait for a reader before those who write wait for it too.
HIGH = 2**16


class Outbox:
    """Sends messages: those of one turn of the loop as one list, which is one call of the system and one reading for all."""

    def __init__(self, stream: asyncio.StreamWriter):
        self._stream, self._held = stream, list[bytes]()

    def put(self, message: Message) -> None:
        """Put a message on its way. Raises DataError for a text that is none."""
        self._hold(encode(message))

    def put_text(self, id: int, which: int, text: str) -> bool:
        """Put a text on its way; False, and nothing is done, where the other side does not keep up."""
        if self._behind:
            return False
        self._hold(_bytes_of(f"[{id},{which},{encode_basestring(text)}]"))
        return True

    async def send(self, message: Message) -> None:
        """Put a message on its way, and wait where the other side does not keep up."""
        self.put(message)
        if self._behind:
            await self._stream.drain()

    @property
    def _behind(self) -> bool:
        return self._stream.transport.get_write_buffer_size() > HIGH

    def _hold(self, content: bytes) -> None:
        if not self._held:
            asyncio.get_running_loop().call_soon(self._flush)
        self._held.append(content)

    def _flush(self) -> None:
        self._stream.write(_framed(b",".join(self._held)))
        self._held.clear()


def write(stream: asyncio.StreamWriter, message: Message) -> None:
    """Put a message on its way. Raises DataError for a text that is none."""
    stream.write(pack(message))


def pack(message: Message) -> bytes:
    """A message as bytes, on its own. Raises DataError for a text that is none."""
    return _framed(encode(message))


def encode(message: Message) -> bytes:
    """A message as JSON. Raises DataError for a text that is none."""
    return _bytes_of(ENCODE(message))


def _bytes_of(content: str) -> bytes:
    try:
        return content.encode()
    except UnicodeEncodeError as err:
        half = ascii(err.object[err.start])
        raise DataError(f"a text holds half of a character ({half}), which is no text; take it out") from None


def _framed(content: bytes) -> bytes:
    return LENGTH.pack(len(content) + 2) + b"[" + content + b"]"


async def read(stream: asyncio.StreamReader) -> list[Any] | None:
    """The next messages, one at least; None where the other side is gone."""
    try:
        (length,) = LENGTH.unpack(await stream.readexactly(LENGTH.size))
        content = await stream.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    found: list[Any] = json.loads(content)
    return found
