"""Answers from passages: what a model is asked, and which of its citations exist."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from luthier.core.errors import DataError
from luthier.core.types import Message
from luthier.retrieval.passage import Passage
from luthier.retrieval.refuse import Evidence, Refusal, script_of
from luthier.retrieval.search import Hit, Index, search_all
from luthier.retrieval.words import is_dense

# [1], [1, 2], 【1】, and [1][2] one by one.
CITED = re.compile(r"[ \t]*[\[【]\s*(\d{1,3}(?:\s*[,，、]\s*\d{1,3})*)\s*[\]】]")
OPEN = re.compile(r"(?:[ \t]*[\[【][\d\s,，、]*|[ \t]*)\Z")
ASKED = {
    "en": "Answer the question from the numbered passages alone. After each statement cite its passage as [1]. If the passages "
    "do not answer the question, say: {unknown}",
    "zh": "请只根据下面编号的资料回答问题，并在每个论断后用 [1] 的形式注明出处。如果资料中没有答案，请回答：{unknown}",
}
UNKNOWN = {"en": "I do not know.", "zh": "我不知道。"}
QUESTION = {"en": "Question: {}", "zh": "问题：{}"}


@dataclass(frozen=True, slots=True)
class Source:
    """A passage with the number that it is cited by, from 1."""

    number: int
    hit: Hit

    @property
    def passage(self) -> Passage:
        return self.hit.passage


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


def retrieve_all(index: Index, queries: Sequence[str], k: int = 5) -> list[Retrieved]:
    """The same for several questions at once."""
    found = []
    for query, (hits, evidence) in zip(queries, search_all(index, queries, k)):
        refusal = _refusal(index, query)
        known = bool(hits) and (refusal is None or refusal.knows(evidence))
        found.append(Retrieved(query, tuple(Source(at, hit) for at, hit in enumerate(hits, 1)), known, evidence))
    return found


def _refusal(index: Index, query: str) -> Refusal | None:
    """What was measured for the question's writing; for one that the index holds too little of, what was for the other."""
    measured = index.stored.meta.measured
    own = measured.get(script_of(query))
    return next((one.refusal for one in (own, *measured.values()) if one is not None and one.refusal is not None), None)


def language_of(question: str) -> str:
    """The language in which a question is answered, by its script: "zh" or "en"."""
    return "zh" if is_dense(question) else "en"


def say_unknown(question: str) -> str:
    """What is said to a question that the passages do not answer, in its language."""
    return UNKNOWN[language_of(question)]


def build_prompt(question: str, sources: Sequence[Source]) -> str:
    """What a model is asked: the rules, the passages by number, and the question last, in the question's language."""
    language = language_of(question)
    rules = ASKED[language].format(unknown=UNKNOWN[language])
    passages = [
        f"[{one.number}] {' › '.join((one.passage.file, *one.passage.heading))}\n{one.passage.shown}" for one in sources
    ]
    return "\n\n".join([rules, *passages, QUESTION[language].format(question)])


def fit_prompt(question: str, sources: Sequence[Source], fits: Callable[[str], bool]) -> tuple[str, tuple[Source, ...]]:
    """The prompt with as many of the sources, the best first, as `fits` allows, and those. Raises DataError where not even
    one fits."""
    for count in range(len(sources), 0, -1):
        prompt = build_prompt(question, sources[:count])
        if fits(prompt):
            return prompt, tuple(sources[:count])
    raise DataError(
        "not one passage fits the model's context beside the question and room for an answer; ask for fewer tokens "
        "(max_tokens), index with smaller passages (chunking.size), or use a model with a longer context"
    )


def check_citations(text: str, sources: Sequence[Source]) -> tuple[str, tuple[Source, ...], int]:
    """The text with the citations that exist, the sources that it names in order, and how many citations were taken out
    since they name none."""
    known = {one.number: one for one in sources}
    cited: dict[int, Source] = {}
    removed = 0

    def keep(found: re.Match[str]) -> str:
        nonlocal removed
        numbers = [int(one) for one in re.split(r"\D+", found[1])]
        good = [number for number in numbers if number in known]
        removed += len(numbers) - len(good)
        cited.update({number: known[number] for number in good})
        space = found[0][: len(found[0]) - len(found[0].lstrip(" \t"))]
        return space + "".join(f"[{number}]" for number in good) if good else ""

    kept = CITED.sub(keep, text)
    return kept, tuple(cited.values()), removed


def stream_checked(pieces: Iterable[str], sources: Sequence[Source]) -> Iterator[str]:
    """The pieces of an answer as they come, without the citations that name no passage: the beginning of what may become a
    citation is held until that is known."""
    held = ""
    for piece in pieces:
        held += piece
        ready = OPEN.search(held).start()  # type: ignore[union-attr]
        if ready:
            yield check_citations(held[:ready], sources)[0]
        held = held[ready:]
    if held:
        yield check_citations(held, sources)[0]


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


def as_row(found: Answer) -> dict[str, object]:
    """An answer's sources as plain values: the number, where it stands, its text, and whether it is cited."""
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
