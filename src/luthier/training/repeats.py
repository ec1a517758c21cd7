"""Several steps that learn from the same rows, as they were drawn for the first of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from luthier.core.types import Encoded
from luthier.data.batches import deal
from luthier.training.world import World

Shares: TypeAlias = Sequence[Sequence[Encoded]]
"""The rows of each process."""


def repeated(fresh: Iterator[list[Encoded]], times: int, first: int, last: int) -> Iterator[list[Encoded] | None]:
    """The rows of each step from `first` to `last`: fresh ones, and None (the same again) until `times` steps had them.

    `fresh` begins with the rows of the first step from `first` on whose number `times` divides.
    """
    for step in range(first, last):
        yield None if step % times else next(fresh)


def take_share(shares: Shares, world: World) -> list[Encoded]:
    """What this process goes on with: what it had, or where there were more or fewer processes, its share of all."""
    if len(shares) == world.size:
        return list(shares[world.rank])
    rows = [row for share in shares for row in share]
    return [rows[at] for at in deal([len(row.ids) for row in rows], world.size)[world.rank]]
