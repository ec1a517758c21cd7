"""LoRA that learns the magnitude of each output apart from its direction."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from luthier.models.adapters.lora import Lora

if TYPE_CHECKING:
    from luthier.models.adapters.inject import LoraLinear
    from luthier.models.quantised.linear import AnyLinear, Form


class Dora(Lora):
    """DoRA (Liu et al. 2024, arXiv:2402.09353): LoRA with a learned magnitude for each output, in linear layers. Over a
    quantised base its norm is that of the weight as it is rebuilt; merged, that of the base in full."""

    kind: ClassVar[str] = "dora"
    embeds: ClassVar[bool] = False

    def beside(self, base: AnyLinear, form: Form | None = None) -> LoraLinear:
        """The layer that takes the place of `base`."""
        from luthier.models.adapters.magnitude import DoraLinear

        return DoraLinear(base, self.rank, self.alpha, dropout=self.dropout, rslora=self.rslora)
