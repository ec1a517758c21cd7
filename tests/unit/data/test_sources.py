"""Rows in: every kind of file holds the same rows, and every mistake is named with its file and line."""

import gzip
import json
import sys
import types

import pytest

from luthier.core.errors import DataError, MissingExtra
from luthier.core.events import Events
from luthier.data.load import Data, load_data, load_examples
from luthier.data.sources import read_rows
from luthier.data.sources.streams import START, stream_rows

ROWS = [{"text": 'win, "now"\nfree', "label": "spam"}, {"text": "你好，世界", "label": "ham"}]


def refuse(where: str, why: str) -> None:
    raise AssertionError(f"{where}: {why}")


def write(path, kind: str) -> None:
    if kind == "jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    elif kind == "json":
        text = json.dumps(ROWS)
    elif kind == "parquet":
        import pandas

        pandas.DataFrame(ROWS).to_parquet(path)
        return
    else:
        import pandas

        text = pandas.DataFrame(ROWS).to_csv(index=False, sep="\t" if kind == "tsv" else ",")
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_holds_the_same_rows(kind, packed, tmp_path):
    path = tmp_path / f"rows.{kind}"
    write(path, kind)
    if packed:
        whole = path.with_suffix(path.suffix + ".gz")
        whole.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        path = whole
    assert [row.values for row in read_rows(path, bad=refuse)] == ROWS


def test_a_text_file_is_lines_or_paragraphs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n", encoding="utf-8")
    assert [row.values["text"] for row in read_rows(path, bad=refuse)] == ["one", "two"]
    path.write_text("one\ntwo\n\nthree\n", encoding="utf-8")
    assert [(row.values["text"], row.where) for row in read_rows(path, bad=refuse)] == [
        ("one\ntwo", "a.txt:1"),
        ("three", "a.txt:4"),
    ]


def test_a_packed_text_file_is_the_same(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("one\n你好\r\n".encode()))
    assert [row.values["text"] for row in read_rows(path, bad=refuse)] == ["one", "你好"]


MARKED = {
    "csv": "text,label\r\nx,a\r\ny\r\n",
    "tsv": "text\tlabel\r\nx\ta\r\ny\r\n",
    "jsonl": '\r\n{"text": "x", "label": "a"}\r\n{"text": y}\r\n',
    "json": '[{"text": "x", "label": "a"}, 1]',
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", MARKED)
def test_a_byte_order_mark_is_no_part_of_the_rows(kind, packed, tmp_path):
    """Excel puts one before CSV, and editors of Windows before any text; lines are counted as without it."""
    path = tmp_path / (f"a.{kind}.gz" if packed else f"a.{kind}")
    content = MARKED[kind].encode("utf-8-sig")
    path.write_bytes(gzip.compress(content) if packed else content)
    wrong = []
    for found in (read_rows(path, bad=lambda where, why: wrong.append(where)), streamed(path, kind, wrong)):
        assert [row.values for row in found] == [{"text": "x", "label": "a"}]
    assert set(wrong) == {f"{path.name}:{2 if kind == 'json' else 3}"}


def streamed(path, kind, wrong):
    """The same rows as they come; of JSON as a whole there is no such reading."""
    if kind == "json":
        return read_rows(path, bad=refuse_none)
    return [row for row, _ in stream_rows(path, START, lambda where, why: wrong.append(where))]


def refuse_none(where: str, why: str) -> None:
    """What is wrong was seen before."""


def test_a_directory_is_its_files_in_order(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n"third"', encoding="utf-8")
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "README.md").write_text("no data", encoding="utf-8")
    found = [(row.values["text"], row.where) for row in read_rows(tmp_path, bad=refuse)]
    assert found == [("first", "a.txt:1"), ("second", "b.jsonl:1"), ("third", "b.jsonl:2")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file in this directory"):
        list(read_rows(tmp_path / "empty", bad=refuse))


def test_a_line_of_csv_is_counted_by_lines_of_the_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"two\nlines",a\nx,b\n', encoding="utf-8")
    assert [row.where for row in read_rows(path, bad=refuse)] == ["a.csv:2", "a.csv:4"]


def test_a_table_in_memory_is_the_same(tmp_path):
    import pandas

    assert [row.values for row in read_rows(pandas.DataFrame(ROWS), bad=refuse)] == ROWS
    assert [row.values for row in read_rows(["a", "b"], bad=refuse)] == [{"text": "a"}, {"text": "b"}]


BROKEN = [
    ("a.jsonl", b"", "the file is empty"),
    ("a.jsonl", b"  \n ", "the file is empty"),
    ("a.jsonl", b'{"text": "x", "label": "a"}\n{"text": \n', "a.jsonl:2: broken JSON"),
    ("a.jsonl", b'{"text": "x"}\n[1]\n', "a.jsonl:2: expected an object"),
    ("a.json", b'{"text": ', "broken JSON"),
    ("a.json", b'{"a": 1}', "expected a list of rows"),
    ("a.csv", b"text,label\nx\n", "a.csv:2: 1 values for 2 columns"),
    ("a.csv", b"text,text\nx,y\n", "stands twice"),
    ("a.csv", b"text,label\n", "no rows"),
    ("a.jsonl.gz", b"\x1f\x8b\x08nonsense", "the gzip file is damaged"),
    ("a.parquet", b"PAR1 no parquet at all", "cannot be read as parquet"),
    ("a.xlsx", b"x", "unknown kind of file"),
    ("a.jsonl", '{"text": "房间很干净"}'.encode("gb18030"), "reads as gb18030"),
    ("a.jsonl", b'{"body": "x"}', "no known shape fits the columns 'body'"),
    ("a.jsonl", b'{"text": "x", "label": "a"}\n{"text": "y"}\n', "a.jsonl:2: the column 'label' is missing"),
    ("a.jsonl", b'{"text": "", "label": "a"}', "'text' is empty"),
    ("a.jsonl", b'{"messages": [{"role": "usr", "content": "x"}]}', "did you mean 'user'"),
    ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}', "no turn of the assistant"),
    ("a.jsonl", b'{"text": "x", "score": "high"}', "expected a number"),
]


@pytest.mark.parametrize(("name", "content", "said"), BROKEN)
def test_a_mistake_is_one_sentence_with_its_place(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        load_data(Data(train=str(tmp_path / name)), Events())


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("{}", encoding="utf-8")

    def deny(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", deny)
    with pytest.raises(DataError, match="cannot be read \\(Permission denied\\)"):
        load_examples(str(path), Data(train=str(path)), Events())


def test_dropped_rows_are_counted_by_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"text {at}", "label": "ab"[at % 2]} for at in range(20)]
    lines = [json.dumps(row) for row in rows] + ['{"text": "", "label": "a"}', "{", '{"text": " ", "label": "b"}']
    path.write_text("\n".join(lines), encoding="utf-8")
    events = Events()
    found = load_data(Data(train=str(path), on_bad_row="drop"), events)
    assert sum(found.dropped.values()) == 3 and found.dropped["'text' is empty"] == 2
    assert found.profile["rows"] == 20 and sum(events.warnings.values()) == 3


def test_a_label_of_the_test_part_alone(tmp_path):
    train = [{"text": f"t {at}", "label": "ab"[at % 2]} for at in range(10)]
    data = Data(train=train, test=[{"text": "z", "label": "c"}], split={"validation": 0})
    with pytest.raises(DataError, match="the label 'c' occurs in the test part but never in training"):
        load_data(data, Events())


def test_one_class_only():
    data = Data(train=[{"text": f"t {at}", "label": "a"} for at in range(10)])
    with pytest.raises(DataError, match="all 9 training rows have the label 'a'"):
        load_data(data, Events())


def test_pandas_marks_of_what_is_missing_are_bad_rows():
    import pandas

    table = pandas.DataFrame({"text": ["a", None, "c", "d"], "label": ["x", "y", None, "y"]})
    with pytest.raises(DataError, match="2 of 4 rows cannot be used: row 2: 'text' is missing; row 3: 'label' holds"):
        load_data(Data(train=table), Events())
    found = load_data(Data(train=table, on_bad_row="drop", split={"validation": 0}), Events())
    assert len(found.train) == 2 and sum(found.dropped.values()) == 2


@pytest.mark.parametrize("source", [{"train": []}, 3, b"text"])
def test_what_is_no_table_is_said(source):
    with pytest.raises(DataError, match="is no table of rows"):
        list(read_rows(source, bad=refuse))


def test_many_bad_rows_are_named_and_then_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' + "{\n" * 9, encoding="utf-8")
    with pytest.raises(
        DataError, match=r"9 of 10 rows cannot be used: a\.jsonl:2: .*a\.jsonl:6: .*; and 4 more\. Mend them"
    ):
        load_data(Data(train=str(path)), Events())


def test_a_data_set_of_the_hub_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'luthier\[hub-data\]'"):
        list(read_rows("hub:owner/name", bad=refuse))


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hub:owner/name", ("owner/name", None, "train")),
        ("hub:owner/name:test", ("owner/name", None, "test")),
        ("hub:owner/name:zh:test", ("owner/name", "zh", "test")),
    ],
)
def test_a_data_set_of_the_hub(source, asked, monkeypatch):
    seen = []

    def load_dataset(name, config, *, split):
        seen.append((name, config, split))
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows = list(read_rows(source, bad=refuse))
    assert seen == [asked] and [row.values for row in rows] == ROWS and rows[1].where == f"{source}:2"


def test_a_data_set_that_the_hub_does_not_give(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("cannot reach the hub\nsecond line")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"cannot be had \(cannot reach the hub\); HF_ENDPOINT names a mirror"):
        list(read_rows("hub:owner/name", bad=refuse))
    with pytest.raises(DataError, match="write it as hub:owner/name"):
        list(read_rows("hub:a/b:c:d:e", bad=refuse))


def test_parquet_without_its_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtra, match=r"pip install 'luthier\[parquet\]'"):
        list(read_rows(tmp_path / "a.parquet", bad=refuse))
