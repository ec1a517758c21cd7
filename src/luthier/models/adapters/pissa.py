"""LoRA that starts from the principal part of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from luthier.core.errors import ConfigError
from luthier.models.adapters.lora import Lora

if TYPE_CHECKING:
    from luthier.models.adapters.inject import LoraLinear
    from luthier.models.quantised.linear import AnyLinear, Form
    from luthier.models.spec import LoadedModel


class Pissa(Lora):
    """PiSSA (Meng et al. 2024, arXiv:2404.02948): LoRA whose matrices start as the principal singular vectors of the
    weight, which keeps the rest. Saved as an ordinary LoRA of twice the rank for the base as it was.

    With `quantize` the rest is what is quantised, after the principal part was taken out in full precision (QPiSSA): the
    model starts nearer to the base in full than a quantised base is. Deviation: no alternating iterations of the two.
    Whoever loads the files over a base that was quantised whole, as PEFT does, computes with that other rounding.
    """

    kind: ClassVar[str] = "pissa"
    reads_base: ClassVar[bool] = True
    embeds: ClassVar[bool] = False

    def beside(self, base: AnyLinear, form: Form | None = None) -> LoraLinear:
        """The layer that takes the place of `base`, which keeps the rest in `form`."""
        from luthier.models.adapters.principal import PissaLinear

        return PissaLinear(base, self.rank, self.alpha, dropout=self.dropout, rslora=self.rslora, form=form)

    def _put_in(self, loaded: LoadedModel) -> None:
        from luthier.models.quantised.network import quantise

        super()._put_in(loaded)
        if loaded.spec.quantize != "none":
            quantise(loaded.network, loaded.spec.quantize)

    def _form_under(self, loaded: LoadedModel, name: str) -> Form | None:
        """What quantising would hold it in, were it not adapted: linear layers of the body alone."""
        from luthier.models.quantised.network import in_body

        return loaded.spec.quantize if loaded.spec.quantize != "none" and in_body(loaded.network, name) else None

    def _choose(self, loaded: LoadedModel) -> list[str]:
        from luthier.models.adapters.inject import shape_of, sharers
        from luthier.models.quantised.network import quantised_layers

        if any(True for _ in quantised_layers(loaded.network)):
            raise ConfigError(
                f"adapter: {loaded.spec.source} is held in {loaded.spec.quantize} already, and 'pissa' takes the principal "
                "part out of full weights; load the model in full, and ask for quantize here"
            )
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
