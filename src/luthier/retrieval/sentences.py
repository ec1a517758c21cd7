"""Where sentences end, in Chinese and in scripts with spaces."""

from __future__ import annotations

import re
from typing import TypeAlias

Span: TypeAlias = tuple[int, int]
"""Characters [start, end)."""

# Chinese marks end a sentence by themselves, with the quotes that close after them; Latin ones before a space. A blank
# line ends one too, and so does a line before an item of a list.
ENDS = re.compile(
    r"[。！？；…]+[”’」』）》】\"']*"
    r"|[.!?]+[\"'”’)\]]*(?=\s|$)"
    r"|\n[ \t]*(?=\n)"
    r"|\n(?=[ \t]*(?:[-*+•]|\d{1,3}[.)、])[ \t])"
)
# Full stops inside a sentence: the number of an item, titles, initials, and what is shortened before a number or a name.
SHORT = re.compile(r"^\s*\d{1,3}\.$|(?:^|[\s(])(?:Mr|Mrs|Ms|Dr|Prof|St|No|Fig|Eq|vs|etc|e\.g|i\.e|cf|al|[A-Z])\.$")


def split_sentences(text: str) -> list[Span]:
    """Spans of the sentences of `text`, in order, without the space around them. Every other character is in one."""
    spans: list[Span] = []
    start = 0
    for found in ENDS.finditer(text):
        end = found.end()
        if found.group() == "." and SHORT.search(text[max(start, end - 8) : end]):
            continue
        spans += _trim(text, start, end)
        start = end
    return spans + _trim(text, start, len(text))


def split_pieces(text: str, start: int, end: int) -> list[Span]:
    """A sentence as small pieces: words, or single characters of Chinese; spans within `text`."""
    from luthier.retrieval.words import DENSE

    return [
        (start + found.start(), start + found.end())
        for found in re.finditer(rf"[{DENSE}]|[^\s{DENSE}]{{1,24}}", text[start:end])
    ]


def _trim(text: str, start: int, end: int) -> list[Span]:
    part = text[start:end]
    left = len(part) - len(part.lstrip())
    stripped = part.strip()
    return [(start + left, start + left + len(stripped))] if stripped else []
