"""What is read with an adapter beside its base is what it is with the adapter merged and alone: vectors, scores, labels and
searches."""

import gc

import pytest
import torch

from decoders import decoder_model
from luthier.core.errors import ConfigError, ModelError
from luthier.core.events import Events
from luthier.engine.beams import search_each
from luthier.engine.engine import Engine
from luthier.engine.generate import choose_engine
from luthier.engine.labels import Labeller
from luthier.engine.native import let_go
from luthier.engine.pooled import embed
from luthier.engine.pooler import Embedding, Pooler
from luthier.engine.sampling import Sampling
from luthier.engine.scoring import Scorer
from luthier.models.adapters import ADAPTERS
from luthier.models.adapters.inject import lora_layers
from luthier.models.adapters.merge import merge_adapter
from luthier.models.decoder import describe
from luthier.models.pages import BLOCK
from luthier.native.library import why_no_decoder
from luthier.native.packed import Packed
from writing import endless, prompts

needs_decoder = pytest.mark.skipif(why_no_decoder() is not None, reason=str(why_no_decoder()))
SOME = prompts((3, 40, 17, 64))
ASKED = [(prompt, [[7], [9, 11], [9, 12, 13]]) for prompt in SOME]
BEAMS = Sampling(max_tokens=12, beams=3, n=3)


def tuned(model, seed):
    """A model with a LoRA that does something."""
    torch.manual_seed(seed)
    ADAPTERS.parse({"kind": "lora", "rank": 4, "alpha": 8}).apply(model)
    with torch.no_grad():
        for _, layer in lora_layers(model.network):
            layer.lora_b.normal_(std=0.3)
    return model


def merged(model):
    merge_adapter(model)
    return model


def vectors(engine, given):
    """Of texts with adapters, all in one step."""
    readings = [engine.pool(ids, Embedding(), adapter=name) for ids, name in given]
    engine.run()
    return [one.found for one in readings]


def searched(engine, prompt, adapter):
    searching = engine.search(prompt, BEAMS, adapter=adapter)
    assert searching.begin()
    while searching.busy:
        searching.step()
    searching.leave()
    assert engine.blocks.used == 0
    return searching.found


def logs(found):
    return torch.tensor([one.log_prob for scores in found for one in scores])


def own_vectors(model, given):
    pooler = Pooler(model)
    readings = [pooler.pool(ids, Embedding()) for ids in given]
    pooler.run()
    return torch.stack([one.found for one in readings])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3"])
def test_what_is_read_with_an_adapter_is_as_with_it_merged(family):
    engine = Engine(endless(family), 4096)
    for seed in range(2):
        engine.load_adapter(f"a{seed}", tuned(endless(family), seed))
    names = ("a0", "", "a1")
    given = [(ids, name) for ids in SOME for name in names]
    made = vectors(engine, given)
    for name in names:
        alone = merged(tuned(endless(family), int(name[1]))) if name else endless(family)
        own = torch.stack([one for one, (_, other) in zip(made, given) if other == name])
        torch.testing.assert_close(own, own_vectors(alone, SOME), atol=2e-4, rtol=1e-4)
        scores = engine.score_all(ASKED, adapter=name)
        torch.testing.assert_close(logs(scores), logs(Scorer(alone).score(ASKED)), atol=2e-4, rtol=1e-4)
        for prompt in SOME:
            assert searched(engine, prompt, name) == search_each(alone, [prompt], BEAMS, 1)[0]
    assert not torch.allclose(made[0], made[1], atol=1e-2) and not torch.allclose(made[0], made[2], atol=1e-2)


def packed(form):
    model = decoder_model("llama")
    model.spec = model.spec.model_copy(update={"stop_ids": ()})
    choose_engine(model, Sampling(), form, Events())
    let_go(model)
    return model


def apart(seed, form):
    """The tuned model itself, its adapter beside its packed base."""
    model = tuned(decoder_model("llama"), seed)
    model.spec = model.spec.model_copy(update={"stop_ids": ()})
    decoder = describe(model, apart=True)
    model.native = Packed(decoder, form)
    model.native.take_adapters([decoder])
    let_go(model)
    return model


@needs_decoder
@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_with_packed_weights_it_is_that_of_the_tuned_model_to_the_last_bit(form):
    model = packed(form)
    model.native.kept = "bfloat16"
    engine = Engine(model, 4096)
    plain = vectors(engine, [(ids, "") for ids in SOME]), engine.score_all(ASKED), searched(engine, SOME[1], "")
    for seed in range(2):
        engine.load_adapter(f"a{seed}", tuned(decoder_model("llama"), seed))
    given = [(ids, name) for ids in SOME for name in ("a1", "a0", "")]
    made = vectors(engine, given)
    for name in ("a0", "a1"):
        alone = apart(int(name[1]), form)
        alone.native.kept = "bfloat16"
        own = torch.stack([one for one, (_, other) in zip(made, given) if other == name])
        assert torch.equal(own, own_vectors(alone, SOME))
        assert engine.score_all(ASKED, adapter=name) == Scorer(alone).score(ASKED)
        assert searched(engine, SOME[1], name) == search_each(alone, [SOME[1]], BEAMS, 1)[0]
        assert engine.score_all(ASKED, adapter=name) != plain[1]
    # The base is what it was.
    again = vectors(engine, [(ids, "") for ids in SOME])
    assert all(map(torch.equal, again, plain[0])) and engine.score_all(ASKED) == plain[1]
    assert Scorer(model).score(ASKED) == plain[1] and searched(engine, SOME[1], "") == plain[2]


def test_labels_are_chosen_with_the_adapter():
    engine = Engine(endless(), 2048)
    engine.load_adapter("one", tuned(endless(), 1))
    items = [("a", "the quick brown fox"), ("b", "one two three")]
    found = Labeller(engine.model, ["fox", "dog"], raw=True, scorer=engine.scorer("one")).predict(items)
    right = Labeller(merged(tuned(endless(), 1)), ["fox", "dog"], raw=True).predict(items)
    plain = Labeller(engine.model, ["fox", "dog"], raw=True, scorer=engine.scorer()).predict(items)
    for one, other, base in zip(found, right, plain):
        assert one.probabilities["fox"] == pytest.approx(other.probabilities["fox"], abs=1e-4)
        assert one.probabilities["fox"] != pytest.approx(base.probabilities["fox"], abs=1e-4)


def test_an_adapter_that_something_reads_with_is_held_and_its_number_given_to_no_other():
    engine = Engine(endless(), 2048)
    slot = engine.load_adapter("one", tuned(endless(), 1)).slot
    right = engine.score_all(ASKED, adapter="one")
    scorer, searching = engine.scorer("one"), engine.search(SOME[0], BEAMS, adapter="one")
    reading = engine.pool(SOME[0], Embedding(), adapter="one")
    own = own_vectors(merged(tuned(endless(), 1)), SOME[:1])
    engine.unload_adapter("one")
    with pytest.raises(ConfigError, match="no adapter 'one'"):
        engine.scorer("one")
    assert engine.load_adapter("two", tuned(endless(), 2)).slot != slot
    assert scorer.score(ASKED) == right and searching.begin()
    engine.run()
    torch.testing.assert_close(reading.found[None], own, atol=2e-4, rtol=1e-4)
    searching.step()
    searching.leave()
    del scorer, searching
    gc.collect()
    engine.pool(SOME[0], Embedding())
    engine.run()
    assert engine._reader._adapters[slot] is None
    assert engine.load_adapter("three", tuned(endless(), 3)).slot == slot


def test_unloaded_now_whoever_reads_with_it_ends_with_an_error():
    engine = Engine(endless(), 2048)
    engine.load_adapter("one", tuned(endless(), 1))
    scorer, searching = engine.scorer("one"), engine.search(SOME[0], BEAMS, adapter="one")
    reading = engine.pool(SOME[0], Embedding(), adapter="one")
    assert searching.begin()
    engine.unload_adapter("one", now=True)
    assert engine._reader._adapters == [None]
    assert engine.step() == [reading] and "was unloaded" in str(reading.error) and not engine.busy
    for use in (lambda: scorer.score(ASKED), searching.step):
        with pytest.raises(ModelError, match="was unloaded while this was written"):
            use()
    searching.leave()
    assert engine.blocks.used == 0


def test_a_search_waits_for_blocks_and_gives_them_back():
    engine = Engine(endless(), 12 * BLOCK)
    long = Sampling(max_tokens=3 * BLOCK)
    requests = [engine.add(prompt, long) for prompt in prompts((40, 40, 40, 40))]
    right = [engine.add(prompt, long) for prompt in prompts((40, 40, 40, 40))]
    engine.step()
    searching = engine.search(SOME[3], Sampling(max_tokens=40, beams=2))
    steps = 0
    while not searching.begin():
        engine.step()
        steps += 1
    assert steps and engine.blocks.used >= 8
    while searching.busy:
        searching.step()
        engine.step()
    searching.leave()
    engine.run()
    assert engine.blocks.used == 0
    assert searching.found == search_each(endless(), [SOME[3]], Sampling(max_tokens=40, beams=2), 1)[0]
    assert [one.written for one in requests] == [one.written for one in right]
    with pytest.raises(
        ConfigError,
        match=r"5 beams for a prompt of 64 tokens with 40 to write hold keys and values of up to 640 tokens .*, and 384 ",
    ):
        engine.search(SOME[3], Sampling(max_tokens=40, beams=5))
    # One that is left while it waits keeps no text from being taken up.
    engine.add(SOME[3], long)
    engine.step()
    waiting = engine.search(SOME[3], Sampling(max_tokens=2 * BLOCK, beams=3))
    assert not waiting.begin() and engine.schedule.closed
    waiting.leave()
    assert not engine.schedule.closed


def test_vectors_of_a_text_by_embed_are_those_of_the_engine():
    model = endless()
    engine = Engine(model, 2048)
    ids = model.renderer.framed("one two three").ids
    (found,) = vectors(engine, [(ids, "")])
    torch.testing.assert_close(found[None], embed(endless(), ["one two three"]), atol=1e-5, rtol=1e-5)
