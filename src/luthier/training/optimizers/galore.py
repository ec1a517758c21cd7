"""GaLore: Adam inside the few directions in which a matrix's gradient is largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from luthier.training.optimizers.adam import AdamW
from luthier.training.optimizers.engine import Engine, adam_direction, group_matrices, move_as_adamw
from luthier.training.optimizers.part import NO_SCALES


class GaLore(AdamW):
    """Zhao et al. 2024 (arXiv:2403.03507) for the matrices inside the layers; AdamW for all else.

    The gradient is projected on its `rank` largest singular directions of the shorter side, found anew every `refresh`
    steps; Adam runs there, and its step is projected back. Deviation: the directions come from the eigenvectors of
    gradient x gradient.T, which are the singular vectors and cheaper to find. A rate left to "auto" is AdamW's over
    `strength`.
    """

    kind: ClassVar[str] = "galore"
    elementwise: ClassVar[bool] = False
    slots: ClassVar[float] = 0.75
    rate_why: ClassVar[str] = "its steps are Adam's times its strength"

    rank: int = Field(128, gt=0)
    """Directions kept."""
    strength: float = Field(0.25, gt=0)
    """Factor on a matrix's step (the paper's alpha)."""
    refresh: int = Field(200, gt=0)
    """Steps after which the directions are found anew."""

    def times(self, values: int) -> float:
        return 1 / self.strength

    def build(
        self, parameters: Sequence[tuple[str, Parameter]], learning_rate: float, scales: Mapping[str, float] = NO_SCALES
    ) -> torch.optim.Optimizer:
        return GaLoreEngine(group_matrices(self, parameters, learning_rate, scales, "rank", "strength", "refresh"))


class GaLoreEngine(Engine):
    """Groups with `matrix` move by GaLore, the others by AdamW."""

    def move(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not group["matrix"]:
            move_as_adamw(parameter, gradient, state, group)
            return
        tall = parameter.shape[0] > parameter.shape[1]
        gradient_MN = gradient.T if tall else gradient
        if state.get("step", 0) % group["refresh"] == 0:
            state["directions"] = largest_directions(gradient_MN, group["rank"])
        directions_MR = state["directions"]
        moved_RN = adam_direction(directions_MR.T @ gradient_MN, state, group["betas"], group["eps"])
        step_MN = directions_MR @ moved_RN
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(step_MN.T if tall else step_MN, alpha=-group["lr"] * group["strength"])


def largest_directions(matrix_MN: Tensor, rank: int) -> Tensor:
    """[M, rank]: the left singular vectors of the largest singular values, in no order."""
    _, vectors_MM = torch.linalg.eigh(matrix_MN @ matrix_MN.T)
    # Eigenvalues rise, so the largest are last. A copy, for a view would keep (and save) all of them.
    kept_MR: Tensor = vectors_MM[:, -rank:].clone()
    return kept_MR
