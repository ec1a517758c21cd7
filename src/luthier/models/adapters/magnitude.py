"""Linear layers whose weight learns its direction by low-rank matrices and its magnitude by itself."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from luthier.models.adapters.inject import LoraLinear, widened
from luthier.models.quantised.linear import AnyLinear, QuantisedLinear

State: TypeAlias = tuple[object, ...]
"""What changes whenever a weight does."""


class DoraLinear(LoraLinear):
    """y = m (W + scale B A) x / ||W + scale B A|| + bias, with the norm and m [out] by output, m from ||W||.

    DoRA: Liu et al. 2024, arXiv:2402.09353. The norm is a constant in the backward pass (section 4.3). The merged weight
    is never made: the products are those of LoRA, and the norm comes from W A.T and A A.T. Of a quantised base W is what is
    rebuilt from it, for the norm some outputs at a time; m starts as its norm. Dropout acts before A alone;
    PEFT drops from the part of W too that the magnitude adds.
    """

    def __init__(self, base: AnyLinear, rank: int, alpha: float, *, dropout: float = 0.0, rslora: bool = False):
        super().__init__(base, rank, alpha, dropout=dropout, rslora=rslora)
        self._squares: tuple[State, Tensor] | None = None
        self._norm: tuple[State, weakref.ref[nn.Parameter], Tensor] | None = None
        self.lora_magnitude = nn.Parameter(self.norm().clone())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the base's precision."""
        turned = self.product(x, None)
        # As a distance from one: rounded itself, a gain of 1.001 would be lost in bf16.
        gain = (self.lora_magnitude / self.norm() - 1).to(x.dtype)
        start = turned if self.bias is None else turned + self.bias
        return torch.addcmul(start, turned, gain)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """||W + scale B A|| of each output [out], in fp32."""
        a_RI, b_OR = self.lora_a, self.lora_b
        key = (a_RI.data_ptr(), a_RI._version, b_OR.data_ptr(), b_OR._version, self._base_state(), self.training)
        # While it answers, the weights stand still; while it learns, each step moves them. Others at the same place are
        # not the same: weights that are gathered for a while lie where earlier ones lay.
        if self._norm is not None and not self.training and self._norm[0] == key and self._norm[1]() is b_OR:
            return self._norm[2]
        squares_O = self._base_squares()
        cross_O = torch.cat([((rows_BI @ a_RI.T) * b_OR[place]).sum(1) for place, rows_BI in self._blocks()])
        own_O = ((b_OR @ (a_RI @ a_RI.T)) * b_OR).sum(1)
        total_O = squares_O + 2 * self.scale * cross_O + self.scale**2 * own_O
        norm_O = total_O.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        self._norm = (key, weakref.ref(b_OR), norm_O)
        return norm_O

    def _base_squares(self) -> Tensor:
        """||W||^2 of each output, made once for each state of W."""
        key = self._base_state()
        if self._squares is None or self._squares[0] != key:
            squares_O = torch.cat([rows_BI.square().sum(1).float() for _, rows_BI in self._blocks()])
            self._squares = (key, squares_O)
        return self._squares[1]

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """W in fp32, by outputs."""
        if isinstance(self.base, QuantisedLinear):
            yield from self.base.blocks()
        else:
            yield slice(None), widened(self.matrix)

    def _base_state(self) -> State:
        """What changes whenever W does."""
        if isinstance(self.base, QuantisedLinear):
            return self.base.version
        return self.weight.data_ptr(), self.weight._version, self.weight.dtype

    @torch.no_grad()
    def whole(self) -> Tensor:
        """The weight that the layer as it stands amounts to, [out, in], in fp32 at least."""
        return super().whole() * (self.lora_magnitude / self.norm())[:, None]
