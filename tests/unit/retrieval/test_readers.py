"""Files to sections: what is kept, what is dropped, and what is named when it cannot be read."""

import json

import pytest

from luthier.core.errors import ConfigError, DataError
from luthier.core.events import Events
from luthier.retrieval.readers import files
from luthier.retrieval.readers.plain import read_markdown
from luthier.retrieval.readers.questions import Columns, read_questions
from luthier.retrieval.readers.web import read_html

GUIDE = """---
title: A guide
---
Before any heading.

# Shop

## Returns ##

Within 30 days.

```sh
# no heading
```

Delivery
--------
In two days.

### Nothing here
## 退货
七天内可以退货。
"""


def make_pdf(*pages: str) -> bytes:
    """A small PDF by hand, a page for each text; an empty text is a page without any."""
    kids = " ".join(f"{4 + 2 * at} 0 R" for at in range(len(pages)))
    parts = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for at, text in enumerate(pages):
        drawn = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        font = "/Resources << /Font << /F1 3 0 R >> >>"
        parts.append(f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] {font} /Contents {5 + 2 * at} 0 R >>")
        parts.append(f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream")
    content, places = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, 1):
        places.append(len(content))
        content += f"{number} 0 obj\n{part}\nendobj\n".encode()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    end = f"trailer << /Size {len(parts) + 1} /Root 1 0 R >>\nstartxref\n{len(content)}\n%%EOF\n"
    return content + f"xref\n0 {len(parts) + 1}\n0000000000 65535 f \n{table}{end}".encode()


def read(path, events=None, columns=None):
    return files.read_document(path, path.read_bytes(), columns or Columns(), events or Events())


def test_markdown_by_headings():
    found = read_markdown(GUIDE)
    assert [one.heading for one in found] == [
        (), ("Shop", "Returns"), ("Shop", "Delivery"), ("Shop", "Delivery", "Nothing here"), ("Shop", "退货")
    ]  # fmt: skip
    assert "# no heading" in found[1].text and "title" not in found[0].text
    assert "Nothing here" in found[3].text, "a heading by itself is found too"
    for one in found:
        assert GUIDE[one.start : one.start + len(one.text)] == one.text
        assert GUIDE.splitlines()[one.line - 1] == one.text.split("\n")[0]


def test_a_rule_under_prose_is_no_heading():
    found = read_markdown("one line\nand another\n---\nmore\n\n- an item\n---\nend\n")
    assert [one.heading for one in found] == [()]


def test_two_rules_are_no_front_matter():
    assert "kept" in read_markdown("---\n\nkept\n\n---\nmore\n")[0].text


def test_html_without_scripts_and_navigation():
    page = (
        "<html><head><title>Help</title><style>p{}</style><script>let a = '<p>no</p>'</script></head><body>"
        "<nav><ul><li>Home<nav>inner</nav></li></ul>menu</nav><h1>Shop</h1><p>We sell <b>violins</b> &amp; bows.<br>Daily.</p>"
        "<h2>Paying <i>by card</i></h2><ul><li>Visa</li><li>Master</li></ul><pre>a\n  b</pre><p hidden>secret</p>"
        "<div role='navigation'>more menu</div><h2>退货</h2><p>七天内。</p><footer>imprint</footer></body></html>"
    )
    found = read_html(page)
    assert [one.heading for one in found] == [
        ("Help", "Shop"),
        ("Help", "Shop", "Paying by card"),
        ("Help", "Shop", "退货"),
    ]
    assert found[0].text == "We sell violins & bows.\nDaily."
    assert found[1].text.startswith("Visa\n\nMaster") and "a\n  b" in found[1].text
    said = "\n\n".join(one.text for one in found)
    assert not any(word in said for word in ("menu", "inner", "secret", "imprint", "no</p>"))
    assert all(said[one.start : one.start + len(one.text)] == one.text for one in found)


def test_html_in_the_encoding_that_it_names(tmp_path):
    path = tmp_path / "old.html"
    path.write_bytes("<meta charset='gb2312'><p>营业时间</p>".encode("gb2312"))
    assert read(path)[0].text == "营业时间"


def test_pdf_by_pages(tmp_path):
    pytest.importorskip("pypdf")
    path = tmp_path / "a.pdf"
    path.write_bytes(make_pdf("First page.", "", "Third page."))
    events = Events()
    found = read(path, events)
    assert [(one.page, one.text.strip()) for one in found] == [(1, "First page."), (3, "Third page.")]
    assert sum(events.warnings.values()) == 1 and "pages hold no text" in next(iter(events.warnings))


@pytest.mark.parametrize("content", [b"%PDF-1.4\nnothing", b"\x00\x01\x02", make_pdf("cut")[:150]])
def test_a_damaged_pdf_is_named(tmp_path, content):
    pytest.importorskip("pypdf")
    path = tmp_path / "bad.pdf"
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as PDF"):
        read(path)


def test_a_pdf_of_no_bytes_holds_no_text(tmp_path):
    path = tmp_path / "zero.pdf"
    path.write_bytes(b"")
    assert read(path) == []


def test_questions_by_the_names_of_columns(tmp_path):
    path = tmp_path / "faq.csv"
    rows = 'How much?,"Ten,\nor eleven.",x\n怎么退货？,七天内退货。,y\n,lost,z\n'
    path.write_text("Question,Answer,Extra\n" + rows, encoding="utf-8")
    events = Events()
    found = read_questions(path, Columns(), events)
    assert [(one.question, one.text, one.line) for one in found] == [
        ("How much?", "Ten,\nor eleven.", 2), ("怎么退货？", "七天内退货。", 4)
    ]  # fmt: skip
    assert list(events.warnings) == ["faq.csv: rows are left out; faq.csv:5: the question or the answer is empty"]


def test_questions_by_columns_that_are_named(tmp_path):
    path = tmp_path / "faq.jsonl"
    rows = [{"title": "Opening hours", "body": "Nine to six."}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"no column of the question among title, body; name it with --set columns\.question"
    ):
        read_questions(path, Columns(), Events())
    found = read_questions(path, Columns(question="title", answer="body"), Events())
    assert [(one.question, one.text) for one in found] == [("Opening hours", "Nine to six.")]
    with pytest.raises(DataError, match="no column of the answer"):
        read_questions(path, Columns(question="title", answer="bod"), Events())


def test_files_of_other_kinds_are_counted_and_hidden_ones_left_aside(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("a.md", "deep/b.TXT", "c.png", "deep/d.png", ".hidden.md", ".git/e.txt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    events = Events()
    assert list(files.list_documents([tmp_path], events)) == ["a.md", "deep/b.TXT"]
    assert list(events.warnings.values()) == [2] and ".png" in next(iter(events.warnings))


def test_roots_that_are_missing_empty_or_clash(tmp_path):
    with pytest.raises(ConfigError, match="no such file or directory"):
        files.list_documents([tmp_path / "none"], Events())
    with pytest.raises(ConfigError, match="no file to read"):
        files.list_documents([tmp_path], Events())
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name, encoding="utf-8")
    found = files.list_documents([tmp_path / "one", tmp_path / "two"], Events())
    assert list(found) == ["a.txt", "two/a.txt"]
    (tmp_path / "x" / "two").mkdir(parents=True)
    (tmp_path / "x" / "two" / "a.txt").write_text("other", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"would both be cited as two/a\.txt"):
        files.list_documents([tmp_path / "one", tmp_path / "two", tmp_path / "x" / "two"], Events())


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "old.txt"
    path.write_bytes("营业时间".encode("gb18030"))
    with pytest.raises(DataError, match="not UTF-8; it reads as gb18030"):
        read(path)
