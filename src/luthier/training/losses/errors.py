"""Losses of a predicted number: squared, absolute, and Huber's blend of the two."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.training.losses.part import Loss


class MeanSquared(Loss):
    """(prediction - gold)^2: the mean of the distribution is its optimum; outliers weigh most."""

    kind: ClassVar[str] = "mse"
    fits: ClassVar[Literal["classes", "numbers"]] = "numbers"

    def rows(self, scores_NC: Tensor, gold: Tensor) -> Tensor:
        return (scores_NC.float().squeeze(-1) - gold) ** 2


class MeanAbsolute(Loss):
    """|prediction - gold|: the median is its optimum; robust against outliers."""

    kind: ClassVar[str] = "mae"
    fits: ClassVar[Literal["classes", "numbers"]] = "numbers"

    def rows(self, scores_NC: Tensor, gold: Tensor) -> Tensor:
        return (scores_NC.float().squeeze(-1) - gold).abs()


class Huber(Loss):
    """Squared within `delta`, linear beyond (Huber 1964): delta x (|e| - delta/2) there."""

    kind: ClassVar[str] = "huber"
    fits: ClassVar[Literal["classes", "numbers"]] = "numbers"

    delta: float = Field(1.0, gt=0)
    """Where squared turns linear, in standard deviations of the gold numbers (they are standardised for training)."""

    def rows(self, scores_NC: Tensor, gold: Tensor) -> Tensor:
        return F.huber_loss(scores_NC.float().squeeze(-1), gold, reduction="none", delta=self.delta)
