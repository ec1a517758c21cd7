"""The Part that an optimiser is, and which weights decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from luthier.core.catalog import Part

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer as TorchOptimizer


class Optimizer(Part):
    """Builds a torch optimiser over named parameters."""

    kind: ClassVar[str]
    elementwise: ClassVar[bool] = False
    """Whether each value moves by its own gradient alone, so that a process can move its part of a weight."""

    weight_decay: float = Field(0.0, ge=0)
    """Pull of matrices towards zero; biases, norms and other vectors never decay."""

    def build(self, parameters: Sequence[tuple[str, Parameter]], learning_rate: float) -> TorchOptimizer:
        """A fresh optimiser; its groups keep the base rate under "base_lr" for the schedule."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def group(self, parameters: Sequence[tuple[str, Parameter]], learning_rate: float) -> list[dict[str, Any]]:
        """Two groups, with and without decay; an empty one is left out."""
        decayed = [parameter for _, parameter in parameters if parameter.ndim >= 2]
        plain = [parameter for _, parameter in parameters if parameter.ndim < 2]
        groups = ((decayed, self.weight_decay), (plain, 0.0))
        return [
            {"params": members, "weight_decay": decay, "lr": learning_rate, "base_lr": learning_rate}
            for members, decay in groups
            if members
        ]
