"""The n-gram baseline of examples/mini: against a naive version with dictionaries, and its sums."""

import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

MINI = Path(__file__).parents[3] / "examples" / "mini"
VOCABULARY, END, ORDER = 12, 0, 4


@pytest.fixture(scope="module")
def ngram() -> ModuleType:
    """Imported by path; the scripts import one another by plain names, which must not stay importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(MINI)
        import ngram as module  # type: ignore[import-not-found]
    for name in ("ngram", "corpus", "sources", "tokenizer"):
        sys.modules.pop(name, None)
    return module


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    """Zipf-distributed tokens; the last of the vocabulary never occurs."""
    chance = np.random.default_rng(1)
    weights = 1 / np.arange(1, VOCABULARY - 1)
    return [
        (1 + chance.choice(VOCABULARY - 2, size=chance.integers(1, 30), p=weights / weights.sum())).tolist()
        for _ in range(40)
    ]


def naive_probability(ngram: ModuleType, documents: list[list[int]], context: tuple[int, ...], token: int) -> float:
    """Modified Kneser-Ney straight from its definition, for a context of at most ORDER - 1 tokens."""

    def counts(n: int) -> Counter[tuple[int, ...]]:
        longest = Counter(
            tuple(padded[i - ORDER + 1 : i + 1])
            for ids in documents
            for padded in [[END] * (ORDER - 1) + ids + [END]]
            for i in range(ORDER - 1, len(padded))
        )
        if n == ORDER:
            return longest
        return Counter(gram[1:] for gram in {gram[ORDER - n - 1 :] for gram in longest})

    def probability(context: tuple[int, ...], token: int) -> float:
        table = counts(len(context) + 1)
        discounts, _ = ngram.estimate_discounts(np.array(list(table.values())))
        lower = probability(context[1:], token) if context else 1 / VOCABULARY
        after = {gram[-1]: count for gram, count in table.items() if gram[:-1] == context}
        if not after:
            return lower
        total = sum(after.values())
        spared = sum(discounts[min(count, 3) - 1] for count in after.values())
        own = after[token] - discounts[min(after[token], 3) - 1] if token in after else 0.0
        return own / total + spared / total * lower

    return probability(context, token)


def test_agrees_with_the_definition(ngram: ModuleType, documents: list[list[int]]) -> None:
    model = ngram.fit(documents, ORDER, VOCABULARY, END)
    chance = np.random.default_rng(2)
    seen = ngram.windows(documents, ORDER, END)
    grams = np.concatenate([seen[chance.choice(len(seen), 20)], chance.integers(VOCABULARY, size=(20, ORDER))])
    expected = [naive_probability(ngram, documents, tuple(gram[:-1]), gram[-1]) for gram in grams.tolist()]
    np.testing.assert_allclose(ngram.probabilities(model, grams), expected, rtol=1e-12)


def test_probabilities_sum_to_one(ngram: ModuleType, documents: list[list[int]]) -> None:
    model = ngram.fit(documents, ORDER, VOCABULARY, END)
    assert model.levels[-1].estimated  # so that not only the fallback discounts are tried
    contexts = np.random.default_rng(3).integers(VOCABULARY, size=(50, ORDER - 1))
    grams = np.concatenate([np.repeat(contexts, VOCABULARY, 0), np.tile(np.arange(VOCABULARY), 50)[:, None]], 1)
    p = ngram.probabilities(model, grams)
    assert (p > 0).all()
    np.testing.assert_allclose(p.reshape(50, VOCABULARY).sum(1), 1, rtol=1e-12)


def test_windows_do_not_reach_into_the_document_before(ngram: ModuleType) -> None:
    assert ngram.windows([[5, 6], [7]], 3, END).tolist() == [[0, 0, 5], [0, 5, 6], [5, 6, 0], [0, 0, 7], [0, 7, 0]]


def test_discounts_of_chen_and_goodman(ngram: ModuleType) -> None:
    counts = np.repeat([1, 2, 3, 4, 9], [100, 40, 20, 12, 5])
    found, estimated = ngram.estimate_discounts(counts)
    y = 100 / 180
    assert estimated
    assert found == pytest.approx((1 - 2 * y * 40 / 100, 2 - 3 * y * 20 / 40, 3 - 4 * y * 12 / 20))
    assert ngram.estimate_discounts(np.array([7, 8, 9])) == ((0.5, 1.0, 1.5), False)


def test_too_high_an_order_is_refused(ngram: ModuleType) -> None:
    with pytest.raises(ValueError, match="lower order"):
        ngram.pack(np.zeros((1, 5), dtype=np.int64), 8192)
