"""BM25 over postings that lie in plain arrays (Robertson and Zaragoza 2009)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from luthier.retrieval.words import split_words

Floats: TypeAlias = NDArray[np.float32]

K1, B = 1.2, 0.75


@dataclass(frozen=True, slots=True)
class Words:
    """The words of N passages: for each of V words, in order, the passages that hold it and what it adds to their score.

    `starts_V1[v]` to `starts_V1[v + 1]` are the places in `passages_P` and `scores_P` of word v.
    """

    terms: dict[str, int]
    starts_V1: NDArray[np.int64]
    passages_P: NDArray[np.int32]
    scores_P: Floats
    passages: int

    def score(self, text: str) -> Floats:
        """BM25 of every passage [N] for the words of `text`; a word that is asked twice counts twice."""
        scores_N = np.zeros(self.passages, np.float32)
        for word, times in Counter(split_words(text)).items():
            at = self.terms.get(word)
            if at is not None:
                part = slice(self.starts_V1[at], self.starts_V1[at + 1])
                scores_N[self.passages_P[part]] += times * self.scores_P[part]
        return scores_N

    def most(self, text: str) -> float:
        """What a passage would score at most that holds every word of `text` again and again; words that no passage holds
        count as the rarest. BM25 divided by it, from 0 to 1, is how much of a question a passage speaks of."""
        total = 0.0
        for word, times in Counter(split_words(text)).items():
            at = self.terms.get(word)
            held = 0 if at is None else int(self.starts_V1[at + 1] - self.starts_V1[at])
            total += times * weigh(self.passages, held) * (K1 + 1)
        return total


def weigh(passages: int, held: int) -> float:
    """How much a word counts that `held` of `passages` hold, as in Lucene: never below zero."""
    return math.log(1 + (passages - held + 0.5) / (held + 0.5))


def index_words(texts: Sequence[str]) -> Words:
    """The words of these passages, scored."""
    counted = [Counter(split_words(text)) for text in texts]
    lengths_N = np.array([sum(one.values()) for one in counted], np.float64)
    mean = float(lengths_N.mean()) or 1.0 if len(texts) else 1.0
    names = sorted({word for one in counted for word in one})
    terms = {word: at for at, word in enumerate(names)}
    total = sum(map(len, counted))
    words_P = np.fromiter((terms[word] for one in counted for word in one), np.int64, total)
    times_P = np.fromiter((times for one in counted for times in one.values()), np.float64, total)
    passages_P = np.repeat(np.arange(len(texts), dtype=np.int32), [len(one) for one in counted])
    order = np.argsort(words_P, kind="stable")
    words_P, times_P, passages_P = words_P[order], times_P[order], passages_P[order]
    held_V = np.bincount(words_P, minlength=len(names))
    weights_V = np.array([weigh(len(texts), int(held)) for held in held_V])
    norms_P = K1 * (1 - B + B * lengths_N[passages_P] / mean)
    scores_P = weights_V[words_P] * times_P * (K1 + 1) / (times_P + norms_P)
    starts_V1 = np.concatenate([[0], np.cumsum(held_V)]).astype(np.int64)
    return Words(terms, starts_V1, passages_P, scores_P.astype(np.float32), len(texts))
