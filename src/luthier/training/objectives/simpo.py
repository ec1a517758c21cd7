"""Learn from pairs of answers by their mean log-probability alone: SimPO, without a reference."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.training.objectives.answers import Compare


class SimPO(Compare):
    """Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734): the mean log p of a token, by which answers are
    also written, is the reward, so long answers gain nothing by length.

    The loss of a row is -log sigmoid(beta (mean log p of the chosen answer - that of the rejected one) - gamma). The
    margin is the paper's gamma, as in TRL; papers often state gamma / beta, about 0.5.
    """

    kind: ClassVar[str] = "simpo"

    beta: float = Field(2.0, gt=0)
    """Scale of the rewards (2 to 10 in the paper)."""
    gamma: float = Field(1.0, ge=0)
    """By how much the chosen answer should lead."""

    def losses(self, logs_R2: Tensor, sizes_R2: Tensor, reference_R2: Tensor) -> Tensor:
        rewards_R2 = self.rewards(logs_R2, sizes_R2, reference_R2)
        return -F.logsigmoid(rewards_R2[:, 0] - rewards_R2[:, 1] - self.gamma)

    def rewards(self, logs_R2: Tensor, sizes_R2: Tensor, reference_R2: Tensor) -> Tensor:
        return self.beta * logs_R2 / sizes_R2
