"""Keys, limits, metrics, disconnects, crashes and the end: from outside, against real servers."""

import asyncio
import json
import os
import signal
import socket
import threading
import time

import httpx
import openai
import pytest

from luthier.core.errors import ConfigError
from luthier.faces.cli.main import main
from luthier.faces.server.app import make_app
from luthier.faces.server.keys import add_key, find_key, read_keys
from luthier.faces.server.limits import Taken
from luthier.faces.server.refusals import Refusal
from luthier.faces.server.server import make_server
from luthier.faces.server.settings import Limits, Serve
from running import Running

# Long enough to be met in the middle: drawn, or what repeats itself is guessed and soon done.
LONG = {"n": 8, "temperature": 1.5, "stream": True, "extra_body": {"ignore_eos": True}}
ASK = {
    "model": "mini",
    "messages": [{"role": "user", "content": "Once upon a time"}],
    "max_tokens": 400,
    "ignore_eos": True,
}


def state_of(url):
    """How many blocks texts hold."""
    text = httpx.get(f"{url}/metrics").text
    return float(
        next(line for line in text.splitlines() if line.startswith('luthier_held_blocks{model="mini"}')).split()[1]
    )


def until(check, seconds=20.0):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end
        threading.Event().wait(0.05)


def test_who_leaves_takes_nothing_along(served):
    for stream in (True, False):
        for _ in range(6):
            address = httpx.URL(served.url)
            with socket.create_connection((address.host, address.port)) as line:
                body = json.dumps({**ASK, "stream": stream}).encode()
                head = (
                    f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.host}\r\nContent-Type: application/json\r\n"
                )
                line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                if stream:
                    assert line.recv(15) == b"HTTP/1.1 200 OK"
    until(lambda: state_of(served.url) == 0)
    assert httpx.post(f"{served.url}/v1/chat/completions", json={**ASK, "max_tokens": 3}).status_code == 200


def test_metrics_count_what_was_written(served):
    def read(name):
        lines = httpx.get(f"{served.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = read('luthier_written_tokens_total{model="mini"}'), read("luthier_time_to_first_token_seconds_count")
    answer = httpx.post(f"{served.url}/v1/chat/completions", json={**ASK, "max_tokens": 7, "temperature": 0})
    assert answer.headers["x-request-id"].startswith("req-")
    assert read('luthier_written_tokens_total{model="mini"}') == before[0] + 7
    assert read("luthier_time_to_first_token_seconds_count") == before[1] + 1
    assert read('luthier_requests_total{path="/v1/chat/completions",status="200"}') > 0


def test_a_server_without_keys_is_for_this_machine_alone(served):
    models = f"{served.url}/v1/models"
    assert httpx.get(models, headers={"Host": "evil.example"}).status_code == 403
    assert httpx.get(models, headers={"Origin": "http://evil.example"}).status_code == 403
    assert httpx.get(models, headers={"Origin": served.url}).status_code == 200


def test_malformed_bodies_are_answered(served):
    chat = f"{served.url}/v1/chat/completions"
    for content in (
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"model": "mini"}',
        b'{"model": 3, "messages": []}',
        b"nul",
        b'"' * 9,
    ):
        answer = httpx.post(chat, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"], content
    assert httpx.get(f"{served.url}/nothing").json()["error"]["message"].startswith("there is nothing at this address")
    assert httpx.get(chat).status_code == 405
    large = httpx.post(chat, content=b" " * (33 * 2**20), headers={"Content-Type": "application/json"})
    assert large.status_code == 413 and "32 MB" in large.json()["error"]["message"]
    pieces = httpx.post(chat, content=(b" " * 2**20 for _ in range(33)), headers={"Content-Type": "application/json"})
    assert pieces.status_code == 413 and "32 MB" in pieces.json()["error"]["message"]
    lone = httpx.post(chat, content=json.dumps({**ASK, "max_tokens": 2}).replace("Once", "\\ud800").encode(),
                      headers={"Content-Type": "application/json"})  # fmt: skip
    assert lone.status_code == 400 and "half of a character" in lone.text


def test_a_body_that_does_not_come_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_RUNS", str(tmp_path))
    server = make_server(Serve(timeout=0.2), print)
    app, sent = make_app(server, None), []

    async def work():
        pieces = iter([{"type": "http.request", "body": b'{"model"', "more_body": True}])

        async def receive():
            return next(pieces, None) or await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"), (b"content-length", b"50")]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": "/v1/chat/completions", "raw_path": b"", "root_path": "", "query_string": b"", "headers": headers,
            "client": None, "server": None,
        }  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 10)

    asyncio.run(work())
    assert sent[0]["status"] == 408 and b"nothing more of the body came within 0.2 s" in sent[1]["body"]
    assert (b"connection", b"close") in sent[0]["headers"] and server.going == 0


def test_readiness_is_a_token(served):
    assert httpx.get(f"{served.url}/health/live").json() == {"status": "live"}
    ready = httpx.get(f"{served.url}/health/ready", timeout=60)
    assert ready.status_code == 200 and ready.json() == {"status": "ready", "troubles": {}}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """A server with keys, its address, the keys, and its file of them."""
    folder = tmp_path_factory.mktemp("keyed")
    path = folder / "keys.json"
    keys = {name: add_key(path, name, scopes) for name, scopes in (("app", ["infer"]), ("boss", ["admin", "metrics"]))}
    content = json.loads(path.read_text())
    content["keys"][0]["limits"] = {"requests_a_minute": 40, "at_once": 2}
    path.write_text(json.dumps(content))
    running = Running("mini", "--keys", str(path), "--drain", "20", runs=folder)
    yield running, keys
    running.process.kill()
    running.process.communicate()


@pytest.fixture
def asking():
    """Makes clients for the key "app", which are closed in the end."""
    made = []

    def make(running, keys):
        made.append(openai.OpenAI(base_url=f"{running.url}/v1", api_key=keys["app"], max_retries=0))
        return made[-1]

    yield make
    for one in made:
        one.close()


def with_key(key):
    return {"Authorization": f"Bearer {key}"}


def test_every_address_asks_for_a_key(keyed):
    running, keys = keyed
    schema = httpx.get(f"{running.url}/openapi.json", headers=with_key(keys["app"])).json()
    asked = 0
    for path, methods in schema["paths"].items():
        for method in methods:
            answer = httpx.request(method, running.url + path.replace("{name}", "mini"), json={})
            assert answer.status_code == (200 if path == "/health/live" else 401), (method, path)
            asked += 1
    assert asked > 10
    for path in ("/nothing", "/v1/", "/docs", "/openapi.json", "//v1/models", "/v1/../v1/models", "/metrics/"):
        assert httpx.get(running.url + path).status_code == 401, path
    assert httpx.get(f"{running.url}/v1/models", headers=with_key("lk-wrong")).status_code == 401


def test_keys_do_what_their_scopes_say(keyed):
    running, keys = keyed
    app, boss = with_key(keys["app"]), with_key(keys["boss"])
    assert httpx.get(f"{running.url}/v1/models", headers=app).status_code == 200
    assert httpx.get(f"{running.url}/metrics", headers=app).status_code == 403
    assert httpx.get(f"{running.url}/metrics", headers=boss).status_code == 200
    assert (
        httpx.post(f"{running.url}/admin/models", timeout=60, headers=app, json={"source": "mini"}).status_code == 403
    )
    assert httpx.post(f"{running.url}/v1/completions", headers=boss, json={}).status_code == 403
    wrong = httpx.post(f"{running.url}/admin/models", timeout=60, headers=boss, json={"source": "./nowhere"})
    assert wrong.status_code == 400 and "nowhere" in wrong.json()["error"]["message"]
    made = httpx.post(f"{running.url}/admin/models", timeout=60, headers=boss, json={"source": "mini", "name": "other"})
    assert made.status_code == 201 and made.json()["id"] == "other"
    again = httpx.post(
        f"{running.url}/admin/models", timeout=60, headers=boss, json={"source": "mini", "name": "other"}
    )
    assert again.status_code == 409
    assert httpx.delete(f"{running.url}/admin/models/other", headers=boss).json()["deleted"]
    assert httpx.delete(f"{running.url}/admin/models/other", headers=boss).status_code == 404


def test_a_key_takes_no_more_at_once_than_it_may(keyed, asking):
    running, keys = keyed
    client = asking(running, keys)
    ask = {name: value for name, value in ASK.items() if name != "ignore_eos"} | LONG
    streams = [client.chat.completions.create(**ask) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="2 requests of this key") as caught:
        client.chat.completions.create(**ask)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    for one in streams:
        one.close()


def test_an_engine_that_is_killed_comes_back(keyed, asking):
    running, keys = keyed
    client = asking(running, keys)
    until(
        lambda: httpx.get(f"{running.url}/health/ready", timeout=60, headers=with_key(keys["boss"])).status_code == 200
    )
    stream = client.chat.completions.create(model="mini", messages=ASK["messages"], max_tokens=400, **LONG)
    next(stream)
    os.kill(engine_of(running.process.pid), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="the engine ended while this was written"):
        list(stream)
    with pytest.raises(openai.InternalServerError, match=r"started again|being loaded"):
        client.chat.completions.create(model="mini", messages=ASK["messages"], max_tokens=3)
    until(
        lambda: httpx.get(f"{running.url}/health/ready", timeout=60, headers=with_key(keys["boss"])).status_code == 200,
        60,
    )
    assert client.chat.completions.create(model="mini", messages=ASK["messages"], max_tokens=3).choices


def engine_of(pid):
    """The process of the server's only engine."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return next(int(one) for one in file.read().split())


def test_a_signal_lets_answers_end(keyed, asking):
    running, keys = keyed
    client = asking(running, keys)
    stream = client.chat.completions.create(model="mini", messages=ASK["messages"], max_tokens=300, **LONG)
    next(stream)
    running.process.terminate()
    until(
        lambda: (
            httpx.get(f"{running.url}/health/ready", timeout=60, headers=with_key(keys["app"])).json()["status"]
            == "draining"
        )
    )
    with pytest.raises(openai.InternalServerError, match="the server is ending"):
        client.chat.completions.create(model="mini", messages=ASK["messages"], max_tokens=3)
    assert [one.choices[0].finish_reason for one in stream][-1] == "length"
    running.process.communicate(timeout=30)
    assert running.process.returncode == 0


def test_keys_are_kept_as_hashes(tmp_path):
    path = tmp_path / "keys.json"
    key = add_key(path, "me", ["infer"])
    assert key not in path.read_text() and path.stat().st_mode & 0o077 == 0
    found = read_keys(path)
    assert find_key(found, key).name == "me" and find_key(found, key + "x") is None
    with pytest.raises(ConfigError, match="already"):
        add_key(path, "me", ["infer"])
    with pytest.raises(ConfigError, match="scopes"):
        add_key(path, "you", ["all"])
    path.write_text("{")
    with pytest.raises(ConfigError, match="line 1"):
        read_keys(path)


def test_a_server_for_others_needs_keys(capsys):
    assert main(["serve", "mini", "--host", "0.0.0.0"]) == 2
    assert "needs keys" in capsys.readouterr().err


def test_limits_of_a_minute():
    now = 0.0
    taken = Taken(lambda: now)
    limits = Limits(requests_a_minute=2)
    for _ in range(2):
        with taken.request(limits):
            pass
        now += 10
    with pytest.raises(Refusal, match="2 times a minute") as caught, taken.request(limits):
        pass
    assert caught.value.wait == 40
    now = 61.0
    with taken.request(limits):
        pass


def test_tokens_of_a_minute():
    now = 0.0
    taken = Taken(lambda: now)
    limits = Limits(tokens_a_minute=100)
    with taken.request(limits):
        taken.spend(60)
    now = 14.0
    with taken.request(limits):
        taken.spend(60)
    now = 20.0
    # 120 were taken; from the second 60 on, the first 60 are over a minute ago.
    with pytest.raises(Refusal, match="100 tokens a minute") as caught, taken.request(limits):
        pass
    assert caught.value.wait == 40
    now = 60.0
    with taken.request(limits):
        taken.spend(50)
