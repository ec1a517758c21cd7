"""Pooling goes by the mask."""

import pytest
import torch

from luthier.models.heads import pool
from luthier.models.load import load_model
from tiny import ALL_FAMILIES, tiny_model


def test_pool_by_hand():
    hidden = torch.tensor([[[1.0], [2.0], [9.0]], [[9.0], [4.0], [6.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert pool(hidden, mask, "mean").tolist() == [[1.5], [5.0]]
    assert pool(hidden, mask, "last").tolist() == [[2.0], [6.0]]
    assert pool(hidden, mask, "first").tolist() == [[1.0], [4.0]]


@pytest.mark.parametrize("pooling", ["last", "mean", "first"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_padding_changes_nothing(family, pooling):
    loaded = load_model(str(tiny_model(family)), task="regress", pooling=pooling)
    ids = torch.tensor([[7, 30, 31, 32, 33]])
    # Padded with an ordinary token: only the mask may tell.
    padded = torch.tensor([[7, 30, 31, 32, 33, 40, 41, 42]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        alone = loaded.module(ids, torch.ones_like(ids))
        beside = loaded.module(padded, mask)
    assert torch.allclose(alone, beside, atol=1e-6)


def test_second_text_of_a_pair_is_segment_one():
    loaded = load_model(str(tiny_model("bert")), task="regress")
    encoded = loaded.tokenizer("ok see you", "at the station", return_tensors="pt")
    seen = {}
    loaded.network.register_forward_pre_hook(lambda _, args, inputs: seen.update(inputs), with_kwargs=True)
    loaded.module(encoded["input_ids"], encoded["attention_mask"])
    assert torch.equal(seen["token_type_ids"], encoded["token_type_ids"])
    assert seen["token_type_ids"].sum() > 0


def test_unused_decoder_does_not_learn():
    module = load_model(str(tiny_model("bart")), task="regress").module
    module(torch.tensor([[5, 6, 7]]), torch.ones(1, 3)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters() if parameter.requires_grad)
