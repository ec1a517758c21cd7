"""Methods of the PEFT library here, against PEFT's own model in a plain loop: losses, files and written texts."""

import pytest
import torch

from luthier.core.config import resolve
from luthier.core.events import Events
from luthier.engine.generate import generate
from luthier.engine.sampling import Sampling
from luthier.models.adapters import ADAPTERS
from luthier.models.load import AUTO_CLASSES, load_model
from luthier.models.quiet import quiet
from luthier.models.save import save_model
from luthier.verbs.tune import Tune, encode_for, tune_model
from tiny import NATURAL_TASK, kind_of, tiny_model

peft = pytest.importorskip("peft")
# Between peft and transformers, and no matter of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]
METHODS = {
    "ia3": {},
    "vera": {"r": 4},
    "oft": {"oft_block_size": 8},
    "lokr": {"r": 2},
    "prompt": {"num_virtual_tokens": 3},
    "p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "prefix": {"num_virtual_tokens": 3},
}
TEXTS = [
    "Win a free prize now!",
    "Ok, see you at the station at seven.",
    "The capital of France is Paris.",
    "One two three",
]
STEPS = 3
# Learned vectors are far from the loss in a random model, and their gradients small.
RATES = {"prompt": 200.0, "prefix": 5.0, "vera": 20.0}


def start(method, family, path):
    """A directory with an adapter that does something, for both to begin with."""
    torch.manual_seed(1)
    loaded = load_model(str(tiny_model(family)))
    adapter = ADAPTERS.parse({"kind": "peft", "method": method, "options": METHODS[method]})
    adapter.apply(loaded)
    with torch.no_grad():
        for _, parameter in adapter.trainable(loaded):
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_model(loaded, path)
    return loaded


def theirs(family, path, trainable=False):
    with quiet():
        base = AUTO_CLASSES[NATURAL_TASK[kind_of(family)]].from_pretrained(tiny_model(family)).eval()
        return peft.PeftModel.from_pretrained(base, path, is_trainable=trainable).eval()


def asked(method, path):
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[:12]}]} for text in TEXTS
    ]
    values = {
        "model": str(path),
        "data": {"train": rows, "split": {"validation": 0.0}},
        "objective": "sft",
        "adapter": {"kind": "peft", "method": method, "options": METHODS[method]},
        "optimizer": {"kind": "sgd", "momentum": 0.0},
        "schedule": {"kind": "constant", "warmup": 0},
        "steps": STEPS,
        "batch_size": len(TEXTS),
        "learning_rate": RATES.get(method, 0.5),
        "clip": 0.0,
        "by_length": False,
        "baselines": False,
    }
    return resolve(Tune, values=values)


def their_losses(family, path, rows, rate):
    """Mean loss of each step of SGD on encoded rows, padded on the right, by PEFT's model in a plain loop."""
    model = theirs(family, path)
    model.peft_config["default"].inference_mode = False
    # PEFT opens its methods on layers when it is asked to, and refuses to open learned vectors, which it can train.
    learned = [one for name, one in model.named_parameters() if "default" in name and one.is_floating_point()]
    for parameter in learned:
        parameter.requires_grad_(True)
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows])
    weights = torch.tensor([[*row.weights, *[0.0] * (width - len(row.ids))] for row in rows])
    labels = ids.masked_fill(weights == 0, -100)
    engine = torch.optim.SGD(learned, lr=rate)
    losses = []
    for _ in range(STEPS):
        found = model(input_ids=ids, attention_mask=mask).logits[:, -width:]
        loss = torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        engine.step()
        engine.zero_grad()
    return losses


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["ia3", "vera", "oft", "prompt", "prefix"])
def test_losses_are_those_of_a_plain_loop(method, family, tmp_path):
    if method == "oft" and family == "gpt2":
        pytest.skip("PEFT has none for GPT-2's layers")
    start(method, family, tmp_path / "start")
    rows = encode_for(asked(method, tmp_path / "start"), Events(), limit=len(TEXTS))[0]
    plain = their_losses(family, tmp_path / "start", rows, RATES.get(method, 0.5))
    events = []
    tune_model(asked(method, tmp_path / "start"), sinks=[events.append])
    ours = [event["loss"] for event in events if event["event"] == "step"]
    # Far more than what the two may differ by, else a wrong gradient would pass.
    assert ours[-1] < ours[0] - 5e-5
    assert ours == pytest.approx(plain, abs=3e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma", "bert", "t5", "bart"])
@pytest.mark.parametrize("method", list(METHODS))
def test_outputs_are_those_of_peft(method, family, tmp_path):
    if (method == "prefix" and kind_of(family) != "decoder") or (method in ("oft", "lokr") and family == "gpt2"):
        pytest.skip("PEFT has no such thing")
    loaded = start(method, family, tmp_path / "model")
    again, own = load_model(str(tmp_path / "model")), theirs(family, tmp_path / "model")
    ids = torch.tensor([[5, 30, 31, 32, 33], [7, 8, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    decoder = {"decoder_input_ids": ids[:, :3]} if kind_of(family) == "encoder-decoder" else {}
    expected = own(input_ids=ids, attention_mask=mask, **decoder).logits
    real = mask.bool() if not decoder else torch.ones(2, 3, dtype=torch.bool)
    width = real.shape[1]
    for one in (loaded, again):
        found = one.module(input_ids=ids, attention_mask=mask, **decoder).logits
        assert found.shape[1] == width
        assert torch.allclose(found[real], expected[:, -width:][real], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma", "t5"])
@pytest.mark.parametrize("method", ["ia3", "prompt", "p_tuning", "prefix"])
def test_written_texts_are_those_of_peft(method, family, tmp_path):
    if method == "prefix" and family == "t5":
        pytest.skip("a prefix is for decoders")
    loaded, own = start(method, family, tmp_path / "model"), theirs(family, tmp_path / "model")
    sampling = Sampling(temperature=0, max_tokens=6)
    together = generate(loaded, TEXTS[:2], sampling, raw=True)
    for text, found in zip(TEXTS, together, strict=False):
        ids = torch.tensor([loaded.renderer.prompt(text, raw=True)])
        assert list(found.ids) == their_words(own, ids, loaded.spec.stop_ids, 6)


@torch.no_grad()
def their_words(model, ids, stops, count):
    """The likeliest tokens one after another, by PEFT's forward alone, without a cache: with transformers 5.24 PEFT's own
    `generate` no longer finds the cache, and puts the vectors in again before every token."""
    both = model.config.is_encoder_decoder
    written = [model.config.decoder_start_token_id] if both else []
    for _ in range(count):
        new = torch.tensor([written], dtype=torch.long)
        inputs = {"input_ids": ids, "decoder_input_ids": new} if both else {"input_ids": torch.cat([ids, new], 1)}
        found = model(attention_mask=torch.ones_like(inputs["input_ids"]), **inputs).logits[0, -1].argmax().item()
        if found in stops:
            break
        written.append(found)
    return written[1:] if both else written


def test_a_file_of_peft_loads_here_and_goes_back(tmp_path):
    with quiet():
        base = AUTO_CLASSES["causal"].from_pretrained(tiny_model("llama"))
    config = peft.VeraConfig(r=4, target_modules=["q_proj", "down_proj"], vera_dropout=0.0)
    made = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "vera_lambda_b" in name:
                parameter.normal_()
    made.save_pretrained(tmp_path / "theirs")
    loaded = load_model(str(tmp_path / "theirs"))
    assert loaded.spec.adapter["method"] == "vera" and loaded.spec.adapter["options"]["r"] == 4
    ids = torch.tensor([[5, 30, 31]])
    save_model(loaded, tmp_path / "ours")
    with torch.no_grad():
        assert torch.allclose(loaded.module(input_ids=ids).logits, made(input_ids=ids).logits, atol=1e-6)
        back = theirs("llama", tmp_path / "ours")
        assert torch.allclose(back(input_ids=ids).logits, made(input_ids=ids).logits, atol=1e-6)
