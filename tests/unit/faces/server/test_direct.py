"""Pieces that go straight to a connection stand where they would stand if they had gone through ASGI."""

import asyncio
import json
import socket
from contextlib import asynccontextmanager, nullcontext
from types import SimpleNamespace

import pytest
import uvicorn

from luthier.faces.server import serving, wire
from luthier.faces.server.app import make_app
from luthier.faces.server.direct import Direct
from luthier.faces.server.engines import EngineProcess, Inbox
from luthier.faces.server.server import make_server
from luthier.faces.server.settings import Serve
from luthier.faces.server.shelf import Served

BEGIN = {"type": "http.response.start", "status": 200, "headers": []}
ASK = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


def body(content, more=True):
    return {"type": "http.response.body", "body": content, "more_body": more}


@asynccontextmanager
async def answering(app, around=Direct):
    """The address at which uvicorn asks `app`."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(around(app), log_level="warning", lifespan="off", http="httptools")
        web = uvicorn.Server(config)
        web.capture_signals = nullcontext
        serving = asyncio.create_task(web.serve([listening]))
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


TEXTS = ["Once", ' "upon"', "\n\\a", " 琴匠", "\u2028😀", " </script>", "\x01", " time."]
TURNS = {"model": "it", "messages": [{"role": "user", "content": "a"}]}
ASKED = {
    "chat/completions": {**TURNS, "stream_options": {"include_usage": True}, "n": 2, "temperature": 1},
    "completions": {"model": "it", "prompt": "a", "n": 2, "temperature": 1},
    "messages": {**TURNS, "max_tokens": 9},
    "responses": {"model": "it", "input": "a", "user": "b"},
}


async def write_slowly(theirs, breaks):
    """An engine's side: texts, one after another, each while its reader waits."""
    reader, writer = await asyncio.open_connection(sock=theirs)
    ((message,),) = [await wire.read(reader)]
    id, count = message["id"], message["sampling"].get("n", 1)
    usage = {"prompt": 3, "written": 9, "reused": 1, "drafted": 0, "accepted": 0, "first_seconds": 0.1}
    for which in range(count):
        wire.write(writer, {"id": id, "piece": {"which": which, "text": "", "usage": usage}})
        wire.write(writer, {"id": id, "piece": {"which": which, "text": "It: "}})
    for text in TEXTS:
        for which in range(count):
            await asyncio.sleep(0.01)
            writer.write(wire._framed(json.dumps([id, which, text]).encode()))
    if breaks:
        wire.write(writer, {"id": id, "error": {"kind": "Bug", "message": "broken"}})
    for which in range(count):
        wire.write(writer, {"id": id, "piece": {"which": which, "text": "", "finish": "stop"}})
    wire.write(writer, {"id": id, "end": {"usage": usage}})
    await wire.read(reader)
    writer.close()


def stream(path, around, breaks):
    """What is streamed, and the texts that went straight to the connection."""
    passed = []

    async def all():
        server = make_server(Serve(), lambda event: None)
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        process = EngineProcess({"source": "it"})
        process.state, process._writer = "ready", writer
        server.shelf.models["it"] = Served("it", "it", process)
        app = make_app(server, None)
        tasks = [asyncio.create_task(process._read(reader)), asyncio.create_task(write_slowly(theirs, breaks))]

        async def counted(scope, receive, send):
            write = scope["state"].get("write")

            def note(content):
                passed.append(write(content))
                return passed[-1]

            if write is not None:
                scope["state"]["write"] = note
            await app(scope, receive, send)

        content = json.dumps({**ASKED[path], "stream": True}).encode()
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n"
        async with answering(counted, around) as address:
            asking, sending = await asyncio.open_connection(*address)
            sending.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
            found = await asyncio.wait_for(asking.readuntil(b"\r\n0\r\n\r\n"), 20)
            sending.close()
        writer.close()
        await asyncio.gather(*tasks)
        return found.partition(b"\r\n\r\n")[2]

    return asyncio.run(all()), sum(passed)


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("path", ASKED)
def test_a_stream_is_the_same_bytes_whichever_way_it_goes(path, breaks, monkeypatch):
    for module in ("chat", "completions", "messages", "items", "responses"):
        monkeypatch.setattr(f"luthier.faces.server.{module}.new_id", lambda prefix: f"{prefix}-1")
    for module in ("chat", "completions", "responses"):
        monkeypatch.setattr(f"luthier.faces.server.{module}.time", SimpleNamespace(time=lambda: 1.0))
    straight, passed = stream(path, Direct, breaks)
    through, none = stream(path, lambda app: app, breaks)
    assert straight == through
    assert all(json.dumps(text, ensure_ascii=False).encode() in straight for text in TEXTS)
    assert passed == len(TEXTS) * ASKED[path].get("n", 1) and not none


def test_what_is_served_gives_each_request_a_way_to_its_connection(monkeypatch, tmp_path):
    scope = {"type": "http", "method": "GET", "path": "/health/live", "query_string": b"", "state": {}}

    class Web:
        def __init__(self, config, server, say):
            self.app = config.app

        async def serve(self, sockets):
            async def send(message):
                pass

            await self.app({**scope, "headers": [(b"host", b"localhost")]}, None, send)

    monkeypatch.setattr(serving, "_Web", Web)
    monkeypatch.setenv("LUTHIER_RUNS", str(tmp_path))
    assert serving.serve(Serve(port=0), lambda line: None) == 0
    assert "write" in scope["state"]
