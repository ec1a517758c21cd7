"""Weights that lie in a file: their pages go and come back, and what was written to is never let go of."""

import sys
from pathlib import Path

import pytest
import torch

import luthier.models.mapped as mapped
from luthier.models.load import load_model
from luthier.models.mapped import by_layers, find_mapped, letting_go
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


def resident(network):
    """Bytes of the files in which its weights lie that are in this process's memory."""
    starts, found, inside = {start for start, _ in find_mapped(network)}, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            inside = int(name.partition("-")[0], 16) in starts
        elif name == "Rss:" and inside:
            found += int(rest[0]) * 1024
    return found


def test_what_layers_read_goes_while_the_others_read(monkeypatch):
    monkeypatch.setattr(mapped, "AT_ONCE", 0)
    network = load_model(str(tiny_model("llama"))).network
    ids_1N, left = torch.tensor([[5, 6, 7]]), []
    right = network(input_ids=ids_1N).logits
    whole = resident(network)
    hook = network.model.norm.register_forward_pre_hook(lambda *_: left.append(resident(network)))
    with by_layers(network) as let_go:
        let_go()
        assert torch.equal(network(input_ids=ids_1N).logits, right)
    hook.remove()
    assert left[0] < whole / 4 and resident(network) == 0 < whole
    assert not any(layer._forward_hooks for layer in network.modules())
