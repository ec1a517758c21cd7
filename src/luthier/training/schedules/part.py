"""The Part that a schedule is: warm-up, then a shape."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from luthier.core.catalog import Part


class Schedule(Part):
    """A factor on the learning rate for each step."""

    kind: ClassVar[str]

    warmup: float = Field(0.05, ge=0)
    """Linear rise at the start: a share of all steps below 1, a number of steps from 1 on."""

    def factor(self, step: int, steps: int) -> float:
        """The factor at `step` (from 0) of `steps`. The first step of a warm-up of w is 1/w, never 0."""
        rise = self.rise(steps)
        if step < rise:
            return (step + 1) / rise
        return self.after(step - rise, max(1, steps - rise))

    def rise(self, steps: int) -> int:
        """Steps of the warm-up."""
        return min(round(self.warmup * steps) if self.warmup < 1 else int(self.warmup), steps)

    def after(self, step: int, steps: int) -> float:
        """The shape after the warm-up: factor at `step` (from 0) of the `steps` that are left."""
        raise NotImplementedError(f"{type(self).__name__} must define after()")
