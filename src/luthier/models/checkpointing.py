"""Activation checkpointing: of a layer only the input is kept, all else is computed again on the way back.

Chen et al. 2016 (arXiv:1604.06174), by torch's checkpoint. In place of transformers' own switch, which computes again
outside `packed_attention`, where texts laid end to end see one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from luthier.core.errors import ConfigError, ModelError
from luthier.models.layers import layers_of
from luthier.models.spec import LoadedModel

Checkpointing: TypeAlias = Literal["none", "layers", "offload"]
"""What of a layer is kept for the backward pass: all, its input, or its input in the memory of the host."""


def checkpoint_layers(model: LoadedModel, how: Checkpointing) -> int:
    """Keep only so much of each layer from now on while it learns, in place; returns of how many layers.

    Raises ModelError for a model without a list of layers, and ConfigError for "offload" on the host itself.
    """
    for layer in model.network.modules():
        if "own_forward" in vars(layer):
            layer.forward = vars(layer).pop("own_forward")
    if how == "none":
        return 0
    if how == "offload" and model.device.type == "cpu":
        raise ConfigError("checkpointing: offload moves what a GPU keeps to the host; on the CPU use layers")
    found = list(layers_of(model.network))
    if not found:
        raise ModelError(f"{model.spec.family}: no list of layers was found to compute again; use checkpointing: none")
    for layer in found:
        vars(layer).update(own_forward=layer.forward, offloads=how == "offload")
        layer.forward = MethodType(_forward, layer)
    return len(found)


def _forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
    if not (torch.is_grad_enabled() and layer.training):
        return layer.own_forward(*args, **kwargs)
    if args:
        states, args = args[0], args[1:]
    else:
        states = kwargs.pop("hidden_states")
    # What is computed again reads this, and not the argument, which is let go when there is a copy on the host.
    held: list[Callable[[], Tensor]] = [partial(_itself, states)]

    def run(_: Tensor) -> Any:
        return layer.own_forward(held[0](), *args, **kwargs)

    # torch puts back the random numbers of the devices of the tensors that it is handed: without one of the states'
    # device, what is computed again on a GPU would drop other values than what was computed first.
    where = torch.empty(0, device="cpu" if states.is_meta else states.device)
    out = checkpoint(run, where, use_reentrant=False, context_fn=_same_attention(layer))
    if layer.offloads:
        held[0] = _offload(states)
    return out


def _itself(states: Tensor) -> Tensor:
    return states


def _same_attention(
    layer: nn.Module,
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Compute again with the attention that was set when the layer was computed first."""
    held = (getattr(one, "config", None) for one in layer.modules())
    configs = {id(one): one for one in held if isinstance(one, PreTrainedConfig)}
    chosen = [(one, one._attn_implementation) for one in configs.values()]

    @contextmanager
    def again() -> Iterator[None]:
        before = [(one, one._attn_implementation) for one, _ in chosen]
        for one, name in chosen:
            one._attn_implementation = name
        try:
            yield
        finally:
            for one, name in before:
                one._attn_implementation = name

    return lambda: (nullcontext(), again())


def _offload(states: Tensor) -> Callable[[], Tensor]:
    """Copy to the host; what comes back is a copy on the device again."""
    device, learns = states.device, states.requires_grad
    if states.is_meta:  # a rehearsal: there is nothing to copy
        shape, dtype = states.shape, states.dtype
        return lambda: torch.empty(shape, dtype=dtype, device=device).requires_grad_(learns)
    host = torch.empty(states.shape, dtype=states.dtype, pin_memory=states.is_cuda)
    host.copy_(states.detach(), non_blocking=True)
    return lambda: host.to(device, non_blocking=True, copy=True).requires_grad_(learns)
