"""Merging: in the base's full precision, or not at all."""

import pytest
import torch
from safetensors.torch import load_file

from luthier.core.errors import ConfigError, ModelError
from luthier.models.adapters import ADAPTERS
from luthier.models.load import load_model
from luthier.models.precision import cast_weights
from luthier.models.save import save_model
from luthier.verbs.merge import merge
from tiny import tiny_loaded, tiny_model

IDS = torch.tensor([[5, 30, 31, 32, 33, 34]])


@torch.no_grad()
def logits(loaded):
    return loaded.module(input_ids=IDS).logits


def tuned(kind, source=None):
    """A model as a tuning in bf16 leaves it: the base rounded, the adapter in fp32."""
    loaded = load_model(str(source or tiny_model("llama")))
    part = ADAPTERS.parse({"kind": kind, "rank": 4, "tokens": ["<tool>"], "also": ["norm"]})
    part.apply(loaded)
    named = part.trainable(loaded)
    cast_weights(loaded, "bfloat16")
    with torch.no_grad():
        for name, parameter in named:
            # As small as what a short tuning learns.
            parameter.add_((0.02 if "lora_b" in name else 0.002) * torch.randn_like(parameter))
    return loaded, part


def test_full_tuning_of_a_rounded_adapter_starts_from_the_full_precision(tmp_path):
    loaded, _ = tuned("lora")
    save_model(loaded, tmp_path / "adapter")
    again = load_model(str(tmp_path / "adapter"))
    assert again.network.dtype == torch.bfloat16
    ADAPTERS.parse("full").apply(again)
    expected = logits(load_model(str(tmp_path / "adapter"), dtype="float32"))
    assert torch.allclose(logits(again), expected, atol=1e-5)


def test_a_base_that_is_gone_or_changed(tmp_path):
    base = tiny_loaded("llama")
    save_model(base, tmp_path / "base")
    loaded, part = tuned("lora", tmp_path / "base")
    other, _ = tuned("lora", tmp_path / "base")
    save_model(load_model(str(tiny_model("llama", seed=1))), tmp_path / "base")
    with pytest.raises(ModelError, match="now holds another model"):
        part.merge(loaded)
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(ModelError, match="cannot be read again in full precision"):
        part.merge(other)


def test_verb(tmp_path):
    loaded, _ = tuned("dora")
    save_model(loaded, tmp_path / "adapter")
    made = merge(model=str(tmp_path / "adapter"), output=tmp_path / "whole")
    assert made["dtype"] == "float32" and made["difference"] < 1e-5 and made["rounding"] < 1e-5
    expected = logits(load_model(str(tmp_path / "adapter"), dtype="float32"))
    assert torch.allclose(logits(load_model(str(tmp_path / "whole"))), expected, atol=1e-5)
    with pytest.raises(ConfigError, match="exists and is not empty"):
        merge(model=str(tmp_path / "adapter"), output=tmp_path / "whole")
    with pytest.raises(ConfigError, match="holds no adapter"):
        merge(model=str(tmp_path / "whole"), output=tmp_path / "twice")


def test_verb_keeps_the_precision_of_the_bases_files(tmp_path):
    save_model(tiny_loaded("llama"), tmp_path / "base", dtype="bfloat16")
    loaded, _ = tuned("lora", tmp_path / "base")
    save_model(loaded, tmp_path / "adapter")
    made = merge(model=str(tmp_path / "adapter"), output=tmp_path / "whole")
    assert made["dtype"] == "bfloat16" and made["difference"] < 1e-5 < made["rounding"] < 0.05
    held = load_file(tmp_path / "whole" / "model.safetensors")
    assert {one.dtype for one in held.values()} == {torch.bfloat16}
    made = merge(model=str(tmp_path / "adapter"), output=tmp_path / "fine", dtype="float32")
    assert made["rounding"] < 1e-5


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa"])
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_an_adapter_over_a_quantised_base_is_merged_into_the_full_one(form, kind, tmp_path):
    part = ADAPTERS.parse({"kind": kind, "rank": 4})
    loaded = load_model(str(tiny_model("llama")), quantize=form, unquantised=part.reads_base)
    part.apply(loaded)
    with torch.no_grad():
        for name, parameter in part.trainable(loaded):
            parameter.add_((0.02 if "lora_b" in name else 0.002) * torch.randn_like(parameter))
    save_model(loaded, tmp_path / "adapter")
    found = merge(model=str(tmp_path / "adapter"), output=tmp_path / "whole", dtype="float32")
    assert found["difference"] <= 1e-4
    beside = load_model(str(tmp_path / "adapter"), dtype="float32", quantize="none")
    assert torch.allclose(logits(load_model(str(tmp_path / "whole"))), logits(beside), atol=1e-5)
