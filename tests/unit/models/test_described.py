"""What a decoder is read to be, in the cases that its logits on a short text would not show."""

import copy

import pytest
import torch

from decoders import decoder_model
from luthier.models.decoder import describe
from luthier.models.output import head_of
from luthier.models.packed import hidden_states
from luthier.models.rules import Unlike
from luthier.native.plain import read_plainly

IDS = [(7 * at) % 380 + 5 for at in range(60)]


@torch.inference_mode()
def own_logits(model):
    return head_of(model).logits(hidden_states(model, torch.tensor(IDS), (len(IDS),))).float()


def largest_apart(model):
    own_TV = own_logits(model)
    return float((read_plainly(describe(model), torch.tensor(IDS)) - own_TV).abs().max() / own_TV.abs().max())


def with_length(model, longest):
    model.spec = model.spec.model_copy(update={"max_length": longest})
    return model


def test_a_norm_with_one_large_weight_is_read_as_what_it_is():
    model = decoder_model("gemma")
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            if "norm" in name:
                weight[0] = 200.0
    assert largest_apart(model) < 1e-4


@pytest.mark.parametrize("family, windows", [("llama", [None] * 3), ("mistral", [40] * 3), ("gemma2", [40, None, 40])])
def test_windows_are_those_of_the_layers_not_of_the_config(family, windows):
    assert [one.window for one in describe(decoder_model(family, sliding_window=40)).blocks] == windows


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [4.0] * 16,
            "original_max_position_embeddings": 64, "factor": 2.0}  # fmt: skip


@pytest.mark.parametrize(
    "rope, longest",
    [(LONGROPE, 64), ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 128)],
    ids=["longrope", "dynamic"],
)
def test_rotary_positions_that_change_with_the_length_are_refused_where_texts_can_be_so_long(rope, longest):
    model = decoder_model("llama", rope_parameters=rope)
    assert largest_apart(with_length(model, longest)) < 1e-4
    with pytest.raises(Unlike, match="makes other rotary positions for long texts"):
        describe(with_length(model, longest + 40))
    assert largest_apart(with_length(model, longest)) < 1e-4


def test_queries_that_grow_with_their_places_are_refused():
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "llama_4_scaling_beta": 0.5,
        "original_max_position_embeddings": 64,
    }
    model = decoder_model("ministral3", rope_parameters=rope)
    with pytest.raises(Unlike, match="makes the queries or keys of later tokens larger"):
        describe(model)


def test_an_activation_that_is_cut_off_is_none_of_those_that_are_not():
    with pytest.raises(Unlike, match="has an activation of its own"):
        describe(decoder_model("llama", hidden_act="relu6"))


def test_a_model_that_is_being_tuned_is_read_without_what_it_drops():
    model = decoder_model("gpt2", embd_pdrop=0.5)
    model.module.train()
    before = torch.get_rng_state()
    assert len(describe(model).blocks) == 3
    assert model.module.training and torch.equal(torch.get_rng_state(), before)


def test_layers_of_several_sizes_are_refused():
    model = decoder_model("llama")
    layer, config = model.network.base_model.layers[1], copy.deepcopy(model.network.config)
    config.intermediate_size = 192
    layer.mlp = type(layer.mlp)(config)
    with pytest.raises(Unlike, match="has layers of several sizes"):
        describe(model)
