"""Passages for a question: by words and by meaning, fused by rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from luthier.core.errors import ModelError
from luthier.core.events import Events
from luthier.retrieval.embed import Encoder, load_encoder
from luthier.retrieval.passage import RRF, Hit
from luthier.retrieval.refuse import Evidence, script_of
from luthier.retrieval.scores import Scored, rank, score_all
from luthier.retrieval.store import Stored, find_index, open_stored

# How many of each way are fused.
DEPTH = 100


@dataclass(slots=True)
class Index:
    """An index that is open, with its encoder."""

    stored: Stored
    encoder: Encoder | None

    def __len__(self) -> int:
        return len(self.stored)


def open_index(
    reference: str | Path, *, encoder: str | Encoder | None = None, device: str = "auto", events: Events | None = None
) -> Index:
    """Open the index of a run, or in a folder, with the encoder that it was made with; `encoder` says where that is now.

    Raises RunError for an index that is missing, damaged or of another form, and ModelError for another encoder.
    """
    stored = open_stored(find_index(reference))
    meta = stored.meta
    if meta.fingerprint is None:
        return Index(stored, None)
    source = encoder or meta.encoder or "auto"
    loaded = load_encoder(source, device=device, events=events) if isinstance(source, str) else source
    if loaded is None:
        raise ModelError(
            f"{reference}: the index was made with the encoder {meta.encoder}, which is not installed; "
            "pip install 'luthier[retrieval]', or make the index anew"
        )
    if loaded.fingerprint != meta.fingerprint:
        raise ModelError(
            f"{reference}: the index was made with another encoder: {meta.encoder} (fingerprint {meta.fingerprint}), and this "
            f"one is {loaded.fingerprint}; bring the old one back, or make the index anew"
        )
    return Index(stored, loaded)


def search(index: Index, query: str, k: int = 5) -> list[Hit]:
    """The `k` passages that fit `query` best, by the fusion of both ways; fewer where fewer share a word with it and meaning
    is not compared. Raises ConfigError for an empty query."""
    return search_all(index, [query], k)[0][0]


def search_all(index: Index, queries: Sequence[str], k: int = 5) -> list[tuple[list[Hit], Evidence]]:
    """The hits of each query, and how well the index knows what it speaks of; queries are embedded together."""
    stored = index.stored
    compared = [at for at, query in enumerate(queries) if compares_meaning(index, query)]
    words = [at for at in range(len(queries)) if at not in set(compared)]
    scored: dict[int, Scored] = {}
    for places, encoder in ((compared, index.encoder), (words, None)):
        asked = [queries[at] for at in places]
        scored.update(zip(places, score_all(stored.words, stored.vectors_NE, encoder, asked)))
    return [(_fuse(index, scored[at], k), scored[at].evidence()) for at in range(len(queries))]


def compares_meaning(index: Index, query: str) -> bool:
    """Whether the index has an encoder, and it was not measured to be unable to read the query's writing."""
    measured = index.stored.meta.measured.get(script_of(query))
    return index.encoder is not None and (measured is None or measured.compares_meaning)


def fuse_ranks(rankings: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """Reciprocal rank fusion: (place, sum of 1 / (60 + rank) over the rankings that hold it), the highest first; of equal
    ones the one that the first ranking has before."""
    sums: dict[int, float] = {}
    for ranking in rankings:
        for at, place in enumerate(ranking, 1):
            sums[place] = sums.get(place, 0.0) + 1 / (RRF + at)
    return sorted(sums.items(), key=lambda one: -one[1])


def fuse_hits(found: Sequence[Sequence[Hit]], k: int) -> list[Hit]:
    """The `k` best of what one question brought in several ways of asking it, by reciprocal rank fusion (Cormack et al. 2009).
    A passage keeps what it scored the first time; its `score` is 1 where it is the first each time."""
    if len(found) == 1:
        return list(found[0][:k])
    hits: dict[str, Hit] = {}
    for hit in (one for way in found for one in way):
        hits.setdefault(hit.passage.id, hit)
    places = {id: at for at, id in enumerate(hits)}
    every, ranked = list(hits.values()), fuse_ranks([[places[one.passage.id] for one in way] for way in found])
    return [
        replace(every[at], fused=fused / len(found) * (1 if every[at].cosine is None else 2))
        for at, fused in ranked[:k]
    ]


def _fuse(index: Index, scored: Scored, k: int) -> list[Hit]:
    depth, bm25_N, cosine_N = max(DEPTH, k), scored.bm25_N, scored.cosine_N
    words = [int(at) for at in rank(bm25_N, depth) if bm25_N[at] > 0]
    meaning = [] if cosine_N is None else [int(at) for at in rank(cosine_N, depth)]
    by_words = {place: at for at, place in enumerate(words, 1)}
    by_meaning = {place: at for at, place in enumerate(meaning, 1)}
    return [
        Hit(
            index.stored.passage(place),
            float(bm25_N[place]),
            None if cosine_N is None else float(cosine_N[place]),
            by_words.get(place),
            by_meaning.get(place),
            fused,
        )
        for place, fused in fuse_ranks([words, meaning])[:k]
    ]
