"""Adapters beside one base: each text is written as if its adapter were merged and alone, whoever comes and goes beside it."""

import asyncio
import gc
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from crossed import crossed
from decoders import decoder_model
from luthier.core.errors import ConfigError, ModelError
from luthier.core.events import Events
from luthier.engine.door import Door
from luthier.engine.engine import Engine
from luthier.engine.generate import choose_engine
from luthier.engine.native import let_go
from luthier.engine.numbers import numbers_of
from luthier.engine.sampling import Sampling
from luthier.models.adapters import ADAPTERS
from luthier.models.adapters.additions import read_additions
from luthier.models.adapters.inject import lora_layers
from luthier.models.adapters.merge import merge_adapter
from luthier.models.decoder import describe
from luthier.models.load import load_model
from luthier.models.save import save_model
from luthier.native.cached import Cached
from luthier.native.library import why_no_decoder
from luthier.native.packed import Packed
from tiny import tiny_loaded, tiny_model
from writing import endless, prompts

needs_decoder = pytest.mark.skipif(why_no_decoder() is not None, reason=str(why_no_decoder()))
GREEDY = Sampling(max_tokens=12)
DRAWN = Sampling(max_tokens=12, temperature=1.0)
FAMILIES = ["llama", "gpt2", "opt", "gemma", "qwen3"]


def tuned(seed, family="llama", std=0.3, model=None, **settings):
    """A model with a LoRA that does something."""
    model = model or endless(family)
    values = {"kind": "lora", "rank": 4, "alpha": 8, **settings}
    torch.manual_seed(seed)
    ADAPTERS.parse(values).apply(model)
    with torch.no_grad():
        for _, layer in lora_layers(model.network):
            layer.lora_b.normal_(std=std)
            if settings.get("kind") == "pissa":
                layer.lora_a.add_(torch.randn_like(layer.lora_a) * std)
    return model


def saved(tmp_path, name="one", change=lambda settings, tensors: None, model=None, spec=False):
    """The directory of a LoRA as PEFT would write it, changed; with `spec` as a run leaves it."""
    place = tmp_path / name
    save_model(tuned(1) if model is None else model, place)
    if not spec:
        for file in ("luthier.json", "golden.json", "tokenizer.json", "tokenizer_config.json"):
            (place / file).unlink()
    settings = json.loads((place / "adapter_config.json").read_text())
    tensors = load_file(place / "adapter_model.safetensors")
    change(settings, tensors)
    (place / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, place / "adapter_model.safetensors")
    return place


def written(engine, given, sampling=GREEDY):
    requests = [
        engine.add(prompt, sampling, draw=numbers_of(1, at), adapter=name) for at, (prompt, name) in enumerate(given)
    ]
    engine.run()
    assert engine.blocks.used == 0
    return [one.written for one in requests]


def merged(model):
    merge_adapter(model)
    return model


SOME = prompts((3, 40, 17, 64))


@pytest.mark.parametrize("settings", [{}, {"rslora": True, "rank": 5}, {"kind": "pissa"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_three_adapters_and_none_in_one_step_write_as_each_merged_and_alone(family, settings):
    engine = Engine(endless(family), 4096)
    for seed in range(3):
        engine.load_adapter(f"a{seed}", tuned(seed, family, **settings))
    given = [(prompt, name) for prompt in SOME for name in ("a0", "", "a2", "a1")]
    others = {name: merged(tuned(int(name[1]), family, **settings)) for name in ("a0", "a1", "a2")}
    for sampling in (GREEDY, DRAWN):
        found = written(engine, given, sampling)
        for name, other in {**others, "": endless(family)}.items():
            numbers = [at for at, (_, one) in enumerate(given) if one == name]
            alone = Engine(other, 4096)
            requests = [alone.add(given[at][0], sampling, draw=numbers_of(1, at)) for at in numbers]
            alone.run()
            assert [one.written for one in requests] == [found[at] for at in numbers], name
    assert len({tuple(one) for one in found[:4]}) == 4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_are_those_of_peft_and_the_rows_of_the_base_keep_their_bits(family, tmp_path):
    from peft import PeftModel

    base, ids = endless(family), SOME[3]
    place = saved(tmp_path, model=tuned(1, family))
    engine = Engine(base, 4096)
    engine.load_adapter("one", place, Events())
    slot = engine.adapters["one"].slot
    rows = list(range(3 * len(ids)))
    tables, lengths = [[0, 1], [2, 3], [4, 5]], [len(ids)] * 3
    with torch.inference_mode():
        plain = engine._reader.read(ids * 3, tables, [0] * 3, lengths, rows).split(len(ids))
        found = engine._reader.read(ids * 3, tables, [0] * 3, lengths, rows, adapters=[-1, slot, -1]).split(len(ids))
        right = PeftModel.from_pretrained(endless(family).network, str(place))(torch.tensor([ids])).logits[0]
    assert torch.equal(found[0], plain[0]) and torch.equal(found[2], plain[2])
    assert float((found[1] - plain[1]).abs().max()) > 0.05
    assert float((found[1] - right).abs().max()) < 1e-4 * float(right.abs().max())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_rows_with_an_adapter_have_the_same_bits_alone_beside_others_and_in_pieces(family):
    engine, ids = Engine(endless(family), 4096), SOME[3]
    for seed in range(2):
        engine.load_adapter(f"a{seed}", tuned(seed, family, rank=3))
    read = engine._reader.read
    with torch.inference_mode():
        alone = read(ids, [[0, 1]], [0], [64], list(range(64)), adapters=[0])
        tables, numbers = [[2 * at, 2 * at + 1] for at in range(5)], [1, 0, -1, 0, 1]
        many = read(ids * 5, tables, [0] * 5, [64] * 5, list(range(64, 128)), adapters=numbers)
        assert torch.equal(alone, many)
        for start, stop in ((0, 11), (11, 12), (12, 50), (50, 64)):
            part = read(ids[start:stop], [[0, 1]], [start], [stop - start], list(range(stop - start)), adapters=[0])
            assert torch.equal(part, alone[start:stop])


def drawn_beside(**settings):
    given = [(prompt, name) for prompt in SOME for name in ("a0", "", "a1")]
    engine = Engine(endless(), settings.pop("room", 4096), **settings)
    for seed in range(2):
        engine.load_adapter(f"a{seed}", tuned(seed))
    return written(engine, given, DRAWN)


@pytest.fixture(scope="module")
def drawn_alone():
    return drawn_beside(streams=1, guessed=0)


@pytest.mark.parametrize("settings", [{}, {"tokens": 16}, {"streams": 3}, {"room": 192}], ids=str)
def test_what_is_written_is_the_same_however_a_step_is_filled(settings, drawn_alone):
    assert drawn_beside(**settings) == drawn_alone


def packed(family="llama", form="bfloat16"):
    model = decoder_model(family)
    model.spec = model.spec.model_copy(update={"stop_ids": ()})
    choose_engine(model, Sampling(), form, Events())
    return model


@needs_decoder
@pytest.mark.parametrize("form", ["bfloat16", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_the_native_decoder_takes_adapters_from_files_as_it_takes_those_of_training(
    family, form, tmp_path, monkeypatch
):
    model, ids = packed(family, form), SOME[3]
    others = [tuned(seed, model=decoder_model(family), rank=rank) for seed, rank in ((1, 4), (2, 20))]
    for at, other in enumerate(others):
        save_model(other, tmp_path / str(at))
    # What is written with keeps none of its own layers.
    let_go(model)
    engine = Engine(model, 4096)
    assert isinstance(engine._reader, Cached)
    for at in (0, 1):
        engine.load_adapter(f"a{at}", tmp_path / str(at))
    right = Packed(describe(decoder_model(family)), form)
    right.take_adapters([describe(other, apart=True) for other in others])
    rows = list(range(3 * len(ids)))
    given = ids * 3, [[0, 1], [2, 3], [4, 5]], [0] * 3, [len(ids)] * 3, rows
    found = engine._reader.read(*given, adapters=[1, -1, 0])
    assert torch.equal(found, Cached(right, 6).read(*given, adapters=[1, -1, 0]))
    bare = Cached(Packed(describe(decoder_model(family)), form), 6).read(*given)
    assert torch.equal(found[64:128], bare[64:128]) and not torch.equal(found[:64], bare[:64])
    # One that was taken out leaves the others as they are, and its number to the next.
    engine.unload_adapter("a0")
    again = engine._reader.read(*given, adapters=[1, -1, -1])
    assert torch.equal(again[:64], found[:64]) and torch.equal(again[128:], bare[128:])
    engine.load_adapter("again", tmp_path / "0")
    assert torch.equal(engine._reader.read(*given, adapters=[1, -1, 0]), found)


@needs_decoder
def test_the_native_decoder_writes_adapters_alone_as_beside_others():
    model = packed()
    engine = Engine(model, 4096)
    for seed in range(3):
        engine.load_adapter(f"a{seed}", tuned(seed, model=decoder_model("llama")))
    given = [(prompt, name) for prompt in SOME for name in ("a0", "", "a2", "a1")]
    found = written(engine, given, DRAWN)
    for at, one in enumerate(given):
        request = engine.add(one[0], DRAWN, draw=numbers_of(1, at), adapter=one[1])
        engine.run()
        assert request.written == found[at]


def test_what_is_reported_of_an_adapter(tmp_path):
    engine = Engine(endless(), 512)
    said = []
    place = saved(tmp_path, model=tuned(1, targets=["q_proj", "down_proj"], rslora=True))
    made = engine.load_adapter("one", place, Events(sinks=[said.append]))
    assert {(line.rank, line.scale) for line in made.layers} == {(4, 4.0)}
    assert {line.module.rpartition(".")[2] for line in made.layers} == {"q_proj", "down_proj"}
    assert made.parameters == sum(p.numel() for p in load_file(place / "adapter_model.safetensors").values())
    assert dict(engine.adapters) == {"one": made}
    assert [(one["count"], "which weights its base had" in one["message"]) for one in said] == [(1, True)]
    with pytest.warns(UserWarning, match="which weights its base had"):
        engine.load_adapter("two", place)


def test_a_run_is_checked_against_the_weights_of_its_base_and_how_it_reads(tmp_path):
    model = tuned(1, "qwen3")
    place = saved(tmp_path, spec=True, model=model)
    assert Engine(tiny_loaded("qwen3"), 512).load_adapter("one", place).notes == ()
    other = load_model(str(tiny_model("qwen3", seed=5)))
    with pytest.raises(ModelError, match=r"for another base: it was trained on .* bring the old base back"):
        read_additions(other, place)
    with pytest.raises(ModelError, match="for another base: it was trained on"):
        read_additions(other, model)
    base = load_model(str(tiny_model("qwen3")), template="plain")
    (note,) = read_additions(base, place).notes
    assert "its chat template is another one" in note


FAULTS = {
    "no settings": ("this is no adapter", lambda place: (place / "adapter_config.json").unlink()),
    "damaged settings": ("cannot be read as an adapter's settings", lambda place: cut(place / "adapter_config.json")),
    "no weights": ("no adapter_model.safetensors, so", lambda place: (place / "adapter_model.safetensors").unlink()),
    "damaged weights": ("the adapter is not whole", lambda place: cut(place / "adapter_model.safetensors")),
}


def cut(path):
    path.write_bytes(path.read_bytes()[:90])


@pytest.mark.parametrize("name", FAULTS)
def test_files_that_are_not_whole_are_refused(tmp_path, name):
    words, damage = FAULTS[name]
    place = saved(tmp_path)
    damage(place)
    with pytest.raises(ModelError, match=words):
        read_additions(endless(), place)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


MAGNITUDE = Q.replace("lora_{}.weight", "lora_magnitude_vector")


def put(key, tensor):
    return lambda settings, tensors: tensors.__setitem__(key, tensor)


def set_(**values):
    return lambda settings, tensors: settings.update(values)


CHANGES = {
    "ia3": ("the type IA3 is no low-rank one", set_(peft_type="IA3")),
    "dora": (r"learned magnitudes too \(DoRA\), which cannot be added beside the base; merge it", set_(use_dora=True)),
    "whole modules": ("learned whole modules too", set_(modules_to_save=["lm_head"])),
    "rows": ("learned rows of the embedding too", set_(trainable_token_indices=[5])),
    "bias": ("learned biases too", set_(bias="all")),
    "start": ("began by changing its base", set_(init_lora_weights="pissa")),
    "rank": ("gives the rank r as 0", set_(r=0)),
    "alpha": ("gives lora_alpha as None", set_(lora_alpha=None)),
    "other rank": ("says rank 8; the files do not belong together", set_(r=8)),
    "target not there": ("target_modules names 'wq', and the base has no", set_(target_modules=["q_proj", "wq"])),
    "head among the targets": ("adapts lm_head, the embedding or the output", set_(target_modules=["lm_head"])),
    "too few targets": ("holds matrices for .*, which is not among its target_modules", set_(target_modules=["q_proj"])),
    "one layer": ("which is not among its target_modules", set_(layers_to_transform=[0])),
    "half a pair": ("one matrix of two", lambda settings, tensors: tensors.pop(Q.format("A"))),
    "no pair": (
        "q_proj is among its target_modules and has no matrices",
        lambda settings, tensors: (tensors.pop(Q.format("A")), tensors.pop(Q.format("B"))),
    ),
    "shape": ("its layer model.layers.0.self_attn.q_proj is", put(Q.format("A"), torch.zeros(4, 6))),
    "ranks apart": ("the files do not belong together", put(Q.format("A"), torch.zeros(3, 64))),
    "not finite": ("hold numbers that are not finite", lambda settings, tensors: tensors[Q.format("B")].fill_(torch.nan)),
    "another layer": ("has no linear layer model.layers.9.wq", put("model.layers.9.wq.lora_A.weight", torch.zeros(4, 6))),
    "a head": ("lm_head.weight, which is no matrix beside a linear layer", put("lm_head.weight", torch.zeros(4, 6))),
    "a magnitude": ("which is no matrix beside a linear", put(MAGNITUDE, torch.zeros(6))),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_is_refused_with_a_sentence_and_nothing_is_loaded(tmp_path, name):
    words, change = CHANGES[name]
    engine = Engine(endless(), 512)
    with pytest.raises(ModelError, match=words) as caught:
        engine.load_adapter("one", saved(tmp_path, change=change))
    assert "\n" not in str(caught.value) and not engine.adapters
    with pytest.raises(ConfigError, match="no adapter 'one' beside this model; none is loaded"):
        engine.add([5, 6], GREEDY, adapter="one")


@pytest.mark.parametrize(
    "settings",
    [{"kind": "dora"}, {"targets": ["lm_head"]}, {"targets": ["embed_tokens"]}, {"tokens": ["<new>"]}, {"also": ["lm_head"]}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("where", ["memory", "files"])
def test_what_can_only_be_merged_is_refused_from_memory_and_from_a_run(tmp_path, settings, where):
    model = endless()
    ADAPTERS.parse({"kind": "lora", "rank": 4, "alpha": 8, **settings}).apply(model)
    source = model
    if where == "files":
        source = tmp_path / "one"
        save_model(model, source)
    with pytest.raises(ModelError, match=r"merge it \(luthier merge\) and serve it as a model of its own"):
        read_additions(endless(), source)


def test_a_base_with_an_adapter_of_its_own_takes_no_other():
    with pytest.raises(ModelError, match="holds an adapter of its own, beside which no other"):
        read_additions(tuned(1), tuned(2))
    with pytest.raises(ModelError, match="holds no LoRA adapter"):
        read_additions(endless(), endless())
    with pytest.raises(ModelError, match="no such directory"):
        read_additions(endless(), "nowhere/at/all/there")


def test_names_are_taken_once_and_unknown_ones_are_refused():
    engine = Engine(endless(), 512)
    engine.load_adapter("one", tuned(1))
    with pytest.raises(ConfigError, match="called 'one' is there already"):
        engine.load_adapter("one", tuned(1))
    with pytest.raises(ConfigError, match=r"no adapter 'ones' .* did you mean 'one'"):
        engine.add([5], GREEDY, adapter="ones")
    with pytest.raises(ConfigError, match="no adapter 'two'"):
        engine.unload_adapter("two")
    with pytest.raises(ConfigError, match="a name of one character"):
        engine.load_adapter("", tuned(1))


def test_texts_share_what_was_read_with_the_same_adapter_alone():
    engine, prompt = Engine(endless(), 2048), SOME[3] + [7]
    for seed in range(2):
        engine.load_adapter(f"a{seed}", tuned(seed))
    reused = []
    for name in ("a0", "a1", "", "a0", "a1", ""):
        request = engine.add(prompt, GREEDY, adapter=name)
        engine.run()
        reused.append(request.reused)
    assert reused == [0, 0, 0, 64, 64, 64]


def test_no_salt_makes_a_text_of_the_base_share_what_an_adapter_read():
    engine, prompt = Engine(endless(), 2048), SOME[3] + [7]
    engine.load_adapter("one", tuned(1))
    engine.add(prompt, GREEDY, adapter="one", salt="x")
    engine.run()
    serial = engine.adapters["one"].serial
    for salt in (f"{serial} x", "x"):
        other = engine.add(prompt, GREEDY, salt=salt)
        engine.run()
        assert other.reused == 0


def test_one_that_is_unloaded_while_texts_are_written_with_it_lets_them_finish():
    right = written_alone("one")
    engine = Engine(endless(), 2048)
    engine.load_adapter("one", tuned(1))
    request = engine.add(SOME[3], GREEDY, adapter="one")
    for _ in range(3):
        engine.step()
    gone = engine.unload_adapter("one")
    with pytest.raises(ConfigError, match="no adapter 'one'"):
        engine.add(SOME[0], GREEDY, adapter="one")
    # Another of the same name gets a number of its own, and reads its own.
    new = engine.load_adapter("one", tuned(2))
    assert new.slot != gone.slot and new.serial != gone.serial
    other = engine.add(SOME[3], GREEDY, adapter="one")
    engine.run()
    assert request.written == right and other.reused == 0 and other.written != right
    assert engine._reader._adapters[gone.slot] is None
    # Whatever it read is no longer found; what the other read is.
    assert set(engine.blocks._adapters.values()) == {new.slot}
    assert engine.load_adapter("three", tuned(3)).slot == gone.slot
    third = engine.add(SOME[3], GREEDY, adapter="three")
    engine.run()
    assert third.reused == 0


def written_alone(name):
    engine = Engine(endless(), 2048)
    engine.load_adapter(name, tuned(1))
    return written(engine, [(SOME[3], name)])[0]


def test_unloaded_now_its_texts_end_with_an_error_and_the_others_go_on():
    engine = Engine(endless(), 2048)
    engine.load_adapter("one", tuned(1))
    right = written(engine, [(SOME[1], "")])
    stopped = [engine.add(prompt, GREEDY, adapter="one") for prompt in SOME[:2]]
    other = engine.add(SOME[1], GREEDY, draw=numbers_of(1, 0))
    engine.step()
    engine.unload_adapter("one", now=True)
    assert engine._reader._adapters == [None]
    found = engine.step()
    assert set(stopped) <= set(found)
    assert all("was unloaded while this was written" in str(one.error) and one.finish == "error" for one in stopped)
    engine.run()
    assert [other.written] == right and engine.blocks.used == 0
    alone = Engine(endless(), 512)
    alone.load_adapter("one", tuned(1))
    last = alone.add(SOME[0], GREEDY, adapter="one")
    alone.unload_adapter("one", now=True)
    # Nothing is left to write, and still somebody waits to be told.
    assert alone.busy and alone.step() == [last] and not alone.busy


def test_an_adapter_whose_last_text_is_broken_off_is_freed():
    engine = Engine(endless(), 512)
    engine.load_adapter("one", tuned(1))
    request = engine.add(SOME[0], GREEDY, adapter="one")
    engine.step()
    engine.unload_adapter("one")
    engine.abort(request)
    assert engine._reader._adapters == [None]


def test_at_the_door_adapters_come_and_go_while_others_write(tmp_path):
    place = saved(tmp_path)
    right = {"one": written_alone("one"), "": written(Engine(endless(), 2048), [(SOME[3], "")])[0]}
    engine = Engine(endless(), 4096)

    async def body(door):
        async def write(name):
            return list((await door.complete(SOME[3], GREEDY, adapter=name)).ids)

        plain = [asyncio.create_task(write("")) for _ in range(4)]
        made = await door.load_adapter("one", place)
        assert "which weights its base had" in made.notes[0]
        tuned_ones = [asyncio.create_task(write("one")) for _ in range(4)]
        await asyncio.sleep(0)
        await door.unload_adapter("one")
        with pytest.raises(ConfigError, match="no adapter 'one'"):
            await write("one")
        assert await asyncio.gather(*tuned_ones) == [right["one"]] * 4
        assert await asyncio.gather(*plain) == [right[""]] * 4
        await door.load_adapter("one", place)
        long = asyncio.create_task(door.complete(SOME[0], Sampling(max_tokens=120), adapter="one"))
        await asyncio.sleep(0)
        await door.unload_adapter("one", now=True)
        with pytest.raises(ModelError, match="was unloaded while this was written"):
            await long
        with pytest.raises(ModelError, match="no such directory"):
            await door.load_adapter("two", "nowhere/at/all/there")

    with Door(engine) as door:
        asyncio.run(body(door))
    assert engine.blocks.used == 0 and engine._reader._adapters == [None] * len(engine._reader._adapters)


def test_a_layer_that_not_all_tokens_go_through_is_refused():
    model = endless()
    layer = model.network.model.layers[0].mlp
    own = layer.forward
    layer.forward = lambda x: torch.cat([own(x[:, :1]), own(x[:, 1:])], 1)
    engine = Engine(model, 512)
    with pytest.raises(ModelError, match=r"a llama model cannot be read with adapters beside it: .* rows where"):
        engine.load_adapter("one", tuned(1))
    layer.forward = lambda x: own(x) if x is None else x
    with pytest.raises(ModelError, match="is asked 0 times for a text"):
        engine.load_adapter("one", tuned(1))


@needs_decoder
def test_an_engine_that_is_dropped_leaves_nothing_in_the_packed_weights():
    model = decoder_model("llama")
    choose_engine(model, Sampling(), "bfloat16", Events())
    engine, other = Engine(model, 256), Engine(model, 256)
    engine.load_adapter("one", tuned(1, model=decoder_model("llama")))
    other.load_adapter("two", tuned(2, model=decoder_model("llama")))
    assert [one is None for one in model.native.adapters] == [False, False]
    del engine
    gc.collect()
    assert [one is None for one in model.native.adapters] == [True, False]
    # In the middle of a step of another, which holds the lock.
    with model.native.lock:
        del other
        gc.collect()
    assert len(model.native.adapters) == 2
    Engine(model, 256)
    assert model.native.adapters == []


def test_an_encoder_decoder_takes_no_adapter_beside_it():
    with pytest.raises(ModelError, match="an encoder-decoder is written with no adapter beside it; merge"):
        Engine(crossed("bart"), 200).load_adapter("a", tiny_model("bart"))
