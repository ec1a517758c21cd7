"""APOLLO: the gradient itself, scaled as Adam would scale it, which a small random picture of it tells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from luthier.training.optimizers.adam import AdamW
from luthier.training.optimizers.engine import Engine, adam_direction, group_matrices, move_as_adamw
from luthier.training.optimizers.part import NO_SCALES

# Largest growth of a step's norm from one step to the next (the paper's norm-growth limiter).
GROWTH = 1.01


class Apollo(AdamW):
    """Zhu et al. 2024 (arXiv:2412.05270) for the matrices inside the layers; AdamW for all else.

    Adam runs on a random projection of the gradient to `rank` rows, of its shorter side; how much it shrinks each column of
    the projection is how much the gradient's own column is shrunk. No SVD, and little is kept: `rank` 1 with one scale for
    the whole tensor is APOLLO-Mini. The step is also multiplied by sqrt(rows / rank), what the projection makes it too
    small by (the paper's section 4.1), so that AdamW's learning rate serves; the paper has fixed factors (1, and 128 for
    Mini) at rates found for them. Projections are drawn from the step and the place of a tensor, so none is saved.
    """

    kind: ClassVar[str] = "apollo"
    elementwise: ClassVar[bool] = False
    slots: ClassVar[float] = 0.5

    rank: int = Field(128, gt=0)
    """Rows of the projected gradient."""
    scaling: Literal["channel", "tensor"] = "channel"
    """What has one scale: each column along the longer side, or the whole tensor."""
    strength: float = Field(1.0, gt=0)
    """Further factor on a matrix's step."""
    refresh: int = Field(200, gt=0)
    """Steps after which another projection is drawn."""

    def build(
        self, parameters: Sequence[tuple[str, Parameter]], learning_rate: float, scales: Mapping[str, float] = NO_SCALES
    ) -> torch.optim.Optimizer:
        return ApolloEngine(
            group_matrices(self, parameters, learning_rate, scales, "rank", "scaling", "strength", "refresh")
        )


class ApolloEngine(Engine):
    """Groups with `matrix` move by APOLLO, the others by AdamW."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups)
        members = [one for group in self.param_groups for one in group["params"]]
        self._places = {id(one): at for at, one in enumerate(members)}
        self._projections: dict[int, tuple[int, Tensor]] = {}

    def move(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not group["matrix"]:
            move_as_adamw(parameter, gradient, state, group)
            return
        # Rows are the shorter side.
        tall = parameter.shape[0] > parameter.shape[1]
        gradient_MN = gradient.T if tall else gradient
        projection_RM = self._projection(
            parameter, gradient_MN, state.get("step", 0) // group["refresh"], group["rank"]
        )
        low_RN = projection_RM @ gradient_MN
        moved_RN = adam_direction(low_RN, state, group["betas"], group["eps"])
        side = 0 if group["scaling"] == "channel" else None
        tiny = torch.finfo(low_RN.dtype).tiny
        scale = torch.linalg.vector_norm(moved_RN, dim=side) / torch.linalg.vector_norm(low_RN, dim=side).clamp(
            min=tiny
        )
        strength = group["strength"] * math.sqrt(len(gradient_MN) / len(low_RN))
        step_MN = gradient_MN * (scale * strength)
        self._limit(step_MN, state)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(step_MN.T if tall else step_MN, alpha=-group["lr"])

    def _projection(self, parameter: Tensor, gradient_MN: Tensor, turn: int, rank: int) -> Tensor:
        """[R, M] from N(0, 1 / R), the same for all steps of a turn, on any device and after any restart."""
        place = self._places[id(parameter)]
        held = self._projections.get(place)
        if held is None or held[0] != turn:
            rows = min(rank, len(gradient_MN))
            generator = torch.Generator().manual_seed(turn * len(self._places) + place)
            drawn = torch.randn(rows, len(gradient_MN), generator=generator) / math.sqrt(rows)
            held = self._projections[place] = (turn, drawn.to(gradient_MN))
        return held[1]

    def _limit(self, step_MN: Tensor, state: dict[str, Any]) -> None:
        """Shrink a step that is more than GROWTH times the last one; after a step of zero any size goes."""
        norm = torch.linalg.vector_norm(step_MN)
        last = state.get("norm", torch.zeros_like(norm))
        limited = torch.where(last > 0, torch.minimum(norm, last * GROWTH), norm)
        step_MN.mul_(limited / norm.clamp(min=torch.finfo(norm.dtype).tiny))
        state["norm"] = limited
