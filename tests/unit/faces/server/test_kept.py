"""Responses are kept where that is asked for, and go on as if the whole conversation had been sent."""

import time

import httpx
import openai
import pytest

from luthier.faces.server.keys import add_key
from luthier.faces.server.store import Store
from running import Running

PLAIN = {"model": "mini", "temperature": 0, "max_output_tokens": 12}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def keys(place):
    return {
        name: add_key(place / "keys.json", name, scopes)
        for name, scopes in (("app", ["infer"]), ("boss", ["admin", "infer"]))
    }


@pytest.fixture(scope="module")
def running(place, keys):
    made = Running("mini", "--keys", str(place / "keys.json"), "--response-days", "2", runs=place / "runs")
    yield made
    assert made.stop() == 0


@pytest.fixture(scope="module")
def client(running, keys):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=keys["app"], max_retries=0) as made:
        yield made


@pytest.fixture
def store(running, place):
    made = Store(place / "runs" / "server")
    yield made
    made.close()


def test_a_kept_response_goes_on(client):
    first = client.responses.create(**PLAIN, input="Tell me about foxes.", store=True, instructions="Be brief.")
    assert first.store and first.previous_response_id is None
    second = client.responses.create(**PLAIN, input="And about birds?", previous_response_id=first.id, store=True)
    turns = [
        {"role": "user", "content": "Tell me about foxes."},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And about birds?"},
    ]
    sent = client.responses.create(**PLAIN, input=turns)
    assert second.output_text == sent.output_text and second.usage.input_tokens == sent.usage.input_tokens
    assert second.previous_response_id == first.id and not sent.store
    told = client.responses.create(**PLAIN, input="More.", previous_response_id=second.id, store=True, stream=True)
    third = list(told)[-1].response
    more = [*turns, {"role": "assistant", "content": second.output_text}, {"role": "user", "content": "More."}]
    assert third.output[0].content[0].text == client.responses.create(**PLAIN, input=more).output_text
    read = client.responses.retrieve(third.id)
    assert read.output == third.output and read.usage == third.usage and read.store
    items = list(client.responses.input_items.list(third.id, order="asc", limit=2))
    assert [one.content[0].text for one in items] == [one["content"] for one in more]
    assert [one.id for one in client.responses.input_items.list(third.id)] == [one.id for one in items[::-1]]


def test_calls_go_on_too(client):
    parameters = {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}
    tools = [{"type": "function", "name": "look", "parameters": parameters}]
    first = client.responses.create(
        **PLAIN | {"max_output_tokens": 60}, input="Where?", tools=tools, tool_choice="required", store=True
    )
    (call,) = first.output
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "here"}
    second = client.responses.create(**PLAIN, input=[output], tools=tools, previous_response_id=first.id)
    sent = [{"role": "user", "content": "Where?"}, call.model_dump(exclude_none=True), output]
    assert second.output_text == client.responses.create(**PLAIN, input=sent, tools=tools).output_text


def test_a_call_that_was_cut_off_is_none(client):
    parameters = {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"]}
    tools = [{"type": "function", "name": "look", "parameters": parameters}]
    asked = {"input": "Where?", "tools": tools, "tool_choice": "required", "store": True}
    # Its end is missing, whether the call ends within 60 tokens or not.
    longest = client.responses.create(**PLAIN | {"max_output_tokens": 60}, **asked).usage.output_tokens
    first = client.responses.create(**PLAIN | {"max_output_tokens": longest - 2}, **asked)
    assert first.status == "incomplete" and [one.status for one in first.output] == ["incomplete"]
    assert first.output[0].type == "function_call"
    second = client.responses.create(**PLAIN, input="And now?", previous_response_id=first.id)
    sent = [{"role": "user", "content": "Where?"}, {"role": "user", "content": "And now?"}]
    assert second.output_text == client.responses.create(**PLAIN, input=sent).output_text


def test_nothing_is_kept_that_nobody_asked_for(client, store):
    before = store.count("response", "app")
    for settings in ({}, {"store": False}):
        found = client.responses.create(**PLAIN, input="Hello.", **settings)
        with pytest.raises(openai.NotFoundError, match="only what is sent with store: true is kept, for 2 days"):
            client.responses.retrieve(found.id)
    with pytest.raises(openai.BadRequestError, match="context"):
        client.responses.create(**PLAIN, input="word " * 3000, store=True)
    assert store.count("response", "app") == before


def test_a_response_is_its_key_s_alone(client, running, keys):
    found = client.responses.create(**PLAIN, input="Hello.", store=True)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=keys["boss"], max_retries=0) as other:
        for ask in (other.responses.retrieve, other.responses.delete, other.responses.input_items.list):
            with pytest.raises(openai.NotFoundError, match="for the key that asked"):
                ask(found.id)
        with pytest.raises(openai.NotFoundError, match="previous_response_id: there is no response"):
            other.responses.create(**PLAIN, input="Go on.", previous_response_id=found.id)
    assert client.responses.retrieve(found.id).id == found.id


def test_what_is_deleted_or_has_run_out_is_gone(client, store, running, keys):
    first = client.responses.create(**PLAIN, input="A secret of mine.", store=True)
    second = client.responses.create(**PLAIN, input="Go on.", previous_response_id=first.id, store=True)
    client.responses.delete(first.id)
    for ask in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            ask(first.id)
    # Later ones hold what they answered themselves.
    assert client.responses.create(**PLAIN, input="More.", previous_response_id=second.id).output_text is not None
    kept = store.get("response", second.id)
    assert kept.content["expires_at"] == pytest.approx(time.time() + 2 * 86_400, abs=600)
    store.change("response", second.id, expires_at=time.time() - 1)
    with pytest.raises(openai.NotFoundError, match="previous_response_id"):
        client.responses.create(**PLAIN, input="More.", previous_response_id=second.id)
    headers = {"Authorization": f"Bearer {keys['app']}"}
    answer = httpx.get(f"{running.url}/v1/responses/x?stream=true", headers=headers)
    assert answer.status_code == 400 and "is not streamed again" in answer.json()["error"]["message"]


def test_of_too_many_the_oldest_go(tmp_path, monkeypatch):
    from luthier.faces.server import kept
    from luthier.faces.server.inputs import ResponsesRequest
    from luthier.faces.server.keys import Key
    from luthier.faces.server.response import ResponseBody
    from luthier.faces.server.server import make_server
    from luthier.faces.server.settings import Serve

    monkeypatch.setattr(kept, "MOST", 3)
    monkeypatch.setenv("LUTHIER_RUNS", str(tmp_path))
    server = make_server(Serve(keep_responses=True), lambda event: None)
    mine, other = (Key(name=name, sha256="", scopes=()) for name in ("mine", "other"))
    body = ResponsesRequest(model="mini", input="Hello.")
    assert kept.keeps(server, body) and not kept.keeps(server, body.model_copy(update={"store": False}))
    for key in (other, mine):
        for at in range(5):
            whole = ResponseBody(
                id=f"{key.name}-{at}", created_at=0, status="completed", model="mini", output=[], parallel_tool_calls=True,
                temperature=1.0, top_p=1.0,
            )  # fmt: skip
            kept.keep(server, key, body, whole)
    store = server.parts["store"]
    assert [one.id for one in store.all("response")] == [
        f"{name}-{at}" for name in ("other", "mine") for at in (2, 3, 4)
    ]
    # What has run out is dropped when another one comes.
    store.change("response", "other-2", expires_at=0)
    kept.keep(server, mine, body, whole.model_copy(update={"id": "new"}))
    assert store.get("response", "other-2") is None and store.get("response", "other-3") is not None
    store.close()
