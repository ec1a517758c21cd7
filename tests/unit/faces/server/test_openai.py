"""The official client, unmodified, against a real server."""

import json

import openai
import pytest
from pydantic import BaseModel

from luthier.engine.generate import generate
from luthier.engine.sampling import Sampling
from luthier.faces.server.answering import TextEvents, event
from luthier.models.load import load_model

TURNS = [{"role": "user", "content": "Once upon a time"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": PARAMETERS}}]


class Answer(BaseModel):
    ok: bool


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models_are_listed(client):
    assert [one.id for one in client.models.list()] == ["mini", "twin"]
    assert client.models.retrieve("mini").id == "mini"
    with pytest.raises(openai.NotFoundError, match="did you mean 'mini'"):
        client.models.retrieve("minni")


def test_a_chat_is_what_generate_writes(client):
    found = client.chat.completions.create(model="mini", messages=TURNS, max_tokens=24, temperature=0)
    model = load_model("mini", as_stored=True)
    own = generate(model, ["Once upon a time"], Sampling(max_tokens=24))[0]
    assert found.choices[0].message.content == own.text
    assert found.choices[0].finish_reason == own.finish
    assert found.usage.prompt_tokens == own.prompt_tokens
    again = client.chat.completions.create(model="twin", messages=TURNS, max_tokens=24, temperature=0)
    assert again.choices[0].message.content == own.text


def test_an_answer_that_is_expected_is_the_same_and_was_guessed(client):
    asked = {"model": "mini", "messages": TURNS, "max_tokens": 40, "temperature": 0}
    plain = client.chat.completions.create(**asked)
    text = plain.choices[0].message.content
    for content in (text, [{"type": "text", "text": text[:20]}, {"type": "text", "text": text[20:]}]):
        found = client.chat.completions.create(**asked, prediction={"type": "content", "content": content})
        assert found.choices[0].message.content == text
        assert found.usage.completion_tokens_details.accepted_prediction_tokens > 10
    with client.chat.completions.stream(**asked, prediction={"type": "content", "content": "No."}) as stream:
        assert stream.get_final_completion().choices[0].message.content == text


def test_a_stream_adds_up(client):
    whole = client.chat.completions.create(model="mini", messages=TURNS, max_tokens=20, temperature=0)
    stream = client.chat.completions.create(
        model="mini", messages=TURNS, max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True},
        logprobs=True, top_logprobs=3,
    )  # fmt: skip
    chunks = list(stream)
    assert (
        "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == whole.choices[0].message.content
    )
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [one.choices[0].finish_reason for one in chunks if one.choices][-1] == whole.choices[0].finish_reason
    logs = [log for one in chunks if one.choices and one.choices[0].logprobs for log in one.choices[0].logprobs.content]
    assert all(len(log.top_logprobs) == 3 and log.logprob == log.top_logprobs[0].logprob for log in logs)
    assert "".join(log.token for log in logs) == whole.choices[0].message.content


@pytest.mark.parametrize("more", [{}, {"n": 3}, {"stop": ["e"], "n": 2}])
def test_streams_without_more_than_text_are_the_whole_answers(client, more):
    asked = {"model": "mini", "max_tokens": 40, "temperature": 1.0, "seed": 7, **more}
    chats, texts = client.chat.completions, client.completions
    whole = {
        one.index: (one.message.content, one.finish_reason) for one in chats.create(messages=TURNS, **asked).choices
    }
    streamed = {}
    for chunk in chats.create(messages=TURNS, stream=True, **asked):
        for one in chunk.choices:
            text, finish = streamed.get(one.index, ("", None))
            assert finish is None
            streamed[one.index] = text + (one.delta.content or ""), one.finish_reason
    assert streamed == whole
    whole = {one.index: (one.text, one.finish_reason) for one in texts.create(prompt="Once upon", **asked).choices}
    streamed = {}
    for chunk in texts.create(prompt="Once upon", stream=True, **asked):
        for one in chunk.choices:
            streamed[one.index] = streamed.get(one.index, ("", None))[0] + one.text, one.finish_reason
    assert streamed == whole


def test_several_answers_are_drawn(client):
    asked = {"model": "mini", "messages": TURNS, "max_tokens": 8, "n": 3, "seed": 5, "temperature": 1.5}
    found, again = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [one.message.content for one in found.choices]
    assert len(set(texts)) == 3 and texts == [one.message.content for one in again.choices]
    chunks = list(client.chat.completions.create(**asked, stream=True))
    streamed = [
        "".join(one.choices[0].delta.content or "" for one in chunks if one.choices[0].index == at) for at in range(3)
    ]
    assert streamed == texts


def test_a_schema_is_kept_to(client):
    found = client.chat.completions.parse(
        model="mini", messages=TURNS, response_format=Answer, temperature=0, max_tokens=60
    )
    assert isinstance(found.choices[0].message.parsed, Answer)
    found = client.responses.parse(model="mini", input="Is it?", text_format=Answer, temperature=0)
    assert isinstance(found.output_parsed, Answer)


def test_tools_are_called_by_their_schema(client):
    asked = {"model": "mini", "messages": TURNS, "tools": TOOLS, "temperature": 0, "max_tokens": 80}
    found = client.chat.completions.create(**asked, tool_choice="required")
    (call,) = found.choices[0].message.tool_calls
    assert call.function.name == "weather" and set(json.loads(call.function.arguments)) == {"city", "warm"}
    assert found.choices[0].finish_reason == "tool_calls" and found.choices[0].message.content is None
    with client.chat.completions.stream(
        **asked, tool_choice={"type": "function", "function": {"name": "weather"}}
    ) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert streamed.function.arguments == call.function.arguments
    told = [
        *TURNS,
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    after = client.chat.completions.create(**(asked | {"messages": told}), tool_choice="none")
    assert after.choices[0].message.content and after.choices[0].message.tool_calls is None
    with pytest.raises(openai.BadRequestError, match="did you mean 'weather'"):
        client.chat.completions.create(**asked, tool_choice={"type": "function", "function": {"name": "wether"}})


def test_responses_are_streamed(client):
    whole = client.responses.create(model="mini", input="Once upon a time", temperature=0)
    with client.responses.stream(model="mini", input="Once upon a time", temperature=0) as stream:
        kinds = [one.type for one in stream]
        found = stream.get_final_response()
    assert found.output_text == whole.output_text and kinds[0] == "response.created"
    assert kinds[-1] == "response.completed" and "response.output_text.delta" in kinds
    tools = [{"type": "function", "strict": True, **TOOLS[0]["function"]}]
    called = client.responses.create(model="mini", input="Where?", tools=tools, tool_choice="required", temperature=0)
    (call,) = called.output
    items = [
        {"role": "user", "content": "Where?"},
        call.model_dump(exclude_none=True, exclude={"namespace"}),
        {"type": "function_call_output", "call_id": call.call_id, "output": "here"},
    ]
    assert client.responses.create(model="mini", input=items, tools=tools, temperature=0, max_output_tokens=9).output
    with client.responses.stream(
        model="mini", input="Where?", tools=tools, tool_choice="required", temperature=0
    ) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output[0].arguments == call.arguments
    cut = client.responses.create(model="mini", input="Once upon a time", temperature=0, max_output_tokens=3)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


def test_completions_echo_with_likelihoods(client):
    found = client.completions.create(
        model="mini", prompt=["Once upon a time", "The"], max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    first, second = found.choices
    assert first.text.startswith("Once upon a time") and second.index == 1
    logs = first.logprobs
    assert logs.token_logprobs[0] is None and all(one <= 0 for one in logs.token_logprobs[1:])
    assert "".join(logs.tokens) == first.text
    assert all(max(top.values()) >= log for log, top in zip(logs.token_logprobs[1:], logs.top_logprobs[1:]))
    only = client.completions.create(model="mini", prompt="Once upon", max_tokens=0, echo=True, logprobs=0)
    assert only.choices[0].text == "Once upon" and only.usage.completion_tokens == 0
    ids = client.completions.create(model="mini", prompt=[5, 6, 7], max_tokens=4, temperature=0)
    assert ids.usage.prompt_tokens == 3


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"extra_body": {"web_search_options": {}}}, "web_search_options: this server does not support this field"),
        ({"store": True}, "store"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}}, "not"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"max_tokens": 500_000}, "the context of this model is 512 tokens"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "the context of this model is 512 tokens"),
        ({"logit_bias": {"99999": 1}}, "there is no token 99999"),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(client, changed, said):
    with pytest.raises(openai.BadRequestError, match=said):
        client.chat.completions.create(**({"model": "mini", "messages": TURNS, "max_tokens": 4} | changed))


def test_events_that_differ_in_one_text_are_written_as_others():
    content = {"id": "a", "choices": [{"index": 1, "delta": {"content": TextEvents.HERE}, "finish_reason": None}]}
    quick = TextEvents(content)
    for text in ("word", 'a "quote" \\ and\nlines\t', "", "\0", "琴匠 é 🎻", "\ud83d", "\u2028</script>\x7f"):
        content["choices"][0]["delta"]["content"] = text
        assert quick.tell(text) == event(content)
