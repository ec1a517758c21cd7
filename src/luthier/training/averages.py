"""Averages of the weights: what is validated and saved, where it is not what learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter


class Averages(Protocol):
    """Weights to look at and to save, beside those that learn: an optimiser that averages, or a MovingAverage."""

    def eval(self) -> None:
        """Put the averages into the parameters, and what learns aside."""

    def train(self) -> None:
        """Put what learns back, bit for bit."""


class MovingAverage:
    """An exponential moving average of the parameters (Polyak and Juditsky 1992), one more fp32 copy of them.

    average <- d average + (1 - d) weight after every step, with d = min(decay, t / (t + 9)) at step t from 1, so that a
    short run does not end at its first weights (the rule of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, parameters: Sequence[tuple[str, Parameter]], decay: float):
        self.decay, self.steps = decay, 0
        self._pairs = [(parameter, parameter.detach().clone()) for _, parameter in parameters]
        self._swapped = False

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 9))
        for parameter, average in self._pairs:
            average.lerp_(parameter, 1 - decay)

    def eval(self) -> None:
        """Put the averages into the parameters."""
        if not self._swapped:
            self._swap()

    def train(self) -> None:
        """Put back what learns."""
        if self._swapped:
            self._swap()

    def state_dict(self) -> dict[str, int | list[Tensor]]:
        """The averages and how many steps they hold, for a checkpoint; between `train()` and `eval()` only."""
        return {"steps": self.steps, "averages": [average for _, average in self._pairs]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, int | list[Tensor]]) -> None:
        """Go on from what `state_dict` gave."""
        steps, averages = state["steps"], state["averages"]
        assert isinstance(steps, int) and isinstance(averages, list)
        self.steps = steps
        for (_, average), saved in zip(self._pairs, averages, strict=True):
            average.copy_(saved)

    @torch.no_grad()
    def _swap(self) -> None:
        # One weight at a time, so that no third copy of them all is needed.
        for parameter, average in self._pairs:
            held = parameter.clone()
            parameter.copy_(average)
            average.copy_(held)
        self._swapped = not self._swapped
