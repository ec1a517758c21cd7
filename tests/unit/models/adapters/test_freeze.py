"""What learns when the rest is frozen."""

import pytest

from luthier.core.errors import ConfigError
from luthier.models.adapters import ADAPTERS
from luthier.models.load import load_model
from tiny import tiny_model


def learning(family, layers, **purpose):
    loaded = load_model(str(tiny_model(family)), **purpose)
    adapter = ADAPTERS.parse({"kind": "freeze", "layers": layers})
    adapter.apply(loaded)
    return {name for name, _ in adapter.trainable(loaded)}


def parts(names, depth):
    return {".".join(name.split(".")[:depth]) for name in names}


def test_last_layer_final_norm_and_head():
    assert parts(learning("llama", 1), 3) == {"model.layers.1", "model.norm.weight", "lm_head.weight"}


def test_a_tied_head_stays_with_its_embedding():
    assert parts(learning("gpt2", 1), 3) == {"transformer.h.1", "transformer.ln_f.weight", "transformer.ln_f.bias"}
    with pytest.raises(ConfigError, match="nothing is left to learn"):
        learning("gpt2", 0)


def test_the_head_of_a_classifier_alone():
    assert learning("bert", 0, task="classify", labels=("a", "b")) == {"head.weight", "head.bias"}


def test_the_decoder_of_a_translator():
    assert parts(learning("bart", 1), 4) == {"model.decoder.layers.1"}
    assert parts(learning("t5", 1), 3) == {"decoder.block.1", "decoder.final_layer_norm.weight"}


def test_more_layers_than_there_are():
    with pytest.raises(ConfigError, match="3 layers cannot learn, the model has 2"):
        learning("llama", 3)
