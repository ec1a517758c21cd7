"""Segments that continue a shared one are read as if the shared one stood before each."""

import pytest
import torch

from luthier.core.events import Events
from luthier.models import packed
from luthier.models.fuse import fuse
from luthier.models.load import load_model
from luthier.models.packed import hidden_states, packs, shares
from luthier.models.segments import SHORT
from tiny import FAMILIES, tiny_loaded, tiny_model

SEVERAL = ((9, 4, 5, 1, 12, 6, 6, 6, 3), (-1, 0, 0, 0, -1, -1, 4, 4, 5))


def states_and_gradients(read, model, lengths, parents):
    """Of a loss that looks at every state, with respect to every parameter."""
    ids_N = (torch.arange(sum(lengths)) * 11 + 5) % 300
    model.module.zero_grad()
    states_NE = read(model, ids_N, lengths, parents)
    (states_NE**3).sum().backward()
    return states_NE.detach(), {
        name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None
    }


def agree(model, lengths, parents):
    assert packs(model) and shares(model)
    states, gradients = states_and_gradients(hidden_states, model, lengths, parents)
    expected, theirs = states_and_gradients(packed._repeated, model, lengths, parents)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    alike(gradients, theirs)


def alike(gradients, theirs):
    """To fp32's rounding of sums over all tokens, whose terms are as large as the largest gradient."""
    assert gradients.keys() == theirs.keys() != set()
    for name, grad in gradients.items():
        assert (grad - theirs[name]).abs().max() <= 1e-4 + 2e-5 * theirs[name].abs().max(), name


@pytest.mark.parametrize("family", FAMILIES["decoder"])
def test_children_read_a_shared_parent(family):
    model = tiny_loaded(family)
    ids_N = (torch.arange(16) * 11 + 5) % 300
    prompt, one, two, other = ids_N.split([5, 3, 4, 4])
    with torch.no_grad():
        states_NE = hidden_states(model, ids_N, (5, 3, 4, 4), (-1, 0, 0, -1))
        for at, text in ((5, [prompt, one]), (8, [prompt, two])):
            whole = torch.cat(text)
            alone = hidden_states(model, whole, [len(whole)])[len(prompt) :]
            torch.testing.assert_close(states_NE[at : at + len(alone)], alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(states_NE[:5], hidden_states(model, prompt, [5]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(states_NE[12:], hidden_states(model, other, [4]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", [one for one in FAMILIES["decoder"] if one != "gpt_neo"])
def test_reading_a_parent_once_equals_reading_it_before_each(family, fused):
    model = tiny_loaded(family)
    if fused and not fuse(model):
        pytest.skip("nothing in it has a faster form")
    agree(model, *SEVERAL)


@pytest.mark.parametrize(
    ("lengths", "parents"),
    [
        ((SHORT + 20, 5, 40, 7), (-1, 0, 0, -1)),
        ((30, SHORT + 20, 6, SHORT + 5), (-1, 0, 0, -1)),
        ((50, *[9, 10, 11, 1] * 4), (-1, *[0] * 16)),
    ],
)
def test_long_parents_long_children_and_many_children(lengths, parents):
    model = tiny_loaded("qwen2")
    agree(model, lengths, parents)


@pytest.mark.parametrize("window", [4, 8])
def test_a_window_counts_over_parent_and_child(window):
    model = tiny_loaded("mistral")
    whole = states_and_gradients(hidden_states, model, *SEVERAL)[0]
    model.network.config.sliding_window = window
    for layer in model.network.model.layers:
        layer.self_attn.sliding_window = window
    agree(model, *SEVERAL)
    windowed = states_and_gradients(hidden_states, model, *SEVERAL)[0]
    # Tokens of the first parent that see all of their past either way, and the last of its child, which does not.
    torch.testing.assert_close(windowed[:window], whole[:window], rtol=1e-4, atol=1e-5)
    assert (windowed[9 + 3] - whole[9 + 3]).abs().max() > 1e-3


def test_a_model_that_reads_a_parent_otherwise_is_found_out(monkeypatch):
    from luthier.models.segments import Segments

    model = tiny_loaded("llama")
    assert packs(model)
    with monkeypatch.context() as patch:
        patch.setattr(packed, "Segments", lambda lengths, device, parents: Segments(lengths, device))
        events = Events()
        assert not shares(model, events)
    assert "llama" in events.choices["shared prompts"]
    states, gradients = states_and_gradients(hidden_states, model, *SEVERAL)
    model.shares = True
    again, others = states_and_gradients(hidden_states, model, *SEVERAL)
    torch.testing.assert_close(states, again, rtol=1e-4, atol=1e-5)
    alike(gradients, others)


def test_models_that_do_not_pack_or_are_not_causal_share_nothing():
    events = Events()
    assert not shares(load_model(str(tiny_model("gpt_neo"))), events)
    assert list(events.choices) == ["shared prompts"]
    for family in ("bert", "t5"):
        events = Events()
        assert not shares(tiny_loaded(family), events) and not events.choices
