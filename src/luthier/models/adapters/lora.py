"""Small matrices beside the linear layers learn; the model's own weights stay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from luthier.core.errors import ConfigError, did_you_mean
from luthier.models.adapters.part import Adapter

if TYPE_CHECKING:
    from luthier.models.spec import LoadedModel


class Lora(Adapter):
    """LoRA (Hu et al. 2021, arXiv:2106.09685), saved in PEFT's file format; a classifier's head learns in full."""

    kind: ClassVar[str] = "lora"
    quantises: ClassVar[bool] = True

    rank: int = Field(16, gt=0)
    """Width of the small matrices."""
    alpha: float = Field(32, gt=0)
    """Their strength: what they add is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of their input dropped while learning."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Layers that get them: all linear ones but the output layer, or those whose name ends so, such as q_proj."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, which keeps high ranks useful."""

    def apply(self, loaded: LoadedModel) -> None:
        from luthier.models.adapters.inject import LoraLinear, lora_layers, replace_layer
        from luthier.models.facts import fingerprint
        from luthier.models.heads import Pooled
        from luthier.models.sources import lasting_name

        network = loaded.network
        if loaded.spec.adapter is not None:
            self._check_same(loaded)
        else:
            names = self._choose(loaded)
            base = {"base": lasting_name(loaded.spec.source), "base_fingerprint": fingerprint(network)}
            for name in names:
                layer = LoraLinear(
                    network.get_submodule(name), self.rank, self.alpha, dropout=self.dropout, rslora=self.rslora
                )
                layer.train(network.training)
                replace_layer(network, name, layer)
            loaded.spec = loaded.spec.model_copy(update={"adapter": self.model_dump(), **base})
        for parameter in loaded.module.parameters():
            parameter.requires_grad_(False)
        for _, layer in lora_layers(network):
            layer.lora_a.requires_grad_(True)
            layer.lora_b.requires_grad_(True)
        if isinstance(loaded.module, Pooled):
            loaded.module.head.requires_grad_(True)

    def merge(self, loaded: LoadedModel) -> None:
        from luthier.models.adapters.inject import merge_adapter

        merge_adapter(loaded)

    def save(self, loaded: LoadedModel, directory: Path) -> None:
        from luthier.models.adapters.peft_files import write_adapter

        write_adapter(loaded, directory)

    def _choose(self, loaded: LoadedModel) -> list[str]:
        """Names of the layers that get an adapter; of an encoder-decoder that classifies, in its encoder only."""
        from luthier.models.adapters.inject import linear_layers
        from luthier.models.heads import Pooled

        network = loaded.network
        layers = linear_layers(network)
        if isinstance(loaded.module, Pooled) and network.config.is_encoder_decoder:
            inside = {id(module) for module in network.get_encoder().modules()}
            layers = {name: layer for name, layer in layers.items() if id(layer) in inside}
        if self.targets == "all-linear":
            return list(layers)
        chosen: list[str] = []
        for target in self.targets:
            found = [name for name in layers if name == target or name.endswith("." + target)]
            if not found:
                leaves = {name.rpartition(".")[2] for name in layers}
                raise ConfigError(
                    f"adapter.targets: no linear layer is called {target!r}; {did_you_mean(target, leaves)}"
                )
            chosen += found
        return list(dict.fromkeys(chosen))

    def _check_same(self, loaded: LoadedModel) -> None:
        """The adapter that the model brings learns on, if it is the one asked for."""
        from luthier.models.adapters.inject import lora_layers

        held = {(layer.rank, layer.alpha, layer.rslora) for _, layer in lora_layers(loaded.network)}
        if held != {(self.rank, self.alpha, self.rslora)}:
            shown = ", ".join(f"rank {rank}, alpha {alpha:g}" for rank, alpha, _ in sorted(held))
            raise ConfigError(
                f"adapter: {loaded.spec.source} already holds a LoRA adapter of {shown}; ask for the same to train it "
                "further, or for adapter 'full', which merges it into the weights first"
            )
        for _, layer in lora_layers(loaded.network):
            layer.dropout.p = self.dropout
        loaded.spec = loaded.spec.model_copy(update={"adapter": self.model_dump()})
