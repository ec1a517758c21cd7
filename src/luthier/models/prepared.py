"""Linear layers over weights that are laid out once as the processor multiplies them.

In fp32 torch multiplies by MKL, which is slow on some processors, and lays a weight out anew for each product of some rows.
oneDNN takes it laid out already: a product of 1 to 64 rows then takes a half to a third of the time. What comes out is the same
but for rounding. The layout is a second copy of the weight, which lives as long as what holds it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from luthier.models.memory import free_memory, shown
from luthier.models.output import Head, head_of
from luthier.models.spec import LoadedModel

# Rows that the layout is chosen for; others take it as well.
ROWS = 32
# Of the memory that is free, the copies take no more than this share.
SHARE = 0.5
Product: TypeAlias = Callable[[Tensor], Tensor]
Multiplier: TypeAlias = nn.Linear | Literal["head"]
"""What multiplies: a layer, or the head."""


class Prepared:
    """The linear layers of a model and its head, over copies of their weights: of those that are plain, on a CPU that oneDNN
    knows, while there is memory; where it is short, that is warned of. All else is left as it is. Weights that are changed, or
    put elsewhere, are laid out again."""

    def __init__(self, model: LoadedModel):
        self._model, self._made = model, dict[Multiplier, tuple[tuple[int, ...], Product]]()
        plain = _plain(model)
        if _can(model, plain) and not _fits(model, plain):
            warnings.warn(
                f"{model.spec.source}: memory is short of a copy of the weights as the processor multiplies them "
                f"({shown(_size(model, plain))}), so it writes slower; the result is the same",
                stacklevel=2,
            )
            plain = []
        self._layers = plain if _can(model, plain) else []

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the layers multiply by the copies. For inference alone: nothing is kept for gradients."""
        for layer in self._layers:
            vars(layer)["forward"] = self._product(layer, layer.weight, layer.bias)
        try:
            yield
        finally:
            for layer in self._layers:
                vars(layer).pop("forward", None)

    def logits(self, states_NE: Tensor) -> Tensor:
        """[N, V] in fp32, of states that predict a token each."""
        head = head_of(self._model)
        if not self._layers or not isinstance(head, Head):
            return head.logits(states_NE).float()
        return head.finish(self._product("head", head.weight_VE, head.bias_V)(states_NE)).float()

    def _product(self, key: Multiplier, weight: Tensor, bias: Tensor | None) -> Product:
        state = (weight.data_ptr(), weight._version, -1 if bias is None else bias.data_ptr())
        made = self._made.get(key)
        if made is None or made[0] != state:
            made = self._made[key] = (state, _lay_out(weight.detach(), None if bias is None else bias.detach()))
        return made[1]


def _lay_out(weight: Tensor, bias: Tensor | None) -> Product:
    ops = torch.ops.mkldnn
    laid, multiply = ops._reorder_linear_weight(weight, ROWS), ops._linear_pointwise.default
    return lambda x: multiply(x, laid, bias, "none", [], "")


def copied(model: LoadedModel) -> int:
    """Bytes that the copies take, the head's too: 0 where they are of no use, or find no room."""
    plain = _plain(model)
    return _size(model, plain) if _can(model, plain) and _fits(model, plain) else 0


def _size(model: LoadedModel, layers: list[nn.Linear]) -> int:
    head = head_of(model)
    return sum(one.weight.nbytes for one in layers) + (head.weight_VE.nbytes if isinstance(head, Head) else 0)


def _plain(model: LoadedModel) -> list[nn.Linear]:
    # An output layer is called by whoever makes logits, over the rows that are asked for.
    out = model.network.get_output_embeddings()
    return [
        one
        for one in model.network.modules()
        if type(one) is nn.Linear and one is not out and "forward" not in vars(one)
    ]


def _can(model: LoadedModel, layers: list[nn.Linear]) -> bool:
    """Whether it is of use here: tried on a small layer."""
    if model.device.type != "cpu" or not layers or model.network.dtype not in (torch.float32, torch.bfloat16):
        return False
    if any(one.weight.dtype != model.network.dtype for one in layers):
        return False
    weight, x = torch.randn(16, 8, dtype=model.network.dtype), torch.randn(3, 8, dtype=model.network.dtype)
    try:
        apart = (_lay_out(weight, None)(x) - nn.functional.linear(x, weight)).abs().max()
    except (AttributeError, RuntimeError):
        # This torch has no oneDNN, or calls it in another way.
        return False
    return float(apart) <= 0.1


def _fits(model: LoadedModel, layers: list[nn.Linear]) -> bool:
    free = free_memory(model.device)
    return free is None or _size(model, layers) <= SHARE * free
