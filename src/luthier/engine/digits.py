"""Numbers of a JSON text that come to an end: a grammar lets a model write digits for ever, and a greedy one may."""

from __future__ import annotations

import codecs
from copy import copy
from functools import cached_property
from typing import Any

import numpy as np

from luthier.text.called import CallReader

# Digits one after the other, beyond which no more may come where something else may: twice what a float64 tells apart.
MOST = 34
ZERO, NINE, QUOTE, BACKSLASH = b'09"\\'
DIGITS = b"0123456789"


class Vocabulary:
    """The bytes of a tokenizer's tokens, as llguidance holds it."""

    def __init__(self, tokens: Any):
        self.tokens = tokens
        self._plain: dict[int, tuple[bool, int] | None] = {}

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text."""
        return bytes(self.tokens.decode_bytes([token]))

    def plain(self, token: int) -> tuple[bool, int] | None:
        """Whether a token is digits alone, and how many digits it ends with; None where it has a quote or a backslash."""
        if token not in self._plain:
            text = self.bytes_of(token)
            tail = len(text) - len(text.rstrip(DIGITS))
            self._plain[token] = None if QUOTE in text or BACKSLASH in text else (tail == len(text), tail)
        return self._plain[token]

    @cached_property
    def no_digit(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """A bit for each token, unset where it begins with a digit; in words, the lowest bit first."""
        count = self.tokens.vocab_size
        free = np.ones(-(-count // 32) * 32, dtype=np.uint8)
        for token in range(count):
            free[token] = not b"0" <= self.bytes_of(token)[:1] <= b"9"
        return np.packbits(free, bitorder="little").view(np.int32)


class Digits:
    """How many digits stand at the end of a JSON text, outside of its strings."""

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._inside = self._escaped = False
        self._run = 0

    def copy(self) -> Digits:
        """One at the same place."""
        made = Digits(self._vocabulary)
        made._inside, made._escaped, made._run = self._inside, self._escaped, self._run
        return made

    def take(self, token: int) -> None:
        """Go on by a token."""
        plain = None if self._escaped else self._vocabulary.plain(token)
        if plain is not None:
            if not self._inside:
                whole, tail = plain
                self._run = self._run + tail if whole else tail
            return
        for byte in self._vocabulary.bytes_of(token):
            if self._inside:
                if self._escaped or byte == BACKSLASH:
                    self._escaped = not self._escaped
                elif byte == QUOTE:
                    self._inside = False
                continue
            self._inside = byte == QUOTE
            self._run = self._run + 1 if ZERO <= byte <= NINE else 0

    def restrict(self, bits: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """Unset, in place, the bits of tokens that begin with one digit too many, where any others are left."""
        if self._run >= MOST:
            left = bits & self._vocabulary.no_digit
            if left.any():
                bits[:] = left


class CallDigits(Digits):
    """How many digits stand at the end of an answer with calls, inside of these and outside of their texts."""

    def __init__(self, vocabulary: Vocabulary, reader: CallReader):
        super().__init__(vocabulary)
        # Each answer is read by a reader of its own, which holds nothing but texts and numbers.
        self._reader = copy(reader)
        self._letters = codecs.getincrementaldecoder("utf-8")("replace")

    def copy(self) -> CallDigits:
        """One at the same place."""
        made = CallDigits(self._vocabulary, self._reader)
        made._letters.setstate(self._letters.getstate())
        made._run = self._run
        return made

    def take(self, token: int) -> None:
        """Go on by a token."""
        self._reader.feed(self._letters.decode(self._vocabulary.bytes_of(token)))
        self._run = self._reader.digits
