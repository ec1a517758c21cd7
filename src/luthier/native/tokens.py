"""The tokens of a step as the C code reads them: of each its id, its place in its text, and where the blocks of that begin."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np


@dataclass(frozen=True, slots=True)
class Tokens:
    """Words of 32 bits, and the limits of what they hold."""

    ids: array[int]
    places: array[int] | np.ndarray
    first: array[int] | np.ndarray
    """Where in `tables` the blocks of its text begin."""
    tables: array[int]
    rows: array[int]
    adapters: array[int] | np.ndarray
    longest: int
    """Tokens of the longest text, those read now included."""
    held: bool
    """Whether every text has blocks for its tokens."""


def lay(
    ids: Sequence[int],
    tables: Sequence[Sequence[int]],
    before: Sequence[int],
    lengths: Sequence[int],
    rows: Sequence[int],
    adapters: Sequence[int],
    block: int,
) -> Tokens:
    """Texts end to end, with the blocks of `block` tokens in their tables, and the adapter of each.

    Steps of single tokens come thousands of times, and a few numbers are looked at sooner one by one than as arrays."""
    words, widths = array("i", ids), [len(table) for table in tables]
    starts = list(accumulate(widths, initial=0))[:-1]
    flat, wanted = array("i", chain.from_iterable(tables)), array("i", rows)
    ends = [at + count for at, count in zip(before, lengths)]
    longest, held = max(ends), all(end <= width * block for end, width in zip(ends, widths))
    if len(ids) == len(lengths) and min(lengths) == 1:
        return Tokens(words, array("i", before), array("i", starts), flat, wanted, array("i", adapters), longest, held)
    sizes = np.asarray(lengths)
    shift_N = np.repeat(np.asarray(before) - (np.cumsum(sizes) - sizes), sizes)
    places_N = (shift_N + np.arange(len(ids))).astype(np.int32)
    first_N, adapter_N = (np.repeat(np.asarray(one, dtype=np.int32), sizes) for one in (starts, adapters))
    return Tokens(words, places_N, first_N, flat, wanted, adapter_N, longest, held)


def address(words: array[int] | np.ndarray) -> int:
    """Where they lie in memory."""
    if isinstance(words, array):
        return words.buffer_info()[0]
    at: int = words.__array_interface__["data"][0]
    return at
