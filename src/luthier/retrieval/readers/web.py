"""HTML: the text that a reader sees, by headings. Scripts, styles and navigation are dropped."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from luthier.retrieval.passage import Section

DROPPED = frozenset(
    ("script", "style", "noscript", "template", "svg", "iframe", "nav", "footer", "form", "button", "select")
)
# They end a line; other elements stand inside one.
INNER = "address article aside blockquote br dd div dl dt fieldset figcaption figure header hr li main ol p pre section table"
BLOCKS = frozenset((*INNER.split(), "td", "th", "tr", "ul", "title", *(f"h{level}" for level in range(1, 7))))
PARAGRAPHS = frozenset(("p", "li", "pre", "table", "blockquote", "ul", "ol", "section", "article", "div", "tr"))
VOID = frozenset(["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"])


def read_html(text: str) -> list[Section]:
    """Sections of a page, each with the headings above it, in the characters of the text that is seen. Lines
    of the source would say little to a reader, and are left out. The page's title stands above all headings, unless the first
    says the same."""
    parser = _Reader()
    parser.feed(text)
    parser.close()
    return parser.sections()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title = ""
        # What is open of what is dropped, and of the title, a heading, or preformatted text.
        self.dropped: list[str] = []
        self.inside: list[str] = []
        self.path: list[tuple[int, str]] = []
        self.said: list[str] = []
        self.heading: list[str] = []
        self.found: list[tuple[tuple[str, ...], str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            if tag == "br":
                self._say("\n")
            return
        if self.dropped:
            if tag == self.dropped[-1]:
                self.dropped.append(tag)
            return
        held = dict(attrs)
        if tag in DROPPED or held.get("role") == "navigation" or "hidden" in held:
            self.dropped.append(tag)
            return
        if re.fullmatch(r"h[1-6]", tag):
            self._close()
            self.heading = []
        if tag in ("title", "pre") or re.fullmatch(r"h[1-6]", tag):
            self.inside.append(tag)
        elif tag in BLOCKS:
            self._say("\n\n" if tag in PARAGRAPHS else "\n")

    def handle_endtag(self, tag: str) -> None:
        if self.dropped:
            if tag == self.dropped[-1]:
                self.dropped.pop()
            return
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()
            if re.fullmatch(r"h[1-6]", tag):
                level = int(tag[1])
                self.path = [*(one for one in self.path if one[0] < level), (level, _squeeze("".join(self.heading)))]
        if tag in BLOCKS:
            self._say("\n\n" if tag in PARAGRAPHS else "\n")

    def handle_data(self, data: str) -> None:
        if self.dropped:
            return
        last = self.inside[-1] if self.inside else ""
        if last == "title":
            self.title += data
        elif last.startswith("h"):
            self.heading.append(data)
        else:
            self._say(data if last == "pre" else re.sub(r"\s+", " ", data))

    def sections(self) -> list[Section]:
        self._close(last=True)
        title = _squeeze(self.title)
        sections, start = [], 0
        for heading, text in self.found:
            whole = heading if not title or title in heading[:1] else (title, *heading)
            sections.append(Section(text, start, whole))
            start += len(text) + 2
        return sections

    def _say(self, text: str) -> None:
        self.said.append(text)

    def _close(self, last: bool = False) -> None:
        """End a section. A heading with nothing below it is a section by itself only where the next is no deeper, which is
        not known yet: it stays in the path, and is kept at the end."""
        text = _tidy("".join(self.said))
        self.said = []
        headings = tuple(title for _, title in self.path if title)
        if text:
            self.found.append((headings, text))
        elif last and headings and not any(one[0][: len(headings)] == headings for one in self.found):
            self.found.append((headings[:-1], headings[-1]))


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _tidy(text: str) -> str:
    lines = [line.rstrip() if line.startswith("  ") else line.strip() for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
