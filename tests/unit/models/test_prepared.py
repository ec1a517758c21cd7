"""Products over weights that are laid out once, beside torch's own."""

from types import SimpleNamespace

import pytest
import torch

from crossed import crossed
from luthier.core.events import Events
from luthier.engine.engine import Engine
from luthier.engine.generate import tell_engine
from luthier.engine.sampling import Sampling
from luthier.models import prepared
from luthier.models.output import head_of
from luthier.models.precision import cast_weights
from luthier.models.prepared import Prepared, copied
from luthier.verbs.largest import largest_writing


def read(model):
    ids = torch.arange(3, 30)[None].repeat(2, 1)
    with torch.inference_mode():
        return model.module(input_ids=ids, decoder_input_ids=ids[:, :9]).logits


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
def test_what_comes_out_is_what_the_model_gives_itself(family, precision):
    if precision == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN multiplies no bf16 on this processor")
    model = crossed(family)
    cast_weights(model, precision)
    right, weights = read(model), Prepared(model)
    assert weights._layers, "nothing was laid out, so nothing is compared"
    with weights.used():
        found = read(model)
        assert all("forward" in vars(one) for one in weights._layers)
    assert not any("forward" in vars(one) for one in weights._layers) and torch.equal(read(model), right)
    near = (
        {"atol": 1e-4, "rtol": 1e-4} if precision == "float32" else {"atol": 0.05 * float(right.abs().max()), "rtol": 0}
    )
    assert torch.allclose(found.float(), right.float(), **near)
    embedded = model.network.get_input_embeddings().weight
    states = torch.randn(5, embedded.shape[1]).to(embedded.dtype)
    with torch.inference_mode():
        assert torch.allclose(weights.logits(states), head_of(model).logits(states).float(), **near)


def test_weights_that_change_are_laid_out_again():
    model = crossed("bart")
    weights = Prepared(model)
    with weights.used():
        before = read(model)
    with torch.no_grad():
        weights._layers[3].weight.mul_(2)
    right = read(model)
    with weights.used():
        found = read(model)
    assert torch.allclose(found, right, atol=1e-4) and not torch.allclose(found, before, atol=1e-2)


def test_without_memory_for_the_copies_the_model_multiplies_itself(monkeypatch):
    monkeypatch.setattr(prepared, "free_memory", lambda device: 1000)
    model = crossed("bart")
    with pytest.warns(UserWarning, match=r"memory is short of a copy of the weights .* so it writes slower"):
        weights = Prepared(model)
    assert copied(model) == 0
    right = read(model)
    with weights.used():
        assert not weights._layers and torch.equal(read(model), right)


def test_what_the_copies_take_is_known_before_and_said():
    model, events = crossed("bart"), Events()
    engine = Engine(model, 256)
    engine.add([5, 9, 2], Sampling(max_tokens=3))
    engine.run()
    made = engine._reader._weights._made
    laid = [head_of(model).weight_VE if key == "head" else key.weight for key in made]
    assert "head" in made and copied(model) == sum(one.nbytes for one in laid) > 0
    assert len({one.data_ptr() for one in laid}) == len(laid), "nothing is laid out twice"
    tell_engine(model, Sampling(), events)
    assert "a copy of the weights takes" in events.choices["engine"]


def test_the_copies_are_in_the_forecast_of_what_is_written_while_tuning():
    model = crossed("t5")
    work = SimpleNamespace(objective=SimpleNamespace(draws=True), model=model)
    assert largest_writing(work) == copied(model) > 0
