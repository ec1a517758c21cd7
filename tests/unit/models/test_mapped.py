"""Weights that lie in a file: their pages go and come back, and what was written to is never let go of."""

import sys

import pytest
import torch

from luthier.models.load import load_model
from luthier.models.mapped import find_mapped, letting_go
from tiny import tiny_model

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not tell")


def test_pages_of_a_file_come_back_as_they_were():
    network = load_model(str(tiny_model("llama"))).network
    before = {name: one.detach().clone() for name, one in network.named_parameters()}
    assert find_mapped(network)
    letting_go(network)()
    assert all(torch.equal(one, before[name]) for name, one in network.named_parameters())


def test_what_was_written_to_is_kept():
    network = load_model(str(tiny_model("llama"))).network
    weight = network.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.add_(1.0)
    changed = weight.detach().clone()
    letting_go(network)()
    assert torch.equal(weight, changed)
