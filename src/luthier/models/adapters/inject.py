"""Low-rank matrices beside linear layers and embeddings: put in, found, folded in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.models.adapters.product import Factors, low_rank_products
from luthier.models.heads import Pooled
from luthier.models.quantised.linear import AnyLinear, QuantisedLinear

if TYPE_CHECKING:
    from luthier.models.spec import LoadedModel


class LoraLinear(nn.Module):
    """y = base(x) + scale x B A x, with the base frozen and A [rank, in], B [out, rank] learned in fp32.

    LoRA: Hu et al. 2021, arXiv:2106.09685. B starts at zero, so the layer starts equal to its base; scale is
    alpha / rank, or alpha / sqrt(rank) when rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732).
    """

    keeps_base = False
    """Whether its files hold the base's weight too, since the base's own files do not."""

    def __init__(self, base: AnyLinear, rank: int, alpha: float, *, dropout: float = 0.0, rslora: bool = False):
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
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias

    @property
    def matrix(self) -> Tensor:
        """The base's weight as [out, in], whichever way it is kept."""
        return self.weight.T if isinstance(self.base, Conv1D) else self.weight

    @property
    def drops(self) -> bool:
        """Whether inputs of A are dropped at random now."""
        return self.training and self.dropout.p > 0

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the base's precision."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (W + scale B A).T + bias; what is dropped is dropped before A alone."""
        if isinstance(self.base, QuantisedLinear):
            return self._beside_quantised(x, self.base, bias)
        if not self.drops:
            factors = Factors(self.matrix, bias, self.lora_a, self.lora_b, self.scale)
            return low_rank_products(x.flatten(0, -2), [factors])[0].view(*x.shape[:-1], -1)
        return nn.functional.linear(x, self.matrix, bias) + self._dropped(x)

    def _beside_quantised(self, x: Tensor, base: QuantisedLinear, bias: Tensor | None) -> Tensor:
        if not self.drops:
            return base.beside(x, bias, self.lora_a, self.lora_b, self.scale)
        return base.beside(x, bias) + self._dropped(x)

    def _dropped(self, x: Tensor) -> Tensor:
        """What the matrices add where inputs of A are dropped."""
        kept: Tensor = self.dropout(x)
        return ((kept.to(self.lora_a.dtype) @ self.lora_a.T @ self.lora_b.T) * self.scale).to(x.dtype)

    def whole(self) -> Tensor:
        """The weight that the layer as it stands amounts to, [out, in], in fp32 at least."""
        return widened(self.matrix) + (self.lora_b @ self.lora_a) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base with what was learned folded into its weight."""
        whole = self.whole()
        self.weight.copy_(whole.T if isinstance(self.base, Conv1D) else whole)
        return self.base


class LoraEmbedding(nn.Module):
    """y = base(ids) + scale x (B A)[:, ids], with A [rank, vocabulary] from zero and B [dim, rank] learned in fp32."""

    keeps_base = False
    """Whether its files hold the base's weight too, since the base's own files do not."""

    def __init__(self, base: nn.Embedding, rank: int, alpha: float, *, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        # Dropout is for inputs with values: here it stays what was asked, for the other layers and the files.
        self.base, self.rank, self.alpha, self.rslora = base, rank, alpha, rslora
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        rows, width = base.weight.shape
        options: dict[str, Any] = {"dtype": torch.float32, "device": base.weight.device}
        # In a child after the base: a model's dtype is that of its first parameter, which must stay the base's.
        self.added = nn.ParameterDict(
            {
                "lora_a": nn.Parameter(torch.zeros(rank, rows, **options)),
                "lora_b": nn.Parameter(torch.randn(width, rank, **options)),
            }
        )
        base.weight.requires_grad_(False)

    @property
    def lora_a(self) -> nn.Parameter:
        """[rank, vocabulary]"""
        a_RV: nn.Parameter = self.added["lora_a"]
        return a_RV

    @property
    def lora_b(self) -> nn.Parameter:
        """[dim, rank]"""
        b_ER: nn.Parameter = self.added["lora_b"]
        return b_ER

    @property
    def weight(self) -> Tensor:
        """The base's weight."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Ids of any shape to their vectors, in the base's precision."""
        found: Tensor = self.base(ids)
        low = nn.functional.embedding(ids, self.lora_a.T) @ self.lora_b.T
        return found + (low * (self.scale * factor_of(self.base))).to(found.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base with what was learned folded into its weight."""
        self.weight.copy_(widened(self.weight) + (self.lora_b @ self.lora_a).T * self.scale)
        return self.base


LoraLayer: TypeAlias = LoraLinear | LoraEmbedding


def widened(weight: Tensor) -> Tensor:
    """`weight` in fp32, or as it is where it is finer."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def factor_of(embedding: nn.Module) -> float | Tensor:
    """What some families multiply their embeddings by inside the layer (BART, Gemma 3)."""
    return getattr(embedding, "embed_scale", 1.0)


def shape_of(linear: AnyLinear) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer, or of GPT-2's Conv1D, whose weight may have been let go of."""
    if isinstance(linear, Conv1D):
        return int(linear.nf), int(linear.nx)
    return linear.out_features, linear.in_features


def linear_layers(network: Any) -> dict[str, AnyLinear]:
    """Every linear layer by its name in the network, but for the output layer over the vocabulary."""
    output = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output
    }


def edge_layers(network: Any) -> dict[str, nn.Module]:
    """The embedding of the vocabulary and, where there is one, the output layer over it, by name."""
    output = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    edges = (network.get_input_embeddings(), output)
    return {name: module for name, module in network.named_modules() if any(module is edge for edge in edges)}


def also_modules(network: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules that learn whole beside the small matrices: those called `names`, or whose names end so."""
    wanted = tuple(names)
    return {
        name: module
        for name, module in network.named_modules()
        if any(name == one or name.endswith("." + one) for one in wanted)
    }


def lora_layers(network: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """(name, layer) of every layer with an adapter."""
    for name, module in network.named_modules():
        if isinstance(module, LoraLinear | LoraEmbedding):
            yield name, module


def project(x_NI: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """The outputs [N, O] of linear layers that read the same x: together where all hold a plain adapter."""
    plain = [layer for layer in layers if _is_plain(layer)]
    if len(plain) == len(layers):
        factors = [Factors(one.matrix, one.bias, one.lora_a, one.lora_b, one.scale) for one in plain]
        return low_rank_products(x_NI, factors)
    return [layer(x_NI) for layer in layers]


def _is_plain(layer: nn.Module) -> TypeGuard[LoraLinear]:
    if not isinstance(layer, LoraLinear) or type(layer).forward is not LoraLinear.forward:
        return False
    return not layer.drops and not isinstance(layer.base, QuantisedLinear)


def replace_layer(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where `name` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, layer)


def sharers(network: nn.Module, weight: object) -> list[str]:
    """Names of all modules whose weight this one is: an embedding and the output layer tied to it."""
    named = network.named_modules(remove_duplicate=False)
    return [name for name, module in named if module._parameters.get("weight") is weight]


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
