"""Weights in bf16 to tiles of bytes: the bits that going through fp32 gives."""

import ctypes

import pytest
import torch

from luthier.native.forms import filled, to_int8
from luthier.native.library import LANE, Pages, why_no_decoder
from luthier.native.packed import pack_rounded, pack_tiles

pytestmark = pytest.mark.skipif(why_no_decoder() is not None, reason=str(why_no_decoder()))


def weights():
    noise = torch.Generator().manual_seed(0)
    plain = torch.randn(80, 192, generator=noise)
    scattered = plain * torch.randn(80, 1, generator=noise).exp2().pow(8)
    halves = torch.arange(-127, 128).repeat(16, 1) / 2 + 0.25
    small = plain * 1e-20
    strange = plain.clone()
    strange[3, 5], strange[17, 0], strange[33, 191] = torch.nan, torch.inf, -torch.inf
    some = {"plain": plain, "scattered": scattered, "ties": halves, "small": small, "nothing": plain * 0}
    return {**some, "strange": strange, "odd rows": plain[:21], "odd columns": plain[:32, :70]}


def bytes_at(pages, size):
    return ctypes.string_at(pages.at, size)


@pytest.mark.parametrize("name", weights())
def test_rows_are_rounded_and_laid_out_to_the_last_bit(name):
    weight_NK = weights()[name].bfloat16()
    whole_NK = filled(weight_NK, "int8")
    (n, k), size = whole_NK.shape, whole_NK.numel()
    one, other = Pages(size), Pages(size)
    expected, scale = pack_tiles(whole_NK, "int8", one.at), pack_rounded(weight_NK, other.at, k)
    assert n % LANE == 0 and torch.equal(to_int8(whole_NK)[1].nan_to_num(7), expected.nan_to_num(7))
    assert torch.equal(scale.nan_to_num(7), expected.nan_to_num(7))
    assert bytes_at(one, size) == bytes_at(other, size)


def test_rows_of_a_wider_matrix_are_found():
    wide = torch.randn(32, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    part_NK = wide[:, 100:228]
    one, other = Pages(32 * 128), Pages(32 * 128)
    expected, scale = pack_tiles(part_NK.contiguous(), "int8", one.at), pack_rounded(part_NK, other.at, 128)
    assert torch.equal(scale, expected) and bytes_at(one, 32 * 128) == bytes_at(other, 32 * 128)
