"""int8 and NF4: against numbers worked by hand, the definitions, and bitsandbytes where it is installed."""

import pytest
import torch
from scipy.stats import norm

from luthier.models.quantised import int8, nf4


def unpacked(packed, shape, dtype=torch.float32):
    flat = torch.empty(shape[0] * shape[1], dtype=dtype)
    packed.unpack(flat)
    return flat.view(shape)


def test_int8_by_hand():
    weight = torch.tensor([[2.54, -1.27, 0.011], [0.0, 0.0, 0.0], [0.5, -63.5, 0.8]])
    packed = int8.pack(weight)
    # Scales 2.54 / 127 = 0.02, 0 and 63.5 / 127 = 0.5; 1.27 / 0.02 = 63.5 goes to the even 64.
    assert packed.codes.tolist() == [[127, -64, 1], [0, 0, 0], [1, -127, 2]]
    assert torch.allclose(packed.scales[:, 0], torch.tensor([0.02, 0.0, 0.5]))
    expected = torch.tensor([[2.54, -1.28, 0.02], [0.0, 0.0, 0.0], [0.5, -63.5, 1.0]])
    assert torch.allclose(unpacked(packed, (3, 3)), expected)


def test_int8_moves_nothing_by_more_than_half_a_scale():
    weight = torch.randn(600, 700)  # more than is unpacked at once
    packed = int8.pack(weight)
    assert ((unpacked(packed, weight.shape) - weight).abs() <= packed.scales * 0.5001).all()
    assert torch.equal(unpacked(packed, weight.shape, torch.bfloat16), unpacked(packed, weight.shape).bfloat16())


def test_nf4_levels_are_quantiles():
    # Appendix E: quantiles of N(0, 1) from 1 - (1/30 + 1/32) / 2 to one half, eight steps right and seven left of zero.
    outer = 1 - (1 / 30 + 1 / 32) / 2
    right = [norm.ppf(outer + (0.5 - outer) * at / 8) for at in range(8)]
    left = [-norm.ppf(outer + (0.5 - outer) * at / 7) for at in range(7)]
    levels = sorted([*left, 0.0, *right])
    assert torch.allclose(
        torch.tensor(nf4.LEVELS), torch.tensor([one / levels[-1] for one in levels]).float(), atol=1e-6
    )


def test_nf4_by_hand():
    weight = torch.zeros(1, 128)
    weight[0, :5] = torch.tensor([-2.0, 1.0, 0.42, -0.09, 0.7])  # largest 2
    weight[0, 64:67] = torch.tensor([4.0, -4.0, 1.0])  # largest 4
    packed = nf4.pack(weight)
    # Shares -1, 0.5, 0.21, -0.045, 0.35 lie next to the levels 0, 12 (0.4407), 10 (0.2461 is nearer than 0.1609), 7 (0
    # is nearer than -0.0911) and 11; the zeros are level 7.
    assert packed.codes[:3].tolist() == [0 * 16 + 12, 10 * 16 + 7, 11 * 16 + 7]
    assert packed.codes[32:34].tolist() == [15 * 16 + 0, 10 * 16 + 7]
    # Scales 2 and 4: their mean 3, their distances -1 and 1 times the largest distance, 1; of -1 the nearest dynamic
    # number is -0.99296875, so the scale comes back as 2.00703125.
    assert (packed.mean.item(), packed.scale_scales.tolist()) == (3.0, [1.0])
    found = unpacked(packed, (1, 128))[0]
    low = 3 - 0.99296875
    expected = [-low, 0.44070983 * low, 0.24611230 * low, 0.0, 0.33791524 * low]
    assert torch.allclose(found[:5], torch.tensor(expected))
    assert torch.allclose(found[64:67], torch.tensor([4.0, -4.0, 4 * 0.24611230]))


def test_dynamic_levels():
    levels = nf4.dynamic_levels()
    assert len(levels) == len(set(levels.tolist())) == 256
    # One level of 0.55e-6 in the lowest power of ten, then two: 0.325e-5 and 0.775e-5.
    small = [one for one in levels.tolist() if 0 < one < 1e-5]
    assert small == pytest.approx([5.5e-7, 3.25e-6, 7.75e-6])
    assert levels[-1] == 1 and levels[-2] == pytest.approx(1 - 0.9 / 128)


@pytest.mark.parametrize("shape", [(3, 7), (64, 64), (150, 450), (700, 512)])
def test_nf4_of_any_shape(shape):
    weight = torch.randn(shape) * 0.02
    packed = nf4.pack(weight)
    found = unpacked(packed, shape)
    assert float((found - weight).norm() / weight.norm()) < 0.11
    assert torch.equal(unpacked(packed, shape, torch.bfloat16), found.bfloat16())


def test_nf4_beside_bitsandbytes():
    theirs = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(576, 768) * 0.02
    codes, state = theirs.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    packed = nf4.pack(weight)
    assert torch.equal(packed.codes, codes.flatten())
    # A scale that lies between two 8-bit numbers may go to either.
    assert float((packed.scale_codes != state.absmax).float().mean()) < 0.01
    found, expected = unpacked(packed, weight.shape), theirs.dequantize_4bit(codes, state)
    assert float((found - expected).abs().max()) < 0.01 * float(weight.abs().max())
