"""A model whose weights only the first process reads: the others build its shape, and get their parts from it.

The others hold at most their part of the weights, what lies outside the layers (embeddings, the head) and one layer,
where each would otherwise read the whole model to keep a part of it.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from luthier.core.errors import ModelError
from luthier.models.adapters.part import Adapter
from luthier.models.fuse import fuse_as, fused_parts
from luthier.models.heads import Pooled
from luthier.models.output import Head, OwnHead, head_of
from luthier.models.packed import packs, shares
from luthier.models.spec import LoadedModel
from luthier.training.world import World

# Adapters that can be built around a shape; others (PiSSA, PEFT's) look at the weights.
SHAPED = ("full", "freeze", "lora", "dora")


def can_be_hollow(adapter: Adapter, form: str) -> bool:
    """Whether a model can be built without weights under this adapter, its base held in `form`."""
    return adapter.kind in SHAPED and form == "none" and not getattr(adapter, "tokens", ())


def describe(model: LoadedModel) -> str:
    """What trials on the weights said of `model`: told to those that have none to try."""
    shared, head = shares(model), None
    if not isinstance(model.module, Pooled):
        made = head_of(model)
        head = {"scale": made.scale, "softcap": made.softcap} if isinstance(made, Head) else {}
    told = {"precision": model.spec.precision, "packs": packs(model), "shares": shared, "head": head}
    return json.dumps({**told, "parts": fused_parts(model), "shape": _shape(model)})


def believe(model: LoadedModel, told: str) -> None:
    """Make a hollow model like the described one, whose precision it has. Raises ModelError where its shape differs."""
    facts = json.loads(told)
    if _shape(model) != facts["shape"]:
        raise ModelError(
            f"{model.spec.source}: built from its config alone, this model has other weights than its files hold, so they "
            "cannot be shared out while it is loaded; use sharding: none"
        )
    model.packs, model.shares = facts["packs"], facts["shares"]
    fuse_as(model, facts["parts"])
    if facts["head"] is not None:
        layer: Any = model.module.get_output_embeddings()  # type: ignore[operator]
        found = Head(layer.weight, layer.bias, **facts["head"]) if facts["head"] else OwnHead(model.module)
        model.head = (layer, found)


def fill(module: nn.Module, world: World, device: torch.device, *, given: bool) -> None:
    """Put the leader's weights into `module` in every process, but for those that are shared out; all do so together.

    `given`: this process holds them, and only passes them on.
    """
    told = world.spread([one.detach() for one in _whole(module)] if given else None)
    if given:
        return
    new: dict[int, Parameter] = {}
    for one, value in zip(_whole(module), told, strict=True):
        new[id(one)] = Parameter(value.to(device), requires_grad=one.requires_grad)
        vars(new[id(one)]).update(vars(one))
    for inner in module.modules():
        for name, held in inner._parameters.items():
            if held is not None and id(held) in new:
                inner._parameters[name] = new[id(held)]


def fill_buffers(module: nn.Module, world: World, device: torch.device, *, given: bool) -> None:
    """The same for all that is no weight: the frequencies of positions, and the like."""
    told = world.spread({key: held[name] for key, held, name in _buffers(module)} if given else None)
    for key, held, name in _buffers(module) if not given else ():
        if key in told:  # what the leader has more of was made while it was tried
            held[name] = told[key].to(device)
        elif held[name].is_meta:
            raise ModelError(f"{key}: the first process holds no such tensor to share; use sharding: none")


def _whole(module: nn.Module) -> list[Parameter]:
    return [one for one in module.parameters() if not hasattr(one, "full_tensor")]


def _buffers(module: nn.Module) -> list[tuple[str, Any, str]]:
    """(its name in all, what holds it, its name there) of every tensor that is no parameter."""
    return [
        (f"{path}.{name}", held, name)
        for path, inner in module.named_modules()
        for held in (inner._buffers, vars(inner))
        for name, value in held.items()
        if isinstance(value, Tensor)
    ]


def _shape(model: LoadedModel) -> list[list[Any]]:
    named = model.module.named_parameters()
    return [[name, list(one.shape), str(one.dtype), one.requires_grad] for name, one in named]
