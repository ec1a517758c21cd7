"""Schedule-free AdamW: an average of the weights takes the place of a falling learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from luthier.training.optimizers.adam import AdamW
from luthier.training.optimizers.engine import Engine
from luthier.training.optimizers.part import NO_SCALES


class ScheduleFree(AdamW):
    """Defazio et al. 2024 (arXiv:2405.15682), algorithm 1: gradients are taken at y, between the fast weights z and their
    average x; x is what is validated, saved and returned.

    Made for a constant learning rate after a warm-up, which is the schedule unless you ask for another one. The warm-up
    is the schedule's, and a step counts in the average by the square of its rate, as in the paper.
    """

    kind: ClassVar[str] = "schedule_free"
    elementwise: ClassVar[bool] = True
    schedule: ClassVar[str | None] = "constant"
    averages: ClassVar[bool] = True

    beta1: float = Field(0.9, gt=0, lt=1)
    """Share of the average x in y, where gradients are taken."""

    def build(
        self, parameters: Sequence[tuple[str, Parameter]], learning_rate: float, scales: Mapping[str, float] = NO_SCALES
    ) -> torch.optim.Optimizer:
        settings = {"betas": (self.beta1, self.beta2), "eps": self.eps}
        return ScheduleFreeEngine([{**one, **settings} for one in self.group(parameters, learning_rate, scales)])


class ScheduleFreeEngine(Engine):
    """While it trains the parameters hold y; between `eval()` and `train()` they hold x, and y is kept aside."""

    def move(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, weight=0.0, fast=parameter.clone(), square=torch.zeros_like(parameter))
        rate, (beta1, beta2) = group["lr"], group["betas"]
        state["step"] += 1
        state["weight"] += rate**2
        share = rate**2 / state["weight"] if state["weight"] > 0 else 0.0
        state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["square"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        move = torch.div(gradient, root, out=root).add_(parameter, alpha=group["weight_decay"])
        # z <- z - rate move; x <- (1 - share) x + share z; y = (1 - beta1) z + beta1 x: all three, written for y and z.
        parameter.lerp_(state["fast"], share).add_(move, alpha=-rate * (1 - beta1 * (1 - share)))
        state["fast"].add_(move, alpha=-rate)

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average x into the parameters."""
        for parameter, state, group in self._moved():
            if "aside" not in state:
                state["aside"] = parameter.clone()
                parameter.lerp_(state["fast"], 1 - 1 / group["betas"][0])

    @torch.no_grad()
    def train(self) -> None:
        """Put y back, bit for bit."""
        for parameter, state, _ in self._moved():
            if "aside" in state:
                parameter.copy_(state.pop("aside"))

    def _moved(self) -> list[tuple[Parameter, dict[str, Any], dict[str, Any]]]:
        return [
            (one, self.state[one], group) for group in self.param_groups for one in group["params"] if self.state[one]
        ]
