"""Focal loss: cross-entropy that fades where the model is already sure."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.training.losses.part import Loss


class Focal(Loss):
    """(1 - p)^gamma x cross-entropy (Lin et al. 2017, arXiv:1708.02002); gamma 0 is cross-entropy.

    With several labels a row the C binary losses are averaged, where the paper sums over anchors.
    """

    kind: ClassVar[str] = "focal"
    fits: ClassVar[Literal["classes", "numbers"]] = "classes"

    gamma: float = Field(2.0, ge=0)
    """How fast easy rows fade."""
    class_weights: Literal["none", "auto"] | dict[str, float] = "none"
    """The paper's alpha: weight of each class, none, auto (inverse frequency), or name: weight."""

    def rows(self, scores_NC: Tensor, gold: Tensor) -> Tensor:
        scores_NC = scores_NC.float()
        if gold.ndim == 2:
            nll_NC = F.binary_cross_entropy_with_logits(scores_NC, gold, reduction="none")
            return ((1 - torch.exp(-nll_NC)) ** self.gamma * nll_NC).mean(-1)
        nll_N = F.cross_entropy(scores_NC, gold, reduction="none")
        return (1 - torch.exp(-nll_N)) ** self.gamma * nll_N
