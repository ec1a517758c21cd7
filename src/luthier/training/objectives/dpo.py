"""Learn from pairs of answers which is liked better, held near the model of the start: DPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from luthier.core.events import Events
from luthier.core.types import Encoded
from luthier.models.spec import LoadedModel
from luthier.training.objectives.answers import Compare, refer_to_start


class DPO(Compare):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): raise log p of the chosen answer over that
    of the rejected one, both measured against the model at the start of the run.

    With h = log-ratio of the chosen answer - log-ratio of the rejected one, the loss of a row is -log sigmoid(beta h);
    for `ipo` (h - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036, eq. 17), the log-ratios divided by the tokens of
    their answers, as in TRL and, TRL says, in the paper's experiments, though not in its formula; for `hinge`
    max(0, 1 - beta h) (SLiC-HF, Zhao et al. 2023, arXiv:2305.10425, on log-ratios). Log-probabilities of the start are
    computed once, before the first step. `sft` adds that many times the loss of SFT on the chosen answer, a mean over
    its tokens (RPO, Pang et al. 2024, arXiv:2404.19733; TRL takes the mean over the tokens of all rows of a batch).
    """

    kind: ClassVar[str] = "dpo"
    refers: ClassVar[bool] = True

    beta: float = Field(0.1, gt=0)
    """How strongly the model is held to its start."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """Which function of the margin: sigmoid, ipo or hinge."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """How often a pair is assumed to be the wrong way round, for sigmoid (conservative DPO)."""
    sft: float = Field(0.0, ge=0)
    """Weight of the loss of SFT on the chosen answer; 0: none."""

    @model_validator(mode="after")
    def _check(self) -> DPO:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing goes with loss: sigmoid, not with {self.loss}")
        return self

    def refer(self, rows: Sequence[Encoded], model: LoadedModel, events: Events, keep: Path) -> list[Encoded]:
        found_N2 = refer_to_start(rows, model, events, keep)
        return [replace(row, gold=(float(one[0]), float(one[1]))) for row, one in zip(rows, found_N2)]

    def losses(self, logs_R2: Tensor, sizes_R2: Tensor, reference_R2: Tensor) -> Tensor:
        ratios_R2 = logs_R2 - reference_R2
        if self.loss == "ipo":
            ratios_R2 = ratios_R2 / sizes_R2
        margin_R = ratios_R2[:, 0] - ratios_R2[:, 1]
        if self.loss == "sigmoid":
            right_R, wrong_R = F.logsigmoid(self.beta * margin_R), F.logsigmoid(-self.beta * margin_R)
            loss_R = -(1 - self.label_smoothing) * right_R - self.label_smoothing * wrong_R
        elif self.loss == "ipo":
            loss_R = (margin_R - 1 / (2 * self.beta)) ** 2
        else:
            loss_R = F.relu(1 - self.beta * margin_R)
        return loss_R - self.sft * logs_R2[:, 0] / sizes_R2[:, 0] if self.sft else loss_R

    def rewards(self, logs_R2: Tensor, sizes_R2: Tensor, reference_R2: Tensor) -> Tensor:
        return self.beta * (logs_R2 - reference_R2)
