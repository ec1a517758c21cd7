"""One text in the making: its prompt, what was written, and how far the model has read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from luthier.engine.drafts import Guesser
from luthier.engine.sampling import Sampling
from luthier.engine.structure import Matcher


class Likelihoods(NamedTuple):
    """Of the token that was written, then of the likeliest in its place."""

    tokens: list[int]
    raw: list[float]
    processed: list[float]


@dataclass(eq=False, slots=True)
class Request:
    """A prompt to be gone on from.

    `draw` gives a number from 0 to 1 for the place of a token in the answer. Of requests that wait, those of a higher
    `priority` come first, then those of the `tenant` that was served least (`engine.tenants`), then the earlier ones. Prompts
    share what was read of them only under the same `salt`.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    room: int
    """Most tokens of the answer."""
    number: int
    draw: Callable[[int], float]
    priority: int = 0
    salt: str = ""
    tenant: str = ""
    adapter: int = -1
    """The number of the adapter it is written with; -1: none."""
    ends: tuple[int, ...] = ()
    """Tokens that end the answer."""
    banned: tuple[tuple[int, ...], ...] = ()
    """Tokens that must not come one after the other."""
    names: tuple[bytes, ...] = ()
    """Of the full blocks of its prompt."""
    opening: tuple[int, ...] | None = None
    """What the answer follows in an encoder-decoder's decoder, whose prompt is a source apart; None: it follows the prompt."""
    written: list[int] = field(default_factory=list)
    first_at: float = 0.0
    """When the first token was there, by time.monotonic."""
    finish: Literal["stop", "length", "abort", "error"] | None = None
    error: Exception | None = None
    """What ended it, where that was an error."""
    read: int = 0
    """How many of its tokens' keys and values lie in `table`."""
    table: list[int] = field(default_factory=list)
    reused: int = 0
    """Tokens of the prompt that another text had read."""
    guesser: Guesser | None = None
    """Where guesses at its next tokens come from."""
    charged: int = 0
    """Tokens of prompt and answer that its tenant need not be charged for any more."""
    drafts: list[int] = field(default_factory=list)
    """Such a guess, to be read after its own tokens in the next step."""
    drafted: int = 0
    accepted: int = 0
    """Tokens that were guessed, and that were guessed right."""
    logs: list[Likelihoods] = field(default_factory=list)
    """Of each token that was written, where they are asked for."""
    prompt_logs: list[float] = field(default_factory=list)
    """Of each token of the prompt but the first, where they are asked for."""
    prompt_tops: list[list[tuple[int, float]]] = field(default_factory=list)
    """The likeliest tokens in the place of each of those, where they are asked for."""
    matcher: Matcher | None = None
    """What may come next where the answer has a structure; it has taken what was written."""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.written)

    def ids(self, start: int, stop: int) -> list[int]:
        """Some of its tokens."""
        here = len(self.prompt)
        if start >= here:
            return self.written[start - here : stop - here]
        return [*self.prompt[start:stop], *self.written[max(0, start - here) : max(0, stop - here)]]

    def last(self, count: int) -> list[int]:
        """The last tokens of what the answer follows and the answer, fewer where there are not so many."""
        head = self.prompt if self.opening is None else self.opening
        missing = max(0, count - len(self.written))
        return [*head[max(0, len(head) - missing) :], *self.written[max(0, len(self.written) - count) :]]

    @property
    def own(self) -> int:
        """The place from which on it is read for itself: the last token, or the first that must tell what follows it."""
        if self.sampling.prompt_logprobs and len(self.prompt_logs) < len(self.prompt) - 1:
            return len(self.prompt_logs)
        return self.length - 1

    def telling(self, count: int) -> range:
        """Places, of the next `count` to be read, that must tell how likely the token of the prompt after them is, where the
        prompt's log-probabilities are asked for."""
        return range(max(self.read, len(self.prompt_logs)), min(self.read + count, len(self.prompt) - 1))
