"""The Part that a loss is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from luthier.core.catalog import Part

if TYPE_CHECKING:
    from torch import Tensor


class Loss(Part):
    """Loss of each row, unreduced: the loop sums and divides once, by the global weight."""

    fits: ClassVar[Literal["classes", "numbers"]]
    """Whether gold is a class (index, or one 0/1 for each class) or a number."""

    def rows(self, scores_NC: Tensor, gold: Tensor) -> Tensor:
        """Losses [N], fp32. `gold` is [N] int64 class indices, [N, C] floats (several labels a row), or [N] numbers."""
        raise NotImplementedError(f"{type(self).__name__} must define rows()")
