"""Digits at the end of a JSON text are counted token by token as they are in the whole text."""

import json
import random

from luthier.engine.digits import Digits, Vocabulary

TOKENS = [
    b'"',
    b"\\",
    b'\\"',
    b"12",
    b"7",
    b"a",
    b'x"',
    b'":',
    b"3a",
    b"b4",
    b'", "',
    b"}",
    b", ",
    b"n5\\",
    b'"9',
    b"-",
    b"0.25",
]


class Held:
    """What `Vocabulary` asks of llguidance's tokenizer."""

    vocab_size = len(TOKENS)

    def decode_bytes(self, tokens):
        return b"".join(TOKENS[one] for one in tokens)


def counted(text: bytes) -> int:
    """Digits at the end of what lies outside of strings."""
    outside, inside, escaped = "", False, False
    for letter in text.decode():
        if inside:
            if escaped:
                escaped = False
            elif letter == "\\":
                escaped = True
            elif letter == '"':
                inside = False
        elif letter == '"':
            inside, outside = True, outside + letter
        else:
            outside += letter
    return len(outside) - len(outside.rstrip("0123456789"))


def test_tokens_are_counted_as_the_text_is():
    draw, vocabulary = random.Random(0), Vocabulary(Held())
    for _ in range(300):
        digits, text = Digits(vocabulary), b""
        for _ in range(20):
            token = draw.randrange(len(TOKENS))
            digits.take(token)
            text += TOKENS[token]
            assert digits._run == counted(text), json.dumps(text.decode())
