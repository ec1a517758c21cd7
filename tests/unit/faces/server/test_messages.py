"""Anthropic's official client, unmodified, against a real server."""

import json

import anthropic
import httpx
import pytest

from luthier.engine.generate import generate
from luthier.engine.sampling import Sampling
from luthier.faces.server.blocks import CountRequest, MessagesRequest, question_of
from luthier.models.load import load_model

TURNS = [{"role": "user", "content": "Once upon a time"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
TOOLS = [{"name": "weather", "description": "of a city", "input_schema": SCHEMA}]
ASK = {"model": "mini", "messages": TURNS, "max_tokens": 24, "extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def client(served):
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as made:
        yield made


def test_a_message_is_what_generate_writes(client):
    found = client.messages.create(**ASK)
    own = generate(load_model("mini", as_stored=True), ["Once upon a time"], Sampling(max_tokens=24))[0]
    (block,) = found.content
    assert (block.type, block.text, found.role) == ("text", own.text, "assistant")
    assert found.stop_reason == {"length": "max_tokens", "stop": "end_turn"}[own.finish]
    usage = found.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == own.prompt_tokens
    assert client.messages.count_tokens(model="mini", messages=TURNS).input_tokens == own.prompt_tokens
    more = client.messages.count_tokens(model="mini", messages=TURNS, system="Be short.", tools=TOOLS)
    assert more.input_tokens > own.prompt_tokens


def test_a_stream_of_messages_adds_up(client):
    whole = client.messages.create(**ASK)
    with client.messages.stream(**ASK) as stream:
        kinds = [one.type for one in stream]
        found = stream.get_final_message()
    assert found.content[0].text == whole.content[0].text and found.stop_reason == whole.stop_reason
    assert found.usage.output_tokens == whole.usage.output_tokens
    raw = [one.type for one in client.messages.create(**ASK, stream=True)]
    assert raw[:2] == ["message_start", "content_block_start"]
    assert raw[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(raw[2:-3]) == {"content_block_delta"} and "text" in kinds


def test_the_stop_sequence_is_named(client):
    text = client.messages.create(**ASK).content[0].text
    word = text.split()[3]
    asked = ASK | {"stop_sequences": ["nowhere in it", word]}
    found = client.messages.create(**asked)
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", word)
    assert found.content[0].text == text[: text.index(word)]
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    assert (streamed.stop_reason, streamed.stop_sequence) == ("stop_sequence", word)
    assert streamed.content[0].text == found.content[0].text


def test_a_tool_is_used_by_its_schema(client):
    asked = ASK | {"tools": TOOLS, "max_tokens": 80}
    found = client.messages.create(**asked, tool_choice={"type": "any"})
    (call,) = found.content
    assert (call.type, call.name, set(call.input)) == ("tool_use", "weather", {"city", "warm"})
    assert found.stop_reason == "tool_use"
    with client.messages.stream(**asked, tool_choice={"type": "tool", "name": "weather"}) as stream:
        deltas = [one.delta.type for one in stream if one.type == "content_block_delta"]
        (streamed,) = stream.get_final_message().content
    assert streamed.input == call.input and set(deltas) == {"input_json_delta"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    told = [*TURNS, {"role": "assistant", "content": found.content}, {"role": "user", "content": [result]}]
    after = client.messages.create(**(asked | {"messages": told}), tool_choice={"type": "none"})
    assert [one.type for one in after.content] == ["text"]
    cut = client.messages.create(**(asked | {"max_tokens": 18}), tool_choice={"type": "any"})
    assert cut.stop_reason == "max_tokens" and not cut.content


@pytest.mark.parametrize(
    "more, said",
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"container": "box"}, "container: this server does not support this field"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0.*image"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "document"),
        ({"messages": [*TURNS, {"role": "assistant", "content": "Well,"}]}, "the last turn is the assistant's"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"max_tokens": 100_000}, "the context of this model"),
        ({"temperature": 1.5}, "temperature"),
    ],
)
def test_what_is_not_supported_is_named(client, more, said):
    with pytest.raises(anthropic.BadRequestError, match=said) as caught:
        client.messages.create(**{**ASK, "extra_body": {"temperature": 0, **more}})
    body = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"


def test_other_errors_have_its_shape_too(client, served):
    with pytest.raises(anthropic.NotFoundError, match="did you mean 'mini'") as caught:
        client.messages.create(**ASK | {"model": "minni"})
    assert caught.value.body["error"]["type"] == "not_found_error"
    for path in ("/v1/messages", "/v1/messages/nothing"):
        assert httpx.get(f"{served.url}{path}").json()["type"] == "error"
    # Every other address speaks as before.
    assert set(httpx.get(f"{served.url}/v1/nothing").json()) == {"error"}


def test_blocks_become_turns():
    use = {"type": "tool_use", "id": "a", "name": "f", "input": {"x": "ü"}}
    results = [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "one"}]},
        {"type": "tool_result", "tool_use_id": "b", "content": "two", "is_error": True},
        {"type": "text", "text": "and now?"},
    ]
    body = CountRequest.model_validate(
        {
            "model": "m",
            "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": [{"type": "text", "text": "well"}, use]},
                {"role": "user", "content": results},
            ],
        }
    )
    call = {
        "id": "a",
        "type": "function",
        "function": {"name": "f", "arguments": json.dumps({"x": "ü"}, ensure_ascii=False)},
    }
    assert question_of(body)["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "well", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "one"},
        {"role": "tool", "tool_call_id": "b", "content": "Error: two"},
        {"role": "user", "content": "and now?"},
    ]


def test_settings_reach_the_engine():
    asked = {"model": "m", "messages": TURNS, "max_tokens": 5, "top_p": 0.5, "top_k": 3, "stop_sequences": ["x"]}
    drawn = MessagesRequest.model_validate(asked).sampling()
    assert drawn == {"temperature": 1.0, "max_tokens": 5, "top_p": 0.5, "top_k": 3, "stop": ["x"]}
    assert MessagesRequest.model_validate(asked | {"temperature": 0}).sampling() == {
        "temperature": 0, "max_tokens": 5, "stop": ["x"],
    }  # fmt: skip
