"""An index on the disk: made, found in, brought up to date, and broken on purpose."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from luthier.core.errors import ConfigError, DataError, ModelError, RunError
from luthier.core.events import Events
from luthier.retrieval.answer import retrieve
from luthier.retrieval.build import build_index
from luthier.retrieval.chunks import Chunking
from luthier.retrieval.embed import Encoder, load_encoder
from luthier.retrieval.measure import draw_halves, group
from luthier.retrieval.passage import Passage
from luthier.retrieval.search import open_index, search
from luthier.retrieval.store import open_stored
from tiny import tiny_model

FILES = {
    "returns.md": "# Shop\n\n## Returns\n\nYou can return goods within thirty days. Keep the receipt.\n",
    "hours.txt": "We are open from nine to six. On Sundays the shop is closed.\n",
    "退货.txt": "收到商品七天内可以退货。运费由买家承担。\n",
    "faq.csv": "question,answer\nDo you repair violins?,Yes we do.\n可以修琴弓吗？,可以修。\n",
}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(str(tiny_model("bert")))


@pytest.fixture
def docs(tmp_path):
    (tmp_path / "docs").mkdir()
    for name, text in FILES.items():
        (tmp_path / "docs" / name).write_text(text, encoding="utf-8")
    return tmp_path / "docs"


class Counting(Encoder):
    """Keeps the passages that it was asked to embed."""

    seen: list[str] = []  # noqa: RUF012

    def embed(self, texts, *, asking=False, **others):
        if not asking:
            Counting.seen += texts
        return super().embed(texts, asking=asking, **others)


@pytest.fixture
def counting(encoder):
    Counting.seen = []
    return Counting(encoder.model, encoder.pooling)


@pytest.mark.parametrize("meaning", [False, True])
def test_what_is_written_is_read_again(docs, tmp_path, encoder, meaning):
    used = encoder if meaning else None
    built = build_index(tmp_path / "index", [docs], encoder=used)
    assert (built.files, built.passages, built.unchanged, built.left_out) == (4, 5, 0, {})
    assert built.embedded == (5 if meaning else 0)
    index = open_index(tmp_path / "index", encoder=used)
    passages = index.stored.all_passages()
    for one in passages:
        text = FILES[one.file]
        assert one.question is not None or text[one.start : one.end] == one.text
    assert [one.citation for one in passages] == [
        "faq.csv, line 2", "faq.csv, line 3", "hours.txt, line 1", "returns.md › Shop › Returns, line 5", "退货.txt, line 1"
    ]  # fmt: skip
    for question, file in (("return the goods", "returns.md"), ("怎么退货", "退货.txt")):
        found = search(index, question, 5)
        # The vectors of random weights may put any passage first.
        best = next(one for one in found if one.by_words == 1)
        assert best.passage.file == file and best.bm25 > 0 and (meaning or best == found[0])
        assert (best.cosine is not None) == meaning
    if meaning:
        vectors = encoder.embed([one.compared for one in passages])
        assert np.allclose(index.stored.vectors_NE, vectors, atol=1e-6)
        by_hand = [1 / (60 + one.by_words) if one.by_words else 0 for one in found]
        assert [one.fused for one in found] == pytest.approx(
            [a + 1 / (60 + one.by_meaning) for a, one in zip(by_hand, found)]
        )


def test_a_single_character_and_no_word_at_all(docs, tmp_path):
    build_index(tmp_path / "index", [docs], encoder=None)
    index = open_index(tmp_path / "index")
    assert search(index, "琴", 5)[0].passage.question == "可以修琴弓吗？"
    assert search(index, "zebra", 5) == [] and not retrieve(index, "zebra").known
    with pytest.raises(ConfigError, match="the question is empty"):
        search(index, "  ")


def test_only_what_changed_is_embedded_again(docs, tmp_path, counting):
    path = tmp_path / "index"
    build_index(path, [docs], encoder=counting)
    before = open_stored(path)
    kept = np.array(before.vectors_NE)
    Counting.seen = []
    (docs / "hours.txt").write_text("Open on request.", encoding="utf-8")
    (docs / "returns.md").unlink()
    shutil.move(docs / "退货.txt", docs / "zz.txt")
    built = build_index(path, [docs], encoder=counting)
    assert (built.embedded, built.unchanged, built.removed) == (1, 1, 2)
    assert Counting.seen == ["Open on request."], "a file that moved keeps its vector too"
    now = open_stored(path)
    assert [one.file for one in now.all_passages()] == ["faq.csv", "faq.csv", "hours.txt", "zz.txt"]
    assert (now.vectors_NE[[0, 1, 3]] == kept[[0, 1, 4]]).all()
    whole = tmp_path / "anew"
    build_index(whole, [docs], encoder=counting)
    anew = open_stored(whole)
    assert np.allclose(anew.vectors_NE, now.vectors_NE, atol=1e-6) and anew.all_passages() == now.all_passages()
    assert anew.words.score("open 琴").tolist() == now.words.score("open 琴").tolist()


def test_a_reader_of_the_old_index_goes_on(docs, tmp_path):
    path = tmp_path / "index"
    build_index(path, [docs], encoder=None)
    old = open_index(path)
    (docs / "hours.txt").write_text("Closed for good.", encoding="utf-8")
    build_index(path, [docs], encoder=None)
    assert search(old, "closed on Sundays")[0].passage.text.startswith("We are open")
    assert search(open_index(path), "closed")[0].passage.text == "Closed for good."
    assert len(list(path.glob("part-*"))) == 1


def test_other_settings_index_all_anew(docs, tmp_path, counting):
    path = tmp_path / "index"
    build_index(path, [docs], encoder=counting)
    events = Events()
    built = build_index(path, [docs], encoder=counting, chunking=Chunking(size=8, overlap=0), events=events)
    assert built.unchanged == 0 and built.passages > 5 and "chunking changed" in events.choices["index"]
    built = build_index(path, [docs], encoder=None, events=events)
    assert built.unchanged == 0 and "encoder changed" in events.choices["index"]


def test_vectors_in_half_precision(docs, tmp_path, encoder):
    build_index(tmp_path / "index", [docs], encoder=encoder, vectors="float16")
    index = open_index(tmp_path / "index", encoder=encoder)
    assert index.stored.vectors_NE.dtype == np.float16
    build_index(tmp_path / "full", [docs], encoder=encoder)
    full = open_index(tmp_path / "full", encoder=encoder)
    assert search(index, "violin")[0].cosine == pytest.approx(search(full, "violin")[0].cosine, abs=5e-3)


def test_files_that_cannot_be_read_are_named(docs, tmp_path):
    pytest.importorskip("pypdf")
    (docs / "zero.pdf").write_bytes(b"")
    (docs / "bad.pdf").write_bytes(b"%PDF-1.4 nothing")
    (docs / "blank.html").write_text("<nav>menu</nav>", encoding="utf-8")
    (docs / "old.txt").write_bytes("营业时间".encode("gb18030"))
    (docs / "other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    events = Events()
    built = build_index(tmp_path / "index", [docs], encoder=None, events=events)
    assert set(built.left_out) == {"zero.pdf", "bad.pdf", "blank.html", "old.txt", "other.csv"} and built.files == 4
    assert all(why.startswith(name) for name, why in built.left_out.items())
    assert len([one for one in events.warnings if one.startswith("left out: ")]) == 5
    again = build_index(tmp_path / "index", [docs], encoder=None)
    assert again.unchanged == 4 and set(again.left_out) == set(built.left_out), "named each time"


def test_nothing_to_index(tmp_path):
    (tmp_path / "docs").mkdir()
    with pytest.raises(ConfigError, match="no file to read"):
        build_index(tmp_path / "index", [tmp_path / "docs"], encoder=None)
    (tmp_path / "docs" / "a.txt").write_text("  \n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"none of the 1 files can be indexed; the first: a\.txt: the file holds no text"
    ):
        build_index(tmp_path / "index", [tmp_path / "docs"], encoder=None)
    assert not (tmp_path / "index").exists()


def test_another_encoder_is_refused(docs, tmp_path, encoder):
    path = tmp_path / "index"
    build_index(path, [docs], encoder=encoder)
    other = load_encoder(str(tiny_model("bert", seed=1)))
    with pytest.raises(ModelError, match="made with another encoder"):
        open_index(path, encoder=other)
    with pytest.raises(ModelError, match="made with another encoder"):
        open_index(path, encoder=replace(encoder, pooling="first"))
    assert open_index(path).encoder.fingerprint == encoder.fingerprint, "found where it was"


def test_a_damaged_index_is_named(docs, tmp_path, encoder):
    path = tmp_path / "index"
    build_index(path, [docs], encoder=encoder)
    part = path / json.loads((path / "index.json").read_text(encoding="utf-8"))["part"]
    for name in ("vectors.npy", "passages.jsonl", "terms.txt", "scores.npy", "places.npy"):
        whole = (part / name).read_bytes()
        for broken in (whole[:-3], None):
            (part / name).unlink() if broken is None else (part / name).write_bytes(broken)
            with pytest.raises(RunError, match=f"{name} of the index is missing or damaged"):
                open_index(path, encoder=encoder)
            (part / name).write_bytes(whole)
    whole = (part / "passages.jsonl").read_bytes()
    (part / "passages.jsonl").write_bytes(b"x" * len(whole))
    with pytest.raises(RunError, match=r"passages\.jsonl of the index is missing or damaged"):
        search(open_index(path, encoder=encoder), "goods")
    (part / "passages.jsonl").write_bytes(whole)
    (part / "starts.npy").write_bytes(b"x" * (part / "starts.npy").stat().st_size)
    with pytest.raises(RunError, match=r"starts\.npy of the index is missing or damaged"):
        open_index(path, encoder=encoder)
    events = Events()
    assert build_index(path, [docs], encoder=encoder, events=events).unchanged == 0
    assert any("indexed anew" in one for one in events.warnings) and search(open_index(path, encoder=encoder), "goods")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "index.json of the index is missing or damaged"),
        ('{"form": 1}', "index.json of the index is missing or damaged"),
        ('{"form": 9}', "the index is of form 9, and this version of Luthier reads form 1"),
        (None, "there is no index here"),
    ],
)
def test_an_index_of_another_form(docs, tmp_path, content, part):
    path = tmp_path / "index"
    build_index(path, [docs], encoder=None)
    (path / "index.json").unlink() if content is None else (path / "index.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=part):
        open_stored(path)


def many(count: int, question: bool = False) -> list[Passage]:
    return [
        Passage(
            f"{at}", f"{at % 20}.txt", f"number {at} has {at * 7} strings and a long neck of old dark wood", (), 0, 9,
            1, 1, None, f"What is the number of things in place {at}?" if question else None,
        )
        for at in range(count)
    ]  # fmt: skip


def test_half_sentences_are_halves_and_the_same_each_time():
    passages = many(40)
    halves = draw_halves(passages)
    assert halves == draw_halves(passages) and len(halves["spaced"]) == 40 and not halves["dense"]
    for one in halves["spaced"]:
        assert passages[one.place].text.startswith(one.text) and 2 * len(one.text.split()) <= 14


def test_what_speaks_of_the_same():
    assert group(many(40)).tolist() == [*range(20), *range(20)], "by file"
    few = [replace(one, file="a.md", heading=(f"part {at % 3}",)) for at, one in enumerate(many(6))]
    assert group(few).tolist() == [0, 1, 2, 0, 1, 2], "by section where there are few files"
    rows = [replace(one, text=f"answer {at % 2}") for at, one in enumerate(many(4, question=True))]
    assert group(rows).tolist() == [0, 1, 0, 1], "by answer"


def test_an_encoder_that_cannot_read_is_left_out_and_what_is_foreign_refused(tmp_path, encoder):
    """Random weights find few half sentences; what has no shared word is refused by words alone."""
    docs = tmp_path / "docs"
    docs.mkdir()
    for at in range(40):
        kind = ("violin", "cello", "piano", "flute")[at % 4]
        text = f"The {kind} with number {at} was made by master {at * 3} in the year {1700 + at} for a court far away."
        (docs / f"{at}.txt").write_text(text, encoding="utf-8")
    events = Events()
    build_index(tmp_path / "index", [docs], encoder=encoder, events=events)
    index = open_index(tmp_path / "index", encoder=encoder)
    measured = index.stored.meta.measured["spaced"]
    assert measured.sentences == 40 and measured.nearest is not None and measured.refusal is not None
    assert measured.compares_meaning == (measured.unknown <= 0.1 and measured.nearest >= 0.5)
    assert any("words alone are compared" in one for one in events.warnings) != measured.compares_meaning
    found = search(index, "Who made number 17 in 1717?")
    assert (found[0].cosine is not None) == measured.compares_meaning
    assert measured.refusal.cosine_weight == 0 or measured.compares_meaning
    assert retrieve(index, "The violin with number 8 was made by master 24").known
    assert not retrieve(index, "Kann ich morgen im Garten Tomaten pflanzen?").known


def test_halves_of_questions_do_not_judge_the_encoder(tmp_path, encoder):
    """Half of a question fits many rows: on 77 intents of a bank it left out the way that found the most."""
    rows = [f"How do I {verb} my card number {at}?,Answer {at}" for at in range(12) for verb in ("lose", "find")]
    faq = tmp_path / "faq.csv"
    faq.write_text("question,answer\n" + "\n".join(rows), encoding="utf-8")
    build_index(tmp_path / "index", [faq], encoder=encoder)
    index = open_index(tmp_path / "index", encoder=encoder)
    measured = index.stored.meta.measured["spaced"]
    assert measured.sentences == 24 and measured.nearest is None and measured.compares_meaning
    assert search(index, "lose card")[0].cosine is not None


def test_a_threshold_from_questions(docs, tmp_path):
    questions = tmp_path / "questions.jsonl"
    rows = [("return goods within thirty days", True), ("shop closed on Sundays", True), ("closed borders", False)]
    questions.write_text(
        "\n".join(json.dumps({"question": text, "answerable": known}) for text, known in rows), encoding="utf-8"
    )
    build_index(tmp_path / "index", [docs], encoder=None, questions=questions)
    index = open_index(tmp_path / "index")
    assert [retrieve(index, text).known for text, _ in rows] == [True, True, False]
    questions.write_text('{"question": "x y", "answerable": "perhaps"}', encoding="utf-8")
    with pytest.raises(DataError, match="a row needs a question, and answerable: true or false"):
        build_index(tmp_path / "index", [docs], encoder=None, questions=questions)
    assert retrieve(open_index(tmp_path / "index"), rows[0][0]).known, "the earlier index is untouched"
