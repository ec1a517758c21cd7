"""Which citations of an answer exist: those that do not are taken out, while it is written too."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from luthier.retrieval.prompt import Source

# [1], [1, 2], 【1】, and [1][2] one by one.
CITED = re.compile(r"[ \t]*[\[【]\s*(\d{1,3}(?:\s*[,，、]\s*\d{1,3})*)\s*[\]】]")
OPEN = re.compile(r"(?:[ \t]*[\[【][\d\s,，、\[【]*|[ \t]*)\Z")


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

    # What is taken out of the middle of another, as in [[9]8], leaves one that is looked at again.
    while (kept := CITED.sub(keep, text)) != text:
        text = kept
    return kept, tuple(cited.values()), removed


def place_citations(text: str) -> Iterator[tuple[int, int, int]]:
    """The citations of a text that was checked, one by one: the number, and the characters [start, end) of its mark."""
    for found in CITED.finditer(text):
        start = found.end() - len(found[0].lstrip(" \t"))
        yield from ((int(number), start, found.end()) for number in re.split(r"\D+", found[1]))


class CitationReader:
    """Takes the pieces of an answer as they come, and gives them back without the citations that name no passage: the
    beginning of what may become a citation is held until that is known."""

    def __init__(self, sources: Sequence[Source]):
        self._sources, self._held = sources, ""
        self.removed = 0
        """Citations that named none."""

    def feed(self, piece: str) -> str:
        """What is certain now."""
        held = self._check(self._held + piece)
        ready = OPEN.search(held).start()  # type: ignore[union-attr]
        self._held = held[ready:]
        return held[:ready]

    def end(self) -> str:
        """The rest, once the last piece was there."""
        held, self._held = self._held, ""
        return self._check(held)

    def _check(self, text: str) -> str:
        kept, _, removed = check_citations(text, self._sources)
        self.removed += removed
        return kept


def stream_checked(pieces: Iterable[str], sources: Sequence[Source]) -> Iterator[str]:
    """The pieces of an answer as they come, as CitationReader gives them back."""
    reader = CitationReader(sources)
    for piece in pieces:
        if kept := reader.feed(piece):
            yield kept
    if kept := reader.end():
        yield kept
