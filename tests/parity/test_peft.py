"""LoRA against the PEFT library: its files load here, ours load there, with equal logits."""

import json

import pytest
import torch

from luthier.core.errors import ConfigError, ModelError
from luthier.models.adapters import ADAPTERS
from luthier.models.load import AUTO_CLASSES, load_model
from luthier.models.quiet import quiet
from luthier.models.save import save_model
from tiny import ALL_FAMILIES, NATURAL_TASK, kind_of, tiny_model

peft = pytest.importorskip("peft")
# Between peft and transformers, and no matter of ours.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def base_network(family):
    with quiet():
        return AUTO_CLASSES[NATURAL_TASK[kind_of(family)]].from_pretrained(tiny_model(family)).eval()


@torch.no_grad()
def logits(network, kind):
    ids = torch.tensor([[5, 30, 31, 32, 33, 34]])
    decoder = {"decoder_input_ids": ids[:, :3]} if kind == "encoder-decoder" else {}
    return network(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder).logits


def shake(network):
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_ours_loads_in_peft(family, tmp_path):
    loaded = load_model(str(tiny_model(family)))
    ADAPTERS.parse({"kind": "lora", "rank": 4, "alpha": 8, "rslora": family == "llama"}).apply(loaded)
    shake(loaded.module)
    save_model(loaded, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base_network(family), tmp_path / "ours").eval()
    assert torch.allclose(logits(theirs, kind_of(family)), logits(loaded.module, kind_of(family)), atol=1e-5)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_peft_loads_here(family, tmp_path):
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "use_rslora": family == "qwen3"}
    settings["fan_in_fan_out"] = family == "gpt2"
    theirs = peft.get_peft_model(base_network(family), peft.LoraConfig(**settings)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_model(str(tmp_path / "theirs"))
    assert loaded.spec.adapter["rank"] == 4
    assert torch.allclose(logits(loaded.module, kind_of(family)), logits(theirs, kind_of(family)), atol=1e-5)
    # And out again, for peft.
    save_model(loaded, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(base_network(family), tmp_path / "again").eval()
    assert torch.allclose(logits(again, kind_of(family)), logits(theirs, kind_of(family)), atol=1e-5)


def test_ranks_by_layer(tmp_path):
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 3}}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], **patterns)
    theirs = peft.get_peft_model(base_network("llama"), config).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_model(str(tmp_path / "theirs"))
    assert torch.allclose(logits(loaded.module, "decoder"), logits(theirs, "decoder"), atol=1e-5)
    save_model(loaded, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base_network("llama"), tmp_path / "ours").eval()
    assert torch.allclose(logits(again, "decoder"), logits(theirs, "decoder"), atol=1e-5)


def test_the_body_of_a_classifier_loads_in_peft(tmp_path):
    loaded = load_model(str(tiny_model("bert")), task="classify", labels=("a", "b"))
    ADAPTERS.parse("lora").apply(loaded)
    shake(loaded.module)
    save_model(loaded, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base_network("bert").base_model, tmp_path / "ours").eval()
    ids = torch.tensor([[5, 30, 31]])
    with torch.no_grad():
        expected = loaded.network(input_ids=ids).last_hidden_state
        assert torch.allclose(theirs(input_ids=ids).last_hidden_state, expected, atol=1e-6)


def test_dora_is_refused(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    peft.get_peft_model(base_network("llama"), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ModelError, match="use_dora is set"):
        load_model(str(tmp_path / "theirs"))


def test_full_layers_beside_the_adapter_are_refused(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft.get_peft_model(base_network("llama"), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ModelError, match="is no LoRA matrix of a linear layer"):
        load_model(str(tmp_path / "theirs"))


def test_kinds_of_adapter_that_cannot_be_used_are_refused(tmp_path):
    settings = {"peft_type": "CARTRIDGE", "base_model_name_or_path": str(tiny_model("llama"))}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="cartridge is distilled from a long text, not tuned on rows"):
        load_model(str(tmp_path))
