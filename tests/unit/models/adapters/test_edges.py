"""Adapters on the embedding and the output layer, rows of added tokens, modules that learn whole; tied weights."""

import pytest
import torch

from adapted import EDGES, IDS, TOKENS, logits
from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.models.adapters import ADAPTERS
from luthier.models.adapters.inject import LoraEmbedding
from luthier.models.adapters.tokens import token_layers
from luthier.models.cross_entropy import token_loss
from luthier.models.load import load_model
from luthier.models.output import head_of
from luthier.models.packed import hidden_states
from luthier.models.save import save_model
from tiny import tiny_loaded, tiny_model

TIED, UNTIED = "qwen2", "llama"


def tuned(family, adapter, **purpose):
    """A model whose adapter does something, the frozen weights as they were."""
    loaded = load_model(str(tiny_model(family)), **purpose)
    part = ADAPTERS.parse({"kind": "lora", "rank": 4, "targets": ["q_proj"], **adapter})
    part.apply(loaded)
    with torch.no_grad():
        for _, parameter in part.trainable(loaded):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return loaded, part


@pytest.mark.parametrize("family", [TIED, UNTIED])
@pytest.mark.parametrize("adapter", EDGES)
def test_the_loss_honours_what_is_on_the_head(family, adapter):
    """The loss from hidden states is that of the model's own forward, and so are its gradients."""
    loaded, part = tuned(family, adapter)
    named = part.trainable(loaded)
    ids = torch.tensor([5, 30, len(loaded.tokenizer) - 1, 32, len(loaded.tokenizer) - 2, 34])
    own = loaded.module(input_ids=ids[None], labels=ids[None]).loss * (len(ids) - 1)
    theirs = torch.autograd.grad(own, [one for _, one in named])
    states = hidden_states(loaded, ids, [len(ids)])
    ours = token_loss(head_of(loaded), states[:-1], ids[1:], torch.ones(len(ids) - 1))
    assert torch.allclose(ours, own, rtol=1e-5)
    mine = torch.autograd.grad(ours, [one for _, one in named])
    for (name, _), one, other in zip(named, mine, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-5), name


def weights_of(loaded):
    return loaded.network.get_input_embeddings().weight, loaded.network.get_output_embeddings().weight


def test_merging_one_of_two_tied_layers_parts_them():
    loaded, part = tuned(TIED, {"targets": ["lm_head"]})
    embedding = weights_of(loaded)[0].detach().clone()
    part.merge(loaded)
    one, other = weights_of(loaded)
    assert torch.equal(one, embedding) and not torch.equal(other, embedding)
    assert loaded.network.config.tie_word_embeddings is False


@pytest.mark.parametrize("adapter", [{"tokens": TOKENS}, {"also": ["embed_tokens"]}, {"also": ["lm_head"]}])
def test_tied_layers_stay_tied_where_they_learn_as_one(adapter, tmp_path):
    loaded, part = tuned(TIED, adapter)
    save_model(loaded, tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"))
    part.merge(loaded)
    one, other = weights_of(loaded)
    assert one is other and loaded.network.config.tie_word_embeddings is True


@pytest.mark.parametrize("family", [TIED, UNTIED])
def test_only_the_rows_of_tokens_learn(family):
    plain = tiny_loaded(family)
    loaded, part = tuned(family, {"tokens": TOKENS})
    names = [name for name, _ in part.trainable(loaded) if "lora_rows" in name]
    assert len(names) == (1 if family == TIED else 2)
    assert all(one.shape == (2, 32) for name, one in part.trainable(loaded) if name in names)
    part.merge(loaded)
    for before, after in zip(weights_of(plain), weights_of(loaded)):
        assert after.shape == (402, 32) and torch.equal(after[:400], before)


def test_new_rows_start_as_the_mean_of_their_pieces():
    loaded = load_model(str(tiny_model(UNTIED)))
    before, alone = logits(loaded), load_model(str(tiny_model(UNTIED)))
    pieces = loaded.tokenizer("<tool>", add_special_tokens=False)["input_ids"]
    ADAPTERS.parse({"kind": "lora", "tokens": ["<tool>", "e"]}).apply(loaded)
    for (_, layer), weight in zip(token_layers(loaded.network), weights_of(alone), strict=True):
        assert torch.allclose(layer.rows[0], weight[pieces].mean(0), atol=1e-6)
        assert torch.equal(layer.rows[1], weight[loaded.tokenizer.convert_tokens_to_ids("e")])  # known: not added
    assert len(loaded.tokenizer) == 401
    assert torch.allclose(logits(loaded)[:, :400], before, atol=1e-6)
    assert loaded.tokenizer("<tool>", add_special_tokens=False)["input_ids"] == [400]


def test_a_classifier_learns_tokens(tmp_path):
    loaded = load_model(str(tiny_model("bert")), task="classify", labels=("a", "b"))
    ADAPTERS.parse({"kind": "lora", "tokens": TOKENS}).apply(loaded)
    ids = torch.tensor([[5, len(loaded.tokenizer) - 2, len(loaded.tokenizer) - 1]])
    with torch.no_grad():
        expected = loaded.module(ids, torch.ones_like(ids))
        save_model(loaded, tmp_path / "model")
        again = load_model(str(tmp_path / "model"))
        assert torch.equal(again.module(ids, torch.ones_like(ids)), expected)


@pytest.mark.parametrize("adapter", [{"tokens": TOKENS}, {"targets": ["q_proj", "lm_head"]}, {"also": ["lm_head"]}])
def test_a_classifier_leaves_the_part_of_the_output_layer_out_and_says_so(adapter, tmp_path):
    language, _ = tuned(UNTIED, adapter)
    save_model(language, tmp_path / "model")
    events = Events()
    loaded = load_model(str(tmp_path / "model"), task="classify", labels=("a", "b"), events=events)
    assert [text for text in events.warnings if "part for the output layer is left out" in text]
    with torch.no_grad():
        expected = language.module.base_model(input_ids=IDS[None]).last_hidden_state
        assert torch.equal(loaded.network(input_ids=IDS[None]).last_hidden_state, expected)


def test_a_models_precision_stays_that_of_its_base():
    for adapter in ({"targets": ["embed_tokens"]}, {"tokens": TOKENS}):
        loaded = load_model(str(tiny_model(UNTIED)), dtype="bfloat16")
        ADAPTERS.parse({"kind": "lora", **adapter}).apply(loaded)
        assert loaded.network.dtype == torch.bfloat16 == logits(loaded).dtype


def test_embeddings_that_are_multiplied():
    """BART's and Gemma 3's embeddings scale what they give: the adapter's part is scaled too."""
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    base = BartScaledWordEmbedding(10, 6, 0, embed_scale=3.0)
    layer = LoraEmbedding(base, 2, 4)
    layer.lora_a.data.normal_()
    ids = torch.tensor([[1, 4, 4]])
    y = layer(ids)
    assert torch.allclose(y, 3 * (base.weight[ids] + 2 * (layer.lora_b @ layer.lora_a).T[ids]), atol=1e-5)
    assert torch.allclose(layer.merged()(ids), y, atol=1e-5)


REFUSED = [
    ("llama", {"tokens": TOKENS, "targets": ["lm_head"]}, r"adapter\.targets: lm_head holds the rows"),
    ("llama", {"tokens": TOKENS, "also": ["lm_head"]}, r"adapter\.also: lm_head holds the rows"),
    ("llama", {"also": ["lm_head"], "targets": ["lm_head"]}, r"adapter\.also: lm_head is among adapter\.targets too"),
    ("llama", {"also": ["lm_heads"]}, r"adapter\.also: no module is called 'lm_heads'; did you mean 'lm_head'"),
    ("llama", {"tokens": ["<a>", "<a>"]}, r"adapter\.tokens: each token must be given once"),
    ("t5", {"targets": ["lm_head"]}, r"lm_head of a t5 model shares its weights"),
    ("bart", {"targets": "all-linear", "also": ["shared"]}, r"shared of a bart model shares its weights"),
]


@pytest.mark.parametrize(("family", "adapter", "words"), REFUSED)
def test_refused(family, adapter, words):
    with pytest.raises(ConfigError, match=words):
        tuned(family, adapter)
