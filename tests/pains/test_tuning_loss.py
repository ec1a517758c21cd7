"""Pains of tuning that are about the loss: what users of other tools report, and that it cannot happen here."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.core.config import resolve
from luthier.core.errors import ConfigError, TrainingError
from luthier.core.events import Events
from luthier.models.load import load_model
from luthier.models.packed import packs
from luthier.models.segments import Segments
from luthier.verbs.evaluate import evaluate
from luthier.verbs.tune import Tune, tune
from tiny import CONTEXT, tiny_model, tiny_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog and says when it does not know what to do"
# Very unequal answers: a mean of means would be another number.
ANSWERS = [WORDS[: 2 + at * at] for at in range(8)]
CHATS = [
    {"messages": [{"role": "user", "content": f"say {at}"}, {"role": "assistant", "content": text}]}
    for at, text in enumerate(ANSWERS)
]
PAIRS = [{"source": f"say {at}", "target": text} for at, text in enumerate(ANSWERS)]
TEXTS = [{"text": text} for text in ANSWERS]


def learn(family, rows, **settings):
    """The events of a tuning on all rows at once; by default one step, of next to nothing."""
    events: list[dict] = []
    values = {"model": str(family if "/" in str(family) else tiny_model(family)), "steps": 1, "batch_size": 8}
    values |= {"data": {"train": rows, "split": {"validation": 0.0}}, "learning_rate": 1e-5, "baselines": False}
    tune(resolve(Tune, values=values | {"optimizer": {"kind": "sgd"}, "clip": 0} | settings), sinks=[events.append])
    return {kind: [event for event in events if event["event"] == kind] for kind in ("step", "validate", "choice")}


@pytest.mark.parametrize("family", ["llama", "gemma", "t5"])
def test_pain_01_accumulation_does_not_change_the_loss(family):
    """Whether a step is one batch of eight or eight of one: the loss and its gradient are sums, divided once."""
    rows = PAIRS if family == "t5" else CHATS
    settings = {"learning_rate": 1e-3, "steps": 3, "schedule": "constant"}
    whole, *others = (
        learn(family, rows, **settings, **more)["step"] for more in ({}, {"accumulate": 8}, {"micro_tokens": 90})
    )
    for split in others:
        assert split[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-6)
        assert split[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-5)
        assert [one["loss"] for one in split] == pytest.approx([one["loss"] for one in whole], rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neo", "t5"])  # packed, padded, padded on two sides
def test_pain_02_the_validation_loss_does_not_depend_on_the_batch(family):
    """Padding is never scored, means are never averaged; and `evaluate` says the same as the tuning did."""
    rows = PAIRS if family == "t5" else CHATS
    data = {"train": rows, "validation": rows[:7]}
    sizes = (1, 60, 8192)
    found = [
        learn(family, rows, data=data, micro_tokens=size, name=f"at-{size}")["validate"][0]["loss"] for size in sizes
    ]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)
    judged = evaluate(model="run:at-60", data={"train": rows[:7]}, likelihood=True)
    assert math.log(judged.metrics["perplexity"].value) == pytest.approx(found[0], rel=1e-5)


def alone(path, texts):
    """(loss, norm of its gradient) by transformers' own forward, one document at a time, no first token predicted."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    total, count = torch.zeros(()), 0
    for text in texts:
        ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        logits = model(input_ids=ids[None]).logits[0].float()
        total = total + F.cross_entropy(logits[:-1], ids[1:], reduction="sum")
        count += len(ids) - 1
    (total / count).backward()
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    return float(total.detach()) / count, float(torch.nn.utils.get_total_norm(gradients))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "gpt_neo"])
def test_pain_05_documents_in_one_row_do_not_see_each_other(family):
    """Packed as one row, documents give the loss and the gradient that each gives alone."""
    step = learn(family, TEXTS, objective="pretrain", max_length=CONTEXT)["step"][0]
    loss, norm = alone(tiny_model(family), ANSWERS)
    assert step["loss"] == pytest.approx(loss, rel=1e-5)
    assert step["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_pain_05_a_family_that_would_mix_documents_is_padded(monkeypatch):
    """Found out at the start, on the loaded model, and said."""
    from luthier.models import packed

    model = load_model(str(tiny_model("llama")))
    monkeypatch.setattr(packed, "Segments", lambda lengths, *_: Segments((sum(lengths),)))
    events = Events()
    assert not packs(model, events)
    assert "padded" in events.choices["packing"]


class Logits(TorchDispatchMode):
    """The most rows of a tensor as wide as the vocabulary that was ever made."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.most = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor) and one.ndim and one.shape[-1] == self.vocabulary:
                self.most = max(self.most, one.numel() // self.vocabulary)
        return out


PREFERRED = [{"prompt": f"say {at}", "chosen": text + " yes", "rejected": "no"} for at, text in enumerate(ANSWERS)]


@pytest.mark.parametrize(("objective", "rows"), [("sft", CHATS), ("dpo", PREFERRED), ("distil", CHATS)])
def test_pain_11_logits_are_never_kept(objective, rows, monkeypatch):
    """Training, validation and evaluation make the logits of 32 tokens at a time, however many there are; where answers are
    written, those of 32 texts and of 32 guesses."""
    monkeypatch.setattr("luthier.models.cross_entropy.CHUNK", 0)
    monkeypatch.setattr("luthier.models.divergence.CHUNK", 0)
    asked = {"kind": "distil", "teacher": str(tiny_model("llama", seed=1))} if objective == "distil" else objective
    with Logits(400) as seen:
        events = learn("llama", rows, objective=asked, data={"train": rows, "validation": rows}, name="one")
        assert events["step"][0]["tokens"] > 150 and events["validate"]
        evaluate(model="run:one", data={"train": rows}, likelihood=True)
    assert 0 < seen.most <= 64


def test_pain_16_a_loss_that_is_no_number_stops_at_once(runs, tmp_path):
    """The rows of the batch are named, no weight moves, nothing is put into place; the exit code is not zero."""
    path = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), path)
    model = load_model(str(path))
    with torch.no_grad():
        model.network.get_input_embeddings().weight[model.tokenizer("Z")["input_ids"][-1]] = float("nan")
    model.network.save_pretrained(path)
    rows = [{"prompt": "say", "completion": "Z" if at == 5 else "a"} for at in range(8)]
    with pytest.raises(
        TrainingError, match=r"the loss is nan, so training stopped .*rows of this batch: row 6\."
    ) as caught:
        learn(path, rows, name="broken", accumulate=8, steps=50)
    assert caught.value.exit_code
    events = (runs / "broken" / "events.jsonl").read_text()
    assert '"step", ' not in events and not (runs / "broken" / "artefacts" / "model").exists()


def test_pain_16_half_precision_that_overflows_is_not_offered():
    with pytest.raises(ConfigError, match="precision"):
        resolve(Tune, values={"data": "rows.jsonl", "precision": "float16"})


# Families that do something of their own between the last states and the logits, or inside attention and norms.
STRANGE = {
    "gemma2": {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 2.0, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.3, "embedding_multiplier": 5.0, "attention_multiplier": 0.2},
    "hyperclovax": {"logits_scaling": 3.0},
    "gpt_oss": {"sliding_window": 4, "num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "olmo2": {},
    "stablelm": {},
}  # fmt: skip


@pytest.mark.parametrize("family", STRANGE)
def test_pain_18_fast_paths_honour_what_a_family_does_to_its_logits(family, tmp_path):
    """Soft-caps, scales, windows, sinks: loss and gradient are those of the family's own forward."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer("llama")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    marks = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **marks, **STRANGE[family]))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)  # larger than they start, so that caps and scales are felt
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    step = learn(tmp_path / "model", TEXTS, objective="pretrain")["step"][0]
    loss, norm = alone(tmp_path / "model", ANSWERS)
    assert step["loss"] == pytest.approx(loss, rel=1e-5)
    assert step["grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize(("part", "name"), [("RMSNorm", "norms"), ("SwiGLU", "MLPs"), ("Rotate", "attentions")])
def test_pain_18_a_kernel_that_is_wrong_for_a_model_is_not_used(part, name, monkeypatch):
    """Each faster form is tried on the loaded model's own part; one that disagrees is left out, and that is said."""
    from luthier.models import fuse
    from luthier.native.layers import usable

    if not usable(torch.zeros(1)):
        pytest.skip("no library of kernels")
    right = learn("llama", TEXTS, objective="pretrain")
    own = getattr(fuse, part)

    class Wrong:
        @staticmethod
        def apply(*args):
            return own.apply(*args) * 1.01

    monkeypatch.setattr(fuse, part, Wrong)
    wrong = learn("llama", TEXTS, objective="pretrain")
    assert wrong["step"][0]["loss"] == pytest.approx(right["step"][0]["loss"], rel=1e-6)
    said = {event["name"]: event["value"] for event in wrong["choice"]}
    assert name in said["not fused"] and name not in said["fused"]
