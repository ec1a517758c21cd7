"""Ten thousand requests of every kind at once, most of them rude, and a server that stands."""

import asyncio
import random
from collections import Counter
from pathlib import Path

import httpx
import pytest

from running import Running

pytestmark = pytest.mark.e2e
REQUESTS, AT_ONCE = 10_000, 64
TURNS = [{"role": "user", "content": "Once upon a time"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def engine_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


async def leave_early(client, draw):
    """Read a little of a stream, or nothing of an answer, and go."""
    body = {"model": "mini", "messages": TURNS, "max_tokens": 200, "ignore_eos": True, "stream": draw.random() < 0.5}
    try:
        async with asyncio.timeout(draw.uniform(0.001, 0.2)):
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                async for _ in answer.aiter_raw():
                    if draw.random() < 0.2:
                        return "left"
    except TimeoutError:
        return "left"
    return answer.status_code


async def read_slowly(client, draw):
    body = {"model": "mini", "messages": TURNS, "max_tokens": 40, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        read = b""
        async for piece in answer.aiter_raw(64):
            read += piece
            await asyncio.sleep(draw.choice([0, 0, 0.01]))
    assert read.endswith(b"[DONE]\n\n") or answer.status_code == 429
    return answer.status_code


async def be_rude(client, draw):
    content = draw.choice([b"", b"{", b"[" * 5000, b'{"model": "mini", "messages": "x"}', bytes(draw.randbytes(40))])
    path = draw.choice(["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/nothing"])
    answer = await client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404), (path, content, answer.text)
    return answer.status_code


async def ask_well(client, draw):
    drawn = {"temperature": draw.choice([0, 0.7, 2]), "max_tokens": draw.randint(1, 12)}
    kind = draw.randrange(5)
    if kind == 0:
        body = {"prompt": ["The", "A fox"], "logprobs": 2, "echo": True, "top_k": 5, **drawn, "temperature": 1}
        answer = await client.post("/v1/completions", json={"model": "mini", **body})
    elif kind == 1:
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        body = {"messages": TURNS, "response_format": form, **drawn}
        answer = await client.post("/v1/chat/completions", json={"model": "mini", **body})
    elif kind == 2:
        answer = await client.post("/v1/responses", json={"model": "mini", "input": "Hello", "max_output_tokens": 5})
    elif kind == 3:
        answer = await client.post("/tokenize", json={"model": "mini", "messages": TURNS})
    else:
        many = {"n": draw.randint(1, 3)} if drawn["temperature"] else {}
        answer = await client.post("/v1/chat/completions", json={"model": "mini", "messages": TURNS, **drawn, **many})
    assert answer.status_code in (200, 429), answer.text
    return answer.status_code


async def storm(url: str) -> Counter:
    draw, found = random.Random(0), Counter()
    kinds = [ask_well] * 6 + [leave_early] * 2 + [be_rude] * 3 + [read_slowly]
    left = iter([draw.choice(kinds) for _ in range(REQUESTS)])
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=AT_ONCE)) as client:

        async def one() -> None:
            for kind in left:
                found[kind.__name__, await kind(client, draw)] += 1

        await asyncio.gather(*(one() for _ in range(AT_ONCE)))
        for _ in range(200):
            text = (await client.get("/metrics")).text
            if 'luthier_held_blocks{model="mini"} 0.0' in text:
                return found
            await asyncio.sleep(0.1)
    raise AssertionError(text)


def test_ten_thousand_requests(tmp_path):
    served = Running("mini", runs=tmp_path)
    try:
        asyncio.run(storm(served.url))
        engine, before = engine_of(served.process.pid), resident(engine_of(served.process.pid))
        own = resident(served.process.pid)
        found = asyncio.run(storm(served.url))
        assert sum(found.values()) == REQUESTS
        assert found["ask_well", 200] > REQUESTS / 3
        # The same engine as before, and nothing of what was asked stays.
        assert engine_of(served.process.pid) == engine
        assert resident(engine) - before < 60e6 and resident(served.process.pid) - own < 60e6
        assert httpx.get(f"{served.url}/health/ready", timeout=60).status_code == 200
    finally:
        assert served.stop() == 0
