"""Answers from an index: its passages, and what a model says from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from luthier.core.types import Message
from luthier.retrieval.citations import check_citations
from luthier.retrieval.prompt import Source, fit_prompt, say_unknown
from luthier.retrieval.refuse import Evidence, Refusal, script_of
from luthier.retrieval.search import DEPTH, Index, fuse_hits, search_all


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What an index has for a question. `known` is whether the evidence reaches what answers need; where that was never
    measured it is true as soon as anything is found."""

    question: str
    sources: tuple[Source, ...]
    known: bool
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said to a question. `cited` are the sources that the text names, `removed` how many citations named none and
    were taken out; without `known` the model was not asked."""

    text: str
    sources: tuple[Source, ...]
    cited: tuple[Source, ...]
    removed: int
    known: bool


def retrieve(index: Index, query: str, k: int = 5) -> Retrieved:
    """The `k` best passages with the numbers that they are cited by, and whether they are enough to answer from."""
    return retrieve_all(index, [query], k)[0]


def retrieve_all(index: Index, queries: Sequence[str | Sequence[str]], k: int = 5) -> list[Retrieved]:
    """The same for several questions at once. A question that is asked in several ways, the first of which is its text, is
    looked up in each and fused by rank. It is known where its text is, or where what all find first is among what its text finds
    and another way knows it: a change of topic does not live on what was known of the topic before."""
    asked = [(query,) if isinstance(query, str) else tuple(query) for query in queries]
    # What is fused is looked at further down.
    depth = k if all(len(ways) == 1 for ways in asked) else max(k, DEPTH)
    searched = iter(search_all(index, [way for ways in asked for way in ways], depth))
    found = []
    for ways in asked:
        results = [next(searched) for _ in ways]
        alone, *together = [bool(hits) and _knows(index, way, seen) for way, (hits, seen) in zip(ways, results)]
        hits = fuse_hits([hits for hits, _ in results], k)
        itself = {hit.passage.id for hit in results[0][0][:k]}
        known = alone or (any(together) and hits[0].passage.id in itself)
        sources = tuple(Source(at, hit) for at, hit in enumerate(hits, 1))
        found.append(Retrieved(ways[0], sources, known, results[0][1]))
    return found


def _knows(index: Index, query: str, evidence: Evidence) -> bool:
    refusal = _refusal(index, query)
    return refusal is None or refusal.knows(evidence)


def _refusal(index: Index, query: str) -> Refusal | None:
    """What was measured for the question's writing; for one that the index holds too little of, what was for the other."""
    measured = index.stored.meta.measured
    own = measured.get(script_of(query))
    return next((one.refusal for one in (own, *measured.values()) if one is not None and one.refusal is not None), None)


def answer(
    index: Index,
    question: str,
    write: Callable[[tuple[Message, ...]], str],
    k: int = 5,
    fits: Callable[[str], bool] = lambda prompt: True,
) -> Answer:
    """The answer of `write`, a model that is given turns and says the next, from the `k` best passages that fit.

    Where the evidence is too little the model is not asked, and the text says so in the question's language.
    """
    found = retrieve(index, question, k)
    if not found.known:
        return Answer(say_unknown(question), found.sources, (), 0, False)
    prompt, sources = fit_prompt(question, found.sources, fits)
    return finish(write((Message("user", prompt),)), sources)


def finish(text: str, sources: tuple[Source, ...]) -> Answer:
    """What a model wrote from `sources`, with its citations checked."""
    kept, cited, removed = check_citations(text, sources)
    return Answer(kept, sources, cited, removed, True)


class SourceRow(TypedDict):
    """A source as plain values: where it stands, its text, and whether it is cited."""

    number: int
    passage: str
    file: str
    place: str
    text: str
    cited: bool


class SourcesRow(TypedDict):
    """What a row says of where its answer is from."""

    known: bool
    sources: list[SourceRow]
    removed_citations: int


def as_row(found: Answer) -> SourcesRow:
    """An answer's sources as plain values."""
    cited = {one.number for one in found.cited}
    return {
        "known": found.known,
        "sources": [
            {
                "number": one.number,
                "passage": one.passage.id,
                "file": one.passage.file,
                "place": one.passage.citation,
                "text": one.passage.shown,
                "cited": one.number in cited,
            }
            for one in found.sources
        ],
        "removed_citations": found.removed,
    }
