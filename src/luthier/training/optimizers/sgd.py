"""Stochastic gradient descent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn import Parameter

from luthier.training.optimizers.part import NO_SCALES, Optimizer


class SGD(Optimizer):
    """Plain or with momentum (torch's form: velocity = momentum x velocity + gradient).

    A rate left to "auto" is AdamW's times sqrt(values that learn) x (1 - momentum): AdamW moves every value by about the
    rate, which makes a step as long as the rate x sqrt(values), and SGD's steps in one direction add up to the rate / (1 -
    momentum) x the length of the gradient, which `clip` holds near 1.
    """

    kind: ClassVar[str] = "sgd"
    slots: ClassVar[float] = 1.0
    rate_why: ClassVar[str] = "its step is as long as the clipped gradient, not as the root of the number of values"
    elementwise: ClassVar[bool] = True

    momentum: float = Field(0.9, ge=0, lt=1)
    """Share of the last step's velocity that is kept."""
    nesterov: bool = False
    """Look ahead along the velocity."""

    def times(self, values: int) -> float:
        return math.sqrt(values) * (1 - self.momentum)

    def build(
        self, parameters: Sequence[tuple[str, Parameter]], learning_rate: float, scales: Mapping[str, float] = NO_SCALES
    ) -> torch.optim.Optimizer:
        groups = self.group(parameters, learning_rate, scales)
        return torch.optim.SGD(groups, lr=learning_rate, momentum=self.momentum, nesterov=self.nesterov)
