"""One text in the making: its prompt, what was written, and how far the model has read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from luthier.engine.sampling import Sampling
from luthier.engine.structure import Matcher


@dataclass(eq=False, slots=True)
class Request:
    """A prompt to be gone on from.

    `draw` gives a number from 0 to 1 for the place of a token in the answer. Of requests that wait, those of a higher
    `priority` come first, then the earlier ones. Prompts share what was read of them only under the same `salt`.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    room: int
    """Most tokens of the answer."""
    number: int
    draw: Callable[[int], float]
    priority: int = 0
    salt: str = ""
    written: list[int] = field(default_factory=list)
    finish: Literal["stop", "length", "abort"] | None = None
    read: int = 0
    """How many of its tokens' keys and values lie in `table`."""
    table: list[int] = field(default_factory=list)
    reused: int = 0
    """Tokens of the prompt that another text had read."""
    matcher: Matcher | None = None
    """What may come next where the answer has a structure; it has taken what was written."""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.written)

    def ids(self, start: int, stop: int) -> list[int]:
        """Some of its tokens."""
        here = len(self.prompt)
        return [*self.prompt[start:stop], *self.written[max(0, start - here) : max(0, stop - here)]]

    @property
    def order(self) -> tuple[int, int]:
        """Its place among others: what comes first is served first, and let go last."""
        return -self.priority, self.number
