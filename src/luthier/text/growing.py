"""Text of tokens that come one by one: as much of it as no later token can change, and never the whole anew.

Characters may be split over tokens, and decoders of SentencePiece treat the first token and runs of bytes in their own way.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
LOST = "\ufffd"


class GrowingText:
    """What tokens add to a text. All that `take` and `rest` gave, put together, is `decode` of all ids at once (special
    tokens left out, but for those that are `shown`)."""

    def __init__(self, tokenizer: Any, decode: Callable[[Sequence[int]], str], shown: Sequence[int] = ()):
        self._tokenizer, self._decode = tokenizer, decode
        self._known = _known_of(tokenizer)
        self._special, self._falls_back = self._known.special - set(shown), self._known.falls_back
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if self._known.byte_level else None
        self._before: list[int] = []
        """Tokens before those whose text is not told yet: some decoders look at them."""
        self._ids: list[int] = []

    def take(self, token: int) -> str:
        """The text that is certain after one token more."""
        if token in self._special:
            return ""
        if self._bytes is not None and (known := self._known.bytes.get(token)) is not None:
            return self._bytes.decode(known)
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # beyond the vocabulary: decoders leave it out
            return ""
        if self._bytes is not None:
            found = self._known.bytes[token] = _bytes_of(name)
            return self._bytes.decode(found)
        self._ids.append(token)
        # A run of bytes is text only if all of it is: one that is wrong makes every one of them a replacement character.
        if self._falls_back and BYTE.fullmatch(name):
            return ""
        text = self._added()
        # Others may make a character of several tokens without saying so.
        if not self._falls_back and text.endswith(LOST):
            return ""
        return self._told(text)

    def rest(self) -> str:
        """What was not certain, where no token comes any more."""
        if self._bytes is not None:
            return self._bytes.decode(b"", True)
        return self._told(self._added()) if self._ids else ""

    def _added(self) -> str:
        head = self._decode(self._before) if self._before else ""
        return self._decode(self._before + self._ids)[len(head) :]

    def _told(self, text: str) -> str:
        self._before, self._ids = self._ids, []
        return text


class _Known:
    """What is true of a tokenizer for all texts: asked of it once, for each answer has a text of its own."""

    def __init__(self, tokenizer: Any):
        self.size = len(tokenizer)
        kinds, self.falls_back = _decoders_of(tokenizer)
        self.byte_level = kinds == ["ByteLevel"]
        self.special = {token for token, one in tokenizer.added_tokens_decoder.items() if one.special}
        if not tokenizer.is_fast:
            self.special |= set(tokenizer.all_special_ids)
        self.bytes: dict[int, bytes] = {}
        """Of tokens that came."""


_KNOWN: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()


def _known_of(tokenizer: Any) -> _Known:
    known = _KNOWN.get(tokenizer)
    # A token that is added makes it another tokenizer.
    if known is None or known.size != len(tokenizer):
        known = _KNOWN[tokenizer] = _Known(tokenizer)
    return known


def _decoders_of(tokenizer: Any) -> tuple[list[str], bool]:
    """The kinds of the tokenizer's decoder, and whether unknown characters are tokens of single bytes."""
    if not tokenizer.is_fast:
        return [], True
    made = json.loads(tokenizer.backend_tokenizer.decoder.__getstate__()) if tokenizer.backend_tokenizer.decoder else {}
    parts = made.get("decoders", [made])
    kinds = [str(one.get("type")) for one in parts]
    return kinds, "ByteFallback" in kinds


def _letters() -> dict[str, int]:
    """The letters in which byte-level vocabularies write bytes (Radford et al. 2019, GPT-2): those that can be shown stand for
    themselves, the others follow from 256 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [one for one in range(256) if one not in shown]
    return {chr(one): one for one in shown} | {chr(256 + at): one for at, one in enumerate(hidden)}


LETTERS = _letters()


def _bytes_of(name: str) -> bytes:
    """What a token of a byte-level vocabulary stands for; one that was added as text stands for itself."""
    found = [LETTERS.get(letter) for letter in name]
    return name.encode() if None in found else bytes(found)  # type: ignore[arg-type]
