"""Layers computed again give the gradients of layers that are kept."""

import pytest
import torch

from luthier.core.errors import ConfigError
from luthier.models import checkpointing
from luthier.models.adapters import ADAPTERS
from luthier.models.checkpointing import checkpoint_layers
from luthier.models.fuse import fuse
from luthier.models.layers import layers_of
from luthier.models.load import load_model
from luthier.models.packed import hidden_states, packs
from tiny import ALL_FAMILIES, kind_of, tiny_loaded, tiny_model


def gradients(model):
    model.module.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # dropout
    states = hidden_states(model, torch.arange(60) % 300 + 5, [20, 7, 33])
    (states.float() * torch.linspace(-1, 1, states.shape[1])).sum().backward()
    return {name: one.grad.clone() for name, one in model.module.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("adapter", ["full", {"kind": "lora", "rank": 4, "dropout": 0.1}])
def test_every_family(family, adapter):
    model = tiny_loaded(family)
    ADAPTERS.parse(adapter).apply(model)
    if packs(model):
        fuse(model)
    model.module.train()
    whole = gradients(model)
    calls = count_calls(model)
    assert checkpoint_layers(model, "layers") == (4 if kind_of(family) == "encoder-decoder" else 2)
    again = gradients(model)
    assert calls["forward"] == 2
    # On the way to another device and back, as on a GPU.
    for layer in model.network.modules():
        if "own_forward" in vars(layer):
            layer.offloads = True
    moved = gradients(model)
    checkpoint_layers(model, "none")
    after = gradients(model)
    for found in (again, moved, after):
        assert found.keys() == whole.keys() and whole
        assert all(torch.equal(found[name], one) for name, one in whole.items())
    assert not any("own_forward" in vars(layer) for layer in model.network.modules())


def count_calls(model):
    """How often the first norm of the first layer runs."""
    part = next(one for one in next(layers_of(model.network)).modules() if "Norm" in type(one).__name__)
    calls = {"forward": 0}
    part.register_forward_pre_hook(lambda *_: calls.update(forward=calls["forward"] + 1))
    return calls


def test_nothing_is_computed_again_where_no_gradient_is_wanted():
    model = tiny_loaded("llama")
    packs(model)
    checkpoint_layers(model, "layers")
    calls = count_calls(model)
    with torch.no_grad():
        hidden_states(model, torch.arange(30), [30])
    assert calls["forward"] == 1


def test_offload_on_the_host_is_refused():
    with pytest.raises(ConfigError, match="offload moves what a GPU keeps to the host; on the CPU use layers"):
        checkpoint_layers(tiny_loaded("llama"), "offload")


def test_the_random_numbers_of_the_states_device_are_put_back(monkeypatch):
    handed = []
    own = checkpointing.checkpoint

    def note(run, *args, **kwargs):
        handed.append([one.device for one in args])
        return own(run, *args, **kwargs)

    monkeypatch.setattr(checkpointing, "checkpoint", note)
    model = tiny_loaded("llama")
    packs(model)
    checkpoint_layers(model, "layers")
    model.module.train()
    gradients(model)
    # torch saves the state of the devices of what it is handed, and of the host's generator.
    assert handed == [[model.device]] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["layers", "offload"])
def test_dropout_is_the_same_when_computed_again_on_a_gpu(how):
    model = load_model(str(tiny_model("llama")), device="cuda")
    ADAPTERS.parse({"kind": "lora", "rank": 4, "dropout": 0.5}).apply(model)
    packs(model)
    model.module.train()

    def learn():
        model.module.zero_grad(set_to_none=True)
        torch.cuda.manual_seed(0)
        states = hidden_states(model, torch.arange(60, device="cuda") % 300 + 5, [20, 7, 33])
        (states.float() * torch.linspace(-1, 1, states.shape[1], device="cuda")).sum().backward()
        return {name: one.grad.clone() for name, one in model.module.named_parameters() if one.grad is not None}

    whole = learn()
    checkpoint_layers(model, how)
    again = learn()
    assert all(torch.allclose(again[name], one, atol=1e-6) for name, one in whole.items())
