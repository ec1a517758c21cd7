"""Tokens drawn from rows of scores: the C kernel of draws.h. Its twin in plain torch is what `engine.choose` does without it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from luthier.native.layers import LONG, kernel, usable


@dataclass(frozen=True, slots=True)
class Draw:
    """What one token is drawn from, and where the draw falls: a number from 0 to 1.

    The `top_k` likeliest tokens stay (0: all), of these the likeliest that together hold the share `top_p` (1: all), of these
    those with at least `min_p` times the likeliest's probability (0: all).
    """

    number: float
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class _Draw(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_double) for name in ("cooled", "top_p", "min_p", "number")), ("top_k", ctypes.c_long)]


def can_draw(scores_RV: Tensor) -> bool:
    """Whether the kernel can take these scores: fp32 on the CPU, each row in one piece, and there is a library."""
    return scores_RV.dtype.itemsize == 4 and usable(scores_RV) and scores_RV.stride(1) == 1


def draw_rows(scores_RV: Tensor, rows: Sequence[int], draws: Sequence[Draw]) -> list[int]:
    """A token for each of these rows by the draw beside it; -1 where a row's scores are not numbers, or all -inf.

    What a row gets does not depend on those beside it. Tokens come in the order of the vocabulary, or the likeliest first
    where top_k or top_p is set; weights are fp32 and sums fp64. Raises MemoryError.
    """
    count, width = len(rows), scores_RV.shape[1]
    how = (_Draw * count)(*(_Draw(1 / one.temperature, one.top_p, one.min_p, one.number, min(one.top_k, width))
                            for one in draws))  # fmt: skip
    places, tokens = (LONG * count)(*rows), (LONG * count)()
    kernel("draw_rows", scores_RV)(
        scores_RV.data_ptr(), ctypes.addressof(places), ctypes.addressof(how), ctypes.addressof(tokens), count, width,
        scores_RV.stride(0),
    )  # fmt: skip
    if -2 in tokens:
        raise MemoryError("no memory is left to draw a token")
    return list(tokens)
