"""Faster parts give what the model's own parts give, logits and gradients, and can be taken out again."""

import pytest
import torch

from luthier.core.events import Events
from luthier.models.adapters import ADAPTERS
from luthier.models.fuse import fuse, unfuse
from luthier.models.packed import hidden_states, packs
from luthier.native.layers import usable
from tiny import ALL_FAMILIES, tiny_loaded

IDS, LENGTHS = torch.arange(60) % 50 + 8, (8, 1, 20, 31)


def states_and_gradients(model):
    model.module.zero_grad()
    states = hidden_states(model, IDS, LENGTHS)
    (states.float() ** 3).sum().backward()
    return states.detach(), [p.grad.clone() for p in model.module.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_fused_equals_own(family, adapter):
    if not usable(torch.zeros(1)):
        pytest.skip("no library of kernels")
    torch.manual_seed(0)
    model = tiny_loaded(family)
    ADAPTERS.parse(adapter).apply(model)
    if not packs(model):
        pytest.skip("reads no packed texts")
    own_states, own_gradients = states_and_gradients(model)
    events = Events()
    count = fuse(model, events)
    # Two layers of two norms, an MLP and an attention, and the last norm; Qwen 3 has norms of q and k, Gemma a GELU.
    expected = {"llama": 9, "mistral": 9, "qwen2": 9, "qwen3": 13, "gemma": 7}
    assert count == expected.get(family, 0) and bool(events.choices) == (count > 0)
    states, gradients = states_and_gradients(model)
    torch.testing.assert_close(states, own_states, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(gradients, own_gradients):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-4)
    unfuse(model)
    assert torch.equal(states_and_gradients(model)[0], own_states)


def test_a_part_that_computes_something_else_is_left_alone():
    if not usable(torch.zeros(1)):
        pytest.skip("no library of kernels")
    model = tiny_loaded("llama")
    for layer in model.network.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    assert fuse(model) == 7
