"""A reward for keeping it short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from luthier.training.rewards.part import Answer, Reward


class Length(Reward):
    """1 for an answer of at most so many tokens, falling in a line to 0 at twice as many."""

    kind: ClassVar[str] = "length"

    tokens: int = Field(gt=0)
    """Tokens up to which the reward is whole, the stop token with them."""

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return [min(1.0, max(0.0, 2 - one.tokens / self.tokens)) for one in answers]
