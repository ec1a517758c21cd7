"""Rows with liked and disliked answers, in every form they come in, are one noun; bad ones say what is wrong."""

import json

import pytest

from luthier.choice.defaults import choose_objective
from luthier.core.errors import DataError
from luthier.core.events import Events
from luthier.core.types import Feedback, Labelled, Message, Pair, Preference
from luthier.data.load import Data, load_data
from luthier.data.profile import profile_examples
from luthier.data.shapes import Columns, recognise, to_example
from luthier.data.sources import Row
from luthier.data.split import group_rows

ASK, GOOD, BAD = Message("user", "Hi"), Message("assistant", "Hello"), Message("assistant", "Go away")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
USER, SAID, WORSE = ({"role": one.role, "content": one.content} for one in (ASK, GOOD, BAD))
HUMAN, GPT, GPT_WORSE = (
    {"from": who, "value": one.content} for who, one in (("human", ASK), ("gpt", GOOD), ("gpt", BAD))
)
PLAIN = Preference("", (ASK,), (GOOD,), (BAD,))
TALK = (ASK, GOOD, Message("user", "And now?"))
LATER = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And now?\n\nAssistant:"

PAIRS = [
    ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}, PLAIN),
    ({"prompt": [USER], "chosen": [SAID], "rejected": [WORSE]}, PLAIN),
    ({"chosen": [USER, SAID], "rejected": [USER, WORSE]}, PLAIN),
    ({"prompt": [USER], "chosen": [USER, SAID], "rejected": [USER, WORSE]}, PLAIN),
    (
        {"prompt": "Hi", "chosen": json.dumps([USER]), "rejected": "x"},
        Preference("", (ASK,), (Message("assistant", json.dumps([USER])),), (Message("assistant", "x"),)),
    ),
    # UltraFeedback, as it is used: a prompt beside whole conversations, the better one also as `messages`.
    (
        {"prompt": "Hi", "prompt_id": "7", "messages": [USER, SAID], "chosen": [USER, SAID], "rejected": [USER, WORSE]}
        | {"score_chosen": 8.0, "score_rejected": 3.0},
        PLAIN,
    ),
    ({"instruction": "Hi", "chosen_response": "Hello", "rejected_response": "Go away"}, PLAIN),
    # OpenAI
    (
        {"input": {"messages": [USER], "tools": [TOOL]}, "preferred_output": [SAID], "non_preferred_output": [WORSE]},
        Preference("", (ASK,), (GOOD,), (BAD,), (TOOL,)),
    ),
    # LLaMA-Factory
    ({"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "Go away"}, PLAIN),
    (
        {"instruction": "Add", "input": "1 2", "chosen": "3", "rejected": "4", "system": "S"},
        Preference(
            "",
            (Message("system", "S"), Message("user", "Add\n1 2")),
            (Message("assistant", "3"),),
            (Message("assistant", "4"),),
        ),
    ),
    ({"conversations": [HUMAN], "chosen": GPT, "rejected": GPT_WORSE}, PLAIN),
    ({"chosen_messages": [USER, SAID], "rejected_messages": [USER, WORSE]}, PLAIN),
    # HH-RLHF
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away"}, PLAIN),
    (
        {"chosen": f"{LATER} Go.", "rejected": f"{LATER} Stay."},
        Preference("", TALK, (Message("assistant", "Go."),), (Message("assistant", "Stay."),)),
    ),
    (
        {"prompt": LATER, "chosen": "Go.", "rejected": "Stay."},
        Preference("", TALK, (Message("assistant", "Go."),), (Message("assistant", "Stay."),)),
    ),
    (
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away", "margin": 2},
        Preference("", (ASK,), (GOOD,), (BAD,), (), 2.0),
    ),
]
VERDICTS = [
    ({"prompt": "Hi", "completion": "Hello", "label": True}, True),
    ({"prompt": [USER], "completion": [SAID], "label": False}, False),
    ({"prompt": "Hi", "completion": "Hello", "label": "False"}, False),
    ({"instruction": "Hi", "input": "", "output": "Hello", "kto_tag": True}, True),
    ({"conversations": [HUMAN, GPT], "kto_tag": False}, False),
    ({"messages": [USER, SAID], "label": True}, True),
]


def read(values: dict):
    row = Row(values, "x:1")
    shape, found = recognise(row, Columns())
    return shape, to_example(row, shape, found)


@pytest.mark.parametrize(("values", "meant"), PAIRS)
def test_pairs_are_known(values, meant):
    shape, found = read(values)
    assert shape == "preference" and isinstance(found, Preference)
    for name in ("prompt", "chosen", "rejected", "tools", "margin"):
        assert getattr(found, name) == getattr(meant, name), name
    assert choose_objective(found, "decoder")[0] == "dpo"


@pytest.mark.parametrize(("values", "good"), VERDICTS)
def test_verdicts_are_known(values, good):
    shape, found = read(values)
    assert shape == "feedback" and isinstance(found, Feedback)
    assert (found.prompt, found.answer, found.good) == ((ASK,), (GOOD,), good)
    assert choose_objective(found, "decoder")[0] == "kto"


def test_a_label_without_an_answer_is_a_class():
    assert isinstance(read({"text": "Hi", "label": True})[1], Labelled)
    assert isinstance(read({"prompt": "Hi", "completion": "Hello", "label": "greeting"})[1], Pair)


def test_scores_and_other_columns_are_kept():
    found = read(PAIRS[5][0])[1]
    assert found.meta["score_chosen"] == 8.0 and found.meta["prompt_id"] == "7"


BROKEN = [
    ({"prompt": "Hi", "chosen": "Hello", "rejected": "Hello "}, "'chosen' and 'rejected' are the same"),
    ({"prompt": "Hi", "chosen": "Hello", "rejected": "  "}, "'rejected' is empty"),
    ({"prompt": "Hi", "chosen": "Hello", "rejected": [{"role": "assistant", "content": ""}]}, "'rejected' is empty"),
    ({"chosen": [USER, SAID], "rejected": [{"role": "user", "content": "Ho"}, WORSE]}, "differ in turn 1"),
    ({"chosen": [USER, SAID], "rejected": [USER]}, "'rejected' holds no answer of its own"),
    ({"chosen": "Hello", "rejected": "Go away"}, "name it with columns.prompt"),
    ({"prompt": "Hi", "chosen": [SAID, USER], "rejected": [WORSE]}, "'chosen' is no answer of the assistant"),
    ({"prompt": "Hi", "completion": "Hello", "kto_tag": "maybe"}, "expected true or false"),
    ({"messages": [SAID], "kto_tag": True}, "no prompt before the answer"),
]


@pytest.mark.parametrize(("values", "why"), BROKEN)
def test_broken_rows_say_why(values, why):
    row = Row(values, "x:1")
    asked = Columns(good="kto_tag") if "kto_tag" in values else Columns()
    shape, found = recognise(row, asked)
    with pytest.raises(DataError, match=why):
        to_example(row, shape, found)


def test_bad_rows_are_refused_with_names_or_dropped_and_counted():
    rows = [{"prompt": f"Say {at}", "chosen": "yes", "rejected": "no"} for at in range(6)]
    rows[2]["rejected"] = "yes"
    with pytest.raises(DataError, match=r"^1 of 6 rows cannot be used: .*are the same"):
        load_data(Data(train=rows), Events())
    data = load_data(Data(train=rows, on_bad_row="drop"), Events())
    assert data.dropped == {"'chosen' and 'rejected' are the same": 1}
    assert len(data.train) + len(data.validation) == 5


def test_one_prompt_stays_on_one_side():
    rows = [
        Preference(f"t:{at}", (Message("user", f"Say {at // 2}"),), (GOOD,), (Message("assistant", str(at)),))
        for at in range(8)
    ]
    assert sorted(group_rows(rows)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    other = Preference("u", (Message("system", "S"), Message("user", "say  0")), (GOOD,), (BAD,))
    assert sorted(group_rows([*rows, other]))[0] == [0, 1, 8]


def test_the_profile_says_how_long_answers_are():
    rows = [Preference("a", (ASK,), (GOOD,), (BAD,)), Preference("b", (TALK[2],), (BAD,), (GOOD,))]
    found = profile_examples(rows)
    assert (found["chosen_characters"], found["rejected_characters"], found["longer_chosen"]) == (6, 6, 0.5)
    verdicts = profile_examples([Feedback("a", (ASK,), (GOOD,), True), Feedback("b", (ASK,), (BAD,), False)])
    assert (verdicts["good"], verdicts["bad"]) == (1, 1)
