"""Words, BM25 by its formula, ranks and their fusion by hand."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import ConfigError
from luthier.retrieval.bm25 import K1, B, index_words
from luthier.retrieval.refuse import Evidence, Measured, fit_quantile, fit_rows, script_of
from luthier.retrieval.scores import compare, rank, score_all
from luthier.retrieval.search import fuse_ranks
from luthier.retrieval.words import split_words

TEXTS = ["The cat sat on the mat.", "A dog and a cat; the dog barked.", "琴匠修理小提琴。", "小提琴和 Violin 弓", ""]


def naive_bm25(texts: list[str], query: str) -> list[float]:
    """Robertson's formula with Lucene's idf, a passage and a word at a time."""
    split = [split_words(text) for text in texts]
    mean = sum(map(len, split)) / len(split)
    scores = []
    for words in split:
        total = 0.0
        for word in split_words(query):
            held = sum(word in other for other in split)
            times = Counter(words)[word]
            idf = math.log(1 + (len(texts) - held + 0.5) / (held + 0.5))
            total += idf * times * (K1 + 1) / (times + K1 * (1 - B + B * len(words) / mean))
        scores.append(total)
    return scores


def test_words_of_both_scripts():
    assert split_words("Don't PAY ５００ Straße_x") == ["don't", "pay", "500", "strasse", "x"]
    assert split_words("小提琴Violin弓") == ["小", "提", "琴", "小提", "提琴", "violin", "弓"]
    assert split_words("… 。！") == []


@pytest.mark.parametrize("query", ["cat", "the dog the dog", "小提琴", "琴", "violin 弓 cat", "unknown words", "。"])
def test_bm25_by_its_formula(query):
    found = index_words(TEXTS).score(query)
    assert np.allclose(found, naive_bm25(TEXTS, query), atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.text(alphabet="ab 琴弓", max_size=12), min_size=1, max_size=6), st.text(alphabet="ab 琴弓", max_size=6)
)
def test_bm25_by_its_formula_on_any_texts(texts, query):
    if not any(split_words(text) for text in texts):
        return
    words = index_words(texts)
    found = words.score(query)
    assert np.allclose(found, naive_bm25(texts, query), atol=1e-4)
    assert found.max() <= words.most(query) + 1e-4


def test_words_that_nobody_holds_count_in_the_most():
    words = index_words(TEXTS)
    assert words.most("cat zebra") > words.most("cat")
    assert words.most("zebra") > words.most("cat"), "the rarest count most"


def test_ranks_put_the_earlier_of_equals_first():
    scores = np.array([1, 3, 2, 3, 0, 2], np.float32)
    whole = sorted(range(6), key=lambda at: -scores[at])
    for count in range(1, 8):
        assert rank(scores, count).tolist() == whole[:count]


def test_fusion_by_hand():
    found = dict(fuse_ranks([[7, 3, 5], [5, 9]]))
    assert found == pytest.approx({7: 1 / 61, 3: 1 / 62, 5: 1 / 63 + 1 / 61, 9: 1 / 62})
    assert [place for place, _ in fuse_ranks([[7, 3, 5], [5, 9]])] == [5, 7, 3, 9]
    assert [place for place, _ in fuse_ranks([[1, 2], []])] == [1, 2]


def test_cosines_of_halves_are_those_of_floats():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(50, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    exact = compare(vectors, vectors[3])
    assert exact[3] == pytest.approx(1, abs=1e-6) and exact.argmax() == 3
    assert np.allclose(compare(vectors.astype(np.float16), vectors[3]), exact, atol=2e-3)


def test_evidence_among_some_passages():
    (found,) = score_all(index_words(TEXTS), None, None, ["cat mat"])
    assert found.evidence().cosine == 0 and 0 < found.evidence().coverage <= 1
    first = np.array([True, False, False, False, False])
    assert found.evidence(~first).coverage < found.evidence(first).coverage == found.evidence().coverage


def test_an_empty_question_is_refused():
    with pytest.raises(ConfigError, match="the question is empty"):
        score_all(index_words(TEXTS), None, None, ["cat", " "])


def test_a_share_of_what_is_unknown_is_refused():
    unknown = [Evidence(at / 100, 0.5) for at in range(100)]
    made = fit_quantile(unknown, 0.9, "numbers", meaning=False)
    assert made.cosine_weight == 0 and sum(not made.knows(one) for one in unknown) == 90


def test_evidence_of_both_ways_is_added_by_its_spread():
    random = np.random.default_rng(1)
    unknown = [Evidence(float(one), float(other)) for one, other in random.normal((0.1, 0.4), (0.05, 0.1), (500, 2))]
    made = fit_quantile(unknown, 0.8, "numbers", meaning=True)
    assert made.cosine_weight == pytest.approx(0.5, rel=0.15)


def test_rows_part_where_the_most_are_judged_rightly():
    known = [Evidence(one, 0) for one in (0.3, 0.4, 0.5)]
    unknown = [Evidence(one, 0) for one in (0.0, 0.1, 0.35)]
    made = fit_rows(known, unknown, "rows", meaning=False)
    judged = sum(made.knows(one) for one in known) + sum(not made.knows(one) for one in unknown)
    assert judged == 5, "one of six cannot be"
    from luthier.core.errors import DataError

    for sides, kind in (((known, []), "without"), (([], unknown), "with")):
        with pytest.raises(DataError, match=f"no question {kind} an answer"):
            fit_rows(*sides, "rows", meaning=False)


def test_meaning_is_left_out_where_the_encoder_finds_less_than_half():
    assert not Measured(sentences=9, nearest=0.4).compares_meaning
    assert Measured(sentences=9, nearest=0.5).compares_meaning and Measured(sentences=9).compares_meaning


def test_meaning_is_left_out_where_the_vocabulary_lacks_the_writing():
    assert not Measured(sentences=9, unknown=0.3, nearest=0.9).compares_meaning
    assert Measured(sentences=9, unknown=0.1, nearest=0.9).compares_meaning


def test_the_writing_of_a_question():
    assert [script_of(text) for text in ("怎么用 USB 接口？", "what is 琴?", "123")] == ["dense", "spaced", "spaced"]
