"""A client before a real server: busy ones, broken connections, garbage; each failure one sentence, none hidden."""

import re
import threading
from concurrent.futures import CancelledError
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from luthier.core.errors import ConfigError, ServerError
from luthier.engine.backend import Backend
from luthier.engine.client import Client
from serving import as_events, chunked, completion, send, serving

PATH = "/v1/completions"
DONE = completion({"text": "a", "finish_reason": "stop", "token_ids": [5]})


def client(url, waits=None, **settings):
    return Client(Backend(url=url, **settings), (lambda _: None) if waits is None else waits.append)


def replies(*found):
    """Each in turn, the last one for ever: a status with its headers, or the bytes of the whole answer; and how many came."""
    came = []

    def answer(handler, path, body):
        one = found[min(len(came), len(found) - 1)]
        came.append(body)
        if isinstance(one, bytes):
            handler.wfile.write(one)
        elif isinstance(one, tuple):
            send(handler, {"error": {"message": "too many", "type": "x", "code": one[0]}}, one[0], **one[1])
        else:
            send(handler, one)

    return answer, came


def test_a_busy_server_is_asked_again_when_it_says():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=500), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=500), usegmt=True)
    headers = [{"Retry_After": "7"}, {"Retry_After": soon}, {"Retry_After": past}, {"Retry_After": "later"}, {}]
    answer, came = replies(*((429, one) for one in headers), (503, {}), DONE)
    waits = []
    with serving(answer) as url:
        one = client(url, waits, retries=6)
        assert one.ask(PATH, {"a": 1}) == DONE
    assert waits[0] == 7 and 480 < waits[1] <= 500 and waits[2] == 0 and waits[3:] == [8, 16, 32]
    assert one.again == {"HTTP 429": 5, "HTTP 503": 1} and len(came) == 7


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        ((429, {}), "no answer after 3 tries: HTTP 429, too many;"),
        ((429, {"Retry_After": "9999"}), "asks to wait 9,999 s"),
        (b"", "no answer after 3 tries: remote end closed connection without response;"),
    ],
    ids=str,
)
def test_it_is_asked_only_so_often(reply, part):
    answer, came = replies(reply)
    with serving(answer) as url, pytest.raises(ServerError, match=re.escape(part)):
        client(url, retries=2).ask(PATH, {})
    assert len(came) == (1 if "wait" in part else 3)


def test_nobody_there_is_told_at_once_or_after_some_tries():
    with serving(replies(DONE)[0]) as url:
        pass
    waits = []
    with pytest.raises(ServerError, match="no answer: connection refused; see that the server runs there"):
        client(url, waits).ask("/v1/models", patient=False)
    assert waits == []
    with pytest.raises(ServerError, match="after 4 tries"):
        client(url, waits, retries=3).ask(PATH, {})
    assert waits == [1, 2, 4]


def test_an_answer_that_breaks_off_is_asked_for_again():
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n{"
    answer, came = replies(whole, DONE)
    with serving(answer) as url:
        one = client(url)
        assert one.ask(PATH, {}) == DONE
    assert one.again == {"a connection that broke": 1} and len(came) == 2


@pytest.mark.parametrize(
    ("status", "content", "part"),
    [
        (
            400,
            {"object": "error", "message": "max_tokens\nis too large", "code": 400},
            "(HTTP 400: max_tokens is too large)",
        ),
        (
            400,
            {"error": {"message": "logprobs > 20", "type": "BadRequestError", "code": 400}},
            "(HTTP 400: logprobs > 20)",
        ),
        (422, {"detail": [{"loc": ["body"], "msg": "bad"}]}, "(HTTP 422: [{'loc': ['body'], 'msg': 'bad'}])"),
        (401, {"error": "Unauthorized"}, "asks for a key (HTTP 401)"),
        (404, {"detail": "Not Found"}, "knows no /v1/completions for this model (HTTP 404: Not Found)"),
        (500, {"error": {"message": "CUDA out of memory"}}, "the server failed (HTTP 500: CUDA out of memory)"),
        (500, b"<html>", "the server failed (HTTP 500: Internal Server Error)"),
        (302, b"", "has moved to another place"),
        (200, b"<html>hello", "the answer is no JSON (it begins '<html>hello')"),
        (200, {"error": {"message": "the engine died"}}, "the server failed (the engine died)"),
    ],
)
def test_what_a_server_refuses_is_one_sentence(status, content, part):
    came = []

    def answer(handler, path, body):
        came.append(path)
        send(handler, content, status)

    with serving(answer) as url, pytest.raises(ServerError) as said:
        client(url).ask(PATH, {})
    assert part in str(said.value) and "\n" not in str(said.value) and str(said.value).startswith(f"{url}: ")
    assert len(came) == 1


def test_a_stream_that_is_refused_or_fails_says_why():
    refusal = (400, {})
    failure = chunked(as_events([completion({"text": "a", "finish_reason": None}), {"error": {"message": "it died"}}]))
    answer, came = replies(refusal, failure)
    with serving(answer) as url:
        with pytest.raises(ServerError, match=r"refuses what is asked \(HTTP 400: too many\)"):
            list(client(url).stream(PATH, {}))
        events = client(url).stream(PATH, {})
        assert next(events)["choices"][0]["text"] == "a"
        with pytest.raises(ServerError, match=r"the server failed \(it died\)"):
            next(events)
    assert len(came) == 2


def test_what_is_no_http_is_said():
    with (
        serving(replies(b"220 mail.example ESMTP\r\n")[0]) as url,
        pytest.raises(ServerError, match="does not speak HTTP"),
    ):
        client(url).ask(PATH, {})


def test_silence_ends():
    let_go = threading.Event()
    with serving(lambda *_: let_go.wait()) as url:
        try:
            with pytest.raises(ServerError, match=r"nothing came for 0\.01 s; raise backend\.timeout"):
                client(url, timeout=0.01).ask(PATH, {})
        finally:
            let_go.set()


def test_the_key_is_sent_and_never_shown(monkeypatch):
    keys = []

    def answer(handler, path, body):
        keys.append(handler.headers["Authorization"])
        send(handler, {"error": "Unauthorized"}, 401)

    with serving(answer) as url:
        with pytest.raises(ConfigError, match="THE_KEY holds no key"):
            client(url, key="THE_KEY")
        monkeypatch.setenv("THE_KEY", "sk-secret")
        with pytest.raises(ServerError, match="does not take the key in THE_KEY") as said:
            client(url, key="THE_KEY").ask(PATH, {})
    assert keys == ["Bearer sk-secret"] and "secret" not in str(said.value)
    with pytest.raises(ConfigError) as said:
        Backend.make({"key": "sk-secret"})
    assert "secret" not in str(said.value)


def test_a_stream_is_read_wherever_it_is_cut_and_never_ends_early():
    events = [completion({"text": "房", "finish_reason": None}), completion({"text": "", "finish_reason": "stop"})]
    whole = chunked(as_events(events))
    cuts = iter(range(len(whole)))
    with serving(lambda handler, path, body: handler.wfile.write(whole[: next(cuts)])) as url:
        for at in range(len(whole)):
            found = []
            try:
                for event in client(url, retries=0).stream(PATH, {}):
                    found.append(event)
            except ServerError as err:
                assert ("broke off in the middle" in str(err)) == bool(found), at
                assert found == events[: len(found)] and b"data: [DONE]\n\n" not in whole[:at]
            else:
                # What HTTP adds after the end mark is of no matter.
                assert found == events and b"data: [DONE]\n\n" in whole[:at]


def test_a_stream_in_pieces_of_http_is_the_same():
    events = [completion({"text": "房é", "finish_reason": None}), completion()]
    content = as_events(events)
    cuts = iter(range(1, len(content)))

    def answer(handler, path, body):
        at = next(cuts)
        head, mid = chunked(content[:at]).removesuffix(b"0\r\n\r\n"), chunked(content[at:]).partition(b"\r\n\r\n")[2]
        handler.wfile.write(head + mid)

    with serving(answer) as url:
        for _ in range(1, len(content)):
            assert list(client(url).stream(PATH, {})) == events


def test_a_stream_that_fails_before_its_first_event_is_asked_for_again():
    events = [completion({"text": "a", "finish_reason": "stop"})]
    answer, came = replies((503, {}), b"", chunked(as_events(events)[:9]), chunked(as_events(events)))
    with serving(answer) as url:
        one = client(url)
        assert list(one.stream(PATH, {})) == events
    assert one.again == {"HTTP 503": 1, "a connection that broke": 2} and len(came) == 4


def test_so_many_requests_are_out_at_once_and_no_more():
    together, out, most = threading.Barrier(3), [0], []
    lock = threading.Lock()

    def answer(handler, path, body):
        with lock:
            out[0] += 1
            most.append(out[0])
        together.wait(60)  # broken unless three are here at once
        with lock:
            out[0] -= 1
        send(handler, body)

    with serving(answer) as url:
        one = client(url, concurrency=3)
        with one.threads() as pool:
            asked = [pool.submit(one.ask, PATH, {"at": at}) for at in range(12)]
            assert [each.result()["at"] for each in asked] == list(range(12))
    assert max(most) == 3 and not one.again


def test_leaving_hangs_up_on_what_is_out():
    here, let_go = threading.Event(), threading.Event()

    def answer(handler, path, body):
        here.set()
        let_go.wait()

    with serving(answer) as url:
        one = client(url, concurrency=1)
        with one.threads() as pool:
            asked = [pool.submit(one.ask, PATH, {}) for _ in range(2)]
            here.wait()
        with pytest.raises(ServerError, match="hung up"):
            asked[0].result()
        with pytest.raises((ServerError, CancelledError)):
            asked[1].result()
        let_go.set()


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://host:8000/v1/", "http://host:8000"),
        ("https://host/serve", "https://host/serve"),
        ("vllm", "http://localhost:8000"),
        ({"url": "http://[::1]:80"}, "http://[::1]:80"),
        ({"kind": "http://host:8000", "model": "a"}, "http://host:8000"),
    ],
)
def test_addresses(given, url):
    assert Backend.model_validate(given).url == url


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("ftp://host", "no address of a server"),
        ("http://host:99999", "no address"),
        ("http://", "no address"),
        ("http://host?a=b", "no address"),
        ("http://me:word@host", "kept in the record"),
        ("tgi", "kind"),
    ],
)
def test_what_is_no_address(given, part):
    with pytest.raises(ValueError, match=part):
        Backend.model_validate(given)
