"""Small matrices beside the linear layers learn; the model's own weights stay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from luthier.core.errors import ConfigError, did_you_mean
from luthier.models.adapters.part import Adapter

if TYPE_CHECKING:
    from luthier.models.adapters.inject import LoraLinear
    from luthier.models.quantised.linear import AnyLinear, Form
    from luthier.models.spec import LoadedModel


class Lora(Adapter):
    """LoRA (Hu et al. 2021, arXiv:2106.09685), saved in PEFT's file format; a classifier's head learns in full."""

    kind: ClassVar[str] = "lora"
    embeds: ClassVar[bool] = True
    """Whether it can adapt the embedding of the vocabulary."""
    quantises: ClassVar[bool] = True

    rank: int = Field(16, gt=0)
    """Width of the small matrices."""
    alpha: float = Field(32, gt=0)
    """Their strength: what they add is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of their input dropped while learning."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Layers that get them: all linear ones but the output layer, or those whose name ends so, such as q_proj or lm_head."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, which keeps high ranks useful."""
    ratio: float = Field(1.0, gt=0)
    """Learning rate of B over that of A (LoRA+, arXiv:2402.12354, which takes 16 and a lower learning_rate)."""
    tokens: list[str] = Field(default_factory=list)
    """Tokens to learn, added if they are new; their rows alone learn, in the embedding and in the output layer."""
    also: list[str] = Field(default_factory=list)
    """Modules that learn whole, by the end of their name, such as embed_tokens or lm_head; tied weights stay tied."""

    def apply(self, loaded: LoadedModel) -> None:
        from luthier.models.adapters.inject import also_modules, lora_layers
        from luthier.models.adapters.tokens import token_layers
        from luthier.models.heads import Pooled

        network = loaded.network
        if loaded.spec.adapter is not None:
            self._check_same(loaded)
        else:
            self._put_in(loaded)
        for parameter in loaded.module.parameters():
            parameter.requires_grad_(False)
        for _, layer in lora_layers(network):
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(name.rpartition(".")[2].startswith("lora_"))
        for _, rows in token_layers(network):
            rows.rows.requires_grad_(True)
        for module in also_modules(network, self.also).values():
            module.requires_grad_(True)
        if isinstance(loaded.module, Pooled):
            loaded.module.head.requires_grad_(True)

    def scales(self, loaded: LoadedModel) -> dict[str, float]:
        """LoRA+: `ratio` for the B of linear layers. An embedding's A starts at zero in place of B, and keeps the rate."""
        if self.ratio == 1.0:
            return {}
        names = [name for name, one in loaded.module.named_parameters() if one.requires_grad]
        return {name: self.ratio for name in names if name.endswith(".lora_b") and ".added." not in name}

    def merge(self, loaded: LoadedModel) -> None:
        from luthier.models.adapters.merge import merge_adapter

        merge_adapter(loaded)

    def save(self, loaded: LoadedModel, directory: Path) -> None:
        from luthier.models.adapters.peft_write import write_adapter

        write_adapter(loaded, directory)

    def beside(self, base: AnyLinear, form: Form | None = None) -> LoraLinear:
        """The layer that takes the place of `base`, which it is to hold in `form`; None: as it is."""
        from luthier.models.adapters.inject import LoraLinear

        return LoraLinear(base, self.rank, self.alpha, dropout=self.dropout, rslora=self.rslora)

    def _put_in(self, loaded: LoadedModel) -> None:
        from torch import nn

        from luthier.models.adapters.inject import LoraEmbedding, LoraLayer, edge_layers, replace_layer
        from luthier.models.adapters.tokens import add_tokens
        from luthier.models.facts import fingerprint
        from luthier.models.sources import lasting_name

        network = loaded.network
        names = self._choose(loaded)
        also = self._choose_also(loaded)
        inside = {name for name in names for one in also if name == one or name.startswith(one + ".")}
        if inside and self.targets != "all-linear":
            raise ConfigError(f"adapter.also: {min(inside)} is among adapter.targets too; leave it out of one of them")
        names = [name for name in names if name not in inside]
        edges = set(edge_layers(network)) if self.tokens else set()
        for setting, chosen in (("targets", names), ("also", also)):
            if edges & set(chosen):
                raise ConfigError(
                    f"adapter.{setting}: {min(edges & set(chosen))} holds the rows of adapter.tokens, and cannot be adapted "
                    "in two ways; leave one of them out"
                )
        base = {"base": lasting_name(loaded.spec.source), "base_fingerprint": fingerprint(network)}
        for name in names:
            under = network.get_submodule(name)
            layer: LoraLayer
            if isinstance(under, nn.Embedding):
                layer = LoraEmbedding(under, self.rank, self.alpha, dropout=self.dropout, rslora=self.rslora)
            else:
                layer = self.beside(under, self._form_under(loaded, name))
            layer.train(network.training)
            replace_layer(network, name, layer)
        if self.tokens:
            add_tokens(loaded, self.tokens)
        loaded.spec = loaded.spec.model_copy(update={"adapter": self.model_dump(), **base})

    def _form_under(self, loaded: LoadedModel, name: str) -> Form | None:
        """The form in which the layer is to be held under its adapter; None: as it is."""
        return None

    def _choose(self, loaded: LoadedModel) -> list[str]:
        """Names of the layers that get an adapter; of an encoder-decoder that classifies, in its encoder only."""
        from torch import nn

        from luthier.models.adapters.inject import edge_layers, linear_layers
        from luthier.models.heads import Pooled

        network = loaded.network
        layers: dict[str, nn.Module] = dict(linear_layers(network))
        if isinstance(loaded.module, Pooled) and network.config.is_encoder_decoder:
            inside = {id(module) for module in network.get_encoder().modules()}
            layers = {name: layer for name, layer in layers.items() if id(layer) in inside}
        if self.targets == "all-linear":
            return list(layers)
        layers |= {
            name: layer
            for name, layer in edge_layers(network).items()
            if self.embeds or not isinstance(layer, nn.Embedding)
        }
        chosen: list[str] = []
        for target in self.targets:
            found = [name for name in layers if name == target or name.endswith("." + target)]
            if not found:
                leaves = {name.rpartition(".")[2] for name in layers}
                raise ConfigError(
                    f"adapter.targets: no linear layer is called {target!r}; {did_you_mean(target, leaves)}"
                )
            chosen += found
        self._check_edges(loaded, "targets", chosen)
        return list(dict.fromkeys(chosen))

    def _choose_also(self, loaded: LoadedModel) -> list[str]:
        from luthier.models.adapters.inject import also_modules

        network = loaded.network
        found: list[str] = []
        for one in self.also:
            named = also_modules(network, [one])
            if not any(any(True for _ in module.parameters()) for module in named.values()):
                leaves = {name.rpartition(".")[2] for name, _ in network.named_modules() if name}
                raise ConfigError(f"adapter.also: no module is called {one!r}; {did_you_mean(one, leaves)}")
            found += named
        self._check_edges(loaded, "also", found)
        return found

    def _check_edges(self, loaded: LoadedModel, setting: str, names: list[str]) -> None:
        """An embedding that an encoder and a decoder share has no place of its own in PEFT's files."""
        from luthier.models.adapters.inject import edge_layers, sharers

        network = loaded.network
        for name, layer in edge_layers(network).items():
            if name in names and network.config.is_encoder_decoder and len(sharers(network, layer.weight)) > 1:
                raise ConfigError(
                    f"adapter.{setting}: {name} of a {loaded.spec.family} model shares its weights with the embeddings of "
                    "its encoder and decoder, so it cannot be adapted alone; leave it out, or learn rows with adapter.tokens"
                )

    def _check_same(self, loaded: LoadedModel) -> None:
        """The adapter that the model brings learns on, if it is the one asked for."""
        from luthier.models.adapters.inject import lora_layers

        brought = loaded.spec.adapter or {}
        held = {(layer.rank, layer.alpha, layer.rslora) for _, layer in lora_layers(loaded.network)}
        kind = str(brought.get("kind"))
        if kind != self.kind or held != {(self.rank, self.alpha, self.rslora)}:
            shown = ", ".join(f"rank {rank}, alpha {alpha:g}" for rank, alpha, _ in sorted(held))
            raise ConfigError(
                f"adapter: {loaded.spec.source} already holds a {NAMES.get(kind, kind)} adapter of {shown}; ask for the same "
                "to train it further, or for adapter 'full', which merges it into the weights first"
            )
        for setting in ("tokens", "also"):
            if sorted(brought.get(setting, [])) != sorted(getattr(self, setting)):
                raise ConfigError(
                    f"adapter.{setting}: {loaded.spec.source} already holds an adapter that learns "
                    f"{', '.join(brought.get(setting, [])) or 'none'}; ask for the same to train it further"
                )
        for _, layer in lora_layers(loaded.network):
            layer.dropout.p = self.dropout
        loaded.spec = loaded.spec.model_copy(update={"adapter": self.model_dump()})


NAMES = {"lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA"}
