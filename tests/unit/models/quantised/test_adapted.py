"""DoRA and PiSSA over a quantised base: norms by blocks, a rest that is quantised last, and the way back to the full base."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapted import ROWS, logits
from luthier.core.config import resolve
from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.models.adapters import ADAPTERS
from luthier.models.adapters.inject import lora_layers
from luthier.models.adapters.magnitude import DoraLinear
from luthier.models.adapters.principal import PissaLinear
from luthier.models.load import load_model
from luthier.models.precision import cast_weights
from luthier.models.quantised import linear
from luthier.models.quantised.linear import QuantisedLinear
from luthier.models.quantised.network import quantised_layers
from luthier.models.save import save_model
from luthier.verbs.tune import Tune, tune_model
from tiny import ALL_FAMILIES, tiny_loaded, tiny_model

FORMS = ("int8", "nf4")


def shake(loaded):
    with torch.no_grad():
        for _, layer in lora_layers(loaded.network):
            layer.lora_b.add_(0.1 * torch.randn_like(layer.lora_b))
            if isinstance(layer, DoraLinear):
                layer.lora_magnitude.mul_(1 + 0.1 * torch.rand_like(layer.lora_magnitude))


def adapted(kind, form, family="llama", precision="float32", **settings):
    part = ADAPTERS.parse({"kind": kind, "rank": 4, "alpha": 8, **settings})
    loaded = load_model(str(tiny_model(family)), quantize=form, unquantised=part.reads_base)
    part.apply(loaded)
    cast_weights(loaded, precision)
    shake(loaded)
    return loaded, part


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(700, 512), (5, 7), (600, 48), (3000, 100), (16400, 33)])
def test_blocks_are_the_weight(shape, form, monkeypatch):
    monkeypatch.setattr(linear, "rows_at_once", lambda width: 100)
    base = nn.Linear(shape[1], shape[0], bias=False)
    held = QuantisedLinear(base, form)
    places, parts = zip(*held.blocks())
    assert torch.equal(torch.cat(parts), held.rebuilt(torch.float32))
    assert [place.start for place in places[1:]] == [place.stop for place in places[:-1]]
    assert (places[0].start, places[-1].stop) == (0, shape[0])
    if form == "int8":
        assert max(len(part) for part in parts) <= 100
    else:  # what shares a scale of scales stays together: 16,384 values
        assert all(place.start * shape[1] % 16384 == 0 for place in places)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", [nn.Linear(70, 9), nn.Linear(64, 600, bias=False), Conv1D(10, 6)])
def test_dora_is_the_formula_on_the_rebuilt_weight(base, form):
    held = QuantisedLinear(base, form)
    weight = held.rebuilt(torch.float32)
    layer = DoraLinear(held, 4, 6.0)
    x = torch.randn(2, 3, held.in_features, requires_grad=True)
    assert torch.allclose(layer.lora_magnitude, weight.norm(dim=1), rtol=1e-5)
    assert torch.allclose(layer(x), held(x), atol=1e-6)
    layer.lora_b.data.normal_()
    layer.lora_magnitude.data.mul_(torch.rand(held.out_features) + 0.5)
    whole = weight + layer.scale * layer.lora_b @ layer.lora_a
    twin = x @ (whole * (layer.lora_magnitude / whole.detach().norm(dim=1))[:, None]).T
    twin = twin if base.bias is None else twin + base.bias
    y = layer(x)
    assert torch.allclose(y, twin, atol=1e-4)
    inputs = (x, layer.lora_a, layer.lora_b, layer.lora_magnitude)
    ours = torch.autograd.grad((y**3).sum(), inputs)
    theirs = torch.autograd.grad((twin**3).sum(), inputs)
    assert all(float((a - b).abs().max()) <= 1e-4 * float(b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_the_norm_never_rebuilds_the_whole_weight(monkeypatch):
    monkeypatch.setattr(linear, "rows_at_once", lambda width: 64)
    layer = DoraLinear(QuantisedLinear(nn.Linear(256, 640), "nf4"), 4, 8)
    monkeypatch.setattr(QuantisedLinear, "rebuilt", None)
    sizes = []
    blocks = QuantisedLinear.blocks

    def watched(self):
        for place, rows in blocks(self):
            sizes.append(rows.numel())
            yield place, rows

    monkeypatch.setattr(QuantisedLinear, "blocks", watched)
    with torch.no_grad():
        layer.lora_b.add_(1.0)
    layer.norm()
    # The squares of the base are known by now, so one pass is made.
    assert sizes == [64 * 256] * 10


def test_dropout_over_a_quantised_base_adds_the_bias_once():
    base = nn.Linear(6, 10)
    layer = DoraLinear(QuantisedLinear(base, "int8"), 4, 8.0, dropout=0.5).train()
    x = torch.randn(3, 6)
    assert torch.allclose(layer(x), layer.base(x), atol=1e-6)  # B is zero: nothing to drop


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", [nn.Linear(70, 30), Conv1D(30, 70)])
def test_what_pissa_leaves_is_quantised_last(base, form):
    weight = (base.weight.T if isinstance(base, Conv1D) else base.weight).detach().clone()
    layer = PissaLinear(base, 4, 6.0, form=form)
    left, values, right = torch.linalg.svd(weight)
    rest = weight - (left[:, :4] * values[:4]) @ right[:4]
    plain = nn.Linear(70, 30)
    plain.weight.data = rest
    expected = QuantisedLinear(plain, form)
    assert isinstance(layer.base, QuantisedLinear)
    assert torch.allclose(layer.base.weight, expected.weight, atol=2e-2 * float(rest.abs().max()))
    x = torch.randn(5, 70)
    twin = x @ (layer.base.weight + layer.scale * layer.lora_b @ layer.lora_a).T + base.bias
    assert torch.allclose(layer(x), twin, atol=1e-5)
    # A fingerprint of the base sees the weight as it was.
    assert torch.equal(base.weight.T if isinstance(base, Conv1D) else base.weight, weight)
    assert layer.base.original_sample == linear.sample(base.weight)


@pytest.mark.parametrize("form", FORMS)
def test_pissa_starts_nearer_to_the_full_weight(form):
    # As in trained weights, a few directions are far larger than the others (figure 3 of the paper).
    torch.manual_seed(0)
    base = nn.Linear(128, 128, bias=False)
    with torch.no_grad():
        base.weight.add_(3 * torch.randn(128, 4) @ torch.randn(4, 128))
    weight = base.weight.detach().clone()
    plain = float((QuantisedLinear(base, form).weight - weight).norm())
    whole = PissaLinear(base, 4, 8.0, form=form).whole().detach()
    assert float((whole - weight).norm()) < 0.5 * plain


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_every_family(kind, family, tmp_path):
    loaded, _ = adapted(kind, "nf4", family)
    save_model(loaded, tmp_path / "model")
    again = load_model(str(tmp_path / "model"))
    assert torch.equal(logits(again), logits(loaded))
    assert [name for name, _ in quantised_layers(again.network)] == [
        name for name, _ in quantised_layers(loaded.network)
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_files_come_back_and_are_merged_into_the_full_base(kind, precision, form, tmp_path):
    loaded, part = adapted(kind, form, precision=precision)
    save_model(loaded, tmp_path / "model")
    events = Events()
    again = load_model(str(tmp_path / "model"), events=events)
    assert torch.equal(logits(again), logits(loaded)) and events.choices["base"].startswith(form)
    assert again.network.dtype == getattr(torch, precision) and again.spec.quantize == form
    mine, theirs = dict(quantised_layers(loaded.network)), dict(quantised_layers(again.network))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name].weight, theirs[name].weight) for name in mine)
    part.apply(again)  # and learns on

    whole = load_model(str(tmp_path / "model"), quantize="none", dtype="float32")
    part.merge(loaded)
    assert (loaded.spec.quantize, loaded.spec.adapter, loaded.network.dtype) == ("none", None, torch.float32)
    assert torch.allclose(logits(loaded), logits(whole), atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_output_layer_beside_quantised_ones(precision, tmp_path):
    """The output layer stays in full, and what PiSSA took out of it comes back once."""
    loaded, part = adapted("pissa", "nf4", precision=precision, targets=["q_proj", "lm_head"])
    assert type(loaded.network.lm_head.base) is nn.Linear
    assert {layer.form for _, layer in quantised_layers(loaded.network)} == {"nf4"}
    save_model(loaded, tmp_path / "model")
    again = load_model(str(tmp_path / "model"))
    assert torch.equal(logits(again), logits(loaded))
    whole = load_model(str(tmp_path / "model"), quantize="none", dtype="float32")
    part.merge(again)
    assert torch.allclose(logits(again), logits(whole), atol=1e-5)


def test_pissa_of_a_base_in_bfloat16_files(tmp_path):
    plain = tiny_loaded("llama")
    save_model(plain, tmp_path / "base", dtype="bfloat16")
    part = ADAPTERS.parse({"kind": "pissa", "rank": 4})
    loaded = load_model(str(tmp_path / "base"), quantize="nf4", unquantised=True)
    part.apply(loaded)
    cast_weights(loaded, "float32")
    shake(loaded)
    save_model(loaded, tmp_path / "model")
    assert torch.equal(logits(load_model(str(tmp_path / "model"))), logits(loaded))


def test_pissa_on_what_is_quantised_already_is_refused():
    with pytest.raises(ConfigError, match="is held in nf4 already, and 'pissa' takes the principal part out"):
        ADAPTERS.parse({"kind": "pissa", "rank": 4}).apply(load_model(str(tiny_model("llama")), quantize="nf4"))


def ask(**settings):
    quick = {"steps": 6, "learning_rate": 0.02, "batch_size": 8, "baselines": False, "schedule": "constant"}
    data = {"train": ROWS, "split": {"validation": 0.0}}
    return resolve(
        Tune, values={"model": str(tiny_model("qwen2")), "objective": "sft", "data": data, **quick, **settings}
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_tuning(kind, precision, form):
    adapter = {"kind": kind, "rank": 4, "alpha": 8}
    events = []
    asked = ask(quantize=form, precision=precision, adapter=adapter, name="one")
    record, model = tune_model(asked, sinks=[events.append])
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert losses[-1] < losses[0] - 0.1 and model.spec.quantize == form
    assert record.choices["base"].startswith(form) and "linear layers" in str(events)
    again = load_model("run:one")
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    _, more = tune_model(ask(model="run:one", adapter=adapter, steps=1, name="two"))
    assert more.spec.quantize == form
    _, full = tune_model(ask(model="run:one", adapter="full", steps=1, learning_rate=1e-9, name="three"))
    assert (full.spec.quantize, full.spec.adapter) == ("none", None)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_given_is_quantised_by_pissa(form):
    loaded = tiny_loaded("qwen2")
    _, tuned = tune_model(ask(quantize=form, adapter={"kind": "pissa", "rank": 4}, steps=1), model=loaded)
    assert {layer.form for _, layer in quantised_layers(tuned.network)} == {form}
