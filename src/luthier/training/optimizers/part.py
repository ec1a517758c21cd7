"""The Part that an optimiser is, which weights decay, and which learn at a rate of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from luthier.core.catalog import Part

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer as TorchOptimizer

NO_SCALES: Mapping[str, float] = MappingProxyType({})


class Optimizer(Part):
    """Builds a torch optimiser over named parameters."""

    kind: ClassVar[str]
    schedule: ClassVar[str | None] = None
    """The schedule that it is made for; None: any."""
    rate: ClassVar[float] = 1.0
    """The learning rate that suits it, as a multiple of the one that suits AdamW."""
    rate_why: ClassVar[str] = ""
    """Why the rate is another, where it is."""
    averages: ClassVar[bool] = False
    """Whether its engine keeps an average of the weights: it has `eval()`, which puts the average into them, and `train()`."""
    slots: ClassVar[float] = 2.0
    """Values in fp32 kept beside each weight, about; for the estimate of memory."""
    elementwise: ClassVar[bool] = False
    """Whether each value moves by its own gradient alone, so that a process can move its part of a weight."""

    weight_decay: float = Field(0.0, ge=0)
    """Pull of matrices towards zero; biases, norms and other vectors never decay."""

    def times(self, values: int) -> float:
        """The learning rate that suits it where so many `values` learn, as a multiple of the one that suits AdamW."""
        return self.rate

    def build(
        self, parameters: Sequence[tuple[str, Parameter]], learning_rate: float, scales: Mapping[str, float] = NO_SCALES
    ) -> TorchOptimizer:
        """A fresh optimiser; its groups keep the base rate under "base_lr" for the schedule.

        `scales` multiplies the learning rate of a parameter, by its name; 1 for those it does not name.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def group(
        self, parameters: Sequence[tuple[str, Parameter]], learning_rate: float, scales: Mapping[str, float] = NO_SCALES
    ) -> list[dict[str, Any]]:
        """One group for each decay and each scale of the learning rate that occur."""
        groups: dict[tuple[float, float], list[Parameter]] = {}
        for name, parameter in parameters:
            decay = self.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((decay, scales.get(name, 1.0)), []).append(parameter)
        return [
            {
                "params": members,
                "weight_decay": decay,
                "lr": learning_rate * scale,
                "base_lr": learning_rate * scale,
                "scale": scale,
            }
            for (decay, scale), members in groups.items()
        ]
