"""Modules from elsewhere, and the same weights for another purpose."""

import pytest
import torch

from luthier.core.errors import ConfigError, ModelError
from luthier.models.load import load_model
from luthier.models.wrap import fit_model, wrap_model
from tiny import tiny_model


def test_wrap_plain_transformers_model():
    loaded = load_model(str(tiny_model("t5")))
    wrapped = wrap_model(loaded.module, loaded.tokenizer)
    assert wrapped.module is loaded.module
    assert (wrapped.spec.kind, wrapped.spec.task, wrapped.spec.max_length) == ("encoder-decoder", "seq2seq", 128)
    assert wrapped.spec.source == str(tiny_model("t5"))


def test_wrap_remembers():
    loaded = load_model(str(tiny_model("llama")))
    loaded.module.luthier = loaded
    assert wrap_model(loaded.module, loaded.tokenizer) is loaded


def test_wrap_refuses_other_things():
    with pytest.raises(ModelError, match="Linear: expected a model"):
        wrap_model(torch.nn.Linear(2, 2), None)
    body = load_model(str(tiny_model("llama"))).module.base_model
    with pytest.raises(ModelError, match="LlamaModel: a plain transformers model must come from AutoModelForCausalLM"):
        wrap_model(body, None)


def test_a_language_model_grows_a_head():
    loaded = load_model(str(tiny_model("llama")))
    fitted = fit_model(loaded, task="classify", labels=("a", "b"), max_length=32)
    assert fitted.network is loaded.module.base_model
    assert (fitted.spec.task, fitted.spec.labels, fitted.spec.max_length) == ("classify", ("a", "b"), 32)
    assert (fitted.spec.template, fitted.spec.stop_ids) == (None, ())
    ids = torch.tensor([[5, 6, 7]])
    assert fitted.module(ids, torch.ones_like(ids)).shape == (1, 2)
    again = fit_model(fitted, task="classify", labels=("a", "b"))
    assert torch.equal(again.module.head.weight, fitted.module.head.weight)
    with pytest.raises(ConfigError, match="has no head for 'causal'; load it anew"):
        fit_model(fitted, task="causal")


def test_the_same_task_keeps_the_module():
    loaded = load_model(str(tiny_model("qwen2")))
    fitted = fit_model(loaded, max_length=48, truncate=True)
    assert fitted.module is loaded.module
    assert fitted.spec.max_length == 48
    assert fitted.spec.template == loaded.spec.template
