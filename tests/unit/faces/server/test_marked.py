"""Tools of models whose calls are marked by special tokens, over HTTP."""

import json

import openai
import pytest

from luthier.models.save import save_model
from marking import marked_model
from running import Running

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": PARAMETERS}}]
NAMES = ("list", "tags", "named", "ids", "marked", "keys")
TURNS = [{"role": "user", "content": "How is the weather?"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("marked")
    for name in NAMES:
        save_model(marked_model(name), folder / name)
    running = Running(*(f"{name}={folder / name}" for name in NAMES), runs=folder / "runs")
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as made:
        yield made
    assert running.stop() == 0


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_made_streamed_and_sent_back(client, name):
    asked = {
        "model": name,
        "messages": TURNS,
        "tools": TOOLS,
        "tool_choice": "required",
        "temperature": 0,
        "max_tokens": 120,
    }
    whole = client.chat.completions.create(**asked, parallel_tool_calls=False).choices[0]
    (call,) = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    assert call.function.name == "look" and json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    arguments, names = "", []
    for chunk in client.chat.completions.create(**asked, parallel_tool_calls=False, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or ():
            arguments += delta.function.arguments or ""
            names += [delta.function.name] if delta.function.name else []
        assert not chunk.choices[0].delta.content
    assert (names, arguments) == (["look"], call.function.arguments)
    back = [
        *TURNS,
        whole.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "It rains."},
    ]
    again = client.chat.completions.create(**asked | {"messages": back, "tool_choice": "none", "max_tokens": 8})
    assert "[TOOL_CALLS]" not in again.choices[0].message.content
    tools = [{"type": "function", "name": "look", "parameters": PARAMETERS}]
    items = client.responses.create(
        model=name,
        input="How is it?",
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        store=True,
    )
    (item,) = items.output
    output = {"type": "function_call_output", "call_id": item.call_id, "output": "It rains."}
    assert client.responses.create(
        model=name, input=[output], previous_response_id=items.id, temperature=0, max_output_tokens=4
    ).output
