"""Which rows each step of a run learns from: orders, curricula and mixtures of rows that are all at hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from luthier.data.batches import plan_steps

Order: TypeAlias = Literal["shuffled", "given", "short_first", "competence"]
Weight: TypeAlias = tuple[float, float]
"""How much of a mixture a source makes, at the first step of a run and at the last."""

# Parts of the first pass when rows go from short to long.
STAGES = 10
# The share of the shortest rows that a competence begins with (Platanios et al. 2019), and the part of a run it grows for.
FIRST_SHARE, GROWING = 0.01, 0.5
# Steps over which the rows of a mixture are put together by length.
WINDOW = 50


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows of every step of a run: a pure function of these fields, so a resumed run sees the same order.

    Orders: `shuffled`, each row once a pass; `given`, each row once a pass, as the sources have them; `short_first`,
    the first pass goes from short rows to long in ten stages, shuffled inside each, and later passes are shuffled
    (Bengio et al. 2009, "Curriculum learning"); `competence`, over the first half of the run a step is drawn from the
    shortest rows, whose share grows as the root of time (Platanios et al. 2019, arXiv:1903.09848, with length in
    tokens as difficulty), and the second half is shuffled.

    With `weights` the rows are a mixture: of all rows drawn, each source makes the share that its weight is of all
    weights, whatever its size, and never runs ahead of that by a whole row. Each source goes through its own rows in
    `order`, and begins again when it is through: nothing of a source is seen twice before all of it is seen once.
    """

    lengths: Sequence[int]
    """Tokens of each row."""
    batch_size: int
    steps: int
    seed: int
    order: Order = "shuffled"
    by_length: bool = True
    """Rows of like length go into one step, where the order leaves that open."""
    sources: Sequence[str] = ()
    """The source of each row; only a mixture asks."""
    weights: Mapping[str, Weight] = field(default_factory=dict)

    def steps_from(self, first: int) -> Iterator[list[int]]:
        """Row numbers of each step from `first` (from 0) to the last."""
        if self.weights:
            return self._mixed(first)
        if self.order == "competence":
            return self._by_competence(first)
        return self._passes(first, 0)

    def _passes(self, step: int, start: int) -> Iterator[list[int]]:
        """Steps from `step` on, in passes over all rows of which the first begins at step `start`."""
        a_pass = math.ceil(len(self.lengths) / self.batch_size)
        while step < self.steps:
            number, skip = divmod(step - start, a_pass)
            steps = self._pass(number)
            for rows in steps[skip : skip + self.steps - step]:
                yield rows
                step += 1

    def _pass(self, number: int) -> list[list[int]]:
        size = self.batch_size
        if self.order == "given":
            return [list(range(at, min(at + size, len(self.lengths)))) for at in range(0, len(self.lengths), size)]
        if self.order == "short_first" and number == 0:
            ordered = np.argsort(np.asarray(self.lengths), kind="stable")
            count = math.ceil(len(ordered) / size)
            steps: list[list[int]] = []
            for stage in range(STAGES):
                inside = ordered[size * (count * stage // STAGES) : size * (count * (stage + 1) // STAGES)]
                sizes = [self.lengths[row] for row in inside]
                for rows in plan_steps(sizes, size, seed=self.seed, epoch=stage, by_length=self.by_length):
                    steps.append(inside[rows].tolist())
            return steps
        return plan_steps(self.lengths, size, seed=self.seed, epoch=number, by_length=self.by_length)

    def _by_competence(self, first: int) -> Iterator[list[int]]:
        ordered = np.argsort(np.asarray(self.lengths), kind="stable")
        growing = math.ceil(self.steps * GROWING)
        for step in range(first, growing):
            count = max(math.ceil(competence(step, growing) * len(ordered)), min(self.batch_size, len(ordered)))
            random = np.random.default_rng([self.seed, step])
            yield ordered[random.permutation(count)[: self.batch_size]].tolist()
        yield from self._passes(max(first, growing), growing)

    def _mixed(self, first: int) -> Iterator[list[int]]:
        names = list(self.weights)
        owners = np.asarray(self.sources)
        held = [np.flatnonzero(owners == name) for name in names]
        drawn = [0] * len(names)
        orders: list[tuple[int, np.ndarray]] = [(-1, rows) for rows in held]
        shares = Shares([self.weights[name] for name in names])
        for start in range(0, self.steps, WINDOW):
            end = min(start + WINDOW, self.steps)
            rows = []
            for step in range(start, end):
                for source in shares.draw(self.batch_size, step / max(1, self.steps - 1)):
                    number, at = divmod(drawn[source], len(held[source]))
                    drawn[source] += 1
                    if end <= first:
                        continue
                    if orders[source][0] != number:
                        orders[source] = number, self._order(held[source], source, number)
                    rows.append(int(orders[source][1][at]))
            if end <= first:
                continue
            yield from self._cut(rows, start)[max(0, first - start) :]

    def _order(self, rows: np.ndarray, source: int, number: int) -> np.ndarray:
        """The rows of one source in the order of its pass `number`."""
        if self.order == "given":
            return rows
        random = np.random.default_rng([self.seed, source, number])
        if self.order == "short_first" and number == 0:
            ordered = rows[np.argsort([self.lengths[row] for row in rows], kind="stable")]
            return np.concatenate([random.permutation(part) for part in np.array_split(ordered, STAGES)])
        return random.permutation(rows)

    def _cut(self, rows: Sequence[int], start: int) -> list[list[int]]:
        """The rows of one window in steps."""
        if not self.by_length or self.order == "given":
            return [list(rows[at : at + self.batch_size]) for at in range(0, len(rows), self.batch_size)]
        sizes = [self.lengths[row] for row in rows]
        planned = plan_steps(sizes, self.batch_size, seed=self.seed, epoch=start, by_length=True)
        return [[rows[at] for at in step] for step in planned]


class Shares:
    """Which source each row of a mixture comes from: always the one that lacks most of its share.

    No source is ever ahead of its share by a whole row, nor, of two sources, behind it by one. `owed` is all that
    there is to remember.
    """

    def __init__(self, weights: Sequence[Weight], owed: Sequence[float] = ()):
        self._weights = np.array(weights, dtype=np.float64)
        self.owed = list(owed) or [0.0] * len(weights)
        """What each source lacks of its share, in rows."""

    def draw(self, count: int, time: float) -> list[int]:
        """The sources of the next `count` rows, at `time` of the run from 0 to 1: weights go straight from the first
        of each pair to the second."""
        now = self._weights[:, 0] * (1 - time) + self._weights[:, 1] * time
        shares = (now / now.sum()).tolist()
        drawn = []
        for _ in range(count):
            self.owed = [owed + share for owed, share in zip(self.owed, shares)]
            # Among equals the first; rounding, far below any share, makes none of them.
            chosen = max(range(len(shares)), key=lambda at: (round(self.owed[at], 9), -at))
            self.owed[chosen] -= 1.0
            drawn.append(chosen)
        return drawn


def competence(step: int, growing: int) -> float:
    """The share of the easiest rows to learn from at `step` of `growing`: sqrt(t (1 - c0^2) / T + c0^2), at most 1."""
    return min(1.0, math.sqrt(step * (1 - FIRST_SHARE**2) / growing + FIRST_SHARE**2))
