"""The rows that a model learned, as what it writes is guessed from them: by the longest run of tokens that came before.

The places of all rows are sorted by the tokens that stand before them, the nearest first, so those after any few tokens lie
side by side. Which token follows is their vote; those that voted for it vote on the one after.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from luthier.core.errors import ModelError
from luthier.models.sources import resolve_source
from luthier.models.spec import LoadedModel

# In the artefacts of a run.
FILE = "learned.npy"
# What stands between two rows.
BETWEEN = -1
# Tokens of learned rows that are kept.
KEPT = 4_000_000
# Tokens before a place by which it is sorted: three to a number of 64 bits.
DEEP, EACH, BITS = 6, 3, 21
# Most tokens that are looked ahead, places that vote, and of these such as are asked where their rows copied from.
AHEAD, VOTES, ASKED = 24, 32, 16
# Tokens that must be alike for a part of a row to be taken for a copy of another.
COPIED = 3
# Answers about copies that are remembered.
ANSWERS = 65_536


class Followed:
    """The places of the rows that come after the last tokens of a text, and how many of these tokens they share."""

    def __init__(self, rows: Learned, low: int, high: int, alike: int):
        self._rows, self.low, self.high, self.alike = rows, low, high, alike

    def places(self, most: int) -> np.ndarray:
        """At most so many of them, evenly chosen."""
        every = -(-(self.high - self.low) // most)
        return self._rows.order[self.low : self.high : every]

    def walk(self, most: int) -> Iterator[tuple[int, int, int]]:
        """What follows: a token, how many places voted for it, and how many voted; as far as rows go."""
        table = self._rows.ids[self.places(VOTES)[:, None] + np.arange(min(most, AHEAD))].tolist()
        for at in range(min(most, AHEAD)):
            voted = len(table)
            token = table[0][at]
            same = [row for row in table if row[at] == token]
            if 2 * len(same) < voted:
                token = Counter(row[at] for row in table).most_common(1)[0][0]
                same = [row for row in table if row[at] == token]
            if token == BETWEEN:
                return
            yield token, len(same), voted
            table = same

    def copied(self) -> tuple[tuple[int, int], float] | None:
        """The two tokens after which most of these rows go on as they went on before, and how large a part of the rows does;
        None where most of them copy nothing from there."""
        return self._rows.copied(self)


class Learned:
    """Rows of tokens, found by any few tokens that stand one after another in them. Raises ModelError for ids of over 2**21."""

    def __init__(self, rows: np.ndarray):
        ids = rows.astype(np.int32)
        if len(ids) and int(ids.max()) + 1 >= 1 << BITS:
            raise ModelError(
                f"learned rows: a token's id is {int(ids.max())}; ids up to {(1 << BITS) - 2} can be looked up"
            )
        # 0 is what stands between rows.
        padded = np.concatenate([np.zeros(DEEP, dtype=np.int64), ids.astype(np.int64) + 1])
        before = [padded[DEEP - 1 - back : DEEP - 1 - back + len(ids)] for back in range(DEEP)]
        near, far = (_together(before[at : at + EACH]) for at in (0, EACH))
        places = np.flatnonzero(ids != BETWEEN)
        places = places[np.lexsort((far[places], near[places]))]
        self.order = places.astype(np.int32)
        """The places, sorted."""
        self._near, self._far = near[places], far[places]
        # What is looked ahead may end behind the last row.
        self.ids = np.concatenate([ids, np.full(AHEAD, BETWEEN, dtype=np.int32)])
        """The tokens of all rows."""
        self._starts = np.concatenate([[0], np.flatnonzero(ids == BETWEEN) + 1])
        self._copied: dict[tuple[int, int], tuple[tuple[int, int], float] | None] = {}

    def follow(self, ids: Sequence[int]) -> Followed | None:
        """The places after as many of the last of these tokens as ever stood together, at most DEEP."""
        last = [one + 1 for one in reversed(ids[-DEEP:])]
        for alike in range(min(EACH, len(last)), 0, -1):
            low, high = _range(self._near, _key(last[:alike]), EACH - alike)
            if low < high:
                break
        else:
            return None
        for deep in range(EACH + 1, len(last) + 1) if alike == EACH else ():
            if high - low == 1:
                break
            first, end = _range(self._far[low:high], _key(last[EACH:deep]), DEEP - deep)
            if first == end:
                break
            low, high, alike = low + first, low + end, deep
        return Followed(self, low, high, alike)

    def copied(self, followed: Followed) -> tuple[tuple[int, int], float] | None:
        """As `Followed.copied`; looked up once."""
        key = followed.low, followed.high
        if key not in self._copied:
            if len(self._copied) >= ANSWERS:
                self._copied.clear()
            self._copied[key] = self._find_copied(followed.places(ASKED))
        return self._copied[key]

    def _find_copied(self, places: np.ndarray) -> tuple[tuple[int, int], float] | None:
        found: Counter[tuple[int, int]] = Counter()
        for place in places.tolist():
            start = int(self._starts[np.searchsorted(self._starts, place, "right") - 1])
            row, after = self.ids[start:place], self.ids[place : place + COPIED]
            if len(row) < COPIED + 2 or BETWEEN in after:
                continue
            count = len(row) - COPIED - 1
            alike = np.logical_and.reduce([row[2 + at : 2 + at + count] == after[at] for at in range(COPIED)])
            if alike.any():
                at = int(np.argmax(alike))
                found[int(row[at]), int(row[at + 1])] += 1
        if not found:
            return None
        pair, count = found.most_common(1)[0]
        return (pair, count / len(places)) if 2 * count > len(places) else None


def write_learned(path: Path, rows: Iterable[Sequence[int]]) -> None:
    """Keep the rows that a model learned, as far as there is room for them."""
    kept: list[int] = []
    for row in rows:
        if len(kept) + len(row) > KEPT:
            break
        kept += [*row, BETWEEN]
    np.save(path, np.asarray(kept, dtype=np.int32))


def read_learned(path: Path) -> Learned:
    """The rows that `write_learned` kept. Raises ModelError for a file that is damaged."""
    try:
        return Learned(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as err:
        raise ModelError(
            f"{path}: cannot be read as learned rows ({err}); delete it, it only makes writing faster"
        ) from None


def remember(model: LoadedModel) -> None:
    """Let what a run's model writes be guessed from the rows that it learned, if the run kept them."""
    if model.spec.source.startswith("run:"):
        place = resolve_source(model.spec.source)
        path = Path(place).parent / FILE
        if path.is_file():
            model.learned = read_learned(path)


def _together(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Numbers side by side in one, the first the highest."""
    made = np.zeros(len(parts[0]), dtype=np.int64)
    for part in parts:
        made = made << BITS | part
    return made


def _key(tokens: Sequence[int]) -> int:
    made = 0
    for token in tokens:
        made = made << BITS | token
    return made


def _range(keys: np.ndarray, key: int, free: int) -> tuple[int, int]:
    """Where those of the sorted keys lie that begin with `key`, of which so many parts are not said."""
    shift = BITS * free
    low, high = keys.searchsorted((key << shift, key + 1 << shift)).tolist()
    return low, high
