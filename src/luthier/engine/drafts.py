"""Guesses at what a text goes on with, which the model then reads at once and keeps as far as it agrees.

A guess changes nothing but the time: a token is kept only if it is the one that is chosen in its place anyway, greedily or by
the draw of that place. Guesses come from the text itself (prompt lookup, Saxena 2023); from what somebody expects the answer to
be; and for a tuned model from the rows that it learned (`engine.learned`): what followed the same tokens there, or where the
rows copied from their own beginnings, what this text says in that place. How likely a guess is right is counted over all texts,
by where it comes from; a token is guessed where that is worth the time of one more row in the step (`Worth`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, cycle, islice, repeat

from luthier.engine.learned import DEEP, Learned

# Last tokens that must have come before in the text itself, and how far back they are compared; earlier places that are.
ALIKE, COMPARED, PLACES = 2, 6, 8
# How likely a token of the text's own is right after so many alike, and after one of the guess that was right; a vote counts as
# if beside it there were one more, of which this much is for it. Until there are counts, of which these weigh as so many.
BY_TEXT = (0.0, 0.0, 0.35, 0.6, 0.75, 0.8, 0.85)
GOES_ON, DOUBT, WEIGHT = 0.8, 0.3, 8.0
# What was counted so many times ago weighs a third.
MEMORY = 100
# Rows of which fewer than this part agree are asked whether they copied.
AGREED = 0.9
# Where many write, a text of which nothing was worth guessing is left alone for a while, longer each time.
MANY, LONGEST = 4, 16
# Where a token of a guess comes from.
Source = tuple[str, int, int, int]


class Odds:
    """How often guesses from a source were right, newer ones counting more."""

    def __init__(self) -> None:
        self._right: defaultdict[Source, float] = defaultdict(float)
        self._seen: defaultdict[Source, float] = defaultdict(float)

    def of(self, source: Source, expected: float) -> float:
        """How likely the next is right, which was expected to be so likely before anything was seen."""
        return (self._right[source] + WEIGHT * expected) / (self._seen[source] + WEIGHT)

    def learn(self, source: Source, right: bool) -> None:
        """One was right, or not."""
        self._right[source] += right - self._right[source] / MEMORY
        self._seen[source] += 1 - self._seen[source] / MEMORY


class Worth:
    """Tokens that a step is expected to write, for what it costs, which is 1 for a row and `slope` for each one more."""

    def __init__(self, texts: int, slope: float):
        self.tokens, self.cost, self.slope = float(texts), 1.0 + slope * (texts - 1), slope
        self.texts = texts

    def weigh(self, chances: Iterator[float]) -> tuple[int, float, float]:
        """How many of these tokens to read, each right as likely as said if those before it are; what the step then writes and
        costs. A row is worth what tokens cost without it."""
        tokens, cost, likely, count = self.tokens, self.cost, 1.0, 0
        for chance in chances:
            likely *= chance
            if likely * cost <= self.slope * tokens:
                break
            tokens, cost, count = tokens + likely, cost + self.slope, count + 1
        return count, tokens, cost


class Guesser:
    """Guesses for one text."""

    def __init__(self, ids: Sequence[int], learned: Learned | None, odds: Odds, expected: Sequence[int] = ()):
        # What is expected is looked up as what was said before.
        self._ids, self._learned, self._odds, self._expected = [*expected, *ids], learned, odds, bool(expected)
        self._prompt = len(self._ids)
        self._seen: dict[tuple[int, ...], list[int]] = {}
        self._known = 0
        self._sources: list[Source] = []
        self._paused = self._pause = 0

    def guess(self, written: Sequence[int], most: int, worth: Worth) -> list[int]:
        """At most `most` tokens to come after the prompt and what was written since, as many as are worth it in this step."""
        if self._paused:
            self._paused -= 1
            return []
        self._ids += written[len(self._ids) - self._prompt :]
        best, found = (0, worth.tokens, worth.cost), list[tuple[int, Source]]()
        for way in self._ways(most) if most > 0 else ():
            taken = list[tuple[int, Source]]()
            weighed = worth.weigh(self._chances(way, taken))
            if weighed[1] * best[2] > best[1] * weighed[2]:
                best, found = weighed, taken[: weighed[0]]
        _, worth.tokens, worth.cost = best
        self._rest(bool(found) or worth.texts <= MANY)
        self._sources = [source for _, source in found]
        return [token for token, _ in found]

    def learn(self, guessed: int, right: int) -> None:
        """How many of the last guess were right."""
        for at, source in enumerate(self._sources[:guessed]):
            self._odds.learn(source, at < right)
            if at >= right:
                break

    def _chances(self, way: Iterator[tuple[int, Source, float]], taken: list[tuple[int, Source]]) -> Iterator[float]:
        for token, source, expected in way:
            taken.append((token, source))
            yield self._odds.of(source, expected)

    def _rest(self, found: bool) -> None:
        self._pause = 0 if found else min(LONGEST, 2 * self._pause + 1)
        self._paused = self._pause

    def _ways(self, most: int) -> Iterator[Iterator[tuple[int, Source, float]]]:
        """What may follow, in one way after another: a token, where it comes from, and how likely it is expected to be right."""
        at, alike = self._look_up()
        if self._expected and len(self._ids) == self._prompt:
            yield self._read_on("expected", 0, most, 0, GOES_ON)
        if alike:
            yield self._read_on("text", at, most, alike, BY_TEXT[alike])
        followed = self._learned.follow(self._ids) if self._learned is not None else None
        if followed is None:
            return
        votes = followed.walk(most)
        first = next(votes, None)
        if first is not None:
            yield (
                (
                    token,
                    ("row", min(followed.alike + at, DEEP + 2), _part(count, of), min(of, 4)),
                    (count + DOUBT) / (of + 1),
                )
                for at, (token, count, of) in enumerate(chain([first], votes))
            )
        if followed.alike < ALIKE + 1 or (first is not None and first[1] >= AGREED * first[2]):
            return
        copied = followed.copied()
        if copied is not None and copied[0] in self._seen:
            pair, part = copied
            yield self._read_on("copy", self._seen[pair][0], most, followed.alike, part)

    def _read_on(self, kind: str, at: int, most: int, alike: int, first: float) -> Iterator[tuple[int, Source, float]]:
        """What this text says from one of its places on, again and again if it ends."""
        ways = chain([((kind, alike, 0, 0), first)], repeat(((kind, 0, 1, 0), GOES_ON)))
        tokens = cycle(self._ids[at : at + most])
        return ((token, *way) for token, way in zip(tokens, islice(ways, most)))

    def _look_up(self) -> tuple[int, int]:
        """Where the last tokens came before, and how many of them are alike there; the longest, of these the last."""
        ids, last = self._ids, len(self._ids)
        for end in range(max(self._known, ALIKE), last):
            self._seen.setdefault((ids[end - 2], ids[end - 1]), []).append(end)
        self._known = last
        best, longest = 0, 0
        for place in reversed(self._seen.get((ids[-2], ids[-1]), [])[-PLACES:] if last >= ALIKE else []):
            alike = ALIKE
            while alike < min(COMPARED, place) and ids[place - alike - 1] == ids[last - alike - 1]:
                alike += 1
            if alike > longest:
                best, longest = place, alike
        return best, longest


def _part(count: int, of: int) -> int:
    """Which quarter of the votes it were; a single one is apart."""
    return min(3, 4 * count // of) if of > 1 else 4
