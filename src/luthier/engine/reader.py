"""What the engine asks of whatever puts a step's tokens through a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Reader(Protocol):
    """Reads texts in steps, and keeps what it read of each in the blocks of its table."""

    def read(
        self,
        ids: Sequence[int],
        tables: Sequence[Sequence[int]],
        before: Sequence[int],
        lengths: Sequence[int],
        rows: Sequence[int],
        *,
        likeliest: bool = False,
        adapters: Sequence[int] = (),
    ) -> Tensor:
        """Read `lengths` new tokens of each text, end to end in `ids`, of which `before` lie in the blocks of its table, with
        the adapter of that number for each text, or without one (-1).
        The logits after those at `rows` [R, V] in fp32, or with `likeliest` the likeliest token after each [R]."""

    def copy(self, source: int, target: int) -> None:
        """One block as another."""

    def drop(self, block: int) -> None:
        """Nothing more is read of the text whose first block this is."""
