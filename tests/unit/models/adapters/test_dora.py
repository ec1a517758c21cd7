"""DoRA: the layer against its formula, its norm, its gradient, its precision."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.core.errors import ConfigError
from luthier.models.adapters import ADAPTERS
from luthier.models.adapters.magnitude import DoraLinear
from tiny import tiny_loaded


def naive(layer, x):
    """The formula as it stands, the norm a constant."""
    weight = layer.matrix + layer.scale * layer.lora_b @ layer.lora_a
    norm = weight.detach().norm(dim=1)
    return x @ (weight * (layer.lora_magnitude / norm)[:, None]).T + (0 if layer.bias is None else layer.bias)


@pytest.mark.parametrize("base", [nn.Linear(6, 10), nn.Linear(6, 10, bias=False), Conv1D(10, 6)])
@pytest.mark.parametrize("rslora", [False, True])
def test_layer_is_the_formula(base, rslora):
    layer = DoraLinear(base, 4, 6.0, rslora=rslora)
    x = torch.randn(2, 3, 6, requires_grad=True)
    assert torch.allclose(layer(x), base(x), atol=1e-6)
    layer.lora_b.data.normal_()
    layer.lora_magnitude.data.mul_(torch.rand(10) + 0.5)
    y, twin = layer(x), naive(layer, x)
    assert torch.allclose(y, twin, atol=1e-5)
    inputs = (x, layer.lora_a, layer.lora_b, layer.lora_magnitude)
    ours = torch.autograd.grad((y**3).sum(), inputs)
    theirs = torch.autograd.grad((twin**3).sum(), inputs)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(ours, theirs, strict=True))
    assert torch.allclose(layer.merged()(x), y, atol=1e-5)


def test_norm_by_hand():
    base = nn.Linear(2, 2, bias=False)
    base.weight.data = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    layer = DoraLinear(base, 1, 2.0)
    assert layer.norm().tolist() == [5.0, 2.0] == layer.lora_magnitude.tolist()
    layer.lora_a.data = torch.tensor([[1.0, 0.0]])
    layer.lora_b.data = torch.tensor([[1.0], [-0.75]])
    # 2 B A adds [2, 0] to the first row and [-1.5, 0] to the second: lengths of (5, 4) and (-1.5, 2).
    assert layer.norm().tolist() == pytest.approx([41**0.5, 2.5])


def test_the_norm_follows_every_change():
    for training in (True, False):
        layer = DoraLinear(nn.Linear(6, 10), 4, 6.0).train(training)
        layer.norm()
        with torch.no_grad():
            layer.lora_b.add_(1.0)
        whole = layer.matrix + layer.scale * layer.lora_b @ layer.lora_a
        assert torch.allclose(layer.norm(), whole.norm(dim=1), atol=1e-5)
        layer.base.weight.data = layer.base.weight.data * 2
        whole = layer.matrix + layer.scale * layer.lora_b @ layer.lora_a
        assert torch.allclose(layer.norm(), whole.norm(dim=1), atol=1e-5)


def test_dropout_is_before_the_small_matrices_alone():
    layer = DoraLinear(nn.Linear(6, 10), 4, 6.0, dropout=0.5)
    x = torch.randn(5, 6)
    assert torch.allclose(layer.train()(x), layer.base(x), atol=1e-6)  # B is zero: nothing to drop
    layer.lora_b.data.normal_()
    assert not torch.allclose(layer(x), layer.eval()(x), atol=1e-3)


def test_small_magnitudes_are_felt_in_bf16():
    base = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    layer = DoraLinear(base, 4, 8)
    assert layer.lora_magnitude.dtype == torch.float32
    x = torch.randn(512, 64, dtype=torch.bfloat16)
    before = layer(x).detach().float()
    layer.lora_magnitude.data.mul_(1.006)  # which bf16 would round to 1.0078
    after = layer(x).detach()
    assert after.dtype == torch.bfloat16
    assert float(after.float().abs().sum() / before.abs().sum()) == pytest.approx(1.006, abs=1e-3)


def test_not_for_embeddings():
    with pytest.raises(ConfigError, match="no linear layer is called 'embed_tokens'"):
        ADAPTERS.parse({"kind": "dora", "targets": ["embed_tokens"]}).apply(tiny_loaded("llama"))


def test_for_the_output_layer():
    loaded = tiny_loaded("llama")
    ADAPTERS.parse({"kind": "dora", "targets": ["lm_head"]}).apply(loaded)
    assert isinstance(loaded.network.lm_head, DoraLinear)


def test_weights_that_lie_where_earlier_ones_lay_are_not_taken_for_them():
    layer = DoraLinear(nn.Linear(4, 3), 2, 2.0).eval()
    nn.init.normal_(layer.lora_b)
    place, first = layer.lora_b.data, layer.norm().clone()
    # As when weights are gathered anew: another tensor, the same memory, a version that begins again.
    moved = place.clone().mul_(3)
    with torch.no_grad():
        place.set_(place.untyped_storage(), 0, place.shape, place.stride())
        torch.from_numpy(place.numpy()).copy_(moved)
    layer.lora_b = nn.Parameter(place)
    assert layer.lora_b.data_ptr() == place.data_ptr()
    assert not torch.allclose(layer.norm(), first)
