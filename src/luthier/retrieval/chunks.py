"""Sections cut into passages of a few sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from pydantic import Field, model_validator

from luthier.core.config import Config
from luthier.retrieval.passage import Passage, Section
from luthier.retrieval.sentences import Span, split_pieces, split_sentences

Count: TypeAlias = Callable[[Sequence[str]], list[int]]
"""How many tokens each text has."""


class Chunking(Config):
    """How files are cut into passages: at headings, pages and rows, then by tokens, between sentences where that is possible."""

    size: int = Field(200, gt=0)
    """Most tokens of a passage, by the encoder's tokenizer; without an encoder words and Chinese characters are counted."""
    overlap: int = Field(40, ge=0)
    """Tokens that a passage may begin with of the one before it, in whole sentences."""

    @model_validator(mode="after")
    def _check(self) -> Chunking:
        if self.overlap >= self.size:
            raise ValueError(f"overlap is {self.overlap}, and must be below the size, {self.size}")
        return self


def count_words(texts: Sequence[str]) -> list[int]:
    """Words, and characters of Chinese, of each text."""
    return [len(split_pieces(text, 0, len(text))) for text in texts]


def cut_sections(file: str, sections: Sequence[Section], chunking: Chunking, count: Count) -> list[Passage]:
    """The passages of a file, in order. A row of questions and answers stays whole, however long."""
    found: list[Passage] = []
    for section in sections:
        whole = section.question is not None
        for start, end in [(0, len(section.text))] if whole else _cut(section.text, chunking, count):
            before = section.text[:start].count("\n")
            inside = section.text[start:end].count("\n")
            line = None if section.line is None else section.line + before
            found.append(
                Passage(
                    id=f"{file}#{len(found) + 1}",
                    file=file,
                    text=section.text[start:end],
                    heading=section.heading,
                    start=section.start + start,
                    end=section.start + end,
                    line=line,
                    # A row is one line to its readers, whatever its values hold.
                    line_end=line if line is None or whole else line + inside,
                    page=section.page,
                    question=section.question,
                )
            )
    return found


def _cut(text: str, chunking: Chunking, count: Count) -> list[Span]:
    """Spans of at most `size` tokens that begin and end at sentences, each overlapping the one before it by whole sentences."""
    parts = _parts(text, chunking.size, count)
    spans: list[Span] = []
    first = 0
    while first < len(parts):
        last, held = first, 0
        while last < len(parts) and (last == first or held + parts[last][1] <= chunking.size):
            held += parts[last][1]
            last += 1
        spans.append((parts[first][0][0], parts[last - 1][0][1]))
        if last == len(parts):
            break
        again, shared = last, 0
        # What is shared leaves room for the next sentence, so that every passage goes on.
        while again > first + 1 and shared + parts[again - 1][1] <= chunking.overlap:
            again -= 1
            shared += parts[again][1]
        while shared + parts[last][1] > chunking.size:
            shared -= parts[again][1]
            again += 1
        first = again
    return spans


def _parts(text: str, size: int, count: Count) -> list[tuple[Span, int]]:
    """Sentences with their tokens; one that is longer than a passage in as few parts as are needed."""
    sentences = split_sentences(text)
    lengths = count([text[start:end] for start, end in sentences])
    found: list[tuple[Span, int]] = []
    for (start, end), length in zip(sentences, lengths):
        if length <= size:
            found.append(((start, end), length))
            continue
        pieces = split_pieces(text, start, end)
        sizes = count([text[one:other] for one, other in pieces])
        open_at, held = pieces[0][0], 0
        for at, (piece, tokens) in enumerate(zip(pieces, sizes)):
            if held and held + tokens > size:
                found.append(((open_at, pieces[at - 1][1]), held))
                open_at, held = piece[0], 0
            held += tokens
        found.append(((open_at, end), held))
    return found
