"""What every passage scores for a question, by words and by meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from luthier.core.errors import ConfigError
from luthier.retrieval.bm25 import Words
from luthier.retrieval.embed import Encoder
from luthier.retrieval.refuse import Evidence

Floats: TypeAlias = NDArray[np.float32]

# Vectors are compared so many at a time, so that those in fp16 are never held in fp32 as a whole.
ROWS = 65536


@dataclass(frozen=True, slots=True)
class Scored:
    """BM25 and cosine [N] of every passage for a question; no cosine where meaning is not compared."""

    bm25_N: Floats
    most: float
    """The most that its BM25 could be."""
    cosine_N: Floats | None

    def evidence(self, among_N: NDArray[np.bool_] | None = None) -> Evidence:
        """The best of each way, among some passages or all."""
        bm25_N, cosine_N = self.bm25_N, self.cosine_N
        if among_N is not None:
            bm25_N, cosine_N = bm25_N[among_N], None if cosine_N is None else cosine_N[among_N]
        coverage = float(bm25_N.max()) / self.most if self.most else 0.0
        return Evidence(coverage, 0.0 if cosine_N is None else float(cosine_N.max()))


def score_all(
    words: Words, vectors_NE: NDArray[Any] | None, encoder: Encoder | None, queries: Sequence[str]
) -> list[Scored]:
    """The scores of each query; queries are embedded together. Raises ConfigError for an empty query."""
    if not all(query.strip() for query in queries):
        raise ConfigError("the question is empty, so nothing can be looked for; give some text")
    cosines: list[Floats | None] = [None] * len(queries)
    if encoder is not None and vectors_NE is not None:
        cosines = [compare(vectors_NE, asked_E) for asked_E in encoder.embed(queries, asking=True)]
    return [Scored(words.score(query), words.most(query), cosine_N) for query, cosine_N in zip(queries, cosines)]


def compare(vectors_NE: NDArray[Any], asked_E: Floats) -> Floats:
    """The cosine of every passage [N]; all vectors are of length 1."""
    parts = [vectors_NE[start : start + ROWS].astype(np.float32) @ asked_E for start in range(0, len(vectors_NE), ROWS)]
    return np.concatenate(parts)


def rank(scores_N: Floats, count: int) -> NDArray[np.int64]:
    """Places of the `count` highest scores, the highest first; of equal ones the earlier."""
    places = np.arange(len(scores_N))
    if count < len(scores_N):
        lowest = np.partition(scores_N, -count)[-count]
        places = np.flatnonzero(scores_N >= lowest)
    return places[np.argsort(-scores_N[places], kind="stable")][:count].astype(np.int64)
