"""A model with the linear layers of its body in fewer bits, and the way back to full precision."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from luthier.core.errors import ModelError
from luthier.core.events import Events
from luthier.models.adapters.inject import linear_layers, replace_layer
from luthier.models.quantised.linear import Form, QuantisedLinear

if TYPE_CHECKING:
    from luthier.models.spec import LoadedModel


@torch.no_grad()
def quantise(network: Any, form: Form, events: Events | None = None) -> int:
    """Hold every linear layer of the body in `form`, one at a time, in place; returns how many.

    Each layer's own weight is let go before the next is read: where the weights lie in a mapped file, as transformers
    loads them in the precision of the file, the peak is the quantised size and one layer. Embeddings, norms and the
    output layer stay as they are. Raises ModelError for a body without linear layers.
    """
    # What lies under an adapter by now was left, or quantised, by that.
    held = {name for name, _ in quantised_layers(network)}
    names = [name for name in linear_layers(network) if in_body(network, name) and not under_adapter(name)]
    names = [name for name in names if name not in held]
    if not names and not held:
        raise ModelError(
            f"quantize: a {network.config.model_type} model has no linear layers to hold in {form}; leave quantize out"
        )
    for name in names:
        linear = network.get_submodule(name)
        replace_layer(network, name, QuantisedLinear(linear, form).train(linear.training))
        del linear
    # The last of what lies in the mapped file would keep all of it there.
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    if events is not None:
        tell_size(network, events)
    return len(names)


def tell_size(network: nn.Module, events: Events) -> None:
    """Say how many layers are quantised, and what that saves."""
    layers = [layer for _, layer in quantised_layers(network)]
    before = sum(layer.in_features * layer.out_features * 2 for layer in layers)
    shown = f"{layers[0].form}, {sum(layer.nbytes for layer in layers) / 2**20:.1f} MB"
    events.choose("base", shown, f"{len(layers)} linear layers, which take {before / 2**20:.1f} MB in bfloat16")


def in_body(network: Any, name: str) -> bool:
    """Whether a layer lies in the body, as all do but the output layer over the vocabulary."""
    layer, body = network.get_submodule(name), network.base_model
    return any(layer is module for module in body.modules()) and layer is not network.get_output_embeddings()


def under_adapter(name: str) -> bool:
    """Whether a layer is the base of one with an adapter."""
    return name.rpartition(".")[2] in ("base", "base_layer")


def quantise_loaded(loaded: LoadedModel, form: Form, events: Events | None = None) -> None:
    """The same for a model that is loaded already. Raises ModelError when it is held in another form, or its files are not
    known, without which an adapter could not be merged."""
    if loaded.spec.quantize not in ("none", form):
        raise ModelError(
            f"quantize: {loaded.spec.source} is held in {loaded.spec.quantize} already; load it anew for {form}"
        )
    if loaded.spec.quantize == "none":
        quantise(loaded.network, form, events)
        loaded.spec = loaded.spec.model_copy(update={"quantize": form})


def quantised_layers(network: nn.Module) -> Iterator[tuple[str, QuantisedLinear]]:
    """(name, layer) of every quantised layer."""
    for name, module in network.named_modules():
        if isinstance(module, QuantisedLinear):
            yield name, module


@torch.no_grad()
def restore(loaded: LoadedModel, base: Callable[[], Any]) -> list[str]:
    """Put the full weights back where they were quantised, from the base as `base` reads it, in place.

    An adapter is merged into these: into rounded weights, much of what it learned would be rounded away. Returns the names
    of the layers. Raises ModelError when the base is gone, or is no longer the model that it was.
    """
    network = loaded.network
    held = dict(quantised_layers(network))
    if not held:
        return []
    whole = base().requires_grad_(False)
    for name, layer in held.items():
        own = whole.get_submodule(plain_name(name))
        own.train(layer.training)
        replace_layer(network, name, own)
    loaded.spec = loaded.spec.model_copy(update={"quantize": "none"})
    loaded.head = None
    return list(held)


def plain_name(name: str) -> str:
    """The name in the base of what lies in a layer with an adapter."""
    return re.sub(r"\.base(_layer)?(?=\.|$)", "", name)
