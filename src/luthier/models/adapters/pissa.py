"""LoRA that starts from the principal part of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from luthier.core.errors import ConfigError
from luthier.models.adapters.lora import Lora

if TYPE_CHECKING:
    from torch import nn

    from luthier.models.spec import LoadedModel


class Pissa(Lora):
    """PiSSA (Meng et al. 2024, arXiv:2404.02948): LoRA whose matrices start as the principal singular vectors of the
    weight, which keeps the rest. Saved as an ordinary LoRA of twice the rank for the base as it was."""

    kind: ClassVar[str] = "pissa"
    quantises: ClassVar[bool] = False
    embeds: ClassVar[bool] = False

    def beside(self, base: nn.Module) -> nn.Module:
        """The layer that takes the place of `base`."""
        from luthier.models.adapters.principal import PissaLinear

        return PissaLinear(base, self.rank, self.alpha, dropout=self.dropout, rslora=self.rslora)

    def _choose(self, loaded: LoadedModel) -> list[str]:
        from luthier.models.adapters.inject import shape_of, sharers

        names = super()._choose(loaded)
        for name in names:
            layer = loaded.network.get_submodule(name)
            outputs, inputs = shape_of(layer)
            if self.rank > min(outputs, inputs):
                raise ConfigError(
                    f"adapter.rank: {name} is {outputs} x {inputs}, and has no {self.rank} principal directions; ask for "
                    f"{min(outputs, inputs)} or less, or leave the layer out of adapter.targets"
                )
            if len(sharers(loaded.network, layer.weight)) > 1:
                raise ConfigError(
                    f"adapter.targets: {name} shares its weight with another layer, and cannot keep the rest of it for "
                    "itself; leave it out, or use adapter 'lora'"
                )
        return names
