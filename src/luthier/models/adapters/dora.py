"""LoRA that learns the magnitude of each output apart from its direction."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from luthier.models.adapters.lora import Lora

if TYPE_CHECKING:
    from torch import nn


class Dora(Lora):
    """DoRA (Liu et al. 2024, arXiv:2402.09353): LoRA with a learned magnitude for each output, in linear layers."""

    kind: ClassVar[str] = "dora"
    quantises: ClassVar[bool] = False
    embeds: ClassVar[bool] = False

    def beside(self, base: nn.Module) -> nn.Module:
        """The layer that takes the place of `base`."""
        from luthier.models.adapters.magnitude import DoraLinear

        return DoraLinear(base, self.rank, self.alpha, dropout=self.dropout, rslora=self.rslora)
