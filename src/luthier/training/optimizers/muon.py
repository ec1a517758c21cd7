"""Muon: a matrix moves by its momentum with all singular values made alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from luthier.models.precision import is_fast
from luthier.training.optimizers.adam import AdamW
from luthier.training.optimizers.engine import Engine, group_matrices, move_as_adamw
from luthier.training.optimizers.part import NO_SCALES


class Muon(AdamW):
    """Jordan et al. 2024 (kellerjordan.github.io/posts/muon) for the matrices inside the layers; AdamW for all else.

    The step of a matrix is scaled to the size that AdamW's would have, 0.2 sqrt(max(rows, columns)) (Liu et al. 2025,
    arXiv:2502.16982) late in a run, so that one learning rate serves both; early ones of AdamW are up to five times as
    long, and a rate left to "auto" is twice AdamW's. The Newton-Schulz iteration runs in bfloat16, as in the
    paper, where the machine multiplies that fast; elsewhere, in deviation, in float32. On a processor it may take longer
    than the forward and backward pass of a small batch.
    """

    kind: ClassVar[str] = "muon"
    slots: ClassVar[float] = 1.0
    rate: ClassVar[float] = 2.0
    rate_why: ClassVar[str] = "its steps are as long as AdamW's late ones from the beginning"
    elementwise: ClassVar[bool] = False

    beta2: float = Field(0.95, ge=0, lt=1)
    """Memory of the squared gradient, where AdamW is used."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Memory of a matrix's gradient (Nesterov's form)."""
    iterations: int = Field(5, ge=1)
    """Newton-Schulz iterations."""

    def build(
        self, parameters: Sequence[tuple[str, Parameter]], learning_rate: float, scales: Mapping[str, float] = NO_SCALES
    ) -> torch.optim.Optimizer:
        return MuonEngine(group_matrices(self, parameters, learning_rate, scales, "momentum", "iterations"))


class MuonEngine(Engine):
    """Groups with `matrix` move by Muon, the others by AdamW."""

    def move(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not group["matrix"]:
            move_as_adamw(parameter, gradient, state, group)
            return
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(state["momentum"], group["momentum"])
        size = 0.2 * math.sqrt(max(parameter.shape))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        dtype = torch.bfloat16 if is_fast(parameter.device) else torch.float32
        parameter.add_(orthogonalize(ahead, group["iterations"], dtype).to(parameter.dtype), alpha=-group["lr"] * size)


def orthogonalize(matrix: Tensor, iterations: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Singular values brought near 1 (about 0.7 to 1.2), singular vectors kept, by a quintic Newton-Schulz iteration.

    Coefficients: Jordan et al. 2024, chosen for a steep slope at zero rather than for convergence.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T.float() if tall else matrix.float()
    x = (x / (x.norm() + 1e-7)).to(dtype)
    for _ in range(iterations):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    made: Tensor = x.T if tall else x
    return made
