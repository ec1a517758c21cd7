"""Cross-entropy: softmax for one class a row, independent sigmoids where a row may have several."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.training.losses.part import Loss


class CrossEntropy(Loss):
    """-log p(gold), in nats.

    Label smoothing as in Szegedy et al. 2016 (arXiv:1512.00567): the gold class gets 1 - s + s/C of the mass. With
    several labels a row each 0/1 is pulled towards 1/2 by the same share, and the C binary losses are averaged.
    """

    kind: ClassVar[str] = "cross_entropy"
    fits: ClassVar[Literal["classes", "numbers"]] = "classes"

    smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the probability mass spread over all classes."""
    class_weights: Literal["none", "auto"] | dict[str, float] = "none"
    """Weight of each class: none, auto (n / (classes x count), so that rare classes count as much), or name: weight."""

    def rows(self, scores_NC: Tensor, gold: Tensor) -> Tensor:
        scores_NC = scores_NC.float()
        if gold.ndim == 2:
            soft = gold * (1 - self.smoothing) + self.smoothing / 2
            return F.binary_cross_entropy_with_logits(scores_NC, soft, reduction="none").mean(-1)
        return F.cross_entropy(scores_NC, gold, reduction="none", label_smoothing=self.smoothing)


def balance(counts: dict[str, int]) -> dict[str, float]:
    """Class weights n / (C x count): the "balanced" heuristic of King and Zeng 2001, as in scikit-learn."""
    total = sum(counts.values())
    return {name: total / (len(counts) * count) for name, count in counts.items() if count}


def torch_weights(weights: dict[str, float], labels: tuple[str, ...]) -> Tensor:
    """Weights [C] in the order of `labels`; a class that is not named weighs 1."""
    return torch.tensor([weights.get(label, 1.0) for label in labels])
