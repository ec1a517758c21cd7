"""The shapes: flat, straight down, a half cosine, and flat with a fall at the end."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from luthier.training.schedules.part import Schedule


class Constant(Schedule):
    """Flat after the warm-up."""

    kind: ClassVar[str] = "constant"

    def after(self, step: int, steps: int) -> float:
        return 1.0


class Linear(Schedule):
    """Straight down to `floor`, which the step after the last would reach."""

    kind: ClassVar[str] = "linear"

    floor: float = Field(0.0, ge=0, le=1)
    """Factor at the end."""

    def after(self, step: int, steps: int) -> float:
        return 1 - (1 - self.floor) * step / steps


class Cosine(Schedule):
    """Half a cosine down to `floor` (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts)."""

    kind: ClassVar[str] = "cosine"

    floor: float = Field(0.0, ge=0, le=1)
    """Factor at the end."""

    def after(self, step: int, steps: int) -> float:
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * step / steps))


class WarmupStableDecay(Schedule):
    """Flat, then straight down over the last `decay` share of all steps after the warm-up (Hu et al. 2024, arXiv:2404.06395).

    The paper decays exponentially; a straight line does as well and ends at a known value.
    """

    kind: ClassVar[str] = "wsd"

    decay: float = Field(0.2, gt=0, le=1)
    """Share of the steps after the warm-up in which the rate falls."""
    floor: float = Field(0.0, ge=0, le=1)
    """Factor at the end."""

    def after(self, step: int, steps: int) -> float:
        fall = max(1, round(self.decay * steps))
        gone = step - (steps - fall)
        return 1.0 if gone < 0 else 1 - (1 - self.floor) * gone / fall
