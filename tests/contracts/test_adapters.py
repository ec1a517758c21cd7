"""What every adapter promises: it starts equal to the base, survives its files, and merges without a trace."""

import pytest
import torch

from luthier.models.adapters import ADAPTERS
from luthier.models.heads import Pooled
from luthier.models.load import load_model
from luthier.models.quantised.network import quantised_layers
from luthier.models.save import save_model
from tiny import ALL_FAMILIES, kind_of, tiny_loaded, tiny_model

PURPOSES = [(family, task) for family in ALL_FAMILIES for task in (None, "classify")]


@torch.no_grad()
def outputs(loaded):
    ids = torch.tensor([loaded.tokenizer("Ok, see you at the station.")["input_ids"]])
    mask = torch.ones_like(ids)
    if isinstance(loaded.module, Pooled):
        return loaded.module(ids, mask)
    decoder = {"decoder_input_ids": ids[:, :5]} if loaded.spec.kind == "encoder-decoder" else {}
    return loaded.module(input_ids=ids, attention_mask=mask, **decoder).logits


def load(family, task):
    return tiny_loaded(family, task=task, labels=("a", "b") if task == "classify" else ())


@pytest.mark.parametrize("family, task", PURPOSES)
@pytest.mark.parametrize("kind", ADAPTERS.names())
def test_contract(kind, family, task, tmp_path):
    loaded = load(family, task)
    base = outputs(loaded)
    adapter = ADAPTERS.parse(kind)
    adapter.apply(loaded)
    assert torch.allclose(outputs(loaded), base, atol=1e-5)  # starts equal to the base

    named = adapter.trainable(loaded)
    assert named
    assert len({id(parameter) for _, parameter in named}) == len(named)
    assert all(parameter.requires_grad for _, parameter in named)
    frozen = {name: one.detach().clone() for name, one in loaded.module.named_parameters() if not one.requires_grad}
    with torch.no_grad():
        for _, parameter in named:
            parameter.add_(0.02 * torch.randn_like(parameter))
    moved = outputs(loaded)
    assert not torch.equal(moved, base)
    now = dict(loaded.module.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())

    save_model(loaded, tmp_path / "model")
    again = load_model(str(tmp_path / "model"))
    assert torch.equal(outputs(again), moved)  # save and load round trip

    adapter.merge(again)
    assert again.spec.adapter is None
    assert torch.allclose(outputs(again), moved, atol=1e-5)  # merged equals unmerged
    save_model(again, tmp_path / "merged")
    assert torch.allclose(outputs(load_model(str(tmp_path / "merged"))), moved, atol=1e-5)


@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS.names() if ADAPTERS.load(kind).quantises])
def test_over_a_quantised_base(kind, form, tmp_path):
    adapter = ADAPTERS.parse(kind)
    loaded = load_model(str(tiny_model("llama")), quantize=form, unquantised=adapter.reads_base)
    start = outputs(loaded)
    adapter.apply(loaded)
    if adapter.reads_base:
        away = float((outputs(load_model(str(tiny_model("llama")), quantize=form)) - start).norm())
        assert 0 < float((outputs(loaded) - start).norm()) < away  # starts nearer to the base in full than that is
    else:
        assert torch.allclose(outputs(loaded), start, atol=1e-6)  # starts equal to the quantised base
    assert {layer.form for _, layer in quantised_layers(loaded.network)} == {form}
    plain = [one for one in loaded.network.base_model.modules() if type(one) is torch.nn.Linear]
    assert plain == []
    with torch.no_grad():
        for _, parameter in adapter.trainable(loaded):
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_model(loaded, tmp_path / "model")
    assert torch.equal(outputs(load_model(str(tmp_path / "model"))), outputs(loaded))

    whole = load_model(str(tmp_path / "model"), quantize="none")
    adapter.merge(loaded)
    assert loaded.spec.quantize == "none"
    assert torch.allclose(outputs(loaded), outputs(whole), atol=1e-5)  # merged into the full base


@pytest.mark.parametrize("family, task", PURPOSES)
@pytest.mark.parametrize("kind", ADAPTERS.names())
def test_gradient_reaches_all_that_learns(kind, family, task):
    loaded = load(family, task)
    adapter = ADAPTERS.parse(kind)
    adapter.apply(loaded)
    ids = torch.tensor([loaded.tokenizer("Win a free prize now!")["input_ids"]])
    mask = torch.ones_like(ids)
    if task == "classify":
        scores = loaded.module(ids, mask)
    elif kind_of(family) == "encoder-decoder":
        scores = loaded.module(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
    else:
        scores = loaded.module(input_ids=ids, attention_mask=mask).logits
    (scores**2).sum().backward()
    idle = [name for name, parameter in adapter.trainable(loaded) if parameter.grad is None]
    assert idle == []
