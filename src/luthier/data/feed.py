"""Where the rows of each step come from: rows that are all at hand, or a stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np

from luthier.core.errors import DataError
from luthier.core.events import Events
from luthier.core.types import Encoded, Example
from luthier.data.batches import plan_steps
from luthier.data.plans import Plan
from luthier.data.stream import Position, Stream

Place: TypeAlias = dict[str, Any]
"""What a feed must be told to go on, beside the number of steps that were taken: plain values, kept in checkpoints."""
# How encoding says that it cut rows: with the tokens of one window, which nobody wants a thousand times.
CUT = "texts cut to the context length"


class Feed(Protocol):
    """All rows of each step, in the same order wherever and however often it is asked."""

    @property
    def rows_an_epoch(self) -> int | None:
        """Rows of one pass; None where nobody knows."""

    @property
    def place(self) -> Place | None:
        """Where `steps` stands after the step it gave last."""

    def steps(self, first: int, place: Place | None, events: Events) -> Iterator[list[Encoded]]:
        """The rows of each step from `first` (from 0) to the last; `place` is what stood here after the step before."""


@dataclass(frozen=True, slots=True)
class HeldRows:
    """Rows in memory, in the order of a plan."""

    rows: Sequence[Encoded]
    plan: Plan

    @property
    def rows_an_epoch(self) -> int:
        """All of them. A mixture repeats the small sources and samples the large ones, and has as many."""
        return len(self.rows)

    @property
    def place(self) -> None:
        """Nothing: the number of the step says it."""
        return None

    def steps(self, first: int, place: Place | None, events: Events) -> Iterator[list[Encoded]]:
        for rows in self.plan.steps_from(first):
            yield [self.rows[row] for row in rows]


@dataclass(frozen=True, slots=True)
class Window:
    """Rows of a stream that are shuffled together, as steps; what is left over begins the next window."""

    steps: list[list[Encoded]]
    before: Place
    after: Place
    heard: Counter[str]


class StreamedRows:
    """Rows of a stream, in windows of `window` examples: encoded (and packed) and shuffled together, cut into steps.

    The next window is made in a thread while this one is learned from, so two are in memory at most. A place is where
    the window began in every source, with the few rows left over from the one before it: to go on, that one window is
    made again. Weights that move are those of the step at which a window begins. `shuffled` false: rows as they come.
    """

    rows_an_epoch = None

    def __init__(
        self,
        stream: Stream,
        encode: Callable[[Sequence[Example], Events], list[Encoded]],
        *,
        batch_size: int,
        steps: int,
        seed: int,
        window: int,
        shuffled: bool,
        by_length: bool,
    ):
        self._stream, self._encode = stream, encode
        self._batch_size, self._steps, self._seed = batch_size, steps, seed
        self._window, self._shuffled, self._by_length = window, shuffled, by_length
        self.place: Place | None = None

    def steps(self, first: int, place: Place | None, events: Events) -> Iterator[list[Encoded]]:
        start = self._stream.start()
        place = place or {"marks": start.marks, "owed": start.owed, "left": [], "window": 0, "step": 0, "used": 0}
        step, used = first, place["used"]
        pool = ThreadPoolExecutor(1, "feed")
        try:
            coming = pool.submit(self._make, {**place, "used": 0})
            while step < self._steps:
                window = coming.result()
                if window.after["step"] < self._steps:
                    coming = pool.submit(self._make, window.after)
                for message, count in window.heard.items():
                    events.warn(message, count)
                for number, rows in enumerate(window.steps[used:], used + 1):
                    self.place = {**window.before, "used": number}
                    yield rows
                    step += 1
                    if step == self._steps:
                        return
                used = 0
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, place: Place) -> Window:
        events, heard = Events(), Counter[str]()
        time = min(1.0, place["step"] / max(1, self._steps - 1))
        position = Position(tuple(place["marks"]), tuple(place["owed"]))
        examples, position = self._stream.take(position, self._window, time)
        rows = self._encode_all(examples, events, heard)
        cut = sum(1 for row in rows if row.cut)
        if cut:
            heard["texts of the stream cut to the context length"] += cut
        heard.update({message: count for message, count in events.warnings.items() if not message.startswith(CUT)})
        heard.update(self._stream.noted)
        self._stream.noted.clear()
        steps, left = self._cut([*(Encoded(**row) for row in place["left"]), *rows], place["window"])
        after = {
            "marks": position.marks,
            "owed": position.owed,
            "left": [asdict(row) for row in left],
            "window": place["window"] + 1,
            "step": place["step"] + len(steps),
            "used": 0,
        }
        return Window(steps, place, after, heard)

    def _cut(self, rows: Sequence[Encoded], window: int) -> tuple[list[list[Encoded]], list[Encoded]]:
        """Whole steps, and the rows that are too few for another."""
        order = np.arange(len(rows))
        if self._shuffled:
            order = np.random.default_rng([self._seed, window]).permutation(order)
        kept = order[: len(rows) - len(rows) % self._batch_size].tolist()
        left = [rows[at] for at in order[len(kept) :]]
        if not self._shuffled:
            return [
                [rows[at] for at in kept[start : start + self._batch_size]]
                for start in range(0, len(kept), self._batch_size)
            ], left
        lengths = [len(rows[at].ids) + len(rows[at].target) for at in kept]
        plan = plan_steps(lengths, self._batch_size, seed=self._seed, epoch=window, by_length=self._by_length)
        return [[rows[kept[at]] for at in step] for step in plan], left

    def _encode_all(
        self, examples: Sequence[tuple[str, Example]], events: Events, heard: Counter[str]
    ) -> list[Encoded]:
        """The rows of `examples`, each source by itself: in their order, or where rows are packed source by source."""
        places: dict[str, list[int]] = {}
        for at, (name, _) in enumerate(examples):
            places.setdefault(name, []).append(at)
        found: list[tuple[int, Encoded]] = []
        for name, held in places.items():
            rows = self._encode_rows([examples[at][1] for at in held], events, heard)
            rows = [replace(row, source=name) for row in rows] if name else rows
            found += zip(held if len(rows) == len(held) else [held[0]] * len(rows), rows)
        return [row for _, row in sorted(found, key=lambda one: one[0])]

    def _encode_rows(self, examples: Sequence[Example], events: Events, heard: Counter[str]) -> list[Encoded]:
        """Encode `examples`; where rows are dropped rather than refused, without those that cannot be."""
        try:
            return self._encode(examples, events)
        except DataError:
            if not self._stream.drop:
                raise
        rows = []
        for example in examples:
            try:
                rows += self._encode([example], events)
            except DataError:
                heard["rows of the stream dropped because they cannot be learned from"] += 1
        return rows
