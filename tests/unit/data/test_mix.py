"""Several sources where one may stand: what is a source, what they are called, and what is wrong with them."""

import json

import pytest

from luthier.core.errors import ConfigError, DataError
from luthier.core.events import Events
from luthier.data.load import Data, load_data
from luthier.data.mix import Source, is_several, list_sources

CHAT = [
    {"messages": [{"role": "user", "content": f"q {at}"}, {"role": "assistant", "content": "a"}]} for at in range(30)
]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, CHAT)), encoding="utf-8")
    lines = "".join(f"what {at},it {at}\n" for at in range(20))
    (tmp_path / "faq.csv").write_text("q,a\n" + lines, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "value",
    [
        "chat.jsonl",
        [{"text": "a"}],
        [{"source": "a sentence", "target": "its translation"}],
        [{"source": "a sentence", "translation": "ein Satz"}],
        ["some text", "and more"],
        ["see data.csv for more"],
        [],
        ({"messages": []},),
    ],
)
def test_rows_stay_rows(value):
    assert list_sources(value) is value


@pytest.mark.parametrize(
    "value",
    [
        ["a.jsonl", "b.csv"],
        ["hub:owner/name", "b.csv"],
        ["sms_spam"],
        [{"source": "a.jsonl", "weight": 2}, {"source": [{"text": "x"}], "weight": 1}],
        [{"source": "a.jsonl"}, "b.csv"],
        [{"source": "rows", "weight": 1}],
    ],
)
def test_sources_are_sources(value):
    assert is_several(list_sources(value))
    assert list_sources(list_sources(value)) == list_sources(value)


def test_names():
    assert [one.name for one in list_sources(["x/a.jsonl", "b.csv"])] == ["a.jsonl", "b.csv"]
    assert [one.name for one in list_sources(["x/a.jsonl", "y/a.jsonl"])] == ["x/a.jsonl", "y/a.jsonl"]
    sources = [{"source": "x/a.jsonl", "name": "mine"}, {"source": [{"text": "t"}]}, "hub:o/n"]
    assert [one.name for one in list_sources(sources)] == ["mine", "source 2", "hub:o/n"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([{"source": "a.jsonl", "weight": 0}], "a weight is a number above 0, not 0"),
        ([{"source": "a.jsonl", "weight": -1}], "a weight is a number above 0, not -1"),
        ([{"source": "a.jsonl", "weight": [1, -1]}], "neither is negative"),
        ([{"source": "a.jsonl", "weight": [0, 0]}], "neither is negative"),
        ([{"source": "a.jsonl", "weight": [0, 1]}, {"source": "b.csv", "weight": [0, 2]}], "0 at one end of the run"),
        ([{"source": "a.jsonl", "wieght": 1}, "b.csv"], "did you mean 'weight'"),
        ([{"source": "a.jsonl", "weight": 1}, "b.csv"], "source 2: it has no weight, while others do"),
        (["a.jsonl", "a.jsonl"], "'a.jsonl' stands twice"),
        (["a.jsonl", 3], "source 2: expected a path"),
    ],
)
def test_mistakes_are_one_sentence(value, said):
    with pytest.raises(ConfigError, match=said) as caught:
        Data.make({"train": value})
    assert "\n" not in str(caught.value)


def test_weights_are_for_training():
    with pytest.raises(ConfigError, match="weights mix the training rows"):
        Data.make({"train": "a.jsonl", "validation": [{"source": "b.csv", "weight": 1}]})


def test_a_source_that_is_not_there(files):
    with pytest.raises(DataError, match=r"faqs\.csv: no such file"):
        load_data(Data(train=[str(files / "chat.jsonl"), str(files / "faqs.csv")]), Events())


def test_sources_of_two_shapes_are_split_one_by_one(files):
    faq = {"source": str(files / "faq.csv"), "columns": {"prompt": "q", "completion": "a"}, "weight": 1}
    data = Data(train=[{"source": str(files / "chat.jsonl"), "weight": [2, 1]}, faq])
    found = load_data(data, Events())
    assert found.shape == "messages, prompt_completion"
    assert {name: len(rows) for name, rows in found.by_source["train"].items()} == {"chat.jsonl": 27, "faq.csv": 18}
    assert {name: len(rows) for name, rows in found.by_source["validation"].items()} == {"chat.jsonl": 3, "faq.csv": 2}
    assert found.weights == {"chat.jsonl": (2.0, 1.0), "faq.csv": (1.0, 1.0)}
    assert all(row.id.split(":")[0] == name for name, rows in found.by_source["train"].items() for row in rows)
    assert Data.model_validate(data.model_dump(mode="json")) == data.model_copy(
        update={"train": [one.model_copy(update={"source": str(one.source)}) for one in data.train]}
    ), "what a run keeps says the same"


def test_equal_rows_of_two_sources_stay_on_one_side(files):
    found = load_data(Data(train=[{"source": CHAT, "name": "one"}, {"source": CHAT, "name": "two"}]), Events())
    held = {row.messages[0].content for row in found.validation}
    assert held and not held & {row.messages[0].content for row in found.train}


def test_files_that_are_called_alike_have_ids_of_their_own(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text(
            json.dumps({"text": "same words here"}) + "\n" + json.dumps({"text": name}), encoding="utf-8"
        )
    paths = [str(tmp_path / name / "a.jsonl") for name in ("x", "y")]
    found = load_data(Data(train=paths, split={"validation": 0}), Events())
    assert [row.id for row in found.train] == [f"{path}:{line}" for path in paths for line in (1, 2)]


def test_a_label_beside_lists_of_labels():
    one = [{"text": f"t {at}", "label": "ab"[at % 2]} for at in range(10)]
    other = [{"text": f"u {at}", "label": ["a"]} for at in range(4)]
    with pytest.raises(DataError, match="where most rows have one label; sources that are learned together"):
        load_data(Data(train=[{"source": one}, {"source": other}]), Events())


def test_a_source_alone_may_be_a_list_of_one():
    assert Source(source="a.jsonl", weight=2).weights == (2.0, 2.0)
