"""Guesses at what a text goes on with, which the model then reads at once and keeps as far as it agrees.

A guess changes nothing but the time: a token is kept only if it is the one that is chosen in its place anyway, greedily or by
the draw of that place. Guesses come from the text itself (prompt lookup, Saxena 2023), for a tuned model from the rows
that it learned, and where neither says anything from a smaller model, if one is given (`engine.draft_model`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from luthier.core.errors import ModelError
from luthier.models.sources import resolve_source
from luthier.models.spec import LoadedModel

# Last tokens that must have occurred before, in the text itself and in rows that were learned.
ALIKE, ALIKE_LEARNED = 3, 4
# Most tokens of a guess, the first guess, and steps without one after guesses that came to nothing.
MOST, FIRST, PAUSE = 15, 4, 8
MISSES = 3
# Places of the learned rows that are looked at for what follows.
LOOKED_AT = 64
# In the artefacts of a run.
FILE = "learned.npy"
# What stands between two rows.
BETWEEN = -1
# Tokens of learned rows that are kept.
KEPT = 4_000_000


class Pace:
    """How many tokens are worth guessing: more after a guess that was right, fewer after one that was not, none for a while
    after several."""

    def __init__(self) -> None:
        self._reach, self._misses, self._paused = FIRST, 0, 0

    def most(self, allowed: int) -> int:
        """Tokens of the next guess, of which so many are allowed at most."""
        if self._paused:
            self._paused -= 1
            return 0
        return min(allowed, self._reach)

    def learn(self, guessed: int, right: int) -> None:
        """How much of the last guess was right."""
        if right:
            self._misses = 0
            self._reach = min(MOST, self._reach * 2) if right == guessed else max(1, right + 1)
            return
        self._misses += 1
        self._reach = max(1, self._reach // 2)
        if self._misses >= MISSES:
            self._misses, self._paused, self._reach = 0, PAUSE, FIRST


class Guesser:
    """Guesses for one text from itself and from the rows that were learned, as long as they are worth it."""

    def __init__(self, ids: Sequence[int], learned: Learned | None):
        self._ids = list(ids)
        self._learned = learned
        self._seen: dict[tuple[int, ...], int] = {}
        self._known = 0
        self._pace = Pace()

    def guess(self, written: Sequence[int], prompt: int, most: int) -> list[int]:
        """At most `most` tokens to come after a prompt of so many tokens and what was written since."""
        self._ids += written[len(self._ids) - prompt :]
        most = self._pace.most(most)
        if most < 1:
            return []
        found = self._learned.follow(self._ids, most) if self._learned is not None else []
        return found or self._look_up(most)

    def learn(self, guessed: int, right: int) -> None:
        """How much of the last guess was right."""
        self._pace.learn(guessed, right)

    def _look_up(self, most: int) -> list[int]:
        """What followed when the last tokens came before."""
        last = len(self._ids)
        for end in range(max(self._known, ALIKE), last):
            self._seen[tuple(self._ids[end - ALIKE : end])] = end
        self._known = max(self._known, last)
        at = self._seen.get(tuple(self._ids[-ALIKE:]))
        return [] if at is None else self._ids[at : at + most]


class Learned:
    """Rows of tokens that a model learned, found by any few tokens that stand one after another in them."""

    def __init__(self, rows: np.ndarray):
        self._ids = rows.astype(np.int64)
        self._hashes = _hash_all(self._ids, ALIKE_LEARNED)
        self._order = np.argsort(self._hashes, kind="stable")
        self._sorted = self._hashes[self._order]

    def follow(self, ids: Sequence[int], most: int) -> list[int]:
        """What most often followed the last of these tokens, as far as its row goes."""
        if len(ids) < ALIKE_LEARNED or not len(self._sorted):
            return []
        last = np.asarray(ids[-ALIKE_LEARNED:], dtype=np.int64)
        name = _hash_all(last, ALIKE_LEARNED)[0]
        low, high = np.searchsorted(self._sorted, name, "left"), np.searchsorted(self._sorted, name, "right")
        found = []
        for place in self._order[low : min(high, low + LOOKED_AT)].tolist():
            after = place + ALIKE_LEARNED
            if after < len(self._ids) and np.array_equal(self._ids[place:after], last) and self._ids[after] != BETWEEN:
                found.append(after)
        if not found:
            return []
        token = Counter(int(self._ids[after]) for after in found).most_common(1)[0][0]
        start = next(after for after in found if self._ids[after] == token)
        row = self._ids[start : start + most]
        ends = np.flatnonzero(row == BETWEEN)
        return [int(one) for one in (row[: ends[0]] if len(ends) else row)]


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


def _hash_all(ids: np.ndarray, count: int) -> np.ndarray:
    """A number for each `count` tokens that stand one after another."""
    if len(ids) < count:
        return np.zeros(0, dtype=np.uint64)
    made = np.zeros(len(ids) - count + 1, dtype=np.uint64)
    for at in range(count):
        part = (ids[at : at + len(made)] + 2).astype(np.uint64)
        made = (made ^ part) * np.uint64(0x9E3779B97F4A7C15)
        made ^= made >> np.uint64(29)
    return made
