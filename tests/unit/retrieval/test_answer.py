"""Prompts, citations that exist, and answers that are not given."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import DataError
from luthier.core.types import Message
from luthier.retrieval.answer import answer, as_row, retrieve, retrieve_all
from luthier.retrieval.build import build_index
from luthier.retrieval.citations import check_citations, place_citations, stream_checked
from luthier.retrieval.prompt import build_prompt, fit_prompt, ways_of
from luthier.retrieval.search import fuse_hits, fuse_ranks, open_index, search

PIECES = st.lists(
    st.sampled_from(["a", " ", "[", "]", "1", "9", ", ", "[2]", "[7]", "【3】", "\n", "[1, 9]"]), max_size=12
)


@pytest.fixture
def index(tmp_path):
    (tmp_path / "docs").mkdir()
    for name, text in (
        ("a.txt", "Violins are tuned in fifths."),
        ("b.txt", "小提琴按五度定弦。"),
        ("c.txt", "Violins have strings."),
    ):
        (tmp_path / "docs" / name).write_text(text, encoding="utf-8")
    build_index(tmp_path / "index", [tmp_path / "docs"], encoder=None)
    return open_index(tmp_path / "index")


def test_the_prompt_is_in_the_language_of_the_question(index):
    found = retrieve(index, "How are violins tuned?")
    prompt = build_prompt(found.question, found.sources)
    assert prompt.startswith("Answer the question") and prompt.endswith("Question: How are violins tuned?")
    assert "[1] a.txt\nViolins are tuned in fifths." in prompt and "[2] c.txt" in prompt
    found = retrieve(index, "小提琴怎么定弦？")
    prompt = build_prompt(found.question, found.sources)
    assert (
        prompt.startswith("请只根据")
        and "[1] b.txt\n小提琴按五度定弦。" in prompt
        and prompt.endswith("问题：小提琴怎么定弦？")
    )


def test_citations_that_exist_stay(index):
    sources = retrieve(index, "violins").sources
    text, cited, removed = check_citations("Fifths [2], strings[1][9]. Also [1, 3] 【2】 [12] [see] a[0].", sources)
    assert text == "Fifths [2], strings[1]. Also [1] [2] [see] a."
    assert [one.number for one in cited] == [2, 1] and removed == 4


@settings(deadline=None)
@given(PIECES)
def test_a_stream_is_checked_as_the_whole_is(pieces):
    sources = [SimpleNamespace(number=number) for number in (1, 2, 3)]
    assert "".join(stream_checked(pieces, sources)) == check_citations("".join(pieces), sources)[0]


def test_citations_have_their_places(index):
    text = check_citations("Fifths [2], strings 【1, 3】[9].", retrieve(index, "violins", 3).sources)[0]
    assert [(number, text[start:end]) for number, start, end in place_citations(text)] == [(2, "[2]"), (1, "[1]")]


@settings(deadline=None)
@given(PIECES)
def test_what_is_left_exists(pieces):
    text, cited, _ = check_citations("".join(pieces), [SimpleNamespace(number=number) for number in (1, 2, 3)])
    assert {number for number, _, _ in place_citations(text)} == {one.number for one in cited} <= {1, 2, 3}


def test_citations_within_citations(index):
    sources = retrieve(index, "violins").sources
    text, cited, removed = check_citations("Fifths [[9]8] [[7]1].", sources)
    assert (text, removed, [one.number for one in cited]) == ("Fifths [1].", 3, [1])


def test_a_stream_does_not_wait_for_its_end():
    found = stream_checked(iter(["Hello ", "world", " [", "9", "] and", " more"]), [])
    assert next(found) == "Hello" and next(found) == " world" and next(found) == " and"


def test_an_answer_with_its_sources(index):
    asked = []

    def write(turns):
        asked.append(turns[0].content)
        return "In fifths [1] [8]."

    made = answer(index, "How are violins tuned?", write, k=2)
    assert made.text == "In fifths [1]." and made.removed == 1 and made.known and len(asked) == 1
    row = as_row(made)
    assert row["removed_citations"] == 1
    assert [(one["number"], one["file"], one["cited"]) for one in row["sources"]] == [
        (1, "a.txt", True),
        (2, "c.txt", False),
    ]


def test_what_is_not_known_is_not_asked(index):
    def write(turns):
        raise AssertionError("the model was asked")

    assert answer(index, "zebra?", write).text == "I do not know."
    assert answer(index, "斑马？", write).text == "我不知道。"


def test_as_many_passages_as_fit(index):
    found = retrieve(index, "violins")
    whole = build_prompt("violins", found.sources)
    prompt, sources = fit_prompt("violins", found.sources, lambda text: len(text) < len(whole))
    assert sources == found.sources[:1] and prompt == build_prompt("violins", sources)
    with pytest.raises(DataError, match="not one passage fits"):
        fit_prompt("violins", found.sources, lambda text: False)


def test_a_follow_up_is_looked_up_with_the_turn_before(tmp_path):
    (tmp_path / "docs").mkdir()
    subjects = ("violins", "cellos", "horns", "drums", "flutes", "harps", "pianos")
    for name in subjects:
        (tmp_path / "docs" / f"{name}.txt").write_text(f"In winter all {name} are kept in a case.", encoding="utf-8")
    build_index(tmp_path / "index", [tmp_path / "docs"], encoder=None)
    index = open_index(tmp_path / "index")
    turns = (Message("user", "Tell me of pianos."), Message("assistant", "Yes?"), Message("user", "And in winter?"))
    ways = ways_of(turns)
    assert ways == ("And in winter?", "Tell me of pianos.\nAnd in winter?")
    alone, both = retrieve_all(index, ["And in winter?", ways], 4)
    # All are alike to the last turn.
    assert "pianos.txt" not in [one.passage.file for one in alone.sources]
    assert "pianos.txt" in [one.passage.file for one in both.sources] and both.question == "And in winter?"
    assert all(0 < one.hit.score <= 1 for one in both.sources)
    # One turn is looked up as ever, whatever stands beside it.
    assert alone == retrieve(index, "And in winter?", 4) == retrieve_all(index, [ways_of(turns[-1:])], 4)[0]


def test_ways_are_fused_as_ranks_are(index):
    ways = ["violins strings", "violins fifths"]
    found = [search(index, way, 100) for way in ways]
    places = {hit.passage.id: at for at, hit in enumerate(one for way in found for one in way)}
    naive = fuse_ranks([[places[hit.passage.id] for hit in way] for way in found])
    fused = fuse_hits(found, 5)
    assert [(places[one.passage.id], one.fused) for one in fused] == [(at, score / 2) for at, score in naive]
    assert fuse_hits(found[:1], 1) == found[0][:1]


def test_what_was_known_of_one_topic_is_not_known_of_the_next(index):
    known = "How is a violin tuned, in fifths?"
    asked = [known, (known, "violins"), ("zebra", f"{known}\nzebra"), ("fifths?", f"{known}\nfifths?")]
    first, again, other, follow = retrieve_all(index, asked, 2)
    assert first.known and again.known and follow.known and not other.known
