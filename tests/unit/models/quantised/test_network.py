"""Quantised layers in a model: what they compute, what they keep, and how they come and go."""

import json

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapted import IDS, ROWS, logits
from luthier.core.config import resolve
from luthier.core.errors import ConfigError, ModelError
from luthier.core.events import Events
from luthier.models.adapters import ADAPTERS
from luthier.models.adapters.inject import LoraLinear, lora_layers, shape_of
from luthier.models.facts import count_parameters, fingerprint
from luthier.models.load import load_model
from luthier.models.packed import hidden_states, packs
from luthier.models.precision import cast_weights
from luthier.models.quantised.linear import QuantisedLinear
from luthier.models.quantised.network import quantise, quantise_loaded, quantised_layers
from luthier.models.save import save_model
from luthier.verbs.tune import Tune, tune_model
from tiny import ALL_FAMILIES, kind_of, tiny_loaded, tiny_model

FORMS = ("int8", "nf4")
LORA = {"kind": "lora", "rank": 4, "alpha": 8}


def shake(loaded):
    with torch.no_grad():
        for _, layer in lora_layers(loaded.network):
            layer.lora_b.normal_(std=0.1)


def tuned(form="int8", family="llama"):
    loaded = load_model(str(tiny_model(family)), quantize=form)
    ADAPTERS.parse(LORA).apply(loaded)
    shake(loaded)
    return loaded


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", [nn.Linear(6, 10), nn.Linear(70, 9, bias=False), Conv1D(10, 6)])
def test_a_layer_is_one_of_its_rebuilt_weight(base, form):
    held = QuantisedLinear(base, form)
    assert shape_of(held) == shape_of(base)
    x = torch.randn(2, 3, held.in_features, requires_grad=True)
    twin = nn.functional.linear(x, held.weight, base.bias)
    assert torch.equal(held(x), twin)
    layer = LoraLinear(held, 4, 6.0)
    layer.lora_b.data.normal_()
    twin = twin + 1.5 * (x @ layer.lora_a.T @ layer.lora_b.T)
    y = layer(x)
    assert torch.allclose(y, twin, atol=1e-6)
    inputs = (x, layer.lora_a, layer.lora_b)
    ours = torch.autograd.grad((y**3).sum(), inputs)
    theirs = torch.autograd.grad((twin**3).sum(), inputs)
    # Against float64 either is off by up to 1.5e-6 of the largest value; small ones may be all rounding.
    assert all(float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_dropout_beside_a_quantised_layer():
    layer = LoraLinear(QuantisedLinear(nn.Linear(6, 10), "int8"), 4, 8.0, dropout=0.5)
    layer.lora_b.data.normal_()
    x = torch.randn(3, 6)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_a_weights_size_is_kept(form):
    # Wide layers and few tokens: a kept weight (64 x 32 values or more) is larger than anything else that is.
    loaded = tuned(form)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    packs(loaded)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = hidden_states(loaded, IDS, [len(IDS)])
    assert max(kept) < 32 * 16  # the smallest weight, of the keys
    states.sum().backward()
    assert all(layer.lora_a.grad is not None for _, layer in lora_layers(loaded.network))


def test_scales_stay_in_fp32_when_a_model_is_rounded():
    held = QuantisedLinear(nn.Linear(6, 10), "int8")
    before = held.weight
    held.to(torch.bfloat16)
    assert (held.scales.dtype, held.weight.dtype, held.bias.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert torch.equal(held.to(torch.float32).weight, before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family(family, form):
    whole, held = tiny_loaded(family), load_model(str(tiny_model(family)), quantize=form)
    away = float((logits(held) - logits(whole)).norm() / logits(whole).norm())
    assert 0 < away < (0.02 if form == "int8" else 0.25)
    assert fingerprint(held.network) == fingerprint(whole.network)
    assert count_parameters(held.module) == count_parameters(whole.module)
    assert packs(held) == packs(whole)
    body = dict(held.network.base_model.named_modules())
    plain = {name for name, one in body.items() if type(one) is nn.Linear or isinstance(one, Conv1D)}
    assert plain <= {"lm_head"}  # T5 has no body beside the whole model
    # Embeddings, norms and the output layer are as they were.
    left = dict(held.network.named_parameters())
    assert all(torch.equal(one, dict(whole.network.named_parameters())[name]) for name, one in left.items())


def test_loading_gives_what_quantising_after_gives(tmp_path):
    whole = tiny_loaded("llama")
    whole.network.to(torch.bfloat16).save_pretrained(tmp_path)
    whole.tokenizer.save_pretrained(tmp_path)
    after = load_model(str(tmp_path))
    quantise_loaded(after, "nf4")
    assert torch.equal(logits(load_model(str(tmp_path), quantize="nf4")), logits(after))
    rounded = load_model(str(tmp_path), quantize="nf4", dtype="bfloat16")
    cast_weights(after, "bfloat16")
    assert torch.equal(logits(rounded), logits(after))
    rotary = [
        name for name, one in rounded.network.named_buffers() if "inv_freq" in name and one.dtype != torch.float32
    ]
    assert rotary == []


@pytest.mark.parametrize("form", FORMS)
def test_the_saved_adapter_remembers_its_base(form, tmp_path):
    loaded = tuned(form)
    save_model(loaded, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "luthier.json").read_text())["quantize"] == form
    events = Events()
    again = load_model(str(tmp_path / "model"), events=events)
    assert torch.equal(logits(again), logits(loaded))
    assert {layer.form for _, layer in quantised_layers(again.network)} == {form}
    assert events.choices["base"].startswith(form)
    events = Events()
    load_model(str(tmp_path / "model"), quantize="none", events=events)
    assert events.choices["base"].startswith("in full")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_adapter_is_merged_into_the_full_base(precision, tmp_path):
    loaded = tuned("nf4")
    cast_weights(loaded, precision)
    save_model(loaded, tmp_path / "model")
    whole = load_model(str(tmp_path / "model"), quantize="none", dtype="float32")
    held = load_model(str(tmp_path / "model"))
    ADAPTERS.parse(LORA).merge(held)
    assert (held.spec.quantize, held.spec.adapter, held.network.dtype) == ("none", None, torch.float32)
    assert torch.allclose(logits(held), logits(whole), atol=1e-5)
    save_model(held, tmp_path / "whole")
    assert torch.equal(logits(load_model(str(tmp_path / "whole"))), logits(held))


def test_a_base_that_is_gone_cannot_be_merged_into(tmp_path):
    loaded = tuned()
    loaded.spec = loaded.spec.model_copy(update={"base": str(tmp_path / "gone")})
    with pytest.raises(ModelError, match=r"cannot be read again in full precision: .*gone: no such directory"):
        ADAPTERS.parse(LORA).merge(loaded)
    loaded.spec = loaded.spec.model_copy(update={"base": str(tiny_model("llama", seed=1))})
    with pytest.raises(ModelError, match="now holds another model"):
        ADAPTERS.parse(LORA).merge(loaded)


def test_a_quantised_model_is_not_saved_whole(tmp_path):
    with pytest.raises(ModelError, match="are held in int8 for tuning an adapter, and are not written"):
        save_model(load_model(str(tiny_model("llama")), quantize="int8"), tmp_path / "model")


def test_two_forms_at_once_are_refused():
    with pytest.raises(ModelError, match="is held in nf4 already"):
        quantise_loaded(load_model(str(tiny_model("llama")), quantize="nf4"), "int8")


def test_a_model_without_linear_layers():
    loaded = tiny_loaded("llama")
    loaded.network.model.layers = nn.ModuleList()
    with pytest.raises(ModelError, match="has no linear layers to hold in int8"):
        quantise(loaded.network, "int8")


def ask(**settings):
    quick = {"steps": 6, "learning_rate": 0.02, "batch_size": 8, "baselines": False, "schedule": "constant"}
    data = {"train": ROWS, "split": {"validation": 0.0}}
    model = {"model": str(tiny_model("qwen2")), "objective": "sft", "adapter": LORA}
    return resolve(Tune, values={**model, "data": data, **quick, **settings})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_tuning_over_a_quantised_base(form, precision):
    events = []
    record, model = tune_model(ask(quantize=form, precision=precision, name="one"), sinks=[events.append])
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert losses[-1] < losses[0] - 0.1
    assert model.spec.quantize == form
    assert record.numbers["parameters"] > 2 * 32 * 32  # the quantised weights count
    again = load_model("run:one")
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    # It learns on in the same form, and is merged before all its weights learn.
    _, more = tune_model(ask(model="run:one", steps=1, name="two"))
    assert more.spec.quantize == form
    _, full = tune_model(ask(model="run:one", adapter="full", steps=1, learning_rate=1e-9, name="three"))
    assert (full.spec.quantize, full.spec.adapter) == ("none", None)


def test_a_model_given_is_quantised_too():
    loaded = tiny_loaded("qwen2")
    _, tuned_one = tune_model(ask(quantize="int8", steps=1), model=loaded)
    assert tuned_one.spec.quantize == "int8" and list(quantised_layers(tuned_one.network))


@pytest.mark.parametrize("adapter", ["full", "freeze"])
def test_weights_that_learn_cannot_be_quantised(adapter):
    with pytest.raises(
        ConfigError, match="needs the base's own weights, which nf4 cannot hold; choose adapter lora, dora or pissa"
    ):
        tune_model(ask(quantize="nf4", adapter=adapter))


def test_random_weights_are_not_quantised():
    with pytest.raises(ConfigError, match="random weights learn nothing under an adapter"):
        tune_model(ask(quantize="nf4", from_scratch=True))


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_a_classifier_over_a_quantised_base(family, tmp_path):
    loaded = load_model(str(tiny_model(family)), task="classify", labels=("a", "b"), quantize="int8")
    ADAPTERS.parse(LORA).apply(loaded)
    shake(loaded)
    with torch.no_grad():
        before = loaded.module(IDS[None], torch.ones_like(IDS[None]))
        save_model(loaded, tmp_path / "model")
        again = load_model(str(tmp_path / "model"))
        assert torch.equal(again.module(IDS[None], torch.ones_like(IDS[None])), before)
    assert kind_of(family) == again.spec.kind and list(quantised_layers(again.network))
