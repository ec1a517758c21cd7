"""Messages in Chinese for readers of Chinese.

English in the source is the only truth: no message is marked, and the floors below know nothing of this. A finished
sentence is found again by its template in `messages.zh.txt`, filled in there, and shown in English where none fits.
English readers pay nothing: neither the table nor a pattern is read.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from functools import cache, lru_cache

TABLE = "messages.zh.txt"
# A template with fewer letters of its own would fit sentences that are not meant; sooner where it opens with a place,
# which takes whatever comes before.
FEW_LETTERS, FEW_AFTER_A_PLACE = 7, 12
# A text with more colons or semicolons is none of ours, and trying them all would take its time.
MOST_SPLITS = 12


def say(text: object) -> str:
    """`text` as the reader wants it: in Chinese where that is the language and the sentence is known, else as it is."""
    if not wants_chinese():
        return str(text)
    return "\n".join(map(_say_line, str(text).split("\n")))


def wants_chinese() -> bool:
    """LUTHIER_LANG decides; without it the first of LC_ALL, LC_MESSAGES and LANG that is set, as everywhere in POSIX."""
    names = ("LUTHIER_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
    language = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return language.lower().startswith("zh") and _can_write(getattr(sys.stdout, "encoding", None) or "utf-8")


def pad(text: str, width: int) -> str:
    """`text` filled up to `width` cells of a terminal, of which a Chinese character takes two."""
    return text + " " * (width - len(text) - sum(map(_is_wide, text)))


def read_table() -> list[tuple[str, str]]:
    """(English, Chinese) in the order of the file: two lines an entry, a blank line between, `#` before a heading."""
    from pathlib import Path

    text = Path(__file__).with_name(TABLE).read_text(encoding="utf-8")
    blocks = [[line for line in block.split("\n") if line and line[:1] != "#"] for block in text.split("\n\n")]
    return [(english, chinese) for english, chinese in filter(None, blocks)]


class Sentence:
    """A template: English with `{}` for what is filled in, Chinese with `{0}`, `{1}` ... in any order."""

    def __init__(self, english: str, chinese: str):
        self.parts = english.split("{}")
        self.letters = sum(letter.isalpha() for letter in "".join(self.parts))
        self.weak = self.letters < (FEW_LETTERS if self.parts[0] else FEW_AFTER_A_PLACE)
        self.chinese = re.split(r"\{(\d+)\}", chinese)
        self._pattern: re.Pattern[str] | None = None

    def readings(self, text: str) -> Iterator[tuple[str, ...]]:
        """What may stand in the places of `text`; nothing when it is another sentence."""
        if not all(part in text for part in self.parts):
            return
        if self.letters == 0:
            # Bare punctuation, which stands inside sentences too: each place where it may part two of them.
            _, middle, end = self.parts
            if text.endswith(end) and text.count(middle) <= MOST_SPLITS:
                for split in re.finditer(re.escape(middle), text):
                    yield text[: split.start()], text[split.end() : len(text) - len(end)]
            return
        if self._pattern is None:
            self._pattern = re.compile("(.*?)".join(map(re.escape, self.parts)))
        if found := self._pattern.fullmatch(text):
            yield found.groups()

    def fits(self, contents: tuple[str, ...], said: tuple[str, ...]) -> bool:
        """Whether to trust a reading: a weak template needs names in its places, or sentences that are known."""
        if self.letters == 0:
            return contents != said
        if not self.parts[0] and ": " in contents[0] and self.chinese[:2] != ["", "0"]:
            return False  # `where: ` stays in front of a sentence whose words change places
        return not self.weak or all(
            _is_name(content) or (content != known and (before.endswith((": ", "; ")) or after.startswith((":", ";"))))
            for content, known, before, after in zip(contents, said, self.parts, self.parts[1:])
        )

    def fill(self, contents: tuple[str, ...], said: tuple[str, ...]) -> str:
        """The Chinese sentence. No space stays between Chinese and Chinese; names keep theirs."""
        text = self.chinese[0]
        for place, after in zip(self.chinese[1::2], self.chinese[2::2]):
            content = said[int(place)]
            if content != contents[int(place)]:
                if re.search(r"[^\x00-\u2e7f] $", text) and _is_wide(content[:1]):
                    text = text[:-1]
                if after[:1] == " " and _is_wide(after[1:2]) and _is_wide(content[-1:]):
                    after = after[1:]
            text += content + after
        return text


@cache
def _sentences() -> tuple[dict[str, str], list[Sentence]]:
    """Whole sentences, and templates: most letters first, since they say most surely what they are."""
    table = read_table()
    templates = [Sentence(*entry) for entry in table if "{}" in entry[0]]
    return dict(table), sorted(templates, key=lambda one: (one.weak, -one.letters))


def _say_line(line: str) -> str:
    # One space in front belongs to a sentence that goes on; more are an indent.
    found = re.match("  +", line)
    indent = found[0] if found is not None else ""
    return indent + _translate(line[len(indent) :])


@lru_cache(maxsize=1024)
def _translate(text: str) -> str:
    whole, templates = _sentences()
    bare = text.strip()
    if bare in whole:
        return text.replace(bare, whole[bare])
    for sentence in templates:
        for contents in sentence.readings(text):
            # A single word is somebody's name: of a file, a label, a setting.
            said = tuple(_translate(one) if " " in one.strip() else one for one in contents)
            if sentence.fits(contents, said):
                return sentence.fill(contents, said)
    return text


def _is_name(text: str) -> bool:
    """Words with commas between, a value as Python writes it, or a number with its unit."""
    plain = all(" " not in part for part in text.split(", "))
    return plain or text[:1] in tuple("'\"[{(<") or re.fullmatch(r"[\d.,]+ \S+", text) is not None


def _is_wide(text: str) -> bool:
    return text > "\u2e80"


@cache
def _can_write(encoding: str) -> bool:
    try:
        "微调".encode(encoding)
    except (LookupError, UnicodeEncodeError):
        return False
    return True
