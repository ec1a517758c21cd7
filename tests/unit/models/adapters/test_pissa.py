"""PiSSA: the decomposition, the base that keeps the rest, and what comes back from files."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.core.errors import ConfigError
from luthier.models.adapters import ADAPTERS
from luthier.models.adapters.inject import lora_layers
from luthier.models.adapters.principal import EXACT, PissaLinear, principal
from luthier.models.load import load_model
from luthier.models.precision import cast_weights
from luthier.models.save import save_model
from tiny import tiny_loaded

PISSA = {"kind": "pissa", "rank": 4, "alpha": 8}


def test_fast_decomposition_is_the_exact_one():
    # Singular values that fall slowly, as those of trained weights do.
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(600, 300, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(300, 300, generator=generator))[0]
    values = torch.arange(1, 301, dtype=torch.float32) ** -0.5
    weight = (left * values) @ right.T
    assert max(weight.shape) > EXACT
    state = torch.get_rng_state()
    a, b = principal(weight, 16)
    assert torch.equal(torch.get_rng_state(), state)  # no draw of the run is used
    exact = (left[:, :16] * values[:16]) @ right[:, :16].T
    assert float((b @ a - exact).norm() / exact.norm()) < 1e-3
    assert all(torch.equal(one, two) for one, two in zip((a, b), principal(weight, 16)))


def test_decomposition_by_hand():
    a, b = principal(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 1)
    assert torch.allclose((b @ a), torch.tensor([[0.0, 0.0], [0.0, 4.0]]), atol=1e-6)
    assert float(a.norm()) == pytest.approx(2.0) == float(b.norm())


@pytest.mark.parametrize("base", [nn.Linear(6, 10), Conv1D(10, 6)])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_base_keeps_the_rest(base, rslora):
    x = torch.randn(2, 3, 6)
    before, weight = base(x), base.weight.detach().clone()
    layer = PissaLinear(base, 4, 6.0, rslora=rslora)
    assert torch.allclose(layer(x), before, atol=1e-5)
    assert torch.linalg.matrix_rank(layer.matrix, atol=1e-5) == 2
    learned = torch.randn(4, 6)
    layer.lora_a.data.add_(learned)
    expected = weight + (layer.scale * layer.lora_start_b @ learned).T if isinstance(base, Conv1D) else None
    y = layer(x)
    merged = layer.merged()
    assert torch.allclose(merged(x), y, atol=1e-5)
    if expected is not None:
        assert torch.allclose(merged.weight, expected, atol=1e-5)


def tuned(precision="float32"):
    loaded = tiny_loaded("llama")
    ADAPTERS.parse(PISSA).apply(loaded)
    cast_weights(loaded, precision)
    with torch.no_grad():
        for _, layer in lora_layers(loaded.network):
            layer.lora_b.add_(0.1 * torch.randn_like(layer.lora_b))
    return loaded


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_rest_comes_back_exactly(precision, tmp_path):
    """A rounded base is rounded after the principal part was taken from it in fp32, when it is loaded too."""
    loaded = tuned(precision)
    save_model(loaded, tmp_path / "model")
    again = load_model(str(tmp_path / "model"))
    assert again.network.dtype == getattr(torch, precision)
    mine, theirs = loaded.network.state_dict(), again.network.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    ADAPTERS.parse(PISSA).apply(again)  # and learns on
    assert torch.equal(next(lora_layers(again.network))[1].lora_a, next(lora_layers(loaded.network))[1].lora_a)


def test_a_resumed_run_starts_from_the_same_rest():
    torch.manual_seed(1)
    first = tuned().network.state_dict()
    torch.manual_seed(2)
    second = tuned().network.state_dict()
    rests = [name for name in first if name.endswith("base.weight") or "lora_start" in name]
    assert rests and all(torch.equal(first[name], second[name]) for name in rests)


def test_more_directions_than_there_are():
    with pytest.raises(ConfigError, match="is 16 x 32, and has no 20 principal directions"):
        ADAPTERS.parse({**PISSA, "rank": 20}).apply(tiny_loaded("llama"))


def test_a_shared_weight_is_left_whole():
    with pytest.raises(ConfigError, match="lm_head shares its weight with another layer"):
        ADAPTERS.parse({**PISSA, "targets": ["lm_head"]}).apply(tiny_loaded("qwen2"))


def test_another_kind_on_top_is_refused(tmp_path):
    save_model(tuned(), tmp_path / "model")
    with pytest.raises(ConfigError, match="already holds a PiSSA adapter of rank 4, alpha 8"):
        ADAPTERS.parse({**PISSA, "kind": "lora"}).apply(load_model(str(tmp_path / "model")))
