"""The layers of a network."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def layers_of(network: nn.Module) -> Iterator[nn.Module]:
    """The members of every outermost list of modules, if they hold weights: the layers, of both sides where there are two."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from (one for one in child if any(True for _ in one.parameters()))
        else:
            yield from layers_of(child)
