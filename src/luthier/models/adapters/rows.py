"""Adapters of several texts in one pass through a model's own modules: to each row of what a linear layer gives is added what
the adapter of its text adds, and nothing to the others (S-LoRA: Sheng et al. 2023, arXiv:2311.03285)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from luthier.models.adapters.additions import Addition

# Rows that are multiplied at once: products of one size round alike, so a row gets the same bits beside any others.
AT_ONCE = 32


class Pair(NamedTuple):
    """What a layer's rows are multiplied by: A.T [in, rank], and B.T [rank, out] with the scale in it."""

    a_IR: Tensor
    b_RO: Tensor


def pairs_of(layers: Mapping[str, Addition], device: torch.device) -> dict[str, Pair]:
    """An adapter as it is multiplied with, by the layer's name."""
    return {
        name: Pair(one.a_RI.T.contiguous().to(device), (one.b_OR * one.scale).T.contiguous().to(device))
        for name, one in layers.items()
    }


@contextmanager
def adding(
    network: nn.Module, parts: Sequence[tuple[Mapping[str, Pair], Tensor]], count: int
) -> Iterator[dict[str, int]]:
    """Inside, of the `count` rows that go through the network at once, each of `parts` gets what its adapter adds to its rows.

    What it yields counts how often each layer was asked. Raises ValueError where a layer is given other rows than these.
    """
    by_layer: dict[str, list[tuple[Pair, Tensor]]] = {}
    for pairs, rows_K in parts:
        for name, pair in pairs.items():
            by_layer.setdefault(name, []).append((pair, rows_K))
    asked = dict.fromkeys(by_layer, 0)
    handles = []
    try:
        for name, own in by_layer.items():
            handles.append(network.get_submodule(name).register_forward_hook(_hook(name, own, count, asked)))
        yield asked
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def adding_to_all(network: nn.Module, pairs: Mapping[str, Pair]) -> Iterator[None]:
    """Inside, every row that goes through the network gets what this adapter adds."""

    def hook(pair: Pair) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
            x_NI, out_NO = given[0].flatten(0, -2), out.flatten(0, -2)
            return (out_NO + multiply(x_NI.to(pair.a_IR.dtype), pair)).to(out.dtype).view(out.shape)

        return add

    handles = [network.get_submodule(name).register_forward_hook(hook(pair)) for name, pair in pairs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    name: str, parts: Sequence[tuple[Pair, Tensor]], count: int, asked: dict[str, int]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x_NI, out_NO = given[0].flatten(0, -2), out.flatten(0, -2)
        if len(x_NI) != count:
            raise ValueError(f"{name} reads {len(x_NI)} rows where {count} go through the model")
        asked[name] += 1
        for pair, rows_K in parts:
            own_KO = out_NO[rows_K]
            added_KO = multiply(x_NI[rows_K].to(pair.a_IR.dtype), pair)
            out_NO[rows_K] = (own_KO + added_KO).to(out.dtype)
        return out_NO.view(out.shape)

    return add


def multiply(x_KI: Tensor, pair: Pair) -> Tensor:
    """[K, out]: x A.T B.T, the same bits for a row whatever the others are."""
    short = -len(x_KI) % AT_ONCE
    x_KI = torch.cat([x_KI, x_KI[:1].expand(short, -1)])
    made = [part @ pair.a_IR @ pair.b_RO for part in torch.split(x_KI, AT_ONCE)]
    return torch.cat(made)[: len(x_KI) - short]
