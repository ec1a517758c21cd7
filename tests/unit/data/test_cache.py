"""Encoded rows on the disk: they come back as they were, or are made again."""

from dataclasses import dataclass, field

import pytest

from luthier.core.events import Events
from luthier.core.types import Encoded, Text
from luthier.data import cache
from luthier.data.cache import NotStorable, entry_path, lengths_of, read_entry, write_entry
from luthier.models.load import load_model
from luthier.training import encoded
from luthier.training.encoded import encode_once, key_of
from luthier.training.objectives.causal import Loss
from luthier.training.objectives.pretrain import Pretrain
from luthier.training.objectives.sft import SFT
from luthier.training.world import ALONE
from tiny import tiny_model

ROWS = {
    "causal": [Encoded("a", (1, 2, 70_000), (0.0, 1.0, 0.25)), Encoded("乙", (5,), (0.0,), cut=3)],
    "packed": [
        Encoded("a", (1, 2, 3), (0.0, 1.0, 0.0), segments=(2, 1), parents=(-1, 0)),
        Encoded("b", (4, 5), (0.0, 1 / 3)),
    ],
    "seq2seq": [
        Encoded("a", (1, 2), target=(3,), target_weights=(1.0,)),
        Encoded("b", (), target=(4, 5), target_weights=(1.0, 0.1)),
    ],
    "classes": [Encoded("a", (1,), gold=0, weight=0.5), Encoded("b", (2,), gold=3)],
    "numbers": [Encoded("a", (1,), gold=0.1), Encoded("b", (2,), gold=2.0)],
    "several": [Encoded("a", (1,), gold=(0.0, 1.0)), Encoded("b", (2,), gold=(1.0, 1.0))],
    "one": [Encoded("a", (1, 2), (0.0, 1.0))],
}


@dataclass(frozen=True, slots=True)
class Asked(Encoded):
    """A row with more to it."""

    meta: dict = field(default_factory=dict)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ROWS)
def test_rows_come_back_as_they_were(name):
    rows = ROWS[name]
    found, notes = read_entry(write_entry("k", rows, [{"event": "warning", "message": "m", "count": 2}]))
    assert list(found) == rows and found[-1] == rows[-1] and found[:5] == rows
    assert [[type(one) for one in row.weights] for row in found] == [[float] * len(row.weights) for row in rows]
    assert lengths_of(found) == lengths_of(rows) == [len(row.ids) + len(row.target) for row in rows]
    assert notes == [{"event": "warning", "message": "m", "count": 2}]
    with pytest.raises(IndexError):
        found[len(rows)]


def test_what_json_cannot_give_back_is_refused(place, monkeypatch):
    with pytest.raises(NotStorable):
        write_entry("k", [Asked("a", (1,), meta={"x": (1, 2)}), Asked("b", (2,))], [])
    assert not list((place / "encoded").iterdir())
    monkeypatch.setattr("luthier.data.cache.import_module", lambda name: __import__("sys").modules[__name__])
    rows = [Asked("a", (1,), meta={"x": [1, 2]}), Asked("b", (2,))]
    assert list(read_entry(write_entry("k", rows, []))[0]) == rows


@pytest.mark.parametrize("damage", ["cut", "flip", "lose", "manifest"])
def test_a_damaged_entry_is_none(damage):
    path = write_entry("k", ROWS["causal"], [])
    file = path / ("manifest.json" if damage == "manifest" else "ids.npy")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "lose":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2])
    assert read_entry(path) is None
    assert list(read_entry(write_entry("k", ROWS["causal"], []))[0]) == ROWS["causal"]


def test_what_was_not_used_for_longest_goes_first(monkeypatch, place):
    import os

    for at, key in enumerate("abc"):
        write_entry(key, ROWS["causal"], [])
        os.utime(entry_path(key), (at, at))
    assert read_entry(entry_path("a")) is not None  # used just now
    size = sum(file.stat().st_size for file in entry_path("a").iterdir())
    monkeypatch.setattr(cache, "LIMIT", 3 * size)
    write_entry("d", ROWS["causal"], [])
    assert sorted(path.name for path in (place / "encoded").iterdir()) == ["a", "c", "d"]


class Counting(SFT):
    """Says something, and counts how often it is asked."""

    def encode(self, examples, model, events):
        calls.append(len(examples))
        events.warn("a row was odd", 3)
        return [Encoded(one.id, tuple(model.tokenizer(one.text)["input_ids"])) for one in examples]

    def measure(self, model, batch) -> tuple[Loss, None]:
        raise AssertionError


calls: list[int] = []


def test_encoded_once_and_said_again(monkeypatch, place):
    monkeypatch.setattr(encoded, "WORTH", 10)
    calls.clear()
    model, examples = load_model(str(tiny_model("llama"))), [Text("a", "one two"), Text("b", "three")]
    first, second = Events(), Events()
    rows = encode_once("train", examples, Counting(), model, ALONE, first)
    again = encode_once("train", examples, Counting(), model, ALONE, second)
    assert calls == [2] and list(again) == rows
    assert first.warnings == second.warnings == {"a row was odd": 3}
    assert "encoding" in second.choices and "encoding" not in first.choices
    (entry,) = (place / "encoded").iterdir()
    (entry / "ids.npy").write_bytes(b"")
    assert encode_once("train", examples, Counting(), model, ALONE, Events()) == rows and calls == [2, 2]
    monkeypatch.setattr(encoded, "WORTH", 1000)  # too little to look up
    encode_once("train", examples, Counting(), model, ALONE, Events())
    assert calls == [2, 2, 2]


def test_a_place_that_cannot_be_written_is_said(monkeypatch, place):
    monkeypatch.setattr(encoded, "WORTH", 10)
    (place / "encoded").write_text("no directory")
    events = Events()
    rows = encode_once(
        "train", [Text("a", "one two three")], Counting(), load_model(str(tiny_model("llama"))), ALONE, events
    )
    assert len(rows) == 1 and events.choices["cache"].startswith("off: the encoded rows could not be kept")


def test_the_key_knows_all_that_rows_depend_on():
    path = str(tiny_model("llama"))
    model, text = load_model(path), [Text("a", "one")]
    base = key_of(text, Pretrain(), model)
    assert key_of(text, Pretrain(), load_model(path)) == base
    others = [
        key_of([Text("b", "one")], Pretrain(), model),
        key_of([Text("a", "two")], Pretrain(), model),
        key_of(text, Pretrain(documents="joined"), model),
        key_of(text, SFT(), model),
        key_of(text, Pretrain(), load_model(path, max_length=64)),
        key_of(text, Pretrain(), load_model(path, template="raw")),
        key_of(text, Pretrain(), load_model(path, truncate=True)),
        key_of(text, Pretrain(), load_model(path, learn="last")),
        key_of(text, Pretrain(), load_model(str(tiny_model("qwen2")))),
    ]
    assert len({base, *others}) == 1 + len(others)
