"""Pieces that go straight to a connection stand where they would stand if they had gone through ASGI."""

import asyncio
import socket
from contextlib import asynccontextmanager

import uvicorn

from luthier.faces.server.direct import Direct
from luthier.faces.server.engines import Inbox

BEGIN = {"type": "http.response.start", "status": 200, "headers": []}
ASK = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


def body(content, more=True):
    return {"type": "http.response.body", "body": content, "more_body": more}


@asynccontextmanager
async def answering(app):
    """The address at which uvicorn asks `app`."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(Direct(app), log_level="warning", lifespan="off", http="httptools")
        web = uvicorn.Server(config)
        web.capture_signals = asynccontextmanager(lambda: iter(()))
        serving = asyncio.create_task(web._serve([listening]))
        while not web.started:
            await asyncio.sleep(0.001)
        try:
            yield listening.getsockname()
        finally:
            web.should_exit = True
            await serving


def run(app, client):
    async def both():
        async with answering(app) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(ASK)
            try:
                return await client(reader, writer)
            finally:
                writer.close()

    return asyncio.run(both())


def test_a_piece_stands_between_those_that_were_sent():
    said = []

    async def app(scope, receive, send):
        write = scope["state"]["write"]
        said.append(write(b"too early"))
        await send(BEGIN)
        await send(body(b"one "))
        said.append(write(b"two "))
        await send(body(b"three", more=False))
        said.append(write(b"too late"))

    async def client(reader, writer):
        return await reader.readuntil(b"0\r\n\r\n")

    found = run(app, client)
    assert found.endswith(b"\r\n\r\n4\r\none \r\n4\r\ntwo \r\n5\r\nthree\r\n0\r\n\r\n")
    assert said == [False, True, False]


def test_a_body_of_known_length_is_left_alone():
    said = []

    async def app(scope, receive, send):
        await send({**BEGIN, "headers": [(b"content-length", b"3")]})
        said.append(scope["state"]["write"](b"not here"))
        await send(body(b"all", more=False))

    async def client(reader, writer):
        return await reader.readuntil(b"all")

    assert run(app, client).endswith(b"\r\n\r\nall") and said == [False]


def test_who_reads_slowly_stops_it_and_loses_nothing():
    sent = []

    async def app(scope, receive, send):
        write = scope["state"]["write"]
        await send(BEGIN)
        piece = b"x" * 65536
        while write(piece):
            sent.append(piece)
            assert len(sent) < 10_000
        await send(body(b"end", more=False))

    async def client(reader, writer):
        return await reader.readuntil(b"0\r\n\r\n")

    async def slowly(reader, writer):
        reader._transport.pause_reading()
        while not sent or writer.transport.is_reading():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        reader._transport.resume_reading()
        found = b""
        while not found.endswith(b"0\r\n\r\n"):
            found += await reader.read(2**20)
        return found

    found = run(app, slowly)
    assert found.count(b"x" * 65536) == len(sent) > 1 and found.endswith(b"3\r\nend\r\n0\r\n\r\n")


def test_nothing_is_written_to_who_left():
    said = asyncio.Queue()

    async def app(scope, receive, send):
        await send(BEGIN)
        await send(body(b"one"))
        while (await receive())["type"] != "http.disconnect":
            pass
        await said.put(scope["state"]["write"](b"two"))

    async def client(reader, writer):
        await reader.readuntil(b"one")
        writer.close()
        return await asyncio.wait_for(said.get(), 10)

    assert run(app, client) is False


def test_texts_go_to_the_tap_only_while_the_reader_waits():
    async def both():
        tapped, read, open = [], [], [True]

        def tap(which, text):
            if open[0]:
                tapped.append(text)
            return open[0]

        inbox = Inbox(tap)
        inbox.put_text(0, "a")  # nobody waits
        reading = asyncio.create_task(read_all(inbox, read))
        await asyncio.sleep(0)
        inbox.put_text(0, "b")
        open[0] = False
        inbox.put_text(0, "c")  # the tap will not, and the reader is woken
        open[0] = True
        inbox.put_text(0, "d")  # and comes after what is kept
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        inbox.put_text(0, "e")
        inbox.put({"end": {}})
        inbox.put_text(0, "f")
        inbox.put(None)
        await reading
        return tapped, read

    tapped, read = asyncio.run(both())
    assert tapped == ["b", "e"]
    assert [one.get("piece", {}).get("text") for one in read] == ["a", "c", "d", None, "f"]


async def read_all(inbox, read):
    while (message := await inbox.get()) is not None:
        read.append(message)
