"""Weights as 4-bit NormalFloat with doubly quantised scales (QLoRA: Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# Values that share a scale, and scales that share one of their own.
BLOCK, SCALE_BLOCK = 64, 256
# Blocks unpacked at once: what lies between then stays in the cache of a processor.
AT_ONCE = 4096
# Quantiles of the normal distribution scaled to -1 .. 1, with eight on the right of zero and seven on its left, as printed
# in appendix E: computed anew they differ in the last digits, and so would codes that lie between two levels.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class NF4(NamedTuple):
    """A weight, flat in blocks of 64: each value the nearest of 16 levels times its block's largest magnitude.

    The magnitudes are kept in 8 bits: their distance from their mean, by blocks of 256, in dynamic 8-bit numbers
    (Dettmers et al. 2021, arXiv:2110.02861). In all 4.13 bits a value.
    """

    codes: Tensor
    """[values / 2], uint8: two levels in a byte, the first in the upper half."""
    scale_codes: Tensor
    """[blocks], uint8."""
    scale_scales: Tensor
    """[blocks / 256], fp32."""
    mean: Tensor
    """Of the magnitudes, fp32."""

    def rows(self, place: slice, width: int) -> NF4:
        """Some outputs of it; the first must be a multiple of `together(width)`."""
        start, stop = place.start * width, place.stop * width
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        scales = self.scale_scales[start // (BLOCK * SCALE_BLOCK) : -(-stop // (BLOCK * SCALE_BLOCK))]
        return NF4(self.codes[start // 2 : blocks.stop * BLOCK // 2], self.scale_codes[blocks], scales, self.mean)

    @staticmethod
    def together(width: int) -> int:
        """Outputs that can only be taken together: so many that they end where a scale of scales does."""
        return BLOCK * SCALE_BLOCK // math.gcd(width, BLOCK * SCALE_BLOCK)

    def unpack(self, out: Tensor) -> None:
        """Write the weight to `out` [out * in], a piece at a time: the products in fp32, rounded once."""
        device = self.codes.device
        away_B = _dynamic(device)[self.scale_codes.int()]
        away_B *= self.scale_scales.repeat_interleave(SCALE_BLOCK)[: len(away_B)]
        scale_B1, pairs = (away_B + self.mean)[:, None], _pairs(device)
        for start in range(0, len(scale_B1), AT_ONCE):
            place = slice(start, start + AT_ONCE)
            codes = self.codes[start * BLOCK // 2 : (start + AT_ONCE) * BLOCK // 2]
            levels_BK = torch.nn.functional.embedding(codes.int(), pairs).view(-1, BLOCK)
            part = out[start * BLOCK : (start + AT_ONCE) * BLOCK]
            if len(part) == levels_BK.numel():
                torch.mul(levels_BK, scale_B1[place], out=part.view(-1, BLOCK))
            else:  # the end of the last block is padding
                part.copy_((levels_BK * scale_B1[place]).view(-1)[: len(part)])


def pack(weight_OI: Tensor) -> NF4:
    """The nearest NF4 of a weight."""
    flat, levels = weight_OI.flatten(), torch.tensor(LEVELS, device=weight_OI.device)
    values_BK = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale_B = values_BK.abs().amax(1).float()
    codes = torch.empty(values_BK.numel() // 2, dtype=torch.uint8, device=flat.device)
    pieces = zip(
        torch.split(codes, AT_ONCE * BLOCK // 2), torch.split(values_BK, AT_ONCE), torch.split(scale_B, AT_ONCE)
    )
    for part, values, scale in pieces:
        share = values.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        nearest = _nearest(share.flatten(), levels).view(-1, 2)
        torch.add(nearest[:, 0] * 16, nearest[:, 1], out=part)
    mean = scale_B.mean()
    away_B = scale_B - mean
    padded = torch.nn.functional.pad(away_B, (0, -len(away_B) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    largest = padded.abs().amax(1)
    parts = (padded / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).flatten()[: len(away_B)]
    return NF4(codes, _nearest(parts, _dynamic(flat.device)), largest, mean)


@lru_cache(maxsize=1)
def dynamic_levels() -> Tensor:
    """[256] from -0.993 to 1: for each power of ten from 1e-6 to 1, twice as many even steps as for the one below."""
    positive = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6))
    one_side = torch.cat(positive)
    return torch.cat([-one_side, one_side, torch.tensor([0.0, 1.0])]).sort().values


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    """The place of the nearest of sorted `levels` for each value, as uint8."""
    between = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(values, between, out_int32=True).to(torch.uint8)


@lru_cache(maxsize=8)
def _pairs(device: torch.device) -> Tensor:
    """[256, 2]: the two levels of each byte."""
    levels, byte = torch.tensor(LEVELS), torch.arange(256)
    return torch.stack([levels[byte // 16], levels[byte % 16]], 1).to(device)


@lru_cache(maxsize=8)
def _dynamic(device: torch.device) -> Tensor:
    return dynamic_levels().to(device)
