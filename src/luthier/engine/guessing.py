"""Who guesses for the texts of an engine, how much in a step, and what came of it."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Sequence

from luthier.engine.draft_model import DraftModel
from luthier.engine.drafts import Guesser, Odds, Worth
from luthier.engine.learned import Learned
from luthier.engine.request import Request

# What a row more costs of a step with one, before any was timed; a step that was timed counts as if a row was so much apart from
# the others in this many.
SLOPE, BELIEVED = 0.2, 16.0
LEAST, HIGHEST = 0.01, 0.5
# What was timed so many steps ago weighs a third.
MEMORY = 200


class StepCosts:
    """What a row more costs, in steps of one row, by the time that steps took: a line through them, newer ones counting more."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._spread = self._along = 0.0

    def learn(self, rows: int, seconds: float) -> None:
        """A step with so many rows took so long."""
        self._weight += 1 - self._weight / MEMORY
        rate = max(1 / MEMORY, 1 / self._weight)
        apart, late = rows - self._rows, seconds - self._seconds
        self._rows += rate * apart
        self._seconds += rate * late
        self._spread += apart * (rows - self._rows) - self._spread / MEMORY
        self._along += apart * (seconds - self._seconds) - self._along / MEMORY

    @property
    def slope(self) -> float:
        """A row more, in steps of one."""
        if self._seconds <= 0:
            return SLOPE
        row = self._along / self._spread if self._spread > 0 else 0.0
        one = self._seconds - row * (self._rows - 1)
        timed = row / one if one > 0 else HIGHEST
        # Without steps of several sizes nothing is known, and what was believed at first is tried again.
        share = self._spread / (self._spread + BELIEVED)
        return min(HIGHEST, max(LEAST, share * timed + (1 - share) * SLOPE))


class Guessing:
    """Guesses for all texts, at most `most` tokens in a step: from themselves and from what the model learned, and where neither
    is worth it from a smaller model."""

    def __init__(self, most: int, learned: Learned | None, draft: DraftModel | None):
        self._most, self._learned = most, learned
        self.draft = draft
        """The smaller model, until it fails."""
        self._odds, self._costs = Odds(), StepCosts()
        self._worth = Worth(1, SLOPE)

    def take_up(self, prompt: Sequence[int], expected: Sequence[int]) -> Guesser:
        """Who guesses for a text, of which somebody may expect what follows."""
        return Guesser(prompt, self._learned, self._odds, expected)

    def give(self, running: Sequence[Request], fail: Callable[[Request, Exception], None]) -> None:
        """Give the texts that are about to write drafts of what that will be; one that something goes wrong with fails."""
        writing = [one for one in running if one.guesser is not None and one.length - one.read == 1]
        without = dict[Request, int]()
        most = self._most // max(1, len(running))
        self._worth = worth = Worth(max(1, len(writing)), self._costs.slope)
        for request in writing:
            left = min(most, request.room - len(request.written) - 1)
            assert request.guesser is not None
            try:
                request.drafts = request.guesser.guess(request.written, left, worth)
            except Exception as err:
                fail(request, err)
                continue
            if not request.drafts:
                without[request] = left
        if self.draft is None:
            return
        try:
            self.draft.guess(without, running)
        except Exception as err:
            # Whatever it is, texts need no guesses.
            traceback.clear_frames(err.__traceback__)
            self.draft = None
            for request in without:
                request.drafts = []
            warnings.warn(
                f"the draft model failed and guesses nothing from here on; what is written is the same ({_said(err)})",
                stacklevel=4,
            )

    def begin(self, request: Request) -> None:
        """Drafts for a text whose prompt is read to its end in the step for which others were given theirs."""
        if request.guesser is not None:
            left = min(self._most // max(1, self._worth.texts + 1), request.room - len(request.written) - 1)
            request.drafts = request.guesser.guess(request.written, left, self._worth)

    def learn(self, request: Request, right: int) -> None:
        """So many of a text's drafts were right."""
        if request.guesser is not None and not (self.draft is not None and self.draft.learn(request, right)):
            request.guesser.learn(len(request.drafts), right)

    def time(self, rows: int, seconds: float) -> None:
        """How long a step of so many rows took."""
        self._costs.learn(rows, seconds)


def rows_of(planned: Sequence[tuple[Request, int]]) -> int:
    """Rows of a step that only goes on with texts, by one token each and its drafts; 0 for one that reads prompts."""
    goes_on = all(count == 1 + len(request.drafts) for request, count in planned)
    return sum(count for _, count in planned) if goes_on else 0


def _said(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
