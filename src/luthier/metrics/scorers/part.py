"""The Part that a scorer is. A scorer is a metric for one answer, and a reward."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from luthier.core.catalog import Part
from luthier.core.types import Estimate
from luthier.metrics.statistics import as_floats, mean

HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")


class Scorer(Part):
    """A score of one answer against its gold, from 0 to `best`."""

    kind: ClassVar[str]
    best: ClassVar[float] = 1.0
    """What the gold itself scores."""

    def score(self, output: str, gold: str) -> float:
        """The score of one answer."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")

    def estimate(self, outputs: Sequence[str], golds: Sequence[str]) -> dict[str, Estimate]:
        """Named values over all answers, with intervals; by default the mean of the scores."""
        return {self.kind: mean(as_floats([self.score(one, other) for one, other in zip(outputs, golds)]))}


def is_chinese(texts: Sequence[str]) -> bool:
    """Whether Chinese characters make up most of the letters."""
    letters = sum(sum(character.isalpha() for character in text) for text in texts)
    return letters > 0 and sum(len(HAN.findall(text)) for text in texts) > letters / 2
