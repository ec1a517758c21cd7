"""The Part that a reward is, and the one around a scorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from luthier.core.catalog import Part
from luthier.metrics.scorers import SCORERS, Scorer


@dataclass(frozen=True, slots=True)
class Answer:
    """What is rewarded: an answer with its prompt, the gold answer, and the other columns of its row."""

    prompt: str
    output: str
    gold: str
    tokens: int
    """Tokens written, the stop token with them."""
    finished: bool = True
    """Whether it ended by itself."""
    meta: dict[str, Any] = field(default_factory=dict)


class Reward(Part):
    """A number for each answer; more is better."""

    weight: float = 1.0
    """What it is multiplied by in the sum of rewards; below zero it is a penalty."""

    @property
    def name(self) -> str:
        """What it is called among the numbers of a step."""
        return self.kind

    def ready(self, device: torch.device) -> None:
        """Fetch what it needs (code, a model), so that a mistake shows before the first step. Raises LuthierError."""

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """The reward of each answer, without the weight."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")


class Scored(Reward):
    """The score of the answer against the gold, by any scorer: exact_match, token_f1, chrf ..."""

    kind: ClassVar[str] = "scorer"

    scorer: SCORERS.field  # type: ignore[name-defined]
    """Which one, with its settings."""

    @property
    def name(self) -> str:
        return str(self.scorer.kind)

    def score(self, answers: Sequence[Answer]) -> list[float]:
        assert isinstance(self.scorer, Scorer)
        return [self.scorer.score(one.output, one.gold) for one in answers]
