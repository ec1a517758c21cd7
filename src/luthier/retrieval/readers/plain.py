"""Plain text and Markdown: sections are slices of the file, so that a passage is found again in it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from luthier.retrieval.passage import Section

FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
HEADING = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")


def read_plain(text: str) -> list[Section]:
    """The whole text as one section."""
    return [Section(text, 0, line=1)]


def read_markdown(text: str) -> list[Section]:
    """A section for what follows each heading (CommonMark's two kinds), with the headings above it.

    A heading that nothing follows is a section by itself, so that it is found. Front matter between two lines `---` at
    the top is left out.
    """
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    found: list[Section] = []
    path: list[tuple[int, str]] = []
    begun, above = _after_front_matter(lines), 0

    def close(end: int, deeper: bool) -> None:
        body = "".join(lines[begun:end])
        first = above if not body.strip() and path and not deeper else begun
        body = "".join(lines[first:end])
        if body.strip():
            headings = tuple(title for _, title in path if title)
            found.append(Section(body, starts[first], headings, line=first + 1))

    for at, end, level, title in _headings(lines, begun):
        close(at, deeper=bool(path) and level > path[-1][0])
        path = [*(one for one in path if one[0] < level), (level, title)]
        begun, above = end, at
    close(len(lines), deeper=False)
    return found


def _headings(lines: list[str], start: int) -> Iterator[tuple[int, int, int, str]]:
    """(first line, line after, level, title) of each heading outside code."""
    fence = ""
    for at in range(start, len(lines)):
        line = lines[at].rstrip("\r\n")
        if mark := FENCE.match(line):
            if not fence:
                fence = mark[1]
            elif mark[1][0] == fence[0] and len(mark[1]) >= len(fence) and not line[mark.end() :].strip():
                fence = ""
            continue
        if fence:
            continue
        if found := HEADING.match(line):
            yield at, at + 1, len(found[1]), (found[2] or "").strip()
        elif (
            at > start
            and UNDERLINE.match(line)
            and lines[at - 1].strip()
            # One line of text under a blank one: a longer paragraph is no title.
            and (at - 1 == start or not lines[at - 2].strip())
            and not re.match(r" {0,3}([-*+>#|]|\d+[.)]|`{3}|~{3})", lines[at - 1])
        ):
            yield at - 1, at + 1, 1 if "=" in line else 2, lines[at - 1].strip()


def _after_front_matter(lines: list[str]) -> int:
    if not lines or lines[0].strip() != "---":
        return 0
    end = next((at for at in range(1, len(lines)) if lines[at].strip() in ("---", "...")), None)
    # Two rules with prose between are no front matter; keys and values are.
    if end is None or not any(re.match(r"[\w-]+:", line) for line in lines[1:end]):
        return 0
    return end + 1
