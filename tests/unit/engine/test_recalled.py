"""Models that were packed before: recalled straight from their files, or read anew where anything is not what it was."""

import io
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

import luthier
import luthier.engine.native as native
import luthier.engine.recalled as recalled
from decoders import decoder_model
from luthier.core.errors import ConfigError, DataError
from luthier.core.events import Events
from luthier.engine.engine import Engine
from luthier.engine.judging import own_labels
from luthier.engine.learned import FILE, write_learned
from luthier.engine.loading import take_draft
from luthier.engine.numbers import numbers_of
from luthier.engine.pooler import Embedding
from luthier.engine.readers import weight_bytes
from luthier.engine.recalled import STALE, Recalled
from luthier.engine.sampling import Sampling
from luthier.faces.cli.main import main
from luthier.faces.server.hands import load
from luthier.models.adapters import ADAPTERS
from luthier.models.adapters.inject import lora_layers
from luthier.models.precision import cast_weights
from luthier.models.save import save_model
from luthier.native.library import why_no_decoder
from luthier.verbs.generate import Generate, _load

pytestmark = [
    pytest.mark.skipif(why_no_decoder() is not None, reason=str(why_no_decoder())),
    pytest.mark.skipif(torch.cuda.is_available(), reason="packed weights are the processor's"),
]


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    """None is too small, and nothing is kept yet; what is compiled stays where it lies."""
    monkeypatch.setattr(native, "SMALL", 0)
    monkeypatch.setattr(recalled, "cache_directory", lambda: tmp_path / "cache")


def stored(tmp_path, family="llama"):
    model = decoder_model(family)
    cast_weights(model, "bfloat16")
    save_model(model, tmp_path / family)
    (tmp_path / family / "luthier.json").unlink()
    return tmp_path / family


def loaded(place, execution="int8", **settings):
    said = []
    model = _load(Generate(model=str(place), execution=execution, **settings), Events(sinks=[said.append]))
    return model, [{name: one[name] for name in one if name != "time"} for one in said]


def written(model, **settings):
    engine, prompts = Engine(model, 512), [[5, 9, 17], list(range(20, 60)), [7] * 33]
    requests = [
        engine.add(one, Sampling(max_tokens=8, **settings), draw=numbers_of(3, at)) for at, one in enumerate(prompts)
    ]
    engine.run()
    return [one.written for one in requests]


def kept():
    return list((recalled.cache_directory() / "packed").glob("*"))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gemma2", "phi", "gpt2"])
@pytest.mark.parametrize("execution", ["int8", "bfloat16", "int4"])
def test_a_second_loading_builds_no_module_and_writes_the_same(family, execution, tmp_path):
    place = stored(tmp_path, family)
    first, said = loaded(place, execution)
    assert not isinstance(first, Recalled) and len(kept()) == 1
    again, said_again = loaded(place, execution)
    assert isinstance(again, Recalled) and said_again == said
    assert again.spec == first.spec and again.native.kept == first.native.kept
    assert written(again) == written(first)
    assert written(again, temperature=1.0, repetition_penalty=1.2) == written(
        first, temperature=1.0, repetition_penalty=1.2
    )
    assert not again.has_module and again.fingerprint == first.fingerprint


def test_a_module_is_loaded_where_something_asks_for_it(tmp_path):
    place = stored(tmp_path)
    loaded(place)
    model, _ = loaded(place)
    assert model.vocabulary == model.network.get_input_embeddings().weight.shape[0] and model.has_module


@pytest.mark.parametrize("change", ["weights", "settings", "limits", "another form", "max_length"])
def test_what_was_found_of_others_is_not_taken(change, tmp_path, monkeypatch):
    place, settings = stored(tmp_path), {}
    loaded(place)
    if change == "weights":
        path = place / "model.safetensors"
        tensors = load_file(path)
        save_file({name: one * 1.5 for name, one in tensors.items()}, path, {"format": "pt"})
    elif change == "settings":
        path = place / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 0.1}))
    elif change == "limits":
        monkeypatch.setattr(native, "MOST_KL", 0.5)
    else:
        settings = {"execution": "bfloat16"} if change == "another form" else {"max_length": 32}
    model, said = loaded(place, **settings)
    assert not isinstance(model, Recalled) and not any(one["event"] == "warning" for one in said)


def test_other_weights_behind_the_same_name_size_and_date_are_found_out(tmp_path):
    place = stored(tmp_path)
    loaded(place)
    path = place / "model.safetensors"
    tensors, date = load_file(path), path.stat()
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] += 1.0
    with open(path, "r+b") as file:
        file.write(save(tensors, {"format": "pt"}))
    os.utime(path, ns=(date.st_atime_ns, date.st_mtime_ns))
    assert path.stat().st_size == date.st_size
    model, said = loaded(place)
    assert not isinstance(model, Recalled) and {"event": "warning", "message": STALE, "count": 1} in said
    # What was measured anew is kept in its place.
    again, said = loaded(place)
    assert isinstance(again, Recalled) and not any(one["event"] == "warning" for one in said)
    assert written(again) == written(model)


def test_a_description_that_is_not_the_models_is_found_out(tmp_path):
    place = stored(tmp_path)
    loaded(place)
    held, tensors = recalled._read(kept()[0])
    held["decoder"]["scale"] *= 1.01
    recalled._write(kept()[0], held, tensors)
    model, said = loaded(place)
    assert not isinstance(model, Recalled) and any(one.get("message") == STALE for one in said)


def test_what_is_cut_off_is_read_anew_with_a_warning(tmp_path):
    place = stored(tmp_path)
    loaded(place)
    path: Path = kept()[0]
    path.write_bytes(path.read_bytes()[:-100])
    model, said = loaded(place)
    assert not isinstance(model, Recalled) and any(one.get("message") == STALE for one in said)


def rewrite(place, config_dtype, change):
    """Change what the files hold, and what the config says of them."""
    path = place / "model.safetensors"
    save_file({name: change(one) for name, one in load_file(path).items()}, path, {"format": "pt"})
    path = place / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": config_dtype}))


STORED = {
    "as wide as can be": ("bfloat16", torch.Tensor.float),
    "that bf16 would round": ("bfloat16", lambda one: one.float() * 1.0001),
    "in fp32": ("float32", lambda one: one.float() * 1.0001),
    "in fp16": ("float16", lambda one: (one.float() * 1.01).half()),
}


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("how", list(STORED))
def test_weights_of_files_in_other_precisions_are_recalled(how, family, tmp_path):
    place = stored(tmp_path, family)
    rewrite(place, *STORED[how])
    first, said = loaded(place)
    again, said_again = loaded(place)
    assert not isinstance(first, Recalled) and isinstance(again, Recalled) and said_again == said
    assert ("weights" in {one.get("name") for one in said}) == (how == "that bf16 would round")
    assert written(again) == written(first) and again.as_stored == first.as_stored
    assert again.fingerprint == first.fingerprint


def test_a_model_with_an_adapter_lies_in_no_file_and_is_not_kept(tmp_path):
    model = decoder_model("llama")
    ADAPTERS.parse({"kind": "lora", "rank": 4, "alpha": 8}).apply(model)
    save_model(model, tmp_path / "tuned")
    loaded(tmp_path / "tuned")
    assert not kept()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_models_of_runs_are_recalled_with_the_rows_that_they_learned(precision, runs):
    place = runs / "shop" / "artefacts"
    model = decoder_model("llama")
    cast_weights(model, precision)
    save_model(model, place / "model")
    write_learned(place / FILE, [[5, 6, 7, 8, 9]])
    (runs / "shop" / "record.json").write_text("{}")
    first, _ = loaded("run:shop")
    again, _ = loaded("run:shop")
    assert isinstance(again, Recalled) and again.spec == first.spec and again.spec.precision == precision
    assert [one for one, _, _ in again.learned.follow([5, 6, 7, 8]).walk(3)] == [9] and written(again) == written(first)


def test_the_model_that_is_shipped_is_recalled():
    first, _ = loaded("mini", "auto")
    again, _ = loaded("mini", "auto")
    assert isinstance(again, Recalled) and written(again) == written(first)


def labelled(place):
    [one] = luthier.generate(model=str(place), prompt="the fox", labels=["red", "blue"], execution="int8")
    return one


def judged(place, rows, **settings):
    run = luthier.evaluate(model=str(place), data=str(rows), execution="int8", **settings)
    path = Path(os.environ["LUTHIER_RUNS"]) / run.id
    lines = (path / "artefacts" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["output"] for line in lines]


def talked(place, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("the fox\n/quit\n"))
    assert main(["chat", str(place), "--max-tokens", "6", "--temperature", "0", "--execution", "int8"]) == 0
    return capsys.readouterr().out


def served(place):
    order = {"source": str(place), "execution": "int8", "streams": 2, "waiting": 4}
    hands = load(order, lambda event: None)
    try:
        return hands.model.packed_only, hands.facts
    finally:
        hands.close()


def test_every_verb_that_writes_recalls_what_another_kept(tmp_path, monkeypatch, capsys):
    place, rows = stored(tmp_path), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": one, "completion": "a"}) + "\n" for one in ("the fox", "a dog")))
    classes = tmp_path / "classes.jsonl"
    classes.write_text("".join(json.dumps({"text": one, "label": one[0]}) + "\n" for one in ("the fox", "a dog")))

    def all_of_them():
        written = luthier.generate(model=str(place), prompt="the fox", execution="int8", sampling={"max_tokens": 6})
        return (
            written, labelled(place), judged(place, rows, sampling={"max_tokens": 6}), judged(place, classes),
            talked(place, monkeypatch, capsys), served(place),
        )  # fmt: skip

    with monkeypatch.context() as held:
        # As before anything was kept.
        held.setattr(recalled, "_write", lambda *_: None)
        first = all_of_them()
    assert not kept()
    loaded(place)

    def never(*_, **__):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("luthier.models.load.load_network", never)
    assert all_of_them() == first
    # What is judged by likelihood is read by its own weights.
    with pytest.raises(AssertionError, match="weights are loaded"):
        judged(place, rows, likelihood=True)


def test_labels_need_no_draft(tmp_path):
    with pytest.raises(ConfigError, match="draft: nothing is written"):
        luthier.generate(model="mini", prompt="a", labels=["b", "c"], draft="mini")


def test_a_draft_is_recalled(tmp_path):
    place, drafts = stored(tmp_path), []
    for _ in range(2):
        model = decoder_model("llama")
        take_draft(model, str(place), "auto", Events())
        drafts.append(model.draft)
    assert [isinstance(one, Recalled) for one in drafts] == [False, True]


def test_what_is_asked_beside_writing_is_answered_by_packed_weights_alone(tmp_path):
    place = stored(tmp_path)
    model = decoder_model("llama")
    cast_weights(model, "bfloat16")
    ADAPTERS.parse({"kind": "lora", "rank": 4, "alpha": 8}).apply(model)
    with torch.no_grad():
        for _, layer in lora_layers(model.network):
            layer.lora_b.normal_(std=0.3)
    model.spec = model.spec.model_copy(update={"base_fingerprint": None})
    save_model(model, tmp_path / "adapter")
    first, again = loaded(place)[0], loaded(place)[0]
    assert isinstance(again, Recalled) and weight_bytes(first) == weight_bytes(again)
    found = []
    for one in (first, again):
        engine = Engine(one, 512)
        readings = [engine.pool(ids, Embedding(pooling="mean", dimensions=16)) for ids in ([5, 9, 17], [7] * 33)]
        scored = engine.scorer("").score([([5, 9, 17], [[7], [9, 11]]), ([6] * 40, [[1, 2], [3]])])
        engine.run()
        assert own_labels(one) is None
        if one is again:
            assert not again.has_module
        engine.load_adapter("red", tmp_path / "adapter", Events())
        request = engine.add([5, 9, 17], Sampling(max_tokens=8), draw=numbers_of(3, 0), adapter="red")
        beside = engine.pool([5, 9, 17], Embedding(pooling="mean"), adapter="red")
        engine.run()
        tensors = [reading.found.tolist() for reading in (*readings, beside)]
        found.append((tensors, scored, request.written, one.config.model_type))
    assert found[0] == found[1] and again.has_module
    # Names and shapes, and no number.
    assert all(weight.is_meta for weight in again.network.parameters())
    with pytest.raises(DataError, match="there is no token"):
        Engine(again, 64).pool([again.vocabulary], Embedding(pooling="mean"))


def test_only_the_newest_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(recalled, "MODELS", 2)
    places = [stored(tmp_path, family) for family in ("llama", "qwen2", "qwen3")]
    for at, place in enumerate(places):
        loaded(place)
        newest = max(kept(), key=lambda one: one.stat().st_mtime_ns)
        os.utime(newest, (at, at))
    assert len(kept()) == 2
    assert [isinstance(loaded(place)[0], Recalled) for place in places[1:]] == [True, True]


def test_where_nothing_can_be_written_a_model_answers_all_the_same(tmp_path, monkeypatch):
    place = stored(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(recalled, "cache_directory", lambda: tmp_path / "file")
    for _ in range(2):
        assert not isinstance(loaded(place)[0], Recalled)
