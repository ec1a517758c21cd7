"""Weights as int8, one scale for each output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

VALUES_AT_ONCE = 2**18


class Int8(NamedTuple):
    """A weight [out, in] as whole numbers from -127 to 127, each row times its own scale."""

    codes: Tensor
    """[out, in], int8."""
    scales: Tensor
    """[out, 1], fp32: a row's largest magnitude / 127."""

    def rows(self, place: slice, width: int) -> Int8:
        """Some outputs of it."""
        return Int8(self.codes[place], self.scales[place])

    @staticmethod
    def together(width: int) -> int:
        """Outputs that can only be taken together."""
        return 1

    def unpack(self, out: Tensor) -> None:
        """Write the weight to `out` [out * in], some rows at a time: the products in fp32, rounded once."""
        rows = rows_at_once(self.codes.shape[1])
        parts = torch.split(out.view(self.codes.shape), rows)
        for part, codes, scales in zip(parts, torch.split(self.codes, rows), torch.split(self.scales, rows)):
            torch.mul(codes, scales, out=part)


def pack(weight_OI: Tensor) -> Int8:
    """The nearest of 255 even levels between plus and minus the largest magnitude of a row (symmetric, round to nearest).

    No value moves by more than half a scale. A row of zeros stays one.
    """
    scales = weight_OI.abs().amax(1, keepdim=True).float() / 127
    found = Int8(torch.empty_like(weight_OI, dtype=torch.int8), scales)
    rows = rows_at_once(weight_OI.shape[1])
    parts = torch.split(weight_OI, rows)
    for codes, part, scale in zip(torch.split(found.codes, rows), parts, torch.split(scales, rows)):
        codes.copy_((part.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_())
    return found


def rows_at_once(width: int) -> int:
    """Rows whose values stay in the cache of a processor while they are unpacked."""
    return max(1, VALUES_AT_ONCE // width)
