"""Answers from indexes: passages put before a question, and where the answer cites them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, Field

from luthier.core.types import Message
from luthier.faces.server.engines import Tap
from luthier.faces.server.indexes import Found
from luthier.faces.server.server import server_of
from luthier.faces.server.shelf import Served
from luthier.faces.server.writing import write, write_pieces
from luthier.retrieval.citations import CitationReader, place_citations
from luthier.retrieval.prompt import Source, offer_prompts, say_unknown, ways_of

# As `luthier chat` has them: passages, and tokens that are left for an answer whose length the request does not say.
PASSAGES, ROOM = 5, 256
Passages = Annotated[int, Field(ge=1, le=50)]
# What an answer costs that the model is not asked for.
NOTHING = {"prompt": 0, "written": 0, "reused": 0, "drafted": 0, "accepted": 0}


@dataclass(frozen=True, slots=True)
class Ground:
    """What an answer is written from: the passages that were found, the best first, and of those the `read` first ones, which
    the model is given. Without `known` it is not asked."""

    question: str
    found: tuple[Found, ...]
    known: bool
    read: int = 0

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(Source(at, one.hit) for at, one in enumerate(self.found[: self.read], 1))


class Cited(BaseModel):
    """A passage that is cited."""

    number: int
    """The number in the text: [1] is 1."""
    file_id: str
    filename: str
    vector_store_id: str
    """The index."""
    place: str
    """Where the passage stands, for people."""
    quote: str
    """Its text."""
    page: int | None = None
    lines: tuple[int, int] | None = None
    """First and last line of the file."""


class Annotation(Cited):
    """A citation in an item of /v1/responses."""

    type: Literal["file_citation"] = "file_citation"
    index: int
    """The character at which the citation begins in the text."""


class Citation(Cited):
    """A citation in a message of a chat."""

    index: int
    """Its place among the message's citations."""
    start: int
    end: int
    """The characters [start, end) of the content that are the citation."""

    def annotation(self) -> Annotation:
        """The same for /v1/responses."""
        return Annotation(**{**self.model_dump(exclude={"start", "end"}), "index": self.start})


async def find_ground(request: Request, served: Served, asked: dict[str, Any], names: Sequence[str], k: int) -> Ground:
    """Look up the last turn of what is asked of a model, and put the passages that fit before it in its place.

    Raises ConfigError for a last turn that is not the user's, DataError where no passage fits, and as `Indexes.search`.
    """
    ways = ways_of([_turn(one) for one in asked["messages"]])
    question = ways[0]
    found, known = await server_of(request).indexes.search(names, [ways], k)
    request.state.facts |= {"model": served.name, "indexes": list(names), "known": known}
    if not known:
        return Ground(question, tuple(found), False)
    ground = Ground(question, tuple(found), True, len(found))
    limit = served.process.facts["context"] - (asked["sampling"].get("max_tokens") or ROOM)
    for text, sources in offer_prompts(question, ground.sources):
        messages = [*asked["messages"][:-1], {"role": "user", "content": text}]
        prompt = await served.ask("tokenize", messages=messages)
        if len(prompt["ids"]) <= limit:
            asked["messages"] = messages
            request.state.facts["passages"] = len(sources)
            return Ground(question, ground.found, True, len(sources))
    raise AssertionError("offer_prompts raises at its end")


async def write_grounded(
    request: Request, served: Served, asked: dict[str, Any], ground: Ground | None
) -> dict[str, Any]:
    """As `write`; where the ground holds too little, the answers say so."""
    if ground is None or ground.known:
        return await write(request, served, asked)
    one = {"text": _say_unknown(request, ground), "finish": "stop"}
    return {"answers": [one] * asked["sampling"].get("n", 1), "usage": NOTHING}


async def write_grounded_pieces(
    request: Request, served: Served, asked: dict[str, Any], ground: Ground | None, tap: Tap | None = None
) -> AsyncIterator[tuple[Literal["piece", "end"], dict[str, Any]]]:
    """The same, piece by piece."""
    if ground is None or ground.known:
        async for one in write_pieces(request, served, asked, tap):
            yield one
        return
    text = _say_unknown(request, ground)
    for which in range(asked["sampling"].get("n", 1)):
        yield "piece", {"which": which, "text": text, "finish": "stop"}
    yield "end", {"usage": NOTHING}


class Citing:
    """An answer as it comes: what is certain of it, and the citations in that."""

    def __init__(self, request: Request, served: Served, ground: Ground):
        self._request, self._served, self._ground = request, served, ground
        self._reader = CitationReader(ground.sources)
        self._length = self._count = 0

    @property
    def removed(self) -> int:
        """Citations that named no passage, and were taken out."""
        return self._reader.removed

    def feed(self, piece: str, last: bool) -> tuple[str, list[Citation]]:
        """The text that is certain with this piece, all of it after the `last` one, and what it cites."""
        text = self._reader.feed(piece) + (self._reader.end() if last else "")
        cited = [self._cite(*one) for one in place_citations(text) if 0 < one[0] <= self._ground.read]
        self._length += len(text)
        if last and self.removed:
            server_of(self._request).metrics.false.labels(self._served.name).inc(self.removed)
            facts: dict[str, Any] = self._request.state.facts
            facts["removed_citations"] = facts.get("removed_citations", 0) + self.removed
        return text, cited

    def _cite(self, number: int, start: int, end: int) -> Citation:
        one = self._ground.found[number - 1]
        passage, at = one.hit.passage, self._count
        self._count += 1
        return Citation(
            index=at, start=self._length + start, end=self._length + end, number=number, file_id=passage.file,
            filename=passage.file, vector_store_id=one.index, place=passage.citation, quote=passage.shown, page=passage.page,
            lines=None if passage.line is None else (passage.line, passage.line_end or passage.line),
        )  # fmt: skip


def attributes_of(one: Found) -> dict[str, str | float]:
    """Where a passage stands, and its scores, as OpenAI's attributes of a file."""
    passage, hit = one.hit.passage, one.hit
    found = {
        "vector_store_id": one.index, "passage": passage.id, "place": passage.citation, "page": passage.page,
        "line": passage.line, "line_end": passage.line_end, "bm25": hit.bm25, "cosine": hit.cosine,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def _turn(turn: dict[str, Any]) -> Message:
    content = turn.get("content") or ""
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return Message(turn["role"], text)


def _say_unknown(request: Request, ground: Ground) -> str:
    text = say_unknown(ground.question)
    if server_of(request).settings.log_prompts:
        facts: dict[str, Any] = request.state.facts
        facts.setdefault("prompts", []).append(ground.question)
        facts.setdefault("answers", []).append(text)
    return text
