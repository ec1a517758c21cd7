"""How often a run in training writes a checkpoint where nobody says: so that it takes little of the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Time between two checkpoints: seconds at least, and as many times as long as the last took to write.
LEAST, TIMES = 60.0, 20.0


class Pace:
    """When a checkpoint is due: after `every` steps (0: never); None: when the time since the last allows it.

    It guards against what kills a process; at the last step and on a signal one is written in any case.
    """

    def __init__(self, every: int | None, clock: Callable[[], float] = time.monotonic):
        self._every, self._clock = every, clock
        self._last, self._took = clock(), 0.0

    def due(self, step: int) -> bool:
        """Whether one is due after this step, by the clock of this process."""
        if self._every is not None:
            return self._every > 0 and step % self._every == 0
        return self._clock() - self._last >= max(LEAST, TIMES * self._took)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around the writing of one."""
        began = self._clock()
        yield
        self._last = self._clock()
        self._took = self._last - began
