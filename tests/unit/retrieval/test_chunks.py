"""Sentences and passages: nothing is lost, nothing is too long, and spans are where they say."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import ConfigError
from luthier.retrieval.chunks import Chunking, count_words, cut_sections
from luthier.retrieval.passage import Section
from luthier.retrieval.sentences import split_sentences

TEXTS = st.text(alphabet="ab .。！？\n\t-“”中文3", max_size=300)


def sentences(text):
    return [text[start:end] for start, end in split_sentences(text)]


def test_sentences_in_english():
    text = 'Dr. Smith paid 3.50 euros. "Really?" he said! See Fig. 2 (e.g. the left) by J. Doe.\n\nNew paragraph'
    assert sentences(text) == [
        "Dr. Smith paid 3.50 euros.", '"Really?"', "he said!", "See Fig. 2 (e.g. the left) by J. Doe.", "New paragraph"
    ]  # fmt: skip


def test_sentences_in_chinese():
    text = "他说：“今天不去。”她问：去哪儿？营业时间为9:00；周末休息……结束"
    assert sentences(text) == ["他说：“今天不去。”", "她问：去哪儿？", "营业时间为9:00；", "周末休息……", "结束"]


def test_items_of_a_list_are_sentences():
    assert sentences("Bring:\n- a violin\n- a bow\n1. rosin\nwrapped\nline") == [
        "Bring:", "- a violin", "- a bow", "1. rosin\nwrapped\nline"
    ]  # fmt: skip


@settings(deadline=None)
@given(TEXTS)
def test_every_character_is_in_one_sentence(text):
    spans = split_sentences(text)
    assert "".join("".join(text[start:end].split()) for start, end in spans) == "".join(text.split())
    assert all(one[1] <= other[0] for one, other in pairwise(spans))


@settings(deadline=None)
@given(TEXTS, st.integers(1, 12), st.integers(0, 11))
def test_passages_hold_everything_and_are_short_enough(text, size, overlap):
    chunking = Chunking(size=size, overlap=min(overlap, size - 1))
    found = cut_sections("a.txt", [Section(text, 100, line=1)], chunking, count_words)
    seen: set[int] = set()
    for one in found:
        assert text[one.start - 100 : one.end - 100] == one.text
        assert text[: one.start - 100].count("\n") + 1 == one.line
        assert one.line_end == one.line + one.text.count("\n")
        assert count_words([one.text])[0] <= size
        seen |= set(range(one.start - 100, one.end - 100))
    # A mark alone may be no token, and may stand outside.
    assert not [at for at in range(len(text)) if text[at].isalnum() and at not in seen]
    assert all(one.end < other.end for one, other in pairwise(found)), "each goes on"


def test_overlap_is_whole_sentences_at_most_so_many_tokens():
    text = "one two. three four. five six. seven eight. nine ten."
    found = cut_sections("a.txt", [Section(text, 0)], Chunking(size=6, overlap=3), count_words)
    assert [one.text for one in found] == [
        "one two. three four. five six.", "five six. seven eight. nine ten."
    ]  # fmt: skip
    assert [one.id for one in found] == ["a.txt#1", "a.txt#2"]


def test_a_sentence_that_is_too_long_is_cut_between_words_and_characters():
    text = "一二三四五六七八 alpha beta"
    found = cut_sections("a.txt", [Section(text, 0)], Chunking(size=4, overlap=0), count_words)
    assert [one.text for one in found] == ["一二三四", "五六七八", "alpha beta"]


def test_a_row_of_questions_is_never_cut():
    row = Section("word " * 50, 0, line=3, question="What?")
    (found,) = cut_sections("faq.csv", [row], Chunking(size=5, overlap=0), count_words)
    assert found.citation == "faq.csv, line 3" and found.compared == "What?" and found.shown.startswith("What?\nword")


def test_citations_say_where():
    text = "one two.\nthree four.\nfive six."
    found = cut_sections("a.md", [Section(text, 0, ("Top", "Deep"), line=4)], Chunking(size=4, overlap=0), count_words)
    assert [one.citation for one in found] == ["a.md › Top › Deep, lines 4-5", "a.md › Top › Deep, line 6"]
    (page,) = cut_sections("a.pdf", [Section("text", 0, page=7)], Chunking(), count_words)
    assert page.citation == "a.pdf, page 7"


def test_an_overlap_as_long_as_the_passage_is_refused():
    with pytest.raises(ConfigError, match="overlap is 5, and must be below the size, 5"):
        Chunking.make({"size": 5, "overlap": 5})
