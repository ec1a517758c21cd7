"""What is indexed: a section of a file as it was read, the passages that it is cut into, and one that was found."""

from __future__ import annotations

from dataclasses import dataclass

# Reciprocal rank fusion's constant (Cormack, Clarke and Buettcher 2009).
RRF = 60


@dataclass(frozen=True, slots=True)
class Section:
    """Text between two headings, a page, or a row of questions and answers. `text` is `[start, start + len(text))` of what
    was read of the file: for plain text and Markdown the file's own characters."""

    text: str
    start: int
    heading: tuple[str, ...] = ()
    """The headings above it, the outermost first."""
    line: int | None = None
    """The line (from 1) on which it begins; for a row of a table the row's."""
    page: int | None = None
    """The page (from 1) on which it stands."""
    question: str | None = None
    """The question that it answers; such a section is never cut."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a file that is found as a whole, and where it stands."""

    id: str
    """File and number: "guide.md#3"."""
    file: str
    text: str
    heading: tuple[str, ...]
    start: int
    end: int
    """Characters [start, end) of what was read of the file."""
    line: int | None
    line_end: int | None
    """First and last line, where the file has lines."""
    page: int | None
    question: str | None

    @property
    def searched(self) -> str:
        """What words are looked for in: the headings, the question, and the text."""
        return "\n".join(part for part in (" › ".join(self.heading), self.question, self.text) if part)

    @property
    def compared(self) -> str:
        """What is compared by meaning: the question alone where there is one, since it is asked for with questions."""
        return self.question or "\n".join(part for part in (" › ".join(self.heading), self.text) if part)

    @property
    def shown(self) -> str:
        """What a reader or a model is given of it."""
        return self.text if self.question is None else f"{self.question}\n{self.text}"

    @property
    def citation(self) -> str:
        """Where it stands, for people: "guide.md › Returns, lines 3-9"."""
        place = " › ".join((self.file, *self.heading))
        if self.page is not None:
            return f"{place}, page {self.page}"
        if self.line is None:
            return place
        last = self.line_end or self.line
        return f"{place}, line {self.line}" if last == self.line else f"{place}, lines {self.line}-{last}"


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found. `bm25` is its score by words and `cosine` by meaning; `by_words`
    and `by_meaning` its ranks from 1 (None beyond the first hundred, or without a shared word); `fused` the sum of
    1 / (60 + rank). `cosine` is None without an encoder, and where it was measured that the encoder cannot read the question."""

    passage: Passage
    bm25: float
    cosine: float | None
    by_words: int | None
    by_meaning: int | None
    fused: float

    @property
    def score(self) -> float:
        """How it ranks, from 0 to 1: 1 is the first in each way that was compared."""
        return self.fused * (RRF + 1) / (1 if self.cosine is None else 2)
