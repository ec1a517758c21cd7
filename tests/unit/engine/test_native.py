"""The engine over the native decoder: which models take it and in which form, and what texts become with it."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import luthier
import luthier.engine.native as native
from decoders import decoder_model
from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.engine import beams
from luthier.engine.engine import Engine
from luthier.engine.generate import choose_engine, generate
from luthier.engine.native import prepare
from luthier.engine.numbers import numbers_of
from luthier.engine.readers import kept_bytes, reader_for
from luthier.engine.rollouts import roll_out
from luthier.engine.sampling import Sampling
from luthier.models.adapters import ADAPTERS
from luthier.models.load import load_model
from luthier.models.pages import BLOCK, writes_by_pages
from luthier.models.precision import cast_weights
from luthier.models.quantised.network import quantise
from luthier.models.save import save_model
from luthier.native.cached import Cached
from luthier.native.library import TOKENS, why_no_decoder
from luthier.native.packed import Packed
from tiny import tiny_model

pytestmark = pytest.mark.skipif(why_no_decoder() is not None, reason=str(why_no_decoder()))


@pytest.fixture(autouse=True)
def none_is_small(monkeypatch):
    monkeypatch.setattr(native, "SMALL", 0)


def opt():
    return load_model(str(tiny_model("opt")))


def made(family="llama", execution="auto"):
    model, said = opt() if family == "opt" else decoder_model(family), []
    model.spec = model.spec.model_copy(update={"stop_ids": ()})
    choose_engine(model, Sampling(), execution, Events(sinks=[lambda event: said.append(event)]))
    return model, {one["name"]: (one["value"], one["why"]) for one in said if one["event"] == "choice"}


def prompts():
    draw = torch.Generator().manual_seed(0)
    sizes = (1, 5, 17, 3, 33, 8, 64, 40, 2, 31, 32, 50)
    return [torch.randint(5, 390, (size,), generator=draw).tolist() for size in sizes]


def written(model, sampling, **settings):
    engine = Engine(model, settings.pop("room", 4096), **settings)
    requests = [engine.add(one, sampling, draw=numbers_of(3, at)) for at, one in enumerate(prompts())]
    engine.run()
    assert engine.blocks.used == 0
    return [one.written for one in requests]


def test_blocks_are_of_one_size():
    assert BLOCK == TOKENS


def test_int8_is_taken_where_it_changes_next_to_nothing_and_said():
    model, said = made()
    assert model.native.form == "int8"
    value, why = said["engine"]
    assert value == "native int8" and "KL 0.0" in why and "perplexity" in why


def test_bfloat16_is_taken_where_int8_changes_too_much(monkeypatch):
    quality = native.measure
    monkeypatch.setattr(
        native, "measure",
        lambda packed, own: native.Quality(1.0, 0.5, 0.01) if packed.form == "int8" else quality(packed, own),
    )  # fmt: skip
    assert made()[0].native.form == "bfloat16"


@pytest.mark.parametrize("execution", ["auto", "int8"])
def test_keys_and_values_are_measured_as_they_are_kept_and_in_bytes_only_within_the_limits(execution, monkeypatch):
    quality, kept = native.measure, []

    def measured(packed, own):
        kept.append(packed.kept)
        return quality(packed, own) if packed.kept == "bfloat16" else native.Quality(0.02, 0.0, 0.01)

    model, said = made(execution=execution)
    assert model.native.kept == "int8" and said["engine"][1].endswith("keys and values in int8")
    assert reader_for(model, 2).kept == "int8" and kept_bytes(model) == model.native.kept_bytes < model.pages
    monkeypatch.setattr(native, "measure", measured)
    model, said = made(execution=execution)
    assert (model.native.form, model.native.kept, kept) == ("int8", "bfloat16", ["int8", "bfloat16"])
    assert said["engine"][1].endswith("keys and values in bfloat16")
    assert reader_for(model, 2).kept == "bfloat16"


@pytest.mark.parametrize(("added", "kept"), [(1.05, "int8"), (1.2, "bfloat16"), (float("nan"), "bfloat16")])
def test_beside_int4_keys_and_values_are_bytes_where_they_add_next_to_nothing(added, kept, monkeypatch):
    model, said = made(execution="int4")
    assert said["engine"][0] == "native int4" and "keys and values in int8" in said["engine"][1]
    quality = native.measure

    def measured(packed, own):
        # Beyond the limits, as int4 is for larger models.
        times = added if packed.kept == "int8" else 1.0
        return native.Quality(0.5 * times, 0.1, 0.05) if packed.form == "int4" else quality(packed, own)

    monkeypatch.setattr(native, "measure", measured)
    model, said = made(execution="int4")
    assert (model.native.form, model.native.kept) == ("int4", kept)
    assert f"KL {0.5 * (added if kept == 'int8' else 1.0):.4f}" in said["engine"][1]


def test_where_both_change_too_much_the_module_reads(monkeypatch):
    monkeypatch.setattr(native, "MOST_KL", 0.0)
    model, said = made()
    assert model.native is None
    assert said["native"][0] == "no" and "int8 changes too much (KL 0.0" in said["native"][1]


def test_small_models_are_read_by_themselves(monkeypatch):
    monkeypatch.setattr(native, "SMALL", 10**9)
    assert made()[0].native is None
    assert made(execution="int8")[0].native.form == "int8"


def test_a_family_without_a_native_form_goes_on_by_itself_or_refuses():
    model, said = made("opt")
    assert model.native is None and "a opt model" in said["native"][1]
    with pytest.raises(ConfigError, match="execution: int8 needs the native decoder, and a opt model"):
        made("opt", "int8")


def test_logits_that_are_not_the_models_own_are_found_out(monkeypatch):
    model = decoder_model("llama")
    decoder = native.describe(model)
    turned = type(decoder)(
        **{name: getattr(decoder, name) for name in decoder.__slots__} | {"scale": decoder.scale * 3}
    )
    monkeypatch.setattr(native, "describe", lambda model, apart: turned)
    said = []
    prepare(model, "auto", Events(sinks=[lambda event: said.append(event)]))
    assert model.native is None and "gives other logits than its parts" in said[0]["why"]


def test_a_model_whose_parts_give_far_too_large_logits_is_found_out_too():
    model = decoder_model("llama")
    decoder = native.describe(model, apart=False)
    names = {name: getattr(decoder, name) for name in decoder.__slots__}
    loud = type(decoder)(**names | {"head_scale": 1e6})
    quality = native.measure(Packed(loud, "bfloat16"), native._own(model))
    assert quality.perplexity > 1e300 and quality.apart > native.MOST_APART


@pytest.mark.parametrize("execution", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize(
    "sampling", [Sampling(max_tokens=20), Sampling(max_tokens=20, temperature=1.0, top_p=0.9)], ids=["greedy", "drawn"]
)
def test_a_text_is_the_same_alone_beside_others_in_pieces_and_read_anew(execution, sampling):
    model, _ = made("qwen3", execution)
    right = written(model, sampling, streams=1)
    for settings in ({}, {"tokens": 16}, {"streams": 3}, {"room": 160}):
        assert written(model, sampling, **settings) == right


def test_likeliest_tokens_are_those_of_the_logits():
    model, _ = made("qwen3", "int8")
    prompt = prompts()[6]
    found = written(model, Sampling(max_tokens=8))[6]
    reader, ids = Cached(model.native, 4), prompt
    for token in found:
        logits = reader.read(ids, [[0, 1, 2, 3]], [0], [len(ids)], [len(ids) - 1])
        assert int(logits.argmax()) == token
        ids = [*ids, token]


def test_what_an_adapter_adds_is_in_the_packed_weights():
    model = decoder_model("llama")
    ADAPTERS.parse({"kind": "lora", "rank": 4, "alpha": 8}).apply(model)
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            if "lora_b" in name:
                weight.normal_(std=0.2)
    model.spec = model.spec.model_copy(update={"stop_ids": ()})
    own = [one.ids for one in generate(model, ["The quick brown", "One two"], Sampling(max_tokens=6), raw=True)]
    prepare(model, "bfloat16", Events())
    assert [one.ids for one in generate(model, ["The quick brown", "One two"], Sampling(max_tokens=6), raw=True)] == own


def learning(std):
    model = decoder_model("llama")
    cast_weights(model, "bfloat16")
    ADAPTERS.parse({"kind": "lora", "rank": 4, "alpha": 8}).apply(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            if "lora_b" in name:
                weight.normal_(std=std)
    return model


def test_answers_to_learn_from_come_from_the_base_in_bf16_and_its_adapter_apart(monkeypatch):
    monkeypatch.setattr(native, "WORTH", 1)
    # So small that bf16 weights would lose most of it.
    model = learning(1e-4)
    seen = []
    read = Cached.read
    monkeypatch.setattr(
        Cached, "read", lambda self, *given, **more: seen.append(more.get("adapters")) or read(self, *given, **more)
    )
    greedy = roll_out(model, prompts()[:4], 8)
    assert {one for step in seen for one in step} == {0} and model.native is None and model.packable
    with native.natively(model, 10):
        ids = prompts()[6]
        with_it, without = (
            read(Cached(model.native, 2), ids, [[0, 1]], [0], [len(ids)], [len(ids) - 1], adapters=[one])
            for one in (0, -1)
        )
    assert 0 < float((with_it - without).abs().max()) < 0.1
    monkeypatch.setattr(native, "WORTH", 10**9)
    same = [one == other for one, other in zip(roll_out(model, prompts()[:4], 8), greedy)]
    assert sum(same) >= 3


def test_an_adapter_that_is_not_there_is_refused():
    model, _ = made(execution="int8")
    with pytest.raises(ConfigError, match="no adapter 'one' beside this model; none is loaded"):
        Engine(model, 256).add([5, 6], Sampling(), adapter="one")


def test_texts_of_different_adapters_share_nothing_that_was_read():
    model = learning(0.05)
    with native.natively(model, 10**6):
        engine, prompt = Engine(model, 1024), list(range(5, 75))
        one = engine.add(prompt, Sampling(max_tokens=4), adapter="own")
        engine.run()
        other = engine.add(prompt, Sampling(max_tokens=4))
        again = engine.add(prompt, Sampling(max_tokens=4), adapter="own")
        engine.run()
    assert (other.reused, again.reused) == (0, 64) and again.written == one.written != other.written


@pytest.mark.parametrize("execution", ["bfloat16", "int8"])
def test_beams_share_and_copy_blocks_of_the_native_decoder(execution, monkeypatch):
    model, _ = made("llama", execution)
    # Blocks are of 32 tokens: some begin one, others fill it or are about to.
    given, sampling = (
        [one for one in prompts() if len(one) in (1, 17, 31, 32, 33, 64)],
        Sampling(max_tokens=20, beams=3),
    )
    found = beams.search(model, given, sampling, 4)

    def read_anew(search, chosen, reader, blocks):
        for text in search.texts:
            for block in text.table:
                blocks.drop(block)
        search.texts = [
            replace(search.texts[which], written=[*search.texts[which].written, token], table=[], read=0)
            for which, token in chosen
        ]

    monkeypatch.setattr(beams, "TOKENS", 10**6)  # all of a search are read anew in one step
    monkeypatch.setattr(beams.Search, "fork", read_anew)
    monkeypatch.setattr(Cached, "copy", None)
    assert beams.search(model, given, sampling, 4) == found


def test_likelihoods_come_from_the_native_decoder_too():
    model, _ = made("llama", "bfloat16")
    ids = prompts()[6]
    engine = Engine(model, 1024, tokens=24)
    plain = engine.add(ids, Sampling(max_tokens=5))
    told = engine.add(ids, Sampling(max_tokens=5, logprobs=2, prompt_logprobs=True))
    engine.run()
    whole = [*ids, *told.written]
    rows = list(range(len(whole) - 1))
    logits_RV = Cached(model.native, 4).read(whole, [[0, 1, 2, 3]], [0], [len(whole)], rows)
    right = [float(row[token]) for row, token in zip(logits_RV.log_softmax(-1), whole[1:])]
    assert told.prompt_logs == pytest.approx(right[: len(ids) - 1], abs=1e-5)
    assert [one.raw[0] for one in told.logs] == pytest.approx(right[len(ids) - 1 :], abs=1e-5)
    assert plain.written == told.written and plain.logs == []


def test_packing_a_quantised_base_takes_what_packing_a_whole_one_takes(monkeypatch):
    monkeypatch.setattr(native, "WORTH", 1)
    model = decoder_model("llama")
    cast_weights(model, "bfloat16")
    whole, events = native.packed_bytes(model, 10), Events()
    native.tell_packed(model, 10, events)
    assert "a copy of the weights, of" in events.choices["writing"]
    quantise(model.network, "int8", Events())
    assert native.packed_bytes(model, 10) == whole > 0
    native.tell_packed(model, 10, events)
    assert "a copy of the weights, made from the base in int8, of" in events.choices["writing"]
    monkeypatch.setattr(native, "WORTH", 11)
    native.tell_packed(model, 10, none := Events())
    assert not none.choices


def in_bf16(tmp_path):
    model = decoder_model("llama")
    cast_weights(model, "bfloat16")
    save_model(model, tmp_path / "stored")
    (tmp_path / "stored" / "luthier.json").unlink()
    return str(tmp_path / "stored")


def test_a_model_is_packed_from_its_files_precision_and_its_own_layers_let_go(tmp_path):
    model = load_model(in_bf16(tmp_path), as_stored=True)
    assert model.as_stored and model.network.dtype == torch.bfloat16
    choose_engine(model, Sampling(), "int8", Events())
    before = written(model, Sampling(max_tokens=6))
    native.let_go(model)
    assert sum(one.numel() for one in model.network.base_model.layers.parameters() if one.dim() == 2) == 0
    assert written(model, Sampling(max_tokens=6)) == before


@pytest.mark.parametrize("exact", [True, False])
def test_numbers_that_bf16_would_round_are_read_as_they_are(exact, tmp_path):
    source = in_bf16(tmp_path)
    path = f"{source}/model.safetensors"
    tensors = load_file(path)
    name = "model.norm.weight"
    tensors[name] = torch.full_like(tensors[name], 1.5 if exact else 1.0009765625, dtype=torch.float32)
    save_file(tensors, path, {"format": "pt"})
    said = []
    model = load_model(source, as_stored=True, events=Events(sinks=[said.append]))
    assert torch.equal(model.network.state_dict()[name].float(), tensors[name])
    assert model.as_stored is exact and model.network.dtype == (torch.bfloat16 if exact else torch.float32)
    assert [one["value"] for one in said if one.get("name") == "weights"] == ([] if exact else ["float32"])


def test_a_model_that_is_not_packed_computes_in_fp32_as_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "MOST_KL", 0.0)
    source = in_bf16(tmp_path)
    model = load_model(source, as_stored=True)
    choose_engine(model, Sampling(), "auto", Events())
    assert model.native is None and model.network.dtype == torch.float32 and not model.as_stored
    fresh = load_model(source)
    assert writes_by_pages(model) and writes_by_pages(fresh) and model.pages == fresh.pages
    assert written(model, Sampling(max_tokens=6)) == written(load_model(source), Sampling(max_tokens=6))


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_form_that_nothing_is_written_with_is_refused(family):
    with pytest.raises(ConfigError, match="execution: int8 is for language models that the engine here writes with"):
        luthier.generate(model=str(tiny_model(family)), prompt="one [MASK]", execution="int8")


@pytest.mark.parametrize("error", [MemoryError("none"), RuntimeError("can't allocate memory: x")], ids=repr)
def test_where_memory_runs_out_in_packing_the_module_reads(error, monkeypatch):
    def full(*_):
        raise error

    monkeypatch.setattr(native, "Packed", full)
    model, events = decoder_model("llama"), Events()
    choose_engine(model, Sampling(), "auto", events)
    assert model.native is None and events.choices["native"].startswith("no: memory ran out")
    assert list(events.warnings) == ["memory ran out while the weights were packed, so the module itself reads, slower"]
    assert written(model, Sampling(max_tokens=4)) == written(decoder_model("llama"), Sampling(max_tokens=4))
    with pytest.raises(ConfigError, match="execution: int8: memory ran out while the weights were packed"):
        prepare(decoder_model("llama"), "int8", Events())
    monkeypatch.setattr(native, "WORTH", 1)
    tuned = learning(1e-2)
    with pytest.warns(UserWarning, match="memory ran out while the weights were packed"):
        first = roll_out(tuned, prompts()[:2], 4)
    # Said once: it is not tried again.
    assert roll_out(tuned, prompts()[:2], 4) == first and tuned.packable is False


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi"])
@torch.inference_mode()
def test_own_logits_are_made_by_parts_of_the_vocabulary(family, monkeypatch):
    monkeypatch.setattr(native, "VOCABULARY", 100)
    own = native._own(decoder_model(family))
    whole = own.head.logits(own.states_TE)
    assert whole.shape[1] > 200 and torch.allclose(own.logits(own.states_TE), whole, atol=1e-4)
