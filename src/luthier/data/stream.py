"""Examples of sources that are not held in memory: one after another, or mixed, again and again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from luthier.core.errors import DataError
from luthier.core.types import Example, Labelled
from luthier.data.mix import Source, read_example
from luthier.data.plans import Shares, Weight
from luthier.data.shapes import Shape
from luthier.data.sources.streams import START, Place, stream_rows
from luthier.data.split import content_key

Mark: TypeAlias = tuple[int, int, int, Place]
"""A place in sources that follow one another: passes done, the source's number, rows used of it, the place in it."""


@dataclass(frozen=True, slots=True)
class Flow:
    """One source, and how its rows are read."""

    source: Source
    shape: Shape
    columns: dict[str, str]
    kind: type | None = None
    """What the gold of its rows is, where they are labelled."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a stream has been read: nothing else is needed to go on exactly there."""

    marks: tuple[Mark, ...]
    """One for each source of a mixture; one in all for sources that follow one another."""
    owed: tuple[float, ...] = ()
    """What each source of a mixture lacks of its share."""


@dataclass(slots=True)
class Stream:
    """Sources, read row by row as often as it takes.

    Without `weights` they follow one another; with them each row is of the source that lacks most of its share, and
    every source goes its own rounds. Rows that are held out, and rows with the same text, are passed over.
    """

    flows: Sequence[Flow]
    weights: dict[str, Weight] = field(default_factory=dict)
    by: str | None = None
    """The column whose value makes a group: held-out groups are passed over."""
    limit: int | None = None
    """Rows of each source, from its start."""
    drop: bool = False
    """Leave out rows that cannot be used, and count them; else they are errors."""
    noted: Counter[str] = field(default_factory=Counter)
    """What happened to rows of the first pass, until somebody takes it away."""
    _texts: set[str] = field(default_factory=set)
    _groups: set[str] = field(default_factory=set)
    _open: dict[int, tuple[Mark, Iterator[tuple[str, Example, Mark]]]] = field(default_factory=dict)

    @property
    def mixed(self) -> bool:
        return bool(self.weights)

    def start(self) -> Position:
        """Before the first row."""
        count = len(self.flows) if self.mixed else 1
        return Position(((0, 0, 0, START),) * count, (0.0,) * len(self.weights))

    def hold_out(self, examples: Sequence[Example]) -> None:
        """Never give `examples`, nor rows with their text or of their group."""
        self._texts.update(content_key(example) for example in examples)
        if self.by is not None:
            self._groups.update(str(example.meta.get(self.by)) for example in examples)

    def take(self, position: Position, count: int, time: float) -> tuple[list[tuple[str, Example]], Position]:
        """`count` examples from `position` with the name of their source, and the position after them.

        `time` of the run, from 0 to 1, is that of the weights. Raises DataError for a row that cannot be used.
        """
        shares = Shares(list(self.weights.values()), position.owed) if self.mixed else None
        chosen = shares.draw(count, time) if shares else [0] * count
        marks = list(position.marks)
        found = []
        for at in chosen:
            if at not in self._open or self._open[at][0] != marks[at]:
                self._open[at] = (marks[at], self._follow([self.flows[at]] if self.mixed else self.flows, marks[at]))
            rows = self._open[at][1]
            name, example, marks[at] = next(rows)
            self._open[at] = (marks[at], rows)
            found.append((name, example))
        return found, Position(tuple(marks), tuple(shares.owed) if shares else ())

    def _follow(self, flows: Sequence[Flow], mark: Mark) -> Iterator[tuple[str, Example, Mark]]:
        """Rows of `flows`, one after another, from `mark` on and then round and round."""
        passes, first, used, place = mark
        while True:
            whole, given = (first, used, place) == (0, 0, START), 0
            for number, flow in enumerate(flows):
                if number < first:
                    continue
                for example, after in self._usable(flow, place, passes):
                    if self.limit is not None and used >= self.limit:
                        break
                    used += 1
                    if self._is_held_out(example):
                        continue
                    given += 1
                    yield str(flow.source.name or ""), example, (passes, number, used, after)
                used, place = 0, START
            if whole and not given:
                names = ", ".join(str(flow.source.name or "the stream") for flow in flows)
                raise DataError(
                    f"{names}: a whole pass gave no row to learn from; look at the rows, or at what is held out"
                )
            passes, first = passes + 1, 0

    def _usable(self, flow: Flow, place: Place, passes: int) -> Iterator[tuple[Example, Place]]:
        def bad(where: str, why: str) -> None:
            if not self.drop:
                raise DataError(f"{where}: {why}; mend this row of the stream, or set data.on_bad_row: drop")
            if passes == 0:
                self.noted["rows of the stream dropped because they cannot be used"] += 1

        for row, after in stream_rows(flow.source.source, place, bad):
            try:
                example = read_example(row, flow.shape, flow.columns, flow.source)
                if isinstance(example, Labelled) and type(example.label) is not flow.kind:
                    raise DataError("the label is of another kind than those of the first rows")
            except DataError as err:
                bad(row.where, str(err))
                continue
            yield example, after

    def _is_held_out(self, example: Example) -> bool:
        if self.by is not None and str(example.meta.get(self.by)) in self._groups:
            return True
        return bool(self._texts) and content_key(example) in self._texts


def flow_of(source: Source, shape: Shape, columns: dict[str, str], examples: Sequence[Example]) -> Flow:
    """A source as its first rows, `examples`, showed it to be."""
    kind = type(examples[0].label) if isinstance(examples[0], Labelled) else None
    return Flow(source, shape, columns, kind)
