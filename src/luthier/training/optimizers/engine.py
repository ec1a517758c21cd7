"""What our own torch optimisers share: one tensor at a time, and which tensors are matrices inside the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from luthier.training.optimizers.adam import AdamW

# Vocabulary tables, positions and heads: rows looked up or scored one by one, where Adam's step of each entry fits better.
EMBEDDINGS = ("embed", "wte", "wpe", "shared")
TABLES = (*EMBEDDINGS, "lm_head", "score", "classifier", "head")


class Engine(torch.optim.Optimizer):
    """Hands every parameter that has a gradient to `move`."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def move(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Move `parameter` in place; `state` is its own, empty before its first step."""
        raise NotImplementedError(f"{type(self).__name__} must define move()")


def group_matrices(
    part: AdamW,
    parameters: Sequence[tuple[str, Parameter]],
    learning_rate: float,
    scales: Mapping[str, float],
    *settings: str,
) -> list[dict[str, Any]]:
    """The groups of `part`, a kind of AdamW, with its `settings` of these names beside AdamW's; "matrix" says whether one
    holds the matrices inside the layers."""
    held = {name: getattr(part, name) for name in settings} | {"betas": (part.beta1, part.beta2), "eps": part.eps}
    inner = [(name, one) for name, one in parameters if one.ndim == 2 and not any(table in name for table in TABLES)]
    chosen = {id(one) for _, one in inner}
    outer = [(name, one) for name, one in parameters if id(one) not in chosen]
    return [
        {**group, **held, "matrix": matrix}
        for members, matrix in ((inner, True), (outer, False))
        for group in part.group(members, learning_rate, scales)
    ]


def adam_direction(gradient: Tensor, state: dict[str, Any], betas: tuple[float, float], eps: float) -> Tensor:
    """Adam's step at a rate of 1 (arXiv:1412.6980, algorithm 1), a new tensor; `state` is brought forward."""
    if "square" not in state:
        state.update(step=0, mean=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
    state["step"] += 1
    (beta1, beta2), step = betas, state["step"]
    state["mean"].lerp_(gradient, 1 - beta1)
    state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (state["square"] / (1 - beta2**step)).sqrt_().add_(eps)
    return torch.div(state["mean"], root, out=root).div_(1 - beta1**step)


def move_as_adamw(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """AdamW's step, for the tensors that an optimiser does not move in its own way."""
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(adam_direction(gradient, state, group["betas"], group["eps"]), alpha=-group["lr"])
