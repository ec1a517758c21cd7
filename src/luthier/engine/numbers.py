"""The numbers by which texts are drawn: each by its place alone."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np


def numbers_of(seed: int, *key: object) -> Callable[[int], float]:
    """Numbers from 0 to 1 by place: the same for the same seed and key, whatever was drawn before or beside it."""
    words = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, zlib.crc32(repr(key).encode())]

    def draw(place: int) -> float:
        return float(np.random.default_rng([*words, place]).random())

    return draw
