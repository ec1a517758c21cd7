"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn import Parameter

from luthier.training.optimizers.part import NO_SCALES, Optimizer


class SGD(Optimizer):
    """Plain or with momentum (torch's form: velocity = momentum x velocity + gradient)."""

    kind: ClassVar[str] = "sgd"
    slots: ClassVar[float] = 1.0
    elementwise: ClassVar[bool] = True

    momentum: float = Field(0.9, ge=0, lt=1)
    """Share of the last step's velocity that is kept."""
    nesterov: bool = False
    """Look ahead along the velocity."""

    def build(
        self, parameters: Sequence[tuple[str, Parameter]], learning_rate: float, scales: Mapping[str, float] = NO_SCALES
    ) -> torch.optim.Optimizer:
        groups = self.group(parameters, learning_rate, scales)
        return torch.optim.SGD(groups, lr=learning_rate, momentum=self.momentum, nesterov=self.nesterov)
