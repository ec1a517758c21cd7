"""The shapes: flat, straight down, a power of that, half cosines, a slow root, and flat with a fall at the end."""

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


class Polynomial(Linear):
    """The straight line to the power of `power`: above 1 it falls fast at first."""

    kind: ClassVar[str] = "polynomial"

    power: float = Field(2.0, gt=0)
    """Exponent."""

    def after(self, step: int, steps: int) -> float:
        return float(self.floor + (1 - self.floor) * (1 - step / steps) ** self.power)


class Cosine(Schedule):
    """Half a cosine down to `floor`, once or several times (Loshchilov and Hutter 2017, arXiv:1608.03983)."""

    kind: ClassVar[str] = "cosine"

    floor: float = Field(0.0, ge=0, le=1)
    """Factor at the end."""
    restarts: int = Field(0, ge=0)
    """How often it starts again from the top, each time after as many steps."""

    def after(self, step: int, steps: int) -> float:
        down = step * (self.restarts + 1) % steps / steps if self.restarts else step / steps
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * down))


class InverseSqrt(Schedule):
    """Falls as 1 / sqrt(step) after the warm-up (Vaswani et al. 2017, arXiv:1706.03762), whatever the number of steps."""

    kind: ClassVar[str] = "inverse_sqrt"

    def factor(self, step: int, steps: int) -> float:
        rise = max(1, self.rise(steps))
        return min((step + 1) / rise, math.sqrt(rise / (step + 1)))


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
