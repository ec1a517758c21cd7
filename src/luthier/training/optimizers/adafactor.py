"""Adafactor: Adam's second moment kept as one row and one column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn import Parameter

from luthier.training.optimizers.part import NO_SCALES, Optimizer


class Adafactor(Optimizer):
    """Shazeer and Stern 2018 (arXiv:1804.04235), torch's form: the step is scaled by the size of the weight, no momentum.

    A rate left to "auto" is 20 times AdamW's: a share of the weights' root mean square, which is about a twentieth.
    """

    kind: ClassVar[str] = "adafactor"
    elementwise: ClassVar[bool] = False
    slots: ClassVar[float] = 0.0
    rate: ClassVar[float] = 20.0
    rate_why: ClassVar[str] = "its rate is a share of the size of a weight"

    beta2_decay: float = Field(-0.8, lt=0)
    """Exponent of the step number in the decay of the second moment."""
    clipping: float = Field(1.0, gt=0)
    """Largest root mean square of an update."""

    def build(
        self, parameters: Sequence[tuple[str, Parameter]], learning_rate: float, scales: Mapping[str, float] = NO_SCALES
    ) -> torch.optim.Optimizer:
        groups = self.group(parameters, learning_rate, scales)
        return torch.optim.Adafactor(groups, lr=learning_rate, beta2_decay=self.beta2_decay, d=self.clipping)
