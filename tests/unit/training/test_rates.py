"""Which weight learns at which share of the rate, by its name, in every family."""

import re

import pytest

from luthier.core.errors import ConfigError, TrainingError
from luthier.training.rates import combine, layer_scales
from tiny import ALL_FAMILIES, kind_of, tiny_loaded


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_layers_learn_slower_the_lower_they_are(family):
    model = tiny_loaded(family)
    names = [name for name, _ in model.module.named_parameters()]
    scales = layer_scales(names, 0.5)
    assert scales.keys() == set(names)
    layers = 4 if kind_of(family) == "encoder-decoder" else 2
    assert set(scales.values()) == {0.5**down for down in range(layers + 1)}
    table = next(n for n, p in model.module.named_parameters() if p is model.network.get_input_embeddings().weight)
    assert scales[table] == 0.5**layers
    stacks = ("encoder.", "decoder.") if kind_of(family) == "encoder-decoder" else ("",)
    # BERT's kin number `layer`; in T5 that name is for the parts of a block.
    numbered = "layer" if family in ("bert", "roberta", "deberta-v2") else "(h|layers|block)"
    for height, stack in enumerate(stacks):
        for layer in range(2):
            inside = re.compile(rf"{stack}(.*\.)?{numbered}\.{layer}\.")
            found = {scales[name] for name in names if inside.search(name)}
            assert found == {0.5 ** (layers - 1 - layer - 2 * height)}, (stack, layer)
    for name, scale in scales.items():
        if name.startswith(("lm_head", "cls.", "head.")) or "decoder.final_layer_norm" in name:
            assert scale == 1, name


def test_numbers_by_hand():
    names = ["h.0.a", "h.1.a", "h.2.a", "wte.weight", "ln_f.weight"]
    assert layer_scales(names, 0.5) == {"h.0.a": 0.25, "h.1.a": 0.5, "h.2.a": 1, "wte.weight": 0.125, "ln_f.weight": 1}
    assert layer_scales(names, 1.0) == {}
    # T5's blocks hold layers; the encoder's last norm learns as its last block.
    names = [
        "encoder.block.0.layer.1.x",
        "encoder.final_layer_norm.weight",
        "decoder.block.0.layer.2.x",
        "shared.weight",
    ]
    assert list(layer_scales(names, 0.5).values()) == [0.5, 0.5, 1, 0.25]


def test_frozen_layers_do_not_count():
    assert layer_scales(["layers.4.a", "layers.5.a", "head.weight"], 0.5) == {
        "layers.4.a": 0.5,
        "layers.5.a": 1,
        "head.weight": 1,
    }


def test_names_without_layers_are_refused():
    with pytest.raises(ConfigError, match="layer_decay: no weight that learns belongs to a numbered layer"):
        layer_scales(["head.weight"], 0.5)


def test_scales_multiply():
    assert combine(["a", "b", "c"], {"a": 4.0}, {"a": 0.5, "b": 0.5}) == {"a": 2.0, "b": 0.5}
    with pytest.raises(TrainingError, match="given to d, but no weight of that name learns"):
        combine(["a"], {"d": 2.0})
