"""Learn the chosen answers and, in the same step, to prefer them: ORPO, without a reference."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from luthier.training.objectives.answers import Compare


class ORPO(Compare):
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691), in place of SFT and DPO one after the other.

    The loss of a row is -mean log p of the chosen answer's tokens - beta log sigmoid(log-odds of the chosen answer -
    log-odds of the rejected one), the odds p / (1 - p) being those of p = exp(mean log p of a token). As in the paper
    only the answer is learned; TRL's first term is a mean over the tokens of prompts and answers of all rows of a batch.
    """

    kind: ClassVar[str] = "orpo"

    beta: float = Field(0.1, ge=0)
    """Weight of the odds ratio beside the loss of SFT (lambda in the paper)."""

    def losses(self, logs_R2: Tensor, sizes_R2: Tensor, reference_R2: Tensor) -> Tensor:
        means_R2 = logs_R2 / sizes_R2
        odds_R2 = means_R2 - log_rest(means_R2)
        return -means_R2[:, 0] - self.beta * F.logsigmoid(odds_R2[:, 0] - odds_R2[:, 1])

    def rewards(self, logs_R2: Tensor, sizes_R2: Tensor, reference_R2: Tensor) -> Tensor:
        return logs_R2 / sizes_R2


def log_rest(log_p: Tensor) -> Tensor:
    """log(1 - p) from log p, exact at both ends; p = 1 counts as the largest fp32 below it."""
    log_p = log_p.clamp(max=-(2.0**-24))
    return torch.where(log_p > -0.6931, torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p)))
