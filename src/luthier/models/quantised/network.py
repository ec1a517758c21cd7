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
    body = {id(module) for module in network.base_model.modules()}
    names = [name for name, layer in linear_layers(network).items() if id(layer) in body]
    if not names:
        raise ModelError(
            f"quantize: a {network.config.model_type} model has no linear layers to hold in {form}; leave quantize out"
        )
    before = after = 0
    for name in names:
        linear = network.get_submodule(name)
        held = QuantisedLinear(linear, form)
        held.train(linear.training)
        before, after = before + linear.weight.numel() * 2, after + held.nbytes
        replace_layer(network, name, held)
        del linear
    # The last of what lies in the mapped file would keep all of it there.
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    if events is not None:
        shown = f"{form}, {after / 2**20:.1f} MB"
        events.choose("base", shown, f"{len(names)} linear layers, which take {before / 2**20:.1f} MB in bfloat16")
    return len(names)


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
def restore(loaded: LoadedModel, base: Callable[[], Any]) -> None:
    """Put the full weights back where they were quantised, from the base as `base` reads it, in place.

    An adapter is merged into these: into rounded weights, much of what it learned would be rounded away. Raises
    ModelError when the base is gone, or is no longer the model that it was.
    """
    network = loaded.network
    held = dict(quantised_layers(network))
    if not held:
        return
    whole = base().requires_grad_(False)
    for name, layer in held.items():
        own = whole.get_submodule(plain_name(name))
        own.train(layer.training)
        replace_layer(network, name, own)
    loaded.spec = loaded.spec.model_copy(update={"quantize": "none"})
    loaded.head = None


def plain_name(name: str) -> str:
    """The name in the base of what lies in a layer with an adapter."""
    return re.sub(r"\.base(_layer)?(?=\.|$)", "", name)
