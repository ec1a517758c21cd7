"""Sizes, fingerprints, memory and hardware."""

import pytest
import torch
from transformers import AutoConfig

from luthier.core.errors import ModelError
from luthier.models.facts import fingerprint, kind_of, read_facts
from luthier.models.hardware import describe_hardware
from luthier.models.load import load_model
from tiny import ALL_FAMILIES, tiny_model
from tiny import kind_of as kind_of_tiny


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_facts(family):
    loaded = load_model(str(tiny_model(family)))
    facts = read_facts(loaded.network)
    assert facts.kind == kind_of_tiny(family)
    assert facts.layers == (4 if facts.kind == "encoder-decoder" else 2)
    assert (facts.hidden, facts.heads, facts.vocabulary) == (32, 4, len(loaded.tokenizer))
    assert facts.context == (None if family in ("t5", "deberta-v2") else 128)
    assert facts.parameters == sum(one.numel() for one in loaded.module.parameters())


def test_a_family_of_another_sense_is_refused():
    with pytest.raises(ModelError, match="'vit' are neither text decoders, encoders nor encoder-decoders"):
        kind_of(AutoConfig.for_model("vit"))


def test_fingerprint_knows_the_weights_not_the_task():
    source = str(tiny_model("bert"))
    masked, pooled = load_model(source), load_model(source, task="regress")
    assert fingerprint(masked.network) == fingerprint(pooled.network)
    assert fingerprint(load_model(source, dtype="bfloat16").network) == fingerprint(masked.network)
    assert fingerprint(load_model(str(tiny_model("bert", seed=1))).network) != fingerprint(masked.network)
    with torch.no_grad():
        pooled.network.embeddings.word_embeddings.weight.add_(0.01)
    assert fingerprint(masked.network) != fingerprint(pooled.network)


def test_hardware():
    found = describe_hardware()
    assert found["threads"] >= 1
    assert len(found["cuda"]) == torch.cuda.device_count()


def test_fingerprint_of_a_large_table():
    # 49,152 x 576: single precision rounds the last place past the end.
    table = torch.nn.Embedding(49152, 576, _weight=torch.zeros(49152, 576, dtype=torch.bfloat16))
    assert len(fingerprint(table)) == 16
