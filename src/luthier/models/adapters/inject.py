"""Low-rank matrices beside linear layers: put in, found, folded in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.models.adapters.product import LoraProduct
from luthier.models.heads import Pooled
from luthier.models.quantised.linear import QuantisedLinear

if TYPE_CHECKING:
    from luthier.models.spec import LoadedModel


class LoraLinear(nn.Module):
    """y = base(x) + scale x B A x, with the base frozen and A [rank, in], B [out, rank] learned in fp32.

    LoRA: Hu et al. 2021, arXiv:2106.09685. B starts at zero, so the layer starts equal to its base; scale is
    alpha / rank, or alpha / sqrt(rank) when rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732).
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, *, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        self.base, self.rank, self.alpha, self.rslora = base, rank, alpha, rslora
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        outputs, inputs = shape_of(base)
        device = base.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, inputs, dtype=torch.float32, device=device))
        self.lora_b = nn.Parameter(torch.zeros(outputs, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        for parameter in base.parameters():
            parameter.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """The base's weight: some families look at its dtype before they call the layer."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the base's precision."""
        if not self.dropout.p or not self.training:
            if isinstance(self.base, QuantisedLinear):
                return self.base.beside(x, self.lora_a, self.lora_b, self.scale)
            weight = self.base.weight.T if isinstance(self.base, Conv1D) else self.base.weight
            flat = LoraProduct.apply(x.flatten(0, -2), weight, self.base.bias, self.lora_a, self.lora_b, self.scale)
            return flat.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]
        low = (self.dropout(x).to(self.lora_a.dtype) @ self.lora_a.T) @ self.lora_b.T
        return self.base(x) + (low * self.scale).to(x.dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base with the matrices folded into its weight."""
        change = (self.lora_b @ self.lora_a) * self.scale
        weight: Any = self.base.weight
        weight.add_((change.T if isinstance(self.base, Conv1D) else change).to(weight.dtype))
        return self.base


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer; GPT-2's Conv1D holds its weight transposed."""
    rows, columns = linear.weight.shape  # type: ignore[misc,union-attr]
    return (int(columns), int(rows)) if isinstance(linear, Conv1D) else (int(rows), int(columns))


def linear_layers(network: Any) -> dict[str, nn.Module]:
    """Every linear layer by its name in the network, but for the output layer over the vocabulary."""
    output = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output
    }


def lora_layers(network: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(name, layer) of every layer with an adapter."""
    for name, module in network.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def replace_layer(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where `name` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, layer)


def merge_adapter(loaded: LoadedModel) -> None:
    """Fold an attached adapter, if there is one, into the weights; the model is whole then.

    A quantised base is read again in full precision first. Raises ModelError when it can no longer be had.
    """
    from luthier.models.quantised.network import restore

    if loaded.spec.adapter is None:
        return
    restore(loaded)
    if loaded.spec.adapter["kind"] == "peft":
        from luthier.models.adapters.peft_methods import merge

        merge(loaded.network, loaded.spec.source)
    for name, layer in list(lora_layers(loaded.network)):
        replace_layer(loaded.network, name, layer.merged())
    whole = {"adapter": None, "base": None, "base_fingerprint": None}
    loaded.spec = loaded.spec.model_copy(update=whole)


def used_parameters(loaded: LoadedModel) -> list[nn.Parameter]:
    """What may learn: all but positions computed by formula, and the decoder of an encoder-decoder that classifies."""
    module = loaded.module
    used = list(module.parameters())
    if isinstance(module, Pooled) and module.backbone.config.is_encoder_decoder:
        used = [*module.backbone.get_encoder().parameters(), *module.head.parameters()]
    computed = {
        id(parameter)
        for inner in module.modules()
        if "Sinusoidal" in type(inner).__name__
        for parameter in inner.parameters()
    }
    return [parameter for parameter in used if id(parameter) not in computed]
