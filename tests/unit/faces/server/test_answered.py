"""What tools gave answers calls that were made, and calls are answered: asked by the official clients, as their services do."""

import anthropic
import httpx
import openai
import pytest

from luthier.faces.server.answered import check_turns
from luthier.faces.server.refusals import Refusal

ASKED = {"role": "user", "content": "How is it?"}
THANKS = {"role": "user", "content": "And now?"}


def calls(*ids):
    made = [{"id": id, "type": "function", "function": {"name": "look", "arguments": "{}"}} for id in ids]
    return {"role": "assistant", "tool_calls": made}


def gave(id):
    return {"role": "tool", "tool_call_id": id, "content": "It rains."}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.parametrize(
    ("turns", "place", "said"),
    [
        ([ASKED, gave("a")], "messages.1.tool_call_id", "'a' answers no call before it"),
        ([ASKED, calls("a"), gave("a"), gave("b")], "messages.3.tool_call_id", "'b' answers no call before it"),
        ([ASKED, calls("a"), gave("a"), gave("a")], "messages.3.tool_call_id", "'a' is answered twice"),
        # The calls of an earlier turn are over.
        ([ASKED, calls("a"), gave("a"), THANKS, gave("a")], "messages.4.tool_call_id", "'a' answers no call"),
        ([ASKED, calls("a"), {"role": "tool", "content": "x"}], "messages.2.tool_call_id", "is required"),
        ([ASKED, calls("a", "b"), gave("b"), THANKS], "messages.1.tool_calls.0", "the call 'a' has no answer"),
        ([ASKED, calls("a", "b"), gave("a")], "messages.1.tool_calls.1", "the call 'b' has no answer"),
        ([ASKED, calls("a"), {"role": "assistant", "content": "Well."}], "messages.1.tool_calls.0", "'a' has no answer"),
        ([ASKED, calls("a", "a"), gave("a")], "messages.1.tool_calls.1", "'a' is the id of two calls"),
        ([{**calls("a"), "role": "user", "content": "x"}, gave("a")], "messages.0", "tool_calls are the assistant's"),
        ([{**ASKED, "tool_call_id": "a"}], "messages.0", "tool_call_id goes with role tool"),
    ],
)  # fmt: skip
def test_a_chat_whose_calls_and_answers_do_not_fit_is_refused(client, turns, place, said):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="mini", messages=turns, max_tokens=4)
    error = caught.value.body
    assert error["param"] == place and error["message"].startswith(f"{place}: ") and said in error["message"]


def test_a_chat_whose_calls_are_answered_is_written_on(client, served):
    for turns in (
        [ASKED, calls("a", "b"), gave("b"), gave("a")],
        # An id may come again where it was answered.
        [ASKED, calls("a"), gave("a"), THANKS, calls("a"), gave("a"), THANKS],
        # As templates have it, which write no ids.
        [ASKED, calls(None, None), {"role": "tool", "content": "x"}, {"role": "tool", "content": "y"}],
    ):
        assert client.chat.completions.create(model="mini", messages=turns, max_tokens=4).choices
    # Of what was said so far the answer may be to come, and what answers nothing is refused there as well.
    body = {"model": "mini", "messages": [ASKED, calls("a")]}
    assert httpx.post(f"{served.url}/tokenize", json=body).status_code == 200
    assert httpx.post(f"{served.url}/v1/chat/completions/render", json=body).status_code == 400
    labelled = body | {"labels": ["a", "b"]}
    assert "'a' has no answer" in httpx.post(f"{served.url}/v1/classify", json=labelled).text
    body["messages"] = [gave("a")]
    assert "answers no call" in httpx.post(f"{served.url}/tokenize", json=body).text


def test_nameless_calls_are_answered_in_order():
    check_turns([ASKED, calls(None), {"role": "tool", "content": "x"}])
    with pytest.raises(
        Refusal, match=r"messages\.1\.tool_calls\.1: the call has no answer; send a message of role tool"
    ):
        check_turns([ASKED, calls(None, None), {"role": "tool", "content": "x"}])


CALL = {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "a", "output": "It rains."}
PLAIN = {"model": "mini", "max_output_tokens": 4, "temperature": 0}


@pytest.mark.parametrize(
    ("items", "place", "said"),
    [
        ([ASKED, OUTPUT], "input.1.call_id", "'a' answers no call before it"),
        ([ASKED, OUTPUT, CALL], "input.1.call_id", "'a' answers no call before it"),
        ([ASKED, CALL, OUTPUT, OUTPUT], "input.3.call_id", "'a' is answered twice"),
        ([ASKED, CALL, THANKS], "input.1", "the call 'a' has no answer; send a function_call_output"),
    ],
)
def test_items_whose_calls_and_outputs_do_not_fit_are_refused(client, items, place, said):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**PLAIN, input=items)
    assert caught.value.body["param"] == place and said in caught.value.body["message"]


def test_an_output_answers_a_call_that_was_kept(client):
    city = {"properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"], "additionalProperties": False}
    tools = [{"type": "function", "name": "look", "parameters": {"type": "object", **city}}]
    asked = PLAIN | {"max_output_tokens": 200, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    first = client.responses.create(**asked, input="Where?", store=True)
    (call,) = first.output
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**PLAIN, input="And now?", previous_response_id=first.id)
    assert caught.value.body["param"] == "previous_response_id" and f"the call '{call.call_id}'" in str(caught.value)
    with pytest.raises(openai.BadRequestError, match=r"input\.0\.call_id: 'a' answers no call before it"):
        client.responses.create(**PLAIN, input=[OUTPUT], previous_response_id=first.id)
    second = client.responses.create(
        **PLAIN, input=[OUTPUT | {"call_id": call.call_id}], previous_response_id=first.id, store=True
    )
    assert client.responses.create(**PLAIN, input="And now?", previous_response_id=second.id).output
    # Words may stand between a call and what it gave.
    said = {"role": "assistant", "content": "Let me look."}
    assert client.responses.create(**PLAIN, input=[ASKED, CALL, said, OUTPUT]).output


USE = {"type": "tool_use", "id": "a", "name": "look", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "It rains."}


def of(role, *blocks):
    return {"role": role, "content": list(blocks)}


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([ASKED, of("assistant", USE), of("user", RESULT | {"tool_use_id": "b"})],
         r"messages\.2\.content\.0\.tool_use_id: 'b' answers no call before it"),
        ([of("user", RESULT)], r"messages\.0\.content\.0\.tool_use_id: 'a' answers no call before it"),
        ([ASKED, of("assistant", USE), THANKS], r"messages\.1\.content\.0: the call 'a' has no answer; send a tool_result"),
        ([ASKED, of("assistant", USE), of("user", RESULT, RESULT)], r"messages\.2\.content\.1\.tool_use_id: 'a' is answered"),
        ([ASKED, of("assistant", USE), of("user", RESULT), {"role": "assistant", "content": "Well."}, of("user", RESULT)],
         r"messages\.4\.content\.0\.tool_use_id: 'a' answers no call"),
    ],
)  # fmt: skip
def test_blocks_whose_uses_and_results_do_not_fit_are_refused(served, turns, said):
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        for ask in (
            lambda: client.messages.create(model="mini", max_tokens=4, messages=turns),
            lambda: client.messages.count_tokens(model="mini", messages=turns),
        ):
            with pytest.raises(anthropic.BadRequestError, match=said):
                ask()


def test_turns_in_pieces_are_one(served):
    turns = [
        ASKED, of("assistant", USE), {"role": "assistant", "content": "I look."}, of("user", RESULT), THANKS,
    ]  # fmt: skip
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        assert client.messages.create(model="mini", max_tokens=4, messages=turns).content
