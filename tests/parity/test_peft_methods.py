"""Methods of the PEFT library here, against PEFT's own model in a plain loop: losses, files and written texts."""

import pytest
import torch

from luthier.core.config import resolve
from luthier.engine.generate import generate
from luthier.engine.sampling import Sampling
from luthier.models.adapters import ADAPTERS
from luthier.models.load import AUTO_CLASSES, load_model
from luthier.models.quiet import quiet
from luthier.models.save import save_model
from luthier.verbs.tune import Tune, tune_model
from tiny import NATURAL_TASK, kind_of, tiny_model

peft = pytest.importorskip("peft")
# Between peft and transformers, and no matter of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
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
RATE, STEPS = 0.05, 3


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_RUNS", str(tmp_path / "runs"))
    torch.set_num_threads(1)


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


def their_losses(family, path):
    """Mean loss of each step of SGD on the texts, padded on the right, by PEFT's model alone."""
    model, tokenizer = theirs(family, path, trainable=True), load_model(str(tiny_model(family))).tokenizer
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100  # nothing of the text predicts its first token
    engine = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=RATE)
    losses = []
    for _ in range(STEPS):
        found = model(input_ids=ids, attention_mask=mask).logits[:, -width:]
        loss = torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        engine.step()
        engine.zero_grad()
    return losses


def our_losses(method, path):
    events = []
    values = {
        "model": str(path),
        "data": {"train": [{"text": text} for text in TEXTS], "split": {"validation": 0.0}},
        "objective": "pretrain",
        "adapter": {"kind": "peft", "method": method, "options": METHODS[method]},
        "optimizer": {"kind": "sgd", "momentum": 0.0},
        "schedule": {"kind": "constant", "warmup": 0},
        "steps": STEPS,
        "batch_size": len(TEXTS),
        "learning_rate": RATE,
        "clip": 0.0,
        "by_length": False,
        "baselines": False,
    }
    tune_model(resolve(Tune, values=values), sinks=[events.append])
    return [event["loss"] for event in events if event["event"] == "step"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["ia3", "vera", "oft", "prompt", "prefix"])
def test_losses_are_those_of_a_plain_loop(method, family, tmp_path):
    start(method, family, tmp_path / "start")
    ours, plain = our_losses(method, tmp_path / "start"), their_losses(family, tmp_path / "start")
    assert ours[-1] < ours[0]
    assert ours == pytest.approx(plain, abs=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma", "bert", "t5", "bart"])
@pytest.mark.parametrize("method", list(METHODS))
def test_outputs_are_those_of_peft(method, family, tmp_path):
    if (method == "prefix" and kind_of(family) != "decoder") or (method == "oft" and family == "gpt2"):
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
        with quiet(), torch.no_grad():
            out = own.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=6,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=list(loaded.spec.stop_ids),
            )
        new = out[0, 1:] if family == "t5" else out[0, ids.shape[1] :]
        written = [token for token in new.tolist() if token not in loaded.spec.stop_ids]
        assert list(found.ids) == written


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
