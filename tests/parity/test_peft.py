"""LoRA against the PEFT library: its files load here, ours load there, with equal logits."""

import json

import pytest
import torch

from luthier.core.errors import ConfigError, ModelError
from luthier.core.events import Events
from luthier.models.adapters import ADAPTERS
from luthier.models.adapters.additions import read_additions
from luthier.models.adapters.inject import lora_layers
from luthier.models.load import AUTO_CLASSES, load_model
from luthier.models.quantised.network import plain_name, quantised_layers
from luthier.models.quiet import quiet
from luthier.models.save import save_model
from tiny import ALL_FAMILIES, NATURAL_TASK, kind_of, tiny_loaded, tiny_model

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
    loaded = tiny_loaded(family)
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


@pytest.mark.parametrize("missing", [("lora_alpha",), ("r", "lora_alpha"), ("r",)])
def test_what_the_settings_leave_out_is_as_for_peft(missing, tmp_path):
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"]}
    # PEFT's own, where the file says nothing.
    config = peft.LoraConfig(**{name: value for name, value in settings.items() if name not in missing})
    theirs = peft.get_peft_model(base_network("llama"), config).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_config.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in kept.items() if name not in missing}))
    again = peft.PeftModel.from_pretrained(base_network("llama"), tmp_path / "theirs").eval()
    events = Events()
    loaded = load_model(str(tmp_path / "theirs"), events=events)
    assert torch.allclose(logits(again, "decoder"), logits(theirs, "decoder"))
    assert torch.allclose(logits(loaded.module, "decoder"), logits(theirs, "decoder"), atol=1e-5)
    # And that is said: of a model alone, and of an adapter beside its base.
    said = [f"adapter_config.json does not say {name}, so it is 8, as for PEFT" for name in ("r", "lora_alpha")]
    said = [one for one in said if any(f" {name}," in one for name in missing)]
    assert events.warnings == {f"{tmp_path / 'theirs'}: {one}": 1 for one in said}
    beside = read_additions(load_model(str(tiny_model("llama"))), tmp_path / "theirs")
    assert beside.notes[: len(said)] == tuple(f"{tmp_path / 'theirs'}: {one}" for one in said)
    assert not any("as for PEFT" in one for one in beside.notes[len(said) :])
    (scale,) = {one.scale for one in beside.layers.values()}
    assert scale == kept["lora_alpha"] / kept["r"]
    if "r" in missing:
        path.write_text(json.dumps({**kept, "r": 4}))
        with pytest.raises(
            ModelError, match=r"have the rank 8, and adapter_config\.json says 4; the files do not belong"
        ):
            load_model(str(tmp_path / "theirs"))


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


def ours(family, adapter, **purpose):
    """A model here with an adapter that does something, and no two layers the same."""
    loaded = load_model(str(tiny_model(family)), **purpose)
    part = ADAPTERS.parse(adapter)
    part.apply(loaded)
    with torch.no_grad():
        for _, parameter in part.trainable(loaded):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return loaded


def in_peft(family, directory, rows=None):
    network = base_network(family)
    if rows is not None:
        with torch.random.fork_rng():
            network.resize_token_embeddings(rows, mean_resizing=False)
    return peft.PeftModel.from_pretrained(network, directory).eval()


def learned_in_peft(network, **settings):
    """A model of peft's, whatever learns in it shaken."""
    theirs = peft.get_peft_model(network, peft.LoraConfig(r=4, lora_alpha=12, **settings)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return theirs


def goes_both_ways(family, loaded, directory, rows=None):
    """Saved here, it is the same in peft, and here again."""
    save_model(loaded, directory)
    expected = logits(loaded.module, kind_of(family))
    assert torch.allclose(logits(in_peft(family, directory, rows), kind_of(family)), expected, atol=1e-5)
    again = load_model(str(directory))
    assert torch.equal(logits(again.module, kind_of(family)), expected)
    return again


def comes_from_peft(family, theirs, directory, rows=None):
    """Saved in peft, it is the same here, and there again."""
    theirs.save_pretrained(directory / "theirs")
    loaded = load_model(str(directory / "theirs"))
    assert torch.allclose(logits(loaded.module, kind_of(family)), logits(theirs, kind_of(family)), atol=1e-5)
    goes_both_ways(family, loaded, directory / "ours", rows)
    return loaded


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_dora(family, tmp_path):
    loaded = ours(family, {"kind": "dora", "rank": 4, "alpha": 8, "rslora": family == "llama"})
    goes_both_ways(family, loaded, tmp_path / "ours")
    settings = {"target_modules": "all-linear", "use_dora": True, "fan_in_fan_out": family == "gpt2"}
    found = comes_from_peft(family, learned_in_peft(base_network(family), **settings), tmp_path)
    assert found.spec.adapter["kind"] == "dora"


def test_dora_learns_as_in_peft(tmp_path):
    loaded = ours("llama", {"kind": "dora", "rank": 4, "alpha": 8})
    save_model(loaded, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base_network("llama"), tmp_path / "ours", is_trainable=True)
    ids = torch.tensor([[5, 30, 31, 32, 33, 34]])
    for network in (loaded.module, theirs):
        network(input_ids=ids, labels=ids).loss.backward()
    grads = {name: one.grad for name, one in theirs.named_parameters() if one.grad is not None}
    for name, layer in lora_layers(loaded.module):
        layer_name = f"base_model.model.{name}"
        assert torch.allclose(layer.lora_a.grad, grads[f"{layer_name}.lora_A.default.weight"], atol=1e-6)
        assert torch.allclose(layer.lora_b.grad, grads[f"{layer_name}.lora_B.default.weight"], atol=1e-6)
        magnitude = grads[f"{layer_name}.lora_magnitude_vector.default.weight"]
        assert torch.allclose(layer.lora_magnitude.grad, magnitude, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_pissa_loads_in_peft_on_the_base_as_it_was(family, rslora, tmp_path):
    loaded = ours(family, {"kind": "pissa", "rank": 4, "alpha": 8, "rslora": rslora})
    again = goes_both_ways(family, loaded, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["r"] == 8
    assert again.spec.adapter["kind"] == "pissa" and again.spec.adapter["rank"] == 4


def test_pissa_starts_as_in_peft():
    loaded = tiny_loaded("llama")
    ADAPTERS.parse({"kind": "pissa", "rank": 4, "alpha": 8}).apply(loaded)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(base_network("llama"), config)
    layer = dict(lora_layers(loaded.module))["model.layers.1.self_attn.q_proj"]
    other = theirs.base_model.model.model.layers[1].self_attn.q_proj
    assert torch.allclose(layer.weight, other.base_layer.weight, atol=1e-5)
    product = other.lora_B["default"].weight @ other.lora_A["default"].weight
    assert torch.allclose(layer.lora_b @ layer.lora_a, product, atol=1e-5)


@pytest.mark.parametrize("family, embedding", [("llama", "embed_tokens"), ("gemma", "embed_tokens"), ("gpt2", "wte")])
@pytest.mark.filterwarnings(
    "ignore:.*tie_word_embeddings:UserWarning",
    "ignore:.*save_embedding_layers:UserWarning",
    "ignore:fan_in_fan_out is set:UserWarning",
)
def test_embeddings_and_heads(family, embedding, tmp_path):
    for names in ([embedding], ["lm_head"], [embedding, "lm_head"]):
        targets = [*names, "c_attn" if family == "gpt2" else "q_proj"]
        place = tmp_path / "-".join(names)
        goes_both_ways(family, ours(family, {"kind": "lora", "rank": 4, "alpha": 8, "targets": targets}), place)
        if family == "llama" or len(names) == 1:  # peft cannot save both where they are tied
            settings = {"target_modules": targets, "fan_in_fan_out": family == "gpt2"}
            comes_from_peft(family, learned_in_peft(base_network(family), **settings), place)


TOKENS = ["<tool>", "<answer>", "e"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "gemma", "t5", "bart"])
def test_added_tokens(family, tmp_path):
    loaded = ours(family, {"kind": "lora", "rank": 4, "tokens": TOKENS})
    rows = len(loaded.tokenizer)
    assert logits(loaded.module, kind_of(family)).shape[-1] == rows == 402
    again = goes_both_ways(family, loaded, tmp_path / "ours", rows)
    assert again.tokenizer.convert_tokens_to_ids("<tool>") == rows - 2
    ids = torch.tensor([[5, rows - 2, rows - 1, 31]])
    if kind_of(family) == "decoder":
        theirs = in_peft(family, tmp_path / "ours", rows)
        with torch.no_grad():
            assert torch.allclose(theirs(input_ids=ids).logits, again.module(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning")
def test_tokens_added_in_peft(family, tmp_path):
    network = base_network(family)
    network.resize_token_embeddings(402, mean_resizing=False)
    indices = [400, 401, 7]
    settings = {"embed_tokens": indices, "lm_head": indices} if family == "llama" else indices
    theirs = learned_in_peft(network, target_modules=["q_proj"], trainable_token_indices=settings)
    comes_from_peft(family, theirs, tmp_path, rows=402)


def test_tokens_of_the_embedding_alone(tmp_path):
    theirs = learned_in_peft(base_network("llama"), target_modules=["q_proj"], trainable_token_indices=[5, 7])
    comes_from_peft("llama", theirs, tmp_path)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning", "ignore:.*save_embedding_layers:UserWarning")
def test_an_embedding_resized_in_peft_and_adapted(tmp_path):
    network = base_network("llama")
    network.resize_token_embeddings(402, mean_resizing=False)
    theirs = learned_in_peft(network, target_modules=["q_proj", "embed_tokens", "lm_head"])
    comes_from_peft("llama", theirs, tmp_path, rows=402)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_modules_learned_whole(family, names, tmp_path):
    loaded = ours(family, {"kind": "lora", "rank": 4, "also": names})
    goes_both_ways(family, loaded, tmp_path / "ours")
    comes_from_peft(
        family,
        learned_in_peft(base_network(family), target_modules=["q_proj"], modules_to_save=names),
        tmp_path,
    )


def test_a_norm_learned_whole(tmp_path):
    loaded = ours("llama", {"kind": "lora", "rank": 4, "also": ["input_layernorm"]})
    goes_both_ways("llama", loaded, tmp_path / "ours")


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning")
def test_dora_of_an_embedding_is_refused(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], use_dora=True)
    peft.get_peft_model(base_network("llama"), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ModelError, match=r"use_dora is set for the embedding model\.embed_tokens"):
        load_model(str(tmp_path / "theirs"))


def test_kinds_of_adapter_that_cannot_be_used_are_refused(tmp_path):
    settings = {"peft_type": "CARTRIDGE", "base_model_name_or_path": str(tiny_model("llama"))}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="cartridge is distilled from a long text, not tuned on rows"):
        load_model(str(tmp_path))


def quantised(kind, form):
    part = ADAPTERS.parse({"kind": kind, "rank": 4, "alpha": 8})
    loaded = load_model(str(tiny_model("llama")), quantize=form, unquantised=part.reads_base)
    part.apply(loaded)
    shake(loaded.module)
    return loaded


def rebuilt_network(loaded):
    """A plain network whose weights are those that the quantised layers of `loaded` amount to."""
    network = base_network("llama")
    for name, layer in quantised_layers(loaded.network):
        network.get_submodule(plain_name(name)).weight.data = layer.weight
    return network


@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_over_a_quantised_base_ours_is_pefts_over_the_weights_it_amounts_to(kind, form, tmp_path):
    loaded = quantised(kind, form)
    save_model(loaded, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(rebuilt_network(loaded), tmp_path / "ours").eval()
    assert torch.allclose(logits(theirs, "decoder"), logits(loaded.module, "decoder"), atol=1e-5)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_pissa_over_a_quantised_rest(form, tmp_path):
    """PEFT's own QPiSSA is a LoRA of the learned matrices over a quantised residual model that is saved apart. Its files for
    the base as it was hold the difference, of twice the rank: over the base in full they give what merging gives."""
    loaded = quantised("pissa", form)
    residual = rebuilt_network(loaded)
    theirs = peft.get_peft_model(residual, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).eval()
    held = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for name, layer in lora_layers(loaded.network):
            held[name].lora_A["default"].weight.copy_(layer.lora_a)
            held[name].lora_B["default"].weight.copy_(layer.lora_b)
    assert torch.allclose(logits(theirs, "decoder"), logits(loaded.module, "decoder"), atol=1e-5)

    save_model(loaded, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["r"] == 8
    theirs = peft.PeftModel.from_pretrained(base_network("llama"), tmp_path / "ours").eval()
    ADAPTERS.parse("pissa").merge(loaded)
    assert torch.allclose(logits(theirs, "decoder"), logits(loaded.module, "decoder"), atol=1e-5)
