"""Segments that continue a shared one are read as if the shared one stood before each."""

import pytest
import torch

from luthier.models.load import load_model
from luthier.models.packed import hidden_states
from tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES["decoder"])
def test_children_read_a_shared_parent(family):
    model = load_model(str(tiny_model(family)))
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
