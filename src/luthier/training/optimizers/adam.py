"""Adam, with decay inside the gradient, and AdamW, with decay beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn import Parameter

from luthier.training.optimizers.part import NO_SCALES, Optimizer


class Adam(Optimizer):
    """Kingma and Ba 2015 (arXiv:1412.6980); weight decay, if any, is added to the gradient (L2)."""

    kind: ClassVar[str] = "adam"
    elementwise: ClassVar[bool] = True

    beta1: float = Field(0.9, ge=0, lt=1)
    """Memory of the gradient."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Memory of its square."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root, against division by zero."""

    def build(
        self, parameters: Sequence[tuple[str, Parameter]], learning_rate: float, scales: Mapping[str, float] = NO_SCALES
    ) -> torch.optim.Optimizer:
        groups = self.group(parameters, learning_rate, scales)
        return torch.optim.Adam(groups, lr=learning_rate, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)


class AdamW(Adam):
    """Loshchilov and Hutter 2019 (arXiv:1711.05101): decay acts on the weight, scaled by the learning rate."""

    kind: ClassVar[str] = "adamw"

    weight_decay: float = Field(0.01, ge=0)
    """Pull of matrices towards zero; biases, norms and other vectors never decay."""

    def build(
        self, parameters: Sequence[tuple[str, Parameter]], learning_rate: float, scales: Mapping[str, float] = NO_SCALES
    ) -> torch.optim.Optimizer:
        groups = self.group(parameters, learning_rate, scales)
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)
