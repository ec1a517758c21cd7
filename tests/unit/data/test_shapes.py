"""Shapes: each usual form of a data set is known by its columns, and becomes the same noun under other names."""

import json

import pytest

from luthier.core.errors import DataError
from luthier.core.events import Events
from luthier.core.types import Chat, Labelled, Message, Pair, Text
from luthier.data.load import Data, load_data
from luthier.data.shapes import Columns, recognise, to_example
from luthier.data.sources import Row

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
ASKED, SAID = Message("user", "Hi"), Message("assistant", "Hello")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "1", "name": "weather"},
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "sunny."}],
        "weight": 0.5,
    },
]
HEARD = (
    Message("system", "Be brief."),
    Message("user", "Weather?"),
    Message("assistant", "", (CALL,)),
    Message("tool", "sunny", (), "1", "weather"),
    Message("assistant", "It is sunny.", (), None, None, 0.5),
)

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
USED = [
    SHARED[0],
    {"from": "function_call", "value": json.dumps(CALL["function"])},
    {"from": "observation", "value": "x"},
    SHARED[1],
]

# Values of a row, the shape they have, and the example they become (its id and meta left aside).
KNOWN = [
    ({"text": "a"}, "text", Text("", "a")),
    ({"content": "a"}, "text", Text("", "a")),
    ({"prompt": "a", "completion": "b"}, "prompt_completion", Pair("", "a", "b")),
    ({"question": "a", "answer": "b"}, "prompt_completion", Pair("", "a", "b")),
    ({"source": "a", "target": "b"}, "pair", Pair("", "a", "b")),
    ({"instruction": "Hi", "output": "Hello"}, "alpaca", Chat("", (ASKED, SAID))),
    ({"instruction": "Hi", "input": "", "output": "Hello"}, "alpaca", Chat("", (ASKED, SAID))),
    (
        {"instruction": "Add", "input": "1 2", "response": "3"},
        "alpaca",
        Chat("", (Message("user", "Add\n1 2"), Message("assistant", "3"))),
    ),
    (
        {"instruction": "Hi", "output": "Hello", "system": "S"},
        "alpaca",
        Chat("", (Message("system", "S"), ASKED, SAID)),
    ),
    ({"conversations": SHARED}, "sharegpt", Chat("", (ASKED, SAID))),
    ({"conversations": SHARED, "system": "S"}, "sharegpt", Chat("", (Message("system", "S"), ASKED, SAID))),
    (
        {"conversations": USED, "tools": json.dumps([TOOL])},
        "sharegpt",
        Chat("", (ASKED, Message("assistant", "", (CALL,)), Message("tool", "x"), SAID), (TOOL,)),
    ),
    ({"messages": TURNS}, "messages", Chat("", (ASKED, SAID))),
    ({"messages": json.dumps(TURNS)}, "messages", Chat("", (ASKED, SAID))),
    ({"messages": TALK, "tools": [TOOL]}, "messages", Chat("", HEARD, (TOOL,))),
    ({"text": "a", "label": "x"}, "labelled", Labelled("", "a", "x")),
    ({"text": "a", "label": 3}, "labelled", Labelled("", "a", "3")),
    ({"text": "a", "label": True}, "labelled", Labelled("", "a", "true")),
    ({"text": "a", "labels": ["x", "y", "x"]}, "labelled", Labelled("", "a", ("x", "y"))),
    ({"text": "a", "labels": []}, "labelled", Labelled("", "a", ())),
    ({"sentence1": "a", "sentence2": "b", "label": "x"}, "labelled", Labelled("", "a", "x", "b")),
    ({"premise": "a", "hypothesis": "b", "label": "x"}, "labelled", Labelled("", "a", "x", "b")),
    ({"text": "a", "score": "0.5"}, "scored", Labelled("", "a", 0.5)),
    ({"text": "a", "label": 2.5}, "scored", Labelled("", "a", 2.5)),
]


@pytest.mark.parametrize(("values", "shape", "example"), KNOWN)
def test_every_usual_form_is_known_by_its_columns(values, shape, example):
    row = Row(values, "")
    found, columns = recognise(row, Columns())
    assert found == shape
    assert to_example(row, found, columns) == example


MAPPED = [
    ({"body": "a"}, {"text": "body"}, Text("", "a")),
    ({"q": "a", "a": "b"}, {"prompt": "q", "completion": "a"}, Pair("", "a", "b")),
    ({"en": "a", "zh": "b"}, {"source": "en", "target": "zh"}, Pair("", "a", "b")),
    ({"task": "Hi", "reply": "Hello"}, {"instruction": "task", "output": "reply"}, Chat("", (ASKED, SAID))),
    ({"body": "a", "kind": "x"}, {"text": "body", "label": "kind"}, Labelled("", "a", "x")),
    ({"body": "a", "stars": 4}, {"text": "body", "score": "stars"}, Labelled("", "a", 4.0)),
    ({"talk": TURNS}, {"messages": "talk"}, Chat("", (ASKED, SAID))),
    ({"talk": SHARED}, {"conversations": "talk"}, Chat("", (ASKED, SAID))),
    # What is mapped by hand decides before what is found by name.
    (
        {"text": "a", "label": "x", "review": "b", "stars": 4},
        {"text": "review", "score": "stars"},
        Labelled("", "b", 4.0),
    ),
]


@pytest.mark.parametrize(("values", "columns", "example"), MAPPED)
def test_columns_of_other_names_are_mapped(values, columns, example):
    row = Row(values, "")
    made = to_example(row, *recognise(row, Columns(**columns)))
    assert (type(made), made) == (type(example), type(made)(**{**_fields(example), "meta": made.meta}))


def _fields(example) -> dict:
    return {name: getattr(example, name) for name in example.__slots__}


def test_the_other_columns_are_kept_and_ids_and_weights_are_read():
    row = Row({"text": "a", "label": "x", "id": 7, "weight": "2", "from": "web"}, "a.jsonl:1")
    made = to_example(row, *recognise(row, Columns()))
    assert made.id == "7" and made.meta["weight"] == 2.0 and made.meta["from"] == "web"


def test_a_shape_that_is_asked_for_needs_its_columns():
    row = Row({"text": "a", "label": "x"}, "a.jsonl:1")
    assert recognise(row, Columns(), "text")[0] == "text"
    with pytest.raises(DataError, match=r"a\.jsonl:1: the shape 'pair' needs 'source', 'target'.*columns\.source"):
        recognise(row, Columns(), "pair")
    with pytest.raises(DataError, match=r"columns\.text: there is no column 'txet'; did you mean 'text'\?"):
        recognise(row, Columns(text="txet"))


BAD = [
    ({"text": 3}, "'text' holds a int, expected a text"),
    ({"text": "a", "label": None}, "'label' holds None, expected a class name"),
    ({"text": "a", "label": ["x", None]}, "'label' holds None"),
    ({"text": "a", "score": True}, "'score' holds True, expected a number"),
    ({"text": "a", "score": "nan"}, "expected a number"),
    ({"text": "a", "label": "x", "weight": "heavy"}, "'weight' holds 'heavy'"),
    ({"instruction": " ", "output": "b"}, "'instruction' is empty"),
    ({"messages": "no list"}, "is a text and no list of turns"),
    ({"messages": []}, "holds no list of turns"),
    ({"messages": ["Hi"]}, "turn 1 is a str"),
    ({"messages": [{"role": "assistant", "content": None}]}, "turn 1 has no content"),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "image_url"}]}]},
        "'image_url'; only text can be learned",
    ),
    ({"messages": TALK, "tools": "{"}, "the tools are no JSON"),
    ({"messages": TALK, "tools": {"name": "x"}}, "the tools are no list of objects"),
    ({"conversations": [{"from": "function_call", "value": "weather()"}]}, "turn 1 is a function call that is no JSON"),
]


@pytest.mark.parametrize(("values", "said"), BAD)
def test_a_bad_row_says_why(values, said):
    row = Row(values, "a.jsonl:1")
    with pytest.raises(DataError, match=said):
        to_example(row, *recognise(row, Columns()))


def test_one_label_among_lists_is_a_bad_row():
    rows = [{"text": f"t {at}", "label": ["a", "b"][: 1 + at % 2]} for at in range(6)] + [{"text": "z", "label": "a"}]
    with pytest.raises(
        DataError, match="1 of 7 rows cannot be used: row 7: the label is one label, where most rows have a list"
    ):
        load_data(Data(train=rows), Events())
    found = load_data(Data(train=rows, on_bad_row="drop", split={"validation": 0}), Events())
    assert len(found.train) == 6 and sum(found.dropped.values()) == 1
