"""The profile: counted by hand on a few rows."""

import json

import pytest

from luthier.core.types import Chat, Labelled, Message, Pair, Text
from luthier.data.profile import count_scripts, profile_examples, text_of


def test_rows_lengths_and_repeats_by_hand():
    examples = [
        Labelled("1", "abcd", "x"),
        Labelled("2", "ABCD ", "x"),
        Labelled("3", "abcd", "y"),
        Labelled("4", "一二", "y"),
        Labelled("5", "a" * 20, "y"),
    ]
    found = profile_examples(examples)
    assert found["rows"] == 5 and found["kind"] == "Labelled"
    assert found["duplicates"] == 2, "case and spaces are folded"
    assert found["conflicts"] == 1, "one of them has another label"
    assert found["characters"] == {"median": 4, "p95": 17, "max": 20, "total": 35}
    assert list(found["labels"].items()) == [("y", 3), ("x", 2)] and found["imbalance"] == 1.5
    assert json.loads(json.dumps(found)) == found, "plain values only"


def test_every_label_of_a_row_is_counted():
    found = profile_examples([Labelled("1", "a", ("x", "y")), Labelled("2", "b", ("x",)), Labelled("3", "c", ())])
    assert found["labels"] == {"x": 2, "y": 1} and found["imbalance"] == 2.0


def test_scores_are_told_by_quantiles():
    found = profile_examples([Labelled(str(at), f"t {at}", float(at)) for at in range(5)])
    assert found["scores"] == {"min": 0.0, "p25": 1.0, "median": 2.0, "p75": 3.0, "max": 4.0}
    assert "labels" not in found


def test_turns_of_conversations():
    turns = (Message("user", "Hi"), Message("assistant", "Hello"))
    found = profile_examples([Chat("1", turns), Chat("2", turns * 2), Chat("3", turns * 3)])
    assert found["turns"] == {"median": 4, "max": 6} and found["characters"]["max"] == 26


@pytest.mark.parametrize(
    ("example", "text"),
    [
        (Text("", "a"), "a"),
        (Pair("", "a", "b"), "a\nb"),
        (Labelled("", "a", None), "a"),
        (Labelled("", "a", "x", "b"), "a\nb"),
        (Chat("", (Message("user", "a"), Message("assistant", "b"))), "a\nb"),
    ],
)
def test_the_text_of_an_example_is_all_of_it(example, text):
    assert text_of(example) == text


def test_scripts_by_their_share_of_letters():
    assert count_scripts(["ab 12 !?", "房间"]) == {"Latin": 0.5, "Han": 0.5}
    assert count_scripts(["かカ", "한", "я"]) == {"Kana": 0.5, "Hangul": 0.25, "Cyrillic": 0.25}
    assert count_scripts(["123 !?"]) == {}
    assert count_scripts(["a" * 200 + "я" * 800]) == {"Latin": 1.0}, "only the beginning of a text is looked at"
