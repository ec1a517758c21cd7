"""An adapter folded into its base, in the base's full precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from luthier.core.errors import ModelError
from luthier.models.adapters.inject import LoraEmbedding, LoraLinear, also_modules, replace_layer, sharers
from luthier.models.adapters.principal import PissaLinear
from luthier.models.adapters.tokens import TokenRows

if TYPE_CHECKING:
    from luthier.models.spec import LoadedModel


def merge_adapter(loaded: LoadedModel) -> None:
    """Fold an attached adapter, if there is one, into the weights; the model is whole then, and in fp32.

    A base that is held rounded (in bf16) is read again from its files first: added to rounded weights, most of what an
    adapter learned would be rounded away. Layers that shared a weight and now differ get one each, and the config says
    so. Raises ModelError when the base can no longer be had.
    """
    from luthier.models.quantised.network import plain_name, restore

    # Both may need it, and neither for a base that is held in full.
    base = cache(lambda: read_base(loaded))
    restored = {plain_name(name) for name in restore(loaded, base)}
    if loaded.spec.adapter is None:
        return
    network = loaded.network
    if not widen(loaded, base):
        for name, layer in network.named_modules():
            if isinstance(layer, PissaLinear) and plain_name(name) in restored:
                layer.subtract()
    if loaded.spec.adapter["kind"] == "peft":
        from luthier.models.adapters.peft_methods import merge

        merge(network, loaded.spec.source)
    separate(network)
    for name, layer in list(network.named_modules(remove_duplicate=False)):
        if isinstance(layer, LoraLinear | LoraEmbedding | TokenRows):
            replace_layer(network, name, layer.merged())
    whole = {"adapter": None, "base": None, "base_fingerprint": None}
    loaded.spec = loaded.spec.model_copy(update=whole)
    loaded.head = None


@torch.no_grad()
def widen(loaded: LoadedModel, base: Callable[[], Any]) -> bool:
    """Bring a model with an adapter to fp32, the base from its own files, as `base` reads them, where it was rounded; False
    where it was not, and nothing is done.

    Raises ModelError when they are gone or hold another model.
    """
    from luthier.models.quantised.network import plain_name

    network, spec = loaded.network, loaded.spec
    if all(one.dtype.itemsize >= 4 for one in network.parameters()):
        return False
    also = also_modules(network, (spec.adapter or {}).get("also", ()))
    own = {id(parameter) for module in also.values() for parameter in module.parameters()}
    whole = dict(base().named_parameters(remove_duplicate=False))
    for name, parameter in network.named_parameters():
        plain = plain_name(name)
        if id(parameter) in own or plain not in whole:
            parameter.data = parameter.data.float()
            continue
        rows = whole[plain].data.to(parameter.device)
        if rows.shape != parameter.shape:
            # The vocabulary grew: what it was before comes from the files.
            grown = parameter.data.float()
            grown[: len(rows)] = rows
            rows = grown
        parameter.data = rows
    for layer in network.modules():
        if isinstance(layer, PissaLinear):
            layer.subtract()
    network.config.dtype = torch.float32
    loaded.spec = spec.model_copy(update={"precision": "float32"})
    return True


def separate(network: Any) -> None:
    """Give each adapted layer a weight of its own where another layer shares it and is not adapted in the same way."""
    adapted = {
        name: layer
        for name, layer in network.named_modules(remove_duplicate=False)
        if isinstance(layer, LoraLinear | LoraEmbedding | TokenRows)
    }
    for layer in {id(one): one for one in adapted.values()}.values():
        others = [name.removesuffix(".base") for name in sharers(network, layer.weight)]
        own = {name for name in others if adapted.get(name) is layer or _same_rows(adapted.get(name), layer)}
        if set(others) - own:
            layer.base.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
            network.config.tie_word_embeddings = False


def _same_rows(one: object, other: object) -> bool:
    return isinstance(one, TokenRows) and isinstance(other, TokenRows) and one.rows is other.rows


def read_base(loaded: LoadedModel) -> Any:
    """The base of an adapter from its files, in fp32, checked to be the one it was made for."""
    from luthier.core.events import Events
    from luthier.models.facts import fingerprint
    from luthier.models.load import load_network
    from luthier.models.origin import read_config
    from luthier.models.sources import knock, resolve_source

    spec = loaded.spec
    source = spec.base or spec.source
    advice = "the adapter can only be merged into what it was made for; bring it back, or load the model in float32"
    try:
        place = resolve_source(source)
        hub = knock(place) if isinstance(place, str) else {}
        config = read_config(place, hub)
        network = load_network(place, config, spec.task, hub, dtype="float32", from_scratch=False, events=Events())
    except ModelError as err:
        raise ModelError(f"{spec.source}: its base cannot be read again in full precision: {err}; {advice}") from None
    found = fingerprint(network)
    if spec.base_fingerprint not in (None, found):
        raise ModelError(
            f"{spec.source}: its base {source} now holds another model (fingerprint {found} instead of "
            f"{spec.base_fingerprint}); {advice}"
        )
    return network.to(loaded.device)
