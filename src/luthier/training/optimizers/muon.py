"""Muon: a matrix moves by its momentum with all singular values made alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from luthier.training.optimizers.adam import AdamW

# Vocabulary tables, positions and heads: rows looked up or scored one by one, where Adam's step of each entry fits better.
TABLES = ("embed", "wte", "wpe", "lm_head", "score", "classifier", "head", "shared")


class Muon(AdamW):
    """Jordan et al. 2024 (kellerjordan.github.io/posts/muon) for the matrices inside the layers; AdamW for all else.

    The step of a matrix is scaled to the size that AdamW's would have, 0.2 sqrt(max(rows, columns)) (Liu et al. 2025,
    arXiv:2502.16982), so that one learning rate serves both. Deviation: the Newton-Schulz iteration runs in float32, since
    bfloat16 is emulated on most processors; it costs little beside a step's forward and backward.
    """

    kind: ClassVar[str] = "muon"
    elementwise: ClassVar[bool] = False

    beta2: float = Field(0.95, ge=0, lt=1)
    """Memory of the squared gradient, where AdamW is used."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Memory of a matrix's gradient (Nesterov's form)."""
    iterations: int = Field(5, ge=1)
    """Newton-Schulz iterations."""

    def build(self, parameters: Sequence[tuple[str, Parameter]], learning_rate: float) -> torch.optim.Optimizer:
        inner = [(name, p) for name, p in parameters if p.ndim == 2 and not any(table in name for table in TABLES)]
        chosen = {id(parameter) for _, parameter in inner}
        outer = [(name, parameter) for name, parameter in parameters if id(parameter) not in chosen]
        groups = [{**group, "matrix": True} for group in self.group(inner, learning_rate)]
        groups += [{**group, "matrix": False} for group in self.group(outer, learning_rate)]
        return MuonWithAdamW(
            groups,
            {
                "lr": learning_rate,
                "momentum": self.momentum,
                "iterations": self.iterations,
                "betas": (self.beta1, self.beta2),
                "eps": self.eps,
            },
        )


class MuonWithAdamW(torch.optim.Optimizer):
    """Groups with `matrix` move by Muon, the others by AdamW."""

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                move = self._move_matrix if group["matrix"] else self._move_entries
                move(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def _move_matrix(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(state["momentum"], group["momentum"])
        size = 0.2 * math.sqrt(max(parameter.shape))
        parameter.add_(orthogonalize(ahead, group["iterations"]).to(parameter.dtype), alpha=-group["lr"] * size)

    def _move_entries(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["square"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["mean"], root, value=-group["lr"] / (1 - beta1 ** state["step"]))


def orthogonalize(matrix: Tensor, iterations: int) -> Tensor:
    """Singular values brought near 1 (about 0.7 to 1.2), singular vectors kept, by a quintic Newton-Schulz iteration.

    Coefficients: Jordan et al. 2024, chosen for a steep slope at zero rather than for convergence.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T.float() if tall else matrix.float()
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x
