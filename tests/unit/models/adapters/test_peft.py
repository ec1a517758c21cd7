"""The adapter peft: its settings, what it takes of the context, and what it refuses."""

import sys

import pytest
import torch

from luthier.core.config import resolve
from luthier.core.errors import ConfigError, MissingExtra, ModelError
from luthier.models.adapters import ADAPTERS
from luthier.models.heads import Pooled
from luthier.models.load import load_model
from luthier.models.packed import hidden_states, packs
from luthier.models.precision import cast_weights
from luthier.models.save import save_model
from luthier.models.virtual import VirtualEmbedding, insert
from luthier.verbs.tune import Tune, tune_model
from tiny import CONTEXT, tiny_model

pytest.importorskip("peft")
# PEFT says so of every norm that is not LayerNorm, and tunes it.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
LAYERED = {
    "ia3": {},
    "vera": {"r": 4},
    "oft": {"oft_block_size": 8},
    "lokr": {"r": 2},
    "loha": {"r": 2},
    "hra": {"r": 2},
    "miss": {"r": 4},
    "ln_tuning": {},
    "fourierft": {"n_frequency": 20},
    "randlora": {"r": 4},
}
VIRTUAL = {"num_virtual_tokens": 3}
IDS = torch.tensor([[5, 30, 31, 32, 33, 34]])


def put_on(method, options=None, family="llama", **purpose):
    loaded = load_model(str(tiny_model(family)), **purpose)
    adapter = ADAPTERS.parse({"kind": "peft", "method": method, "options": options or {}})
    adapter.apply(loaded)
    return loaded, adapter


def shake(loaded, adapter):
    with torch.no_grad():
        for _, parameter in adapter.trainable(loaded):
            parameter.add_(0.02 * torch.randn_like(parameter))


@torch.no_grad()
def outputs(loaded):
    mask = torch.ones_like(IDS)
    if isinstance(loaded.module, Pooled):
        return loaded.module(IDS, mask)
    return loaded.module(input_ids=IDS, attention_mask=mask).logits


@pytest.mark.parametrize("form", ["none", "int8"])
@pytest.mark.parametrize("method", list(LAYERED))
def test_methods_on_layers(method, form, tmp_path):
    loaded, adapter = put_on(method, LAYERED[method], quantize=form)
    assert packs(loaded)
    shake(loaded, adapter)
    moved = outputs(loaded)
    hidden_states(loaded, IDS[0], [4, 2]).square().sum().backward()
    assert all(parameter.grad is not None for _, parameter in adapter.trainable(loaded))
    save_model(loaded, tmp_path / "model")
    again = load_model(str(tmp_path / "model"))
    assert torch.equal(outputs(again), moved)
    whole = load_model(str(tmp_path / "model"), quantize="none")
    adapter.merge(again)
    assert torch.allclose(outputs(again), outputs(whole), atol=1e-5)


@pytest.mark.parametrize("method", [*LAYERED, "prompt", "prefix"])
def test_what_learns_stays_in_fp32_on_a_bf16_base(method):
    loaded, adapter = put_on(method, LAYERED.get(method, VIRTUAL))
    whole = hidden_states(loaded, IDS[0], [6]).detach()
    cast_weights(loaded, "bfloat16")
    own = torch.bfloat16 if method == "ln_tuning" else torch.float32  # the norms are the base's own
    assert {parameter.dtype for _, parameter in adapter.trainable(loaded)} == {own}
    rounded = hidden_states(loaded, IDS[0], [6]).detach()
    assert rounded.dtype == torch.bfloat16
    assert float((rounded - whole).norm() / whole.norm()) < 0.03


def test_bone_is_what_miss_was_called():
    assert put_on("bone", {"r": 4})[0].spec.adapter["method"] == "bone"


def test_virtual_tokens_stand_before_each_segment():
    loaded, _ = put_on("prompt", VIRTUAL)
    first = loaded.network.get_input_embeddings().weight.shape[0]
    virtual = [first, first + 1, first + 2]
    ids, lengths, text = insert(loaded.network, IDS[0], [4, 2])
    assert ids.tolist() == [*virtual, 5, 30, 31, 32, *virtual, 33, 34]
    assert (list(lengths), text.nonzero().squeeze(1).tolist()) == ([7, 5], [3, 4, 5, 6, 10, 11])
    # A segment that continues another has them from there.
    ids, lengths, _ = insert(loaded.network, IDS[0], [4, 2], [-1, 0])
    assert (ids.tolist(), list(lengths)) == ([*virtual, 5, 30, 31, 32, 33, 34], [7, 2])


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_segment_that_continues_another(method):
    loaded, _ = put_on(method, VIRTUAL)
    with torch.no_grad():
        shared = hidden_states(loaded, torch.cat([IDS[0], IDS[0, :2]]), [4, 2, 2], [-1, 0, 0])
        alone = [hidden_states(loaded, torch.cat([IDS[0, :4], end]), [6])[4:] for end in (IDS[0, 4:], IDS[0, :2])]
    assert torch.allclose(shared[4:], torch.cat(alone), atol=1e-5)


def test_vectors_are_looked_up_and_learn():
    learned = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    base = torch.nn.Embedding(4, 2).requires_grad_(False)
    embedding = VirtualEmbedding(base, torch.nn.Identity(), lambda: learned, 2)
    found = embedding(torch.tensor([[5, 1, 4, 5]]))
    assert torch.equal(found[0], torch.stack([learned[1], base.weight[1], learned[0], learned[1]]))
    found.sum().backward()
    assert learned.grad.tolist() == [[1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_take_room_in_the_context(method, tmp_path):
    loaded, _ = put_on(method, VIRTUAL)
    assert (loaded.spec.max_length, loaded.renderer.max_length) == (CONTEXT - 3, CONTEXT - 3)
    save_model(loaded, tmp_path / "model")
    assert load_model(str(tmp_path / "model")).renderer.max_length == CONTEXT - 3
    (tmp_path / "model" / "luthier.json").unlink()  # as peft leaves it
    assert load_model(str(tmp_path / "model")).renderer.max_length == CONTEXT - 3
    with pytest.raises(ConfigError, match="127 virtual tokens leave nothing of the model's context of 128 tokens"):
        put_on(method, {"num_virtual_tokens": 127})


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "modernbert", "opt"])
@pytest.mark.parametrize("method", ["ia3", "prompt"])
def test_classifiers(method, family, tmp_path):
    options = {"prompt": VIRTUAL}.get(method)
    loaded, adapter = put_on(method, options, family, task="classify", labels=("a", "b"))
    shake(loaded, adapter)
    before = outputs(loaded)
    with torch.no_grad():
        states = hidden_states(loaded, IDS[0], [6])
        assert states.shape == (6, 32)
        assert torch.allclose(loaded.module.score(states, [6]), before, atol=1e-5)
    save_model(loaded, tmp_path / "model")
    assert torch.equal(outputs(load_model(str(tmp_path / "model"))), before)


def test_an_adapter_of_a_language_model_carries_a_classifier(tmp_path):
    loaded, adapter = put_on("ia3")
    shake(loaded, adapter)
    save_model(loaded, tmp_path / "model")
    body = load_model(str(tmp_path / "model"), task="classify", labels=("a", "b")).network
    with torch.no_grad():
        expected = loaded.network.base_model(input_ids=IDS).last_hidden_state
        assert torch.equal(body(input_ids=IDS).last_hidden_state, expected)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["ia3", "prompt", "prefix", "ln_tuning"])
def test_it_learns_and_learns_on(method, precision):
    rows = [
        {"messages": [{"role": "user", "content": f"say {at}"}, {"role": "assistant", "content": f"{at}!"}]}
        for at in range(8)
    ]
    quick = {"steps": 8, "learning_rate": 0.1, "batch_size": 8, "baselines": False, "schedule": "constant"}
    data = {"train": rows, "split": {"validation": 0.0}}
    adapter = {"kind": "peft", "method": method, "options": VIRTUAL if method in ("prompt", "prefix") else {}}

    def losses(**settings):
        events = []
        asked = {
            "model": str(tiny_model("qwen2")),
            "objective": "sft",
            "data": data,
            "adapter": adapter,
            "precision": precision,
            **quick,
        }
        tune_model(resolve(Tune, values=asked | settings), sinks=[events.append])
        return [event["loss"] for event in events if event["event"] == "step"]

    first = losses(name="one")
    assert first[-1] < first[0] - 0.01
    assert losses(model="run:one", steps=1)[0] < first[-1] + 0.01
    with pytest.raises(ConfigError, match=f"already holds an adapter of the kind {method}"):
        losses(model="run:one", adapter={"kind": "peft", "method": "vera"})


def test_what_made_the_vectors_is_not_in_the_files(tmp_path):
    loaded, adapter = put_on("p_tuning", {**VIRTUAL, "encoder_hidden_size": 16})
    save_model(loaded, tmp_path / "model")
    with pytest.raises(ConfigError, match="holds the vectors that p_tuning made, and not what made them"):
        adapter.apply(load_model(str(tmp_path / "model")))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_what_stands_before_the_text_is_not_merged(method, tmp_path):
    loaded, adapter = put_on(method, VIRTUAL)
    save_model(loaded, tmp_path / "model")
    for part in (adapter.merge, ADAPTERS.parse("full").apply):
        with pytest.raises(ConfigError, match="cannot be folded into the weights: it stands before the text"):
            part(load_model(str(tmp_path / "model")))


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("ia4", {}, "PEFT knows no method 'ia4'; did you mean 'ia3'"),
        ("lora", {}, "lora is the adapter kind 'lora' here"),
        ("adalora", {}, "adalora moves its ranks between steps by a schedule of its own"),
        ("vera", {"rr": 3}, "vera has no option 'rr'"),
        ("prompt", {"num_virtual_token": 3}, "has no option 'num_virtual_token'; did you mean 'num_virtual_tokens'"),
        ("prefix", {}, "prefix_tuning learns vectors that stand before the text; say how many"),
        ("ia3", {"peft_type": "LORA"}, "has no option 'peft_type'"),
        ("vera", {"r": -1}, "vera does not (take these options|go with)"),
        ("vera", {"target_modules": ["nowhere"]}, "vera does not go with .* a llama model: No layers"),
        ("miss", {"r": 64}, "miss does not go with .*, a llama model: .*in_features"),
    ],
)
def test_mistakes_are_one_sentence(method, options, said):
    with pytest.raises(ConfigError, match=said) as mistake:
        put_on(method, options)
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_prefix_is_for_decoders(family):
    with pytest.raises(ConfigError, match=r"a prefix is put into the cache of a decoder, and .* is an encoder"):
        put_on("prefix", VIRTUAL, family)


def test_the_package_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"pip install 'luthier\[peft\]'"):
        put_on("ia3")


def test_an_adapter_for_another_base(tmp_path):
    loaded, _ = put_on("ia3")
    save_model(loaded, tmp_path / "model")
    for name in ("luthier.json", "adapter_config.json"):
        path = tmp_path / "model" / name
        path.write_text(path.read_text().replace(str(tiny_model("llama")), str(tiny_model("llama", seed=1))))
    with pytest.raises(ModelError, match="this adapter is for another base: it was trained on"):
        load_model(str(tmp_path / "model"))
    (tmp_path / "model" / "adapter_model.safetensors").unlink()
    (tmp_path / "model" / "luthier.json").unlink()
    with pytest.raises(ModelError, match="the adapter is not whole"):
        load_model(str(tmp_path / "model"))
