"""The page of a run, read as a reader would: parsed, and asked for everything that it promises to hold."""

import json
from html.parser import HTMLParser

import pytest

from luthier.core.run import read_record
from luthier.reporting.charts import draw_lines
from luthier.reporting.page import write_report
from luthier.reporting.sections import show_time
from luthier.verbs.tune import tune
from tiny import tiny_model

HOSTILE = "<script>alert(1)</script>"
QUOTED = "ham \"x\" & 'y'"
STARTS = ("win a prize", "free cash call", "see you at seven", "lunch at noon")
VOID = {"meta", "br", "hr", "img", "link", "input"}
# What a row is, by objective: the hostile text stands in the text, in a label, in an answer.
LABELLED = [
    {"text": f"{STARTS[at % 4]} {at} {HOSTILE} &amp; 房间", "label": HOSTILE if at % 5 < 2 else QUOTED}
    for at in range(80)
]
ROWS = {
    "classify": LABELLED,
    "regress": [{"text": row["text"], "score": at / 7} for at, row in enumerate(LABELLED)],
    "sft": [
        {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": f"{HOSTILE} {at}"}]}
        for at, row in enumerate(LABELLED)
    ],
}
MODELS = {"classify": "bert", "regress": "bert", "sft": "qwen2"}


class Page(HTMLParser):
    """Tags with their attributes, the text, and which tags were left open."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = self.style = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text += data

    def count(self, tag: str, kind: str | None = None) -> int:
        return sum(
            name == tag and (kind is None or kind in (attributes.get("class") or "").split())
            for name, attributes in self.tags
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One finished run an objective, all on hostile rows."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_RUNS", str(root))
        for objective, rows in ROWS.items():
            tune(
                model=str(tiny_model(MODELS[objective])),
                data={"train": rows[:40], "validation": rows[40:50], "test": rows[50:]},
                objective=objective,
                name=objective,
                steps=12,
                batch_size=8,
                validate_every=4,
                learning_rate=5e-3,
            )
    return root


@pytest.fixture(params=ROWS)
def run(request, runs):
    """(directory, page) of each objective's run."""
    return runs / request.param, Page((runs / request.param / "report.html").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_but_itself(run):
    path, page = run
    source = (path / "report.html").read_text(encoding="utf-8")
    assert page.open == [], "every tag is closed"
    assert page.count("script") == page.count("link") == page.count("img") == page.count("iframe") == 0
    assert "@import" not in page.style and "url(" not in page.style
    for tag, attributes in page.tags:
        loads = {"src", "href", "srcset", "xlink:href", "data", "action"} & attributes.keys()
        assert not loads, f"<{tag} {loads}> would be fetched"
        assert not [name for name in attributes if name.startswith("on")]
    assert "http://" not in source and "https://" not in source


def test_hostile_rows_are_shown_and_never_run(run):
    path, page = run
    source = (path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source.lower() and HOSTILE in page.text
    assert "&amp;amp; 房间" in source, "what looks like an entity is text too"
    assert page.count("article", "example") > 0


def test_a_hostile_name_or_warning_does_not_escape_its_place(runs):
    record = json.loads((runs / "classify" / "record.json").read_text(encoding="utf-8"))
    evil = '"><img src=x onerror=alert(1)>'
    record["warnings"] = {evil: 2}
    record["lineage"]["model"] = record["choices"]["loss"] = record["machine"]["processor"] = evil
    copy = runs / "evil"
    (copy / "artefacts").mkdir(parents=True)
    (copy / "record.json").write_text(json.dumps(record), encoding="utf-8")
    details = {"confusion": {"labels": [evil, "b"], "counts": [[1, 0], [0, 1]]}, "notes": [evil]}
    (copy / "artefacts" / "details.json").write_text(json.dumps(details), encoding="utf-8")
    page = Page(write_report(copy).read_text(encoding="utf-8"))
    assert page.count("img") == 0 and page.text.count(evil) >= 6
    assert f"2 × {evil}" in page.text


def test_the_page_holds_what_was_asked_and_where_it_comes_from(run):
    path, page = run
    record = read_record(path)
    assert f"run:{record.id}" in page.text and "finished" in page.text
    for name, why in record.choices.items():
        assert name in page.text and why in page.text
    for setting in ("learning_rate", "batch_size", "data.split.seed", "optimizer.kind"):
        assert setting in page.text
    assert record.versions and all(f"{name}{number}" in page.text for name, number in record.versions.items())
    assert record.lineage["model"] in page.text and record.lineage["data"] in page.text
    assert record.data["fingerprint"][:16] in page.text and record.machine["processor"] in page.text
    assert f"time{show_time(record.seconds)}" in page.text.replace("\n", "")
    assert f"peak memory{record.peak_memory_bytes / 1e6:,.0f} MB" in page.text.replace("\n", "")


def test_the_page_holds_the_data_and_the_curves(run):
    path, page = run
    squeezed = page.text.replace("\n", "")
    assert "rows80" in squeezed and "train40" in squeezed and "validation10" in squeezed and "test30" in squeezed
    assert "Latin letters" in page.text and "Han letters" in page.text
    assert page.count("polyline", "curve") >= 3, "the losses of both parts, and the learning rate"
    assert "What the model saw" in page.text and page.count("div", "tokens") == 3
    if path.name == "sft":
        assert page.count("mark") > 3, "what is learned token by token is marked"
    else:
        assert "Validation metrics" in page.text


def test_the_page_holds_results_with_intervals_beside_baselines(run):
    path, page = run
    record = read_record(path)
    assert f"on {next(iter(record.metrics.values())).n} held-out rows" in page.text
    entries = [*record.metrics.values(), *(one for found in record.baselines.values() for one in found.values())]
    for one in entries:
        assert f"{one.value:.4f}" in page.text and f"{one.low:.4f} to {one.high:.4f}" in page.text
    assert page.count("svg", "interval") == len(entries)
    assert all(baseline in page.text for baseline in record.baselines) and "nan" not in page.text
    assert bool(record.baselines) == (path.name != "sft")
    assert page.count("tr", "own") == len(record.metrics)


def test_the_confusion_matrix_counts_every_row_once(runs):
    source = (runs / "classify" / "report.html").read_text(encoding="utf-8")
    table = source.partition('<table class="heat">')[2].partition("</table>")[0]
    cells = [int(cell.rpartition(">")[2]) for cell in table.replace("</td>", "\n").split("\n") if "--s:" in cell]
    assert len(cells) == 4 and sum(cells) == 30 and table.count("num right") == 2
    assert '<table class="heat">' not in (runs / "regress" / "report.html").read_text(encoding="utf-8")


def test_ten_right_and_ten_wrong_the_surest_first(runs, tmp_path):
    def row(at: int, right: bool) -> dict:
        sure = 0.5 + at / 100
        said = "a" if right else "b"
        shares = {said: sure, "c": 1 - sure}
        return {"id": f"row {at}", "input": f"text {at}", "output": said, "gold": "a", "probabilities": shares}

    def parts(rows: list[dict]) -> list[str]:
        lines = "".join(json.dumps(one) + "\n" for one in rows)
        (tmp_path / "artefacts" / "predictions.jsonl").write_text(lines, encoding="utf-8")
        return write_report(tmp_path).read_text(encoding="utf-8").split('<div class="')[1:]

    (tmp_path / "artefacts").mkdir()
    record = (runs / "classify" / "record.json").read_text(encoding="utf-8")
    (tmp_path / "record.json").write_text(record, encoding="utf-8")
    found = parts([row(at, at % 2 == 0) for at in range(40)])
    right, wrong = (next(part for part in found if part.startswith(f'{side}"')) for side in ("right", "wrong"))
    assert right.count("<article") == wrong.count("<article") == 10
    assert "Right (20)" in right and "Wrong (20), the surest first" in wrong
    assert [f"text {at}<" in wrong for at in (39, 21, 19)] == [True, True, False] and "89.0 %" in wrong
    # Texts without probabilities are in no order, and an empty answer is seen to be one.
    bare = [{"id": "row 1", "input": "x", "output": "", "gold": "y", "probabilities": None}]
    wrong = next(part for part in parts(bare) if part.startswith('wrong"'))
    assert "surest" not in wrong and "said <b>(empty)</b>" in wrong


def test_numbers_are_ordered_by_their_error(runs):
    page = (runs / "regress" / "report.html").read_text(encoding="utf-8")
    assert page.count("<article") == 20 and "Closest" in page and "Farthest" in page

    def errors(side: str) -> list[float]:
        part = page.partition(f'<div class="{side}">')[2].partition('<div class="')[0]
        said = [float(one.partition("<")[0]) for one in part.split("said <b>")[1:]]
        meant = [float(one.partition("<")[0]) for one in part.split("meant <b>")[1:]]
        return [abs(one - other) for one, other in zip(said, meant)]

    near, far = errors("right"), errors("wrong")
    assert len(near) == len(far) == 10
    assert near == pytest.approx(sorted(near), abs=2e-3) and far == pytest.approx(sorted(far)[::-1], abs=2e-3)
    assert max(near) <= min(far)


def test_a_run_that_failed_says_why_and_one_that_was_stopped_says_how_to_go_on(runs, tmp_path):
    record = json.loads((runs / "sft" / "record.json").read_text(encoding="utf-8"))
    for state, said in (("failed", "This run failed: it < broke"), ("interrupted", "tune --resume run:sft")):
        bare = {**record, "state": state, "error": "it < broke", "metrics": {}}
        (tmp_path / "record.json").write_text(json.dumps(bare), encoding="utf-8")
        assert said in Page(write_report(tmp_path).read_text(encoding="utf-8")).text


def test_charts_leave_out_what_cannot_be_drawn():
    assert draw_lines({"loss": [(1, float("nan"))]}, title="x") == ""
    one = draw_lines({"loss": [(1, 2.0), (2, float("inf")), (3, 1e-5)]}, title="a < b", mark=3)
    points = one.partition('points="')[2].partition('"')[0]
    assert points.count(",") == 2 and "nan" not in points and "inf" not in points
    assert "a &lt; b" in one and 'class="mark"' in one
    long = draw_lines({"loss": [(at, at % 7) for at in range(5000)]}, title="x")
    assert long.partition('points="')[2].partition('"')[0].count(",") == 300


@pytest.mark.parametrize(
    ("seconds", "said"), [(2.71, "2.7 s"), (75, "75 s"), (754, "12 min 34 s"), (7500, "2 h 5 min")]
)
def test_time_is_said_as_people_say_it(seconds, said):
    assert show_time(seconds) == said
