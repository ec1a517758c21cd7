"""Streams: the rows that reading it all gives, from any place; windows, mixtures, and what is passed over."""

import gzip
import json
import sys
import tracemalloc
import types
from dataclasses import asdict, replace
from itertools import islice

import pytest

from luthier.core.errors import DataError
from luthier.core.events import Events
from luthier.core.types import Encoded
from luthier.data.feed import StreamedRows
from luthier.data.load import Data, load_data
from luthier.data.sources import read_rows
from luthier.data.sources.streams import START, stream_rows

LINES = [{"text": f'row {at}, "so"\nit is', "label": "ab"[at % 2]} for at in range(23)]


def refuse(where: str, why: str) -> None:
    raise AssertionError(f"{where}: {why}")


def write(path, kind: str) -> None:
    import pandas

    if kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in LINES), encoding="utf-8-sig")
    elif kind == "parquet":
        pandas.DataFrame(LINES).to_parquet(path)
    elif kind == "txt":
        path.write_text("one\ntwo\n\nthree\n\n\nfour", encoding="utf-8")
    else:
        text = pandas.DataFrame(LINES).to_csv(index=False, sep="\t" if kind == "tsv" else ",")
        path.write_text(text, encoding="utf-8-sig")


@pytest.mark.parametrize(
    ("kind", "packed"),
    [(kind, packed) for kind in ("jsonl", "csv", "tsv", "txt") for packed in (False, True)] + [("parquet", False)],
)
def test_a_stream_gives_the_rows_of_the_file_from_every_place(kind, packed, tmp_path):
    path = tmp_path / f"rows.{kind}"
    write(path, kind)
    if packed:
        whole = path.with_suffix(path.suffix + ".gz")
        whole.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    rows = list(read_rows(tmp_path, bad=refuse))
    found = list(stream_rows(tmp_path, START, refuse))
    assert [row for row, _ in found] == rows and len(rows) > 2
    for number, (_, place) in enumerate(found, 1):
        assert list(stream_rows(tmp_path, place, refuse)) == found[number:]


def test_a_stream_over_the_files_of_a_folder(tmp_path):
    for name, kind in (("a.jsonl", "jsonl"), ("b.csv", "csv"), ("c.txt", "txt")):
        write(tmp_path / name, kind)
    found = list(stream_rows(tmp_path, START, refuse))
    assert [row for row, _ in found] == list(read_rows(tmp_path, bad=refuse))
    assert all(list(stream_rows(tmp_path, place, refuse)) == found[at + 1 :] for at, (_, place) in enumerate(found))


def test_text_of_lines_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\x0bthree\n", encoding="utf-8")
    assert [row for row, _ in stream_rows(path, START, refuse)] == list(read_rows(path, bad=refuse))


def test_python_sources_stream():
    for source in (LINES, lambda: iter(LINES)):
        found = list(stream_rows(source, START, refuse))
        assert [row.values for row, _ in found] == LINES
        assert list(stream_rows(source, found[9][1], refuse)) == found[10:]
    with pytest.raises(DataError, match="give a function that returns one"):
        list(stream_rows(iter(LINES), START, refuse))


def test_the_hub_streams(monkeypatch):
    class Table:
        def __init__(self, rows):
            self.rows = rows

        def skip(self, count):
            return Table(self.rows[count:])

        def __iter__(self):
            return iter(self.rows)

    def load_dataset(name, config, *, split, streaming):
        assert streaming
        return Table(LINES)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = list(stream_rows("hub:o/n", START, refuse))
    assert [row.values for row, _ in found] == LINES and found[1][0].where == "hub:o/n:2"
    assert list(stream_rows("hub:o/n", found[4][1], refuse)) == found[5:]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"[]", "cannot be read row by row"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', "not UTF-8"),
        ("a.csv", b'text\n"x', "broken quoting"),
        ("a.jsonl.gz", b"\x1f\x8b\x08nonsense", "the gzip file is damaged"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl:2: broken JSON"),
    ],
)
def test_a_mistake_is_one_sentence(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    data = Data(train=str(tmp_path / name), stream=True, split={"validation": 0})
    with pytest.raises(DataError, match=said):
        load_data(data, Events())


def test_a_stream_goes_round_and_passes_over_what_is_held_out():
    rows = [{"text": f"t {at}", "label": "ab"[at % 2]} for at in range(40)]
    data = Data(
        train=[*rows, {"text": " T  3", "label": "b"}], stream=True, shuffle_buffer=20, split={"validation": 0.2}
    )
    events = Events()
    found = load_data(data, events)
    assert len(found.train) == 16 and len(found.validation) == 4
    assert events.choices["stream"].startswith("20 rows looked at")
    held = {row.text for row in found.validation}
    taken, position = found.stream.take(found.stream.start(), 100, 0.0)
    texts = [row.text for _, row in taken]
    assert not held & set(texts)
    a_pass = [row["text"] for row in rows if row["text"] not in held] + ([] if "t 3" in held else [" T  3"])
    assert texts == (a_pass * 3)[:100] and position.marks[0][0] == 100 // len(a_pass)


def test_groups_are_held_out_whole():
    rows = [{"text": f"t {at}", "label": "ab"[at % 2], "who": str(at % 10)} for at in range(100)]
    split = {"method": "grouped", "by": "who", "validation": 0.3}
    found = load_data(Data(train=rows, stream=True, shuffle_buffer=50, split=split), Events())
    held = {row.meta["who"] for row in found.validation}
    taken, _ = found.stream.take(found.stream.start(), 200, 0.0)
    assert held and not held & {row.meta["who"] for _, row in taken}


def stream_of(*sizes: int, weights=None, **settings):
    sources = [
        {"source": [{"text": f"{name} {at}"} for at in range(size)], "name": name} for name, size in zip("abc", sizes)
    ]
    if weights:
        sources = [{**one, "weight": weight} for one, weight in zip(sources, weights)]
    data = Data(train=sources, stream=True, split={"validation": 0}, **settings)
    return load_data(data, Events()).stream


def test_sources_follow_one_another_or_are_mixed():
    one = [row.text for _, row in stream_of(3, 2).take(stream_of(3, 2).start(), 7, 0.0)[0]]
    assert one == ["a 0", "a 1", "a 2", "b 0", "b 1", "a 0", "a 1"]
    mixed = stream_of(3, 20, weights=(1, 3))
    taken, position = mixed.take(mixed.start(), 16, 0.0)
    names = [name for name, _ in taken]
    assert names.count("a") == 4 and [row.text for name, row in taken if name == "a"] == ["a 0", "a 1", "a 2", "a 0"]
    assert mixed.take(position, 8, 0.0) == stream_of(3, 20, weights=(1, 3)).take(position, 8, 0.0)


def test_limit_is_of_each_source():
    stream = stream_of(5, 9, limit=2)
    assert [row.text for _, row in stream.take(stream.start(), 5, 0.0)[0]] == ["a 0", "a 1", "b 0", "b 1", "a 0"]


def test_bad_rows_of_a_stream_are_named_or_counted():
    rows = [{"text": f"t {at}", "label": "ab"[at % 2]} for at in range(9)]
    rows += [{"text": "", "label": "a"}, {"text": "x", "label": ["a"]}]
    for drop in (False, True):
        data = Data(
            train=rows, stream=True, shuffle_buffer=8, split={"validation": 0}, on_bad_row="drop" if drop else "refuse"
        )
        stream = load_data(data, Events()).stream
        if drop:
            assert len(stream.take(stream.start(), 30, 0.0)[0]) == 30
            assert stream.noted == {"rows of the stream dropped because they cannot be used": 2}
        else:
            with pytest.raises(DataError, match="row 10: 'text' is empty; mend this row of the stream"):
                stream.take(stream.start(), 10, 0.0)


def test_a_pass_without_a_row_ends():
    data = Data(train=[{"text": "a"}] * 4 + [{"text": "b"}], stream=True, split={"validation": 0})
    stream = load_data(data, Events()).stream
    stream.hold_out(load_data(data, Events()).train)
    with pytest.raises(DataError, match="a whole pass gave no row"):
        stream.take(stream.start(), 1, 0.0)


def encode(examples, events):
    """Every example a row, or for texts that say so several rows in one."""
    rows = [Encoded(one.id, tuple(range(len(one.text))), (1.0,) * len(one.text)) for one in examples]
    if not examples[0].text.startswith("a"):
        return rows
    return [replace(rows[at], ids=rows[at].ids * 2) for at in range(0, len(rows), 3)]


def feed_of(stream, **changes) -> StreamedRows:
    settings = {"batch_size": 4, "steps": 40, "seed": 3, "window": 10, "shuffled": True, "by_length": True}
    return StreamedRows(stream, encode, **(settings | changes))


@pytest.mark.parametrize("weights", [None, (1, 2), ((1, 0), (0, 1))])
@pytest.mark.parametrize("shuffled", [True, False])
def test_a_feed_goes_on_exactly_where_it_stood(weights, shuffled):
    whole, places = [], []
    feed = feed_of(stream_of(17, 29, weights=weights), shuffled=shuffled)
    for rows in feed.steps(0, None, Events()):
        whole.append(rows)
        places.append(json.loads(json.dumps(feed.place)))
    assert len(whole) == 40 and all(len(rows) == 4 for rows in whole)
    assert {row.source for rows in whole for row in rows} == {"a", "b"}
    for done in (1, 2, 3, 9, 25, 39):
        place = {**places[done - 1]}
        place["marks"] = [(*mark[:3], tuple(mark[3])) for mark in place["marks"]]
        place["left"] = [
            {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()} for row in place["left"]
        ]
        again = feed_of(stream_of(17, 29, weights=weights), shuffled=shuffled)
        assert list(again.steps(done, place, Events())) == whole[done:]


def test_a_feed_in_the_given_order_is_the_stream():
    feed = feed_of(_texts(7), shuffled=False, steps=7)
    assert [row.id for rows in feed.steps(0, None, Events()) for row in rows] == [
        f"row {at % 7 + 1}" for at in range(28)
    ]


def _texts(size: int):
    rows = [{"text": f"t {at}"} for at in range(size)]
    return load_data(Data(train=rows, stream=True, split={"validation": 0}), Events()).stream


def test_every_row_of_a_window_comes_once():
    feed = feed_of(_texts(1000), window=50, steps=25)
    ids = [row.id for rows in feed.steps(0, None, Events()) for row in rows]
    assert len(set(ids)) == 100 and ids != sorted(ids)
    # Two windows of 50 are 100 rows; two left over from the first go with the second.
    assert len({int(one.split()[1]) for one in ids[:48]} & set(range(1, 51))) == 48


def test_rows_that_cannot_be_encoded_are_errors_or_counted():
    def picky(examples, events):
        bad = [one.id for one in examples if one.text.endswith("5")]
        if bad:
            raise DataError(f"{bad[0]}: too long")
        return [Encoded(one.id, (1, 2), (0.0, 1.0), cut=1) for one in examples]

    rows = [{"text": f"t {at}"} for at in range(30)]
    settings = {"batch_size": 4, "steps": 6, "seed": 0, "window": 15, "shuffled": True, "by_length": True}
    for drop in ("refuse", "drop"):
        data = Data(train=rows, stream=True, split={"validation": 0}, on_bad_row=drop)
        feed, events = StreamedRows(load_data(data, Events()).stream, picky, **settings), Events()
        if drop == "refuse":
            with pytest.raises(DataError, match="row 6: too long"):
                list(feed.steps(0, None, events))
        else:
            assert len(list(feed.steps(0, None, events))) == 6
            assert events.warnings["rows of the stream dropped because they cannot be learned from"] == 3
            assert events.warnings["texts of the stream cut to the context length"] == 27


def test_a_feed_may_be_left_at_any_time():
    feed = feed_of(_texts(50))
    steps = feed.steps(0, None, Events())
    assert len(list(islice(steps, 3))) == 3
    steps.close()
    assert asdict(next(feed.steps(0, None, Events()))[0])


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for at in range(1000):
            file.write(json.dumps({"text": f"t {at} " + "word " * 2000}) + "\n")
    assert path.stat().st_size > 10e6
    tracemalloc.start()
    stream = load_data(Data(train=str(path), stream=True, shuffle_buffer=20), Events()).stream

    def short(examples, events):
        return [Encoded(one.id, (1, 2), (0.0, 1.0)) for one in examples]

    feed = StreamedRows(stream, short, batch_size=4, steps=200, seed=0, window=20, shuffled=True, by_length=True)
    seen = {row.id for rows in feed.steps(0, None, Events()) for row in rows}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(seen) == 800 and peak < 4e6
