"""Lion: every weight moves by the same amount, in the direction of its momentum's sign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from luthier.training.optimizers.engine import Engine
from luthier.training.optimizers.part import NO_SCALES, Optimizer


class Lion(Optimizer):
    """Chen et al. 2023 (arXiv:2302.06675): the sign of a blend of gradient and momentum; one value kept beside each weight.

    It wants a learning rate 3 to 10 times smaller than AdamW's, and a weight decay as many times larger; a rate left to
    "auto" is a third of AdamW's.
    """

    kind: ClassVar[str] = "lion"
    elementwise: ClassVar[bool] = True
    rate: ClassVar[float] = 1 / 3
    rate_why: ClassVar[str] = "every value moves by the whole rate at each step"
    slots: ClassVar[float] = 1.0

    beta1: float = Field(0.9, ge=0, lt=1)
    """Share of the momentum in the step."""
    beta2: float = Field(0.99, ge=0, lt=1)
    """Memory of the momentum."""

    def build(
        self, parameters: Sequence[tuple[str, Parameter]], learning_rate: float, scales: Mapping[str, float] = NO_SCALES
    ) -> torch.optim.Optimizer:
        groups = self.group(parameters, learning_rate, scales)
        return LionEngine([{**group, "betas": (self.beta1, self.beta2)} for group in groups])


class LionEngine(Engine):
    """w <- w - rate (sign(b1 m + (1 - b1) g) + decay w), then m <- b2 m + (1 - b2) g."""

    def move(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(torch.lerp(state["momentum"], gradient, 1 - beta1).sign_(), alpha=-group["lr"])
        state["momentum"].lerp_(gradient, 1 - beta2)
