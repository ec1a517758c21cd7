"""Text as the words that it is found by."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

# Scripts without spaces between words: Han, kana, and Hangul, whose words are seldom the same twice.
DENSE = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U000323af"
RUNS = re.compile(rf"[{DENSE}]+|[^\W_{DENSE}]+(?:['’][^\W_{DENSE}]+)*")
FIRST_DENSE = re.compile(rf"[{DENSE}]")


def split_words(text: str) -> list[str]:
    """The words of `text` after NFKC and case folding: runs of letters and digits, as in Latin script.

    Of a run of Chinese characters (also kana and Hangul) each pair of neighbours is a word, and so is each character: pairs
    tell words apart without a dictionary, and a question of one character still finds something.
    """
    return list(_words(unicodedata.normalize("NFKC", text).casefold()))


def _words(text: str) -> Iterator[str]:
    for found in RUNS.finditer(text):
        run = found.group()
        if FIRST_DENSE.match(run):
            yield from run
            yield from (run[at : at + 2] for at in range(len(run) - 1))
        else:
            yield run


def is_dense(text: str) -> bool:
    """Whether most letters are of a script without spaces, as Chinese is."""
    letters = sum(character.isalpha() for character in text)
    return 2 * len(FIRST_DENSE.findall(text)) > letters
