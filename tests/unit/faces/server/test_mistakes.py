"""What is wrong with a body is said in a few sentences, in the words of who sent it; null says nothing."""

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from luthier.faces.server.app import make_app
from luthier.faces.server.batches import BatchRequest
from luthier.faces.server.blocks import MessagesRequest
from luthier.faces.server.chat import ChatRequest
from luthier.faces.server.completions import CompletionRequest
from luthier.faces.server.embeddings import EmbeddingRequest
from luthier.faces.server.engines import Refused
from luthier.faces.server.inputs import ResponsesRequest
from luthier.faces.server.models import LoadRequest
from luthier.faces.server.orders import JobRequest
from luthier.faces.server.refusals import explain, refusal_of
from luthier.faces.server.scoring import ClassifyRequest, RerankRequest, ScoreRequest
from luthier.faces.server.server import make_server
from luthier.faces.server.settings import Serve
from luthier.faces.server.stores import SearchRequest
from luthier.faces.server.tokens import DetokenizeRequest, TokenizeRequest

TURNS = [{"role": "user", "content": "hi"}]
CHAT = {"model": "mini", "messages": TURNS}
JOB = {"model": "mini", "training_file": "file-1"}


@pytest.fixture(scope="module")
def client():
    app = FastAPI()

    @app.post("/chat")
    async def chat(body: ChatRequest) -> dict:
        return {"stream": body.stream, "temperature": body.temperature, "sampling": body.sampling(None)}

    @app.post("/responses")
    async def respond(body: ResponsesRequest) -> dict:
        return {"temperature": body.temperature, "parallel": body.parallel_tool_calls}

    @app.post("/completions")
    async def complete(body: CompletionRequest) -> dict:
        return {"echo": body.echo, "most": body.max_tokens}

    @app.post("/embeddings")
    async def embed(body: EmbeddingRequest) -> dict:
        return {"form": body.encoding_format}

    @app.post("/jobs")
    async def tune(body: JobRequest) -> dict:
        return {"seed": body.seed}

    def take(path, form):
        async def taken(body: form) -> dict:
            return {}

        app.post(path)(taken)

    for path, form in (
        ("/messages", MessagesRequest), ("/classify", ClassifyRequest), ("/score", ScoreRequest), ("/search", SearchRequest),
        ("/rerank", RerankRequest), ("/batches", BatchRequest), ("/tokenize", TokenizeRequest),
        ("/detokenize", DetokenizeRequest), ("/models", LoadRequest),
    ):  # fmt: skip
        take(path, form)

    explain(app)
    with TestClient(app) as made:
        yield made


def test_null_is_what_nobody_said(client):
    names = ("temperature", "n", "presence_penalty", "frequency_penalty", "stream", "logprobs", "parallel_tool_calls",
             "stop", "seed", "tools", "tool_choice", "logit_bias", "user", "response_format", "top_p")  # fmt: skip
    found = client.post("/chat", json=CHAT | dict.fromkeys(names))
    assert found.status_code == 200, found.text
    assert found.json() == client.post("/chat", json=CHAT).json()
    nulls = dict.fromkeys(("temperature", "parallel_tool_calls", "stream", "store", "tools", "truncation"))
    assert client.post("/responses", json={"model": "mini", "input": "hi"} | nulls).json()["temperature"] == 1.0
    asked = {"model": "mini", "prompt": "a", "echo": None, "stream": None, "n": None}
    assert client.post("/completions", json=asked).json() == {"echo": False, "most": 16}
    # As much as there is room for, where null is a value.
    assert client.post("/completions", json=asked | {"max_tokens": None}).json()["most"] is None
    assert client.post("/jobs", json=JOB | {"seed": None, "suffix": None}).json() == {"seed": 0}
    # What must be there is not, and what is not known is not let through.
    assert client.post("/chat", json={"model": None, "messages": TURNS}).status_code == 400
    assert "mood: this server does not support" in client.post("/chat", json=CHAT | {"mood": None}).text
    properties = client.get("/openapi.json").json()["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"type": "null"} in properties["temperature"]["anyOf"] and properties["temperature"]["default"] == 1.0
    assert properties["model"]["type"] == "string"


IMAGE = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]}]


@pytest.mark.parametrize(
    ("path", "body", "said", "param"),
    [
        ("/chat", CHAT | {"messages": IMAGE}, "messages.0.content.1.type: is 'image_url', expected 'text'",
         "messages.0.content.1.type"),
        ("/chat", CHAT | {"messages": [{"role": "user", "content": 5}]},
         "messages.0.content: is 5, expected a string or a list",
         "messages.0.content"),
        ("/chat", CHAT | {"store": True}, "store: this server does not do this; leave it out", "store"),
        ("/chat", CHAT | {"metadata": {"a": "b"}}, "metadata: this server does not do this; leave it out", "metadata"),
        ("/chat", CHAT | {"response_format": {"type": "json_schema"}},
         "response_format: type: json_schema needs json_schema, with the schema in json_schema.schema", "response_format"),
        ("/chat", CHAT | {"response_format": {"type": "text", "json_schema": {"schema": {}}}},
         "response_format: json_schema goes with type: json_schema, not with text; leave one of the two out",
         "response_format"),
        ("/chat", CHAT | {"stop": ["x"] * 17}, "stop: list should have at most 16 items after validation, not 17", "stop"),
        ("/responses", {"model": "mini", "input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input.0.content.0.type: is 'input_image', expected 'input_text', 'output_text' or 'text'",
         "input.0.content.0.type"),
        ("/responses", {"model": "mini", "input": [{"type": "item_reference", "id": "x"}]},
         "input.0.type: is 'item_reference', expected 'message', 'function_call', 'function_call_output', 'file_search_call'",
         "input.0.type"),
        ("/responses", {"model": "mini", "input": [{"type": "function_call_output", "call_id": "a", "output": []}]},
         "input.0.output: is a list, expected a string", "input.0.output"),
        ("/responses", {"model": "mini", "input": []},
         "input: list should have at least 1 item after validation, not 0", "input"),
        ("/responses", {"model": "mini", "input": "a", "tools": [{"type": "web_search"}]},
         "tools.0.type: 'web_search' is not supported here; use one of 'function', 'file_search'", "tools.0.type"),
        ("/responses", {"model": "mini", "input": "a", "tools": [{"type": "file_search", "vector_store_ids": ["a"], "k": 1}]},
         "tools.0.k: this server does not support this field; leave it out", "tools.0.k"),
        ("/responses", {"model": "mini", "input": "a", "text": {"format": {"type": "text", "schema": {}}}},
         "text.format: schema goes with type: json_schema, not with text; leave one of the two out", "text.format"),
        ("/embeddings", {"model": "mini", "input": ["x"] * 2049},
         "input: list should have at most 2048 items after validation, not 2049", "input"),
        ("/embeddings", {"model": "mini", "input": ["a", [1]]}, "input.1: is a list, expected a string", "input.1"),
        ("/jobs", JOB | {"hyperparameters": {"n_epochs": 0}},
         "hyperparameters.n_epochs: input should be greater than or equal to 1", "hyperparameters.n_epochs"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_once(client, path, body, said, param):
    found = client.post(path, json=body)
    assert found.status_code == 400
    assert (found.json()["error"]["message"], found.json()["error"]["param"]) == (said, param)


RESPOND = {"model": "mini", "input": "a"}
SAY = {"model": "mini", "messages": TURNS, "max_tokens": 4}
LABELLED = {"model": "mini", "input": "a", "labels": ["a", "b"]}
PAIR = {"model": "mini", "text_1": "a", "text_2": "b"}
ORDER = {"model": "mini", "query": "a", "documents": ["b"]}
METHOD = {"type": "dpo", "dpo": {"hyperparameters": {"beta": True}}}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/chat", CHAT | {"n": "3"}, "n: is '3', expected an integer"),
        ("/chat", CHAT | {"n": True}, "n: is true, expected an integer"),
        ("/chat", CHAT | {"max_tokens": 3.0}, "max_tokens: is 3.0, expected an integer"),
        ("/chat", CHAT | {"max_completion_tokens": "9"}, "max_completion_tokens: is '9', expected an integer"),
        ("/chat", CHAT | {"seed": "1"}, "seed: is '1', expected an integer"),
        ("/chat", CHAT | {"temperature": "1"}, "temperature: is '1', expected a number"),
        ("/chat", CHAT | {"top_p": True}, "top_p: is true, expected a number"),
        ("/chat", CHAT | {"stream": "true"}, "stream: is 'true', expected true or false"),
        ("/chat", CHAT | {"logprobs": 1}, "logprobs: is 1, expected true or false"),
        ("/chat", CHAT | {"parallel_tool_calls": "no"}, "parallel_tool_calls: is 'no', expected true or false"),
        ("/chat", CHAT | {"logit_bias": {"5": "1"}}, "logit_bias.5: is '1', expected a number"),
        ("/chat", CHAT | {"stop_token_ids": [1, "2"]}, "stop_token_ids.1: is '2', expected an integer"),
        ("/chat", CHAT | {"user": 5}, "user: is 5, expected a string"),
        ("/chat", CHAT | {"stop": [1]}, "stop.0: is 1, expected a string"),
        ("/chat", CHAT | {"stream": True, "stream_options": {"include_usage": 1}},
         "stream_options.include_usage: is 1, expected true or false"),
        ("/chat", CHAT | {"stream": True, "stream_options": True}, "stream_options: is true, expected an object"),
        ("/completions", {"model": "mini", "prompt": "a", "logprobs": True}, "logprobs: is true, expected an integer"),
        ("/completions", {"model": "mini", "prompt": ["a", 1]}, "prompt.1: is 1, expected a string"),
        ("/completions", {"model": "mini", "prompt": [1, 2.0]}, "prompt.1: is 2.0, expected an integer"),
        ("/completions", {"model": "mini", "prompt": [[1, True]]}, "prompt.0.1: is true, expected an integer"),
        ("/responses", RESPOND | {"max_output_tokens": "5"}, "max_output_tokens: is '5', expected an integer"),
        ("/responses", RESPOND | {"store": "true"}, "store: is 'true', expected true or false"),
        ("/responses", RESPOND | {"tools": [{"type": "file_search", "vector_store_ids": ["a"], "max_num_results": "3"}]},
         "tools.0.max_num_results: is '3', expected an integer"),
        ("/messages", SAY | {"max_tokens": "4"}, "max_tokens: is '4', expected an integer"),
        ("/messages", SAY | {"temperature": "1"}, "temperature: is '1', expected a number"),
        ("/messages", SAY | {"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "a", "is_error": "false"}]}]},
         "messages.0.content.0.is_error: is 'false', expected true or false"),
        ("/embeddings", {"model": "mini", "input": "a", "dimensions": "8"}, "dimensions: is '8', expected an integer"),
        ("/embeddings", {"model": "mini", "input": "a", "normalise": 1}, "normalise: is 1, expected true or false"),
        ("/embeddings", {"model": "mini", "input": 5}, "input: is 5, expected a string or a list"),
        ("/classify", LABELLED | {"calibrate": "yes"}, "calibrate: is 'yes', expected true or false"),
        ("/classify", LABELLED | {"shots": [{"text": 1, "label": "a"}]}, "shots.0.text: is 1, expected a string"),
        ("/score", PAIR | {"raw": 0}, "raw: is 0, expected true or false"),
        ("/rerank", ORDER | {"top_n": "1"}, "top_n: is '1', expected an integer"),
        ("/rerank", ORDER | {"return_documents": "1"}, "return_documents: is '1', expected true or false"),
        ("/search", {"query": "a", "max_num_results": "5"}, "max_num_results: is '5', expected an integer"),
        ("/batches", {"input_file_id": 5, "endpoint": "/v1/completions", "completion_window": "24h"},
         "input_file_id: is 5, expected a string"),
        ("/tokenize", {"model": "mini", "prompt": 5}, "prompt: is 5, expected a string"),
        ("/detokenize", {"model": "mini", "tokens": ["5"]}, "tokens.0: is '5', expected an integer"),
        ("/models", {"source": 5}, "source: is 5, expected a string"),
        ("/jobs", JOB | {"seed": "1"}, "seed: is '1', expected an integer"),
        ("/jobs", JOB | {"hyperparameters": {"n_epochs": "3"}},
         "hyperparameters.n_epochs: is '3', expected an integer or 'auto'"),
        ("/jobs", JOB | {"hyperparameters": {"batch_size": 8.0}},
         "hyperparameters.batch_size: is 8.0, expected an integer or 'auto'"),
        ("/jobs", JOB | {"method": METHOD}, "method.dpo.hyperparameters.beta: is true, expected a number or 'auto'"),
        ("/jobs", JOB | {"metadata": {"a": 1}}, "metadata.a: is 1, expected a string"),
    ],
)  # fmt: skip
def test_nothing_is_taken_for_what_it_is_not(client, path, body, said):
    found = client.post(path, json=body)
    assert found.status_code == 400, found.text
    assert (found.json()["error"]["message"], found.json()["error"]["param"]) == (said, said.partition(":")[0])


def test_what_is_meant_is_taken(client):
    for path, body in (
        ("/chat", CHAT | {"temperature": 1, "n": 2, "logit_bias": {"5": 1, "0": 0.5}, "stream": True, "stop": "a"}),
        ("/jobs", JOB | {"hyperparameters": {"n_epochs": "auto", "batch_size": 8, "learning_rate_multiplier": 2}}),
        ("/classify", LABELLED | {"shots": [{"text": "c", "label": "a"}], "raw": False}),
        ("/classify", LABELLED | {"shots": None}),
        ("/messages", SAY | {"temperature": 1, "top_k": 5}),
        ("/embeddings", {"model": "mini", "input": [[1, 2], [3]]}),
    ):
        assert client.post(path, json=body).status_code == 200, client.post(path, json=body).text


def test_a_thousand_mistakes_are_a_few_sentences(client):
    turns = [{"role": "user", "content": [{"type": "image"}]}] * 1000
    said = client.post("/chat", json=CHAT | {"messages": turns}).json()["error"]["message"]
    assert said.endswith("; and 995 more") and len(said) < 500
    deep = {"type": "object"}
    for _ in range(140):
        deep = {"properties": {"a": deep}}
    form = {"type": "json_schema", "json_schema": {"schema": deep}}
    found = client.post("/chat", json=CHAT | {"response_format": form})
    assert len(found.text) < 500


def test_what_is_no_json_says_what_is(client):
    for content, said in (
        (b"", "the body is empty; send a JSON object, with Content-Type: application/json"),
        (b"[]", "the body is no JSON object; send a JSON object"),
        (b"{", "the body is not valid JSON ("),
        (b'{"model": "\xff"}', "the body cannot be read as JSON: it is no UTF-8"),
        (b"[" * 100_000, "the body cannot be read as JSON: it is no UTF-8, compressed, nested too deep"),
    ):
        found = client.post("/chat", content=content, headers={"Content-Type": "application/json"})
        assert found.status_code == 400 and found.json()["error"]["message"].startswith(said), found.text
        assert found.json()["error"]["param"] is None
    plain = client.post("/chat", content=b'{"model": "mini"}', headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in plain.json()["error"]["message"]


def test_settings_of_the_engine_are_named_as_they_were_sent():
    found = refusal_of(Refused("ConfigError", "sampling: structure: `regex` cannot be followed; mend it"))
    assert (str(found), found.param) == ("structure: `regex` cannot be followed; mend it", "structure")
    found = refusal_of(Refused("ConfigError", "stop_ids: there is no token 9"))
    assert (str(found), found.param) == ("stop_token_ids: there is no token 9", "stop_token_ids")


def test_a_filter_that_is_not_applied_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_RUNS", str(tmp_path))
    with TestClient(make_app(make_server(Serve(), print), None), base_url="http://127.0.0.1:8000") as client:
        for address, name in (
            ("/v1/fine_tuning/jobs?metadata[a]=b", "metadata[a]"),
            ("/v1/files?limit=1&afer=x", "afer"),
            ("/v1/models?page=2", "page"),
        ):
            found = client.get(address)
            assert found.status_code == 400 and found.json()["error"]["param"] == name, found.text
        assert client.get("/v1/files?limit=1&order=asc").status_code == 200
        assert "did you mean 'after'?" in client.get("/v1/files?afer=x").text
        # All is text there, numbers too.
        assert "limit" in client.get("/v1/files?limit=many").text


def test_nothing_behind_an_address_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_RUNS", str(tmp_path))
    with TestClient(make_app(make_server(Serve(), print), None), base_url="http://127.0.0.1:8000") as client:
        for method, address, name in (
            ("POST", "/v1/chat/completions?stream=true", "stream"),
            ("POST", "/v1/embeddings?api-version=1", "api-version"),
            ("POST", "/v1/files?purpose=batch", "purpose"),
            ("POST", "/v1/fine_tuning/jobs/ftjob-1/cancel?force=1", "force"),
            ("POST", "/v1/messages?stream=true", "stream"),
            ("POST", "/v1/messages/count_tokens?beta=yes", "beta"),
            ("POST", "/v1/chat/completions?beta=true", "beta"),
            ("POST", "/tokenize?add_special_tokens=false", "add_special_tokens"),
            ("POST", "/admin/models?wait=0", "wait"),
            ("DELETE", "/v1/files/file-1?force=true", "force"),
            ("DELETE", "/v1/models/mini?now=1", "now"),
        ):
            found = client.request(method, address, json={} if method == "POST" else None)
            assert found.status_code == 400, found.text
            assert found.json()["error"]["message"] == (
                f"{name}: this server does not support this here; leave it out of the address; settings go into the body"
            )
            assert found.json()["error"].get("param", name) == name
        # Clients say with a query which form of an API they speak.
        for address in ("/v1/messages", "/v1/messages/count_tokens"):
            said = client.post(f"{address}?beta=true", json={}).json()["error"]["message"]
            assert said.startswith("model: is required")
        assert client.get("/health/live?from=probe").status_code == 200
