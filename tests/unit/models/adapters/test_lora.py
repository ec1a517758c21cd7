"""LoRA: the layer, its targets, and adapters that meet the wrong base."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.core.errors import ConfigError, ModelError
from luthier.models.adapters import ADAPTERS
from luthier.models.adapters.inject import LoraLinear, lora_layers, shape_of
from luthier.models.load import load_model
from luthier.models.save import save_model
from tiny import tiny_loaded, tiny_model

LORA = {"kind": "lora", "rank": 4, "alpha": 8}


def tuned(family="llama", adapter=LORA, **purpose):
    """A model with an adapter that does something."""
    loaded = load_model(str(tiny_model(family)), **purpose)
    ADAPTERS.parse(adapter).apply(loaded)
    with torch.no_grad():
        for _, layer in lora_layers(loaded.network):
            layer.lora_b.normal_(std=0.1)
    return loaded


@torch.no_grad()
def logits(loaded):
    return loaded.module(input_ids=torch.tensor([[5, 30, 31, 32]])).logits


@pytest.mark.parametrize("base", [nn.Linear(6, 10), nn.Linear(6, 10, bias=False), Conv1D(10, 6)])
@pytest.mark.parametrize("rslora", [False, True])
def test_layer_is_the_formula(base, rslora):
    layer = LoraLinear(base, 4, 6.0, rslora=rslora)
    layer.lora_b.data.normal_()
    x = torch.randn(2, 3, 6, requires_grad=True)
    twin = base(x) + (6.0 / (2 if rslora else 4)) * (x @ layer.lora_a.T @ layer.lora_b.T)
    y = layer(x)
    assert shape_of(base) == (10, 6)
    assert torch.allclose(y, twin, atol=1e-6)
    inputs = (x, layer.lora_a, layer.lora_b)
    ours = torch.autograd.grad((y**3).sum(), inputs)
    theirs = torch.autograd.grad((twin**3).sum(), inputs)
    # Against float64 either is off by up to 1.6e-6 of the largest value; small ones may be all rounding.
    assert all(float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()) for a, b in zip(ours, theirs, strict=True))
    assert torch.allclose(layer.merged()(x), y, atol=1e-5)


def test_adapter_stays_fp32_on_a_bf16_base():
    layer = LoraLinear(nn.Linear(6, 10, dtype=torch.bfloat16), 4, 8)
    assert layer.lora_a.dtype == torch.float32
    assert layer(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_targets_by_name():
    loaded = tuned(adapter={**LORA, "targets": ["q_proj", "layers.1.mlp.up_proj"]})
    assert [name for name, _ in lora_layers(loaded.network)] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    with pytest.raises(ConfigError, match="no linear layer is called 'query'"):
        tuned(adapter={**LORA, "targets": ["query"]})


def test_the_output_layer_is_left_alone():
    names = [name for name, _ in lora_layers(tuned("llama").network)]
    assert len(names) == 14
    assert "lm_head" not in names


def test_only_the_adapter_and_a_new_head_learn():
    loaded = tuned("bert", task="classify", labels=("a", "b"))
    names = [name for name, _ in ADAPTERS.parse(LORA).trainable(loaded)]
    assert {name.rpartition(".")[2] for name in names if name.startswith("backbone.")} == {"lora_a", "lora_b"}
    assert {name for name in names if not name.startswith("backbone.")} == {"head.weight", "head.bias"}


def test_the_adapter_learns_on(tmp_path):
    save_model(tuned(), tmp_path / "first")
    loaded = load_model(str(tmp_path / "first"))
    before = logits(loaded)
    ADAPTERS.parse(LORA).apply(loaded)
    assert torch.equal(logits(loaded), before)
    assert len(list(lora_layers(loaded.network))) == 14
    save_model(loaded, tmp_path / "second")
    again = load_model(str(tmp_path / "second"))
    assert torch.equal(logits(again), before)
    assert again.spec.base == str(tiny_model("llama"))


def test_another_adapter_on_top_is_refused(tmp_path):
    save_model(tuned(), tmp_path / "model")
    with pytest.raises(ConfigError, match="already holds a LoRA adapter of rank 4, alpha 8"):
        ADAPTERS.parse({**LORA, "rank": 8}).apply(load_model(str(tmp_path / "model")))


def test_full_tuning_merges_first(tmp_path):
    save_model(tuned(), tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))
    before = logits(loaded)
    ADAPTERS.parse("full").apply(loaded)
    assert torch.allclose(logits(loaded), before, atol=1e-5)
    assert not list(lora_layers(loaded.network))
    assert (loaded.spec.adapter, loaded.spec.base) == (None, None)


def test_a_language_adapter_carries_a_classifier(tmp_path):
    language = tuned()
    save_model(language, tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), task="classify", labels=("a", "b"))
    ids = torch.tensor([[5, 30, 31, 32]])
    with torch.no_grad():
        expected = language.module.base_model(input_ids=ids).last_hidden_state
        assert torch.equal(loaded.network(input_ids=ids).last_hidden_state, expected)


def name_base(directory, base):
    """Point a saved adapter at another base, as a moved or retrained model would."""
    for file, key in (("luthier.json", "base"), ("adapter_config.json", "base_model_name_or_path")):
        settings = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps({**settings, key: str(base)}))


def test_a_retrained_base_is_another_base(tmp_path):
    save_model(tuned(), tmp_path / "model")
    name_base(tmp_path / "model", tiny_model("llama", seed=1))
    with pytest.raises(ModelError, match="this adapter is for another base: it was trained on"):
        load_model(str(tmp_path / "model"))


def test_names_tell_another_family(tmp_path):
    save_model(tuned(), tmp_path / "model")
    name_base(tmp_path / "model", tiny_model("bert"))
    (tmp_path / "model" / "luthier.json").unlink()  # as peft leaves it: no fingerprint
    with pytest.raises(ModelError, match=r"another base: .* has no linear layer model\.layers\.0"):
        load_model(str(tmp_path / "model"))


def test_other_shapes_tell(tmp_path):
    save_model(tuned("gpt2"), tmp_path / "model")
    settings = tmp_path / "model" / "adapter_model.safetensors"
    save_file(
        {name: torch.cat([one, one], 1) if "lora_A" in name else one for name, one in load_file(settings).items()},
        settings,
    )
    with pytest.raises(
        ModelError,
        match=r"another base: its layer transformer\.h\.0\.attn\.c_attn is 96 x 64, and that of .* is 96 x 32",
    ):
        load_model(str(tmp_path / "model"))


def test_a_base_that_is_gone(tmp_path):
    save_model(tuned(), tmp_path / "model")
    name_base(tmp_path / "model", tmp_path / "gone")
    with pytest.raises(ModelError, match=r"the base of this adapter cannot be found: .*gone: no such directory"):
        load_model(str(tmp_path / "model"))


def test_half_an_adapter(tmp_path):
    save_model(tuned(), tmp_path / "model")
    (tmp_path / "model" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="the adapter is not whole"):
        load_model(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda settings: [settings], "cannot be read as an adapter's settings"),
        (lambda settings: {**settings, "r": None}, "gives the rank r as None"),
        (lambda settings: {**settings, "lora_alpha": "16"}, "gives lora_alpha as '16'"),
    ],
)
def test_settings_that_are_none(tmp_path, damage, words):
    save_model(tuned(), tmp_path / "model")
    path = tmp_path / "model" / "adapter_config.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ModelError, match=words):
        load_model(str(tmp_path / "model"))


def test_it_starts_equal_to_the_last_bit():
    base = tiny_loaded("gpt2")
    loaded = tiny_loaded("gpt2")
    ADAPTERS.parse(LORA).apply(loaded)
    assert torch.equal(logits(loaded), logits(base))


def test_lora_plus_is_a_rate_for_each_b():
    for kind in ("lora", "dora", "pissa"):
        loaded = tiny_loaded("llama")
        adapter = ADAPTERS.parse({"kind": kind, "rank": 4, "ratio": 16, "tokens": ["<tool>"]})
        adapter.apply(loaded)
        names = [name for name, _ in adapter.trainable(loaded)]
        scales = adapter.scales(loaded)
        assert set(scales) == {name for name in names if name.endswith("lora_b")} and len(scales) == 14
        assert set(scales.values()) == {16.0}


def test_the_rate_of_an_embedding_is_left_alone():
    loaded = tiny_loaded("llama")
    adapter = ADAPTERS.parse({**LORA, "ratio": 16, "targets": ["embed_tokens", "lm_head"]})
    adapter.apply(loaded)
    assert adapter.scales(loaded) == {"lm_head.lora_b": 16.0}
    assert ADAPTERS.parse("full").scales(loaded) == {} == ADAPTERS.parse(LORA).scales(loaded)
