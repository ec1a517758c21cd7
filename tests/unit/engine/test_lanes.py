"""Continuations scored by the native decoder: those of the weights it holds, the same bits whatever is beside them."""

import random

import pytest
import torch

import luthier
import luthier.engine.native as native
from decoders import decoder_model
from luthier.core.events import Events
from luthier.engine import lanes
from luthier.engine.engine import Engine
from luthier.engine.labelling import Labelling
from luthier.engine.labels import Labeller
from luthier.engine.planted import plant
from luthier.engine.scoring import Scorer
from luthier.models.adapters import ADAPTERS
from luthier.models.load import load_model
from luthier.models.precision import cast_weights
from luthier.native.cached import Cached
from luthier.native.library import why_no_decoder
from luthier.native.plain import read_plainly

pytestmark = pytest.mark.skipif(why_no_decoder() is not None, reason=str(why_no_decoder()))

# That begin alike, that begin another, of one token, and given in an order in which branches would cross.
ANSWERS = ((7, 8, 1), (30,), (7, 1), (40, 41, 42), (7, 8, 9, 1), (7, 8), (40, 43, 42, 1), (7, 8, 10, 1))
# A token's, by weights of 16 bits and of 8.
TOLERANCE = {"bfloat16": 0.02, "int8": 0.05}


@pytest.fixture(autouse=True)
def none_is_small(monkeypatch):
    monkeypatch.setattr(native, "SMALL", 0)


def ask_all(start=40, sizes=(3, 1, 20, 33, 45, 24, 56), answers=ANSWERS, seed=0):
    draw = random.Random(seed)
    one = lambda size: [draw.randrange(5, 390) for _ in range(size)]  # noqa: E731
    head = one(start)
    return [(head + one(size), answers) for size in sizes]


def packed(family="llama", form="bfloat16", **more):
    model = decoder_model(family, **more)
    native.prepare(model, form, Events())
    return model


def logs(scores):
    return [one.log_prob for some in scores for one in some]


@pytest.mark.parametrize("form", TOLERANCE)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2", "mistral"])
def test_scores_are_those_of_the_models_own_layers_in_fp32(family, form):
    model = packed(family, form)
    for start in (40, 0, 31, 32, 33):
        asked = ask_all(start)
        found = Scorer(model).score(asked)
        own = decoder_model(family)
        for some, right in zip(found, Scorer(own).score(asked), strict=True):
            for answer, one, other in zip(ANSWERS, some, right, strict=True):
                assert one.tokens == len(answer)
                assert one.log_prob == pytest.approx(other.log_prob, abs=TOLERANCE[form] * len(answer))


def test_scores_are_those_of_the_rounded_weights_in_plain_torch():
    model = packed(form="int8")
    asked = ask_all()
    for (prompt, answers), scores in zip(asked, Scorer(model).score(asked)):
        for answer, one in zip(answers, scores):
            logs_TV = read_plainly(model.native.decoder, torch.tensor([*prompt, *answer]), "int8").log_softmax(-1)
            right = sum(float(logs_TV[len(prompt) - 1 + at, token]) for at, token in enumerate(answer))
            # Activations are rounded too.
            assert one.log_prob == pytest.approx(right, abs=0.02 * len(answer))


@pytest.mark.parametrize("form", TOLERANCE)
def test_a_score_is_the_same_alone_beside_others_in_pieces_and_by_one_hand(form, monkeypatch):
    model, asked = packed("qwen3", form), ask_all()
    right = Scorer(model).score(asked)
    assert [Scorer(model).score([one])[0] for one in asked] == right
    for tokens in (4096, 100, 30, 1):
        assert Scorer(model).score(asked, tokens=tokens) == right
    for name, number in (("HANDS", 1), ("HANDS", 1000), ("TOKENS", 7), ("LOGITS", 1)):
        with monkeypatch.context() as changed:
            changed.setattr(lanes, name, number)
            assert Scorer(model).score(asked) == right


def test_a_scorer_goes_on_with_what_it_has_read():
    model, asked = packed(), ask_all()
    scorer = Scorer(model)
    for some in (
        asked,
        asked[2:4],
        asked[:1],
        ask_all(33),
        ask_all(64, (1, 2), seed=1),
        asked,
        ask_all(0, (70,)),
        asked,
    ):
        assert scorer.score(some) == [Scorer(model).score([one])[0] for one in some]


def count_tokens(monkeypatch):
    """(tokens, rows of logits) of each step from now on."""
    read, seen = Cached.read, []

    def tell(self, ids, tables, before, lengths, rows, **more):
        seen.append((len(ids), len(rows)))
        return read(self, ids, tables, before, lengths, rows, **more)

    monkeypatch.setattr(Cached, "read", tell)
    return seen


def test_each_prompt_is_read_once_and_a_label_of_one_token_costs_nothing_more(monkeypatch):
    model = packed()
    seen, asked = count_tokens(monkeypatch), ask_all(answers=((7,), (30,), (9,)))
    Scorer(model).score(asked)
    own = sum(len(prompt) - 40 for prompt, _ in asked)
    assert seen == [(40, 0), (own, len(asked))]
    seen.clear()
    monkeypatch.setattr(lanes, "HANDS", 1)
    scorer = Scorer(model)
    scorer.score(ask_all(answers=((7, 8, 1), (7, 1), (30, 31, 1), (32,))))
    # 7 8 and 30 31 are read, and each predicts what comes after it.
    assert seen == [(40, 0), (own, len(asked)), *[(2 * len(asked), 2 * len(asked))] * 2]
    seen.clear()
    scorer.score(ask_all(answers=((7,),)))
    assert seen == [(own, len(asked))], "the beginning was kept"


def test_blocks_are_given_back():
    model, asked = packed(), ask_all()
    scorer = Scorer(model)
    scorer.score(asked)
    used = scorer._lanes._blocks.used
    assert used == 2 + len(asked), "the trunk, and the first block of each lane"
    for _ in range(3):
        scorer.score(asked)
    assert scorer._lanes._blocks.used == used


def test_no_more_blocks_are_held_than_are_planned():
    model, draw = packed(), random.Random(3)
    context, held = model.spec.max_length, 0
    one = lambda size: [draw.randrange(5, 390) for _ in range(size)]  # noqa: E731
    most = lanes.blocks_held(context, 8, 4096)
    scorer = Scorer(model)
    for start, size, prompts, labels, length in (
        (1, 1, 8, 24, context // 2),
        (context // 2, context // 4, 8, 24, context // 4),
        (33, 9, 1, 70, context - 42),
        (1, context - 3, 8, 2, 2),
        (5, 31, 8, 3, 1),
    ):
        head, answers = one(start), [one(length) for _ in range(labels)]
        scorer.score([(head + one(size), answers) for _ in range(prompts)])
        held = max(held, scorer._lanes._cached.blocks)
        assert scorer._lanes._cached.blocks <= most, (start, size, prompts, labels, length)
    assert held > most / 4, "the plan is not far from what is held"


def test_chains_follow_what_the_one_before_left():
    planted = plant((5, 6), ANSWERS)
    depths, standing = planted.depths(), list(range(2))
    places = []
    for chain in planted.chains():
        up = planted.tree.ups[chain[0]]
        standing = [*standing[: depths[chain[0]]], *chain]
        assert standing[depths[up]] == up and [depths[at] for at in standing] == list(range(len(standing)))
        places += chain
    assert places == list(range(2, len(planted.tree.ids)))
    # 7, 7 8, 7 8 9, 7 8 10, 40, 40 41, 40 43, 40 43 42.
    assert len(places) == 8


def test_an_engine_scores_by_its_packed_weights():
    model, asked = packed(form="int8"), ask_all()
    assert Engine(model, 512).score_all(asked) == Scorer(model).score(asked)
    assert Engine(model, 512).score(*asked[2]) == Scorer(model).score(asked)[2]


def test_an_adapter_beside_the_weights_is_scored_with(monkeypatch):
    monkeypatch.setattr(native, "WORTH", 1)
    model = decoder_model("llama")
    cast_weights(model, "bfloat16")
    ADAPTERS.parse({"kind": "lora", "rank": 4, "alpha": 8}).apply(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            if "lora_b" in name:
                weight.normal_(std=0.2)
    scorer, asked = Scorer(model), ask_all()
    own, plain = logs(scorer.score(asked)), logs(Scorer(decoder_model("llama")).score(asked))
    with native.natively(model, 10):
        found = logs(scorer.score(asked))
    assert found == pytest.approx(own, abs=0.1) and found != own
    assert max(abs(one - other) for one, other in zip(found, plain)) > 0.5
    assert logs(scorer.score(asked)) == own


@pytest.mark.parametrize("settings", [{}, {"per_token": True}, {"calibrate": True}], ids=str)
def test_labels_mean_the_same_by_either_way(settings):
    texts = list(zip("abcd", ("Win a free prize now!", "Ok, see you at seven.", "房间很干净", "x")))
    labels, found = ("spam", "ham", "something else"), []
    for form in ("model", "bfloat16"):
        model, events = decoder_model("qwen3", max_position_embeddings=256), Events()
        native.prepare(model, form, Events())
        found.append(Labeller(model, labels, Labelling(**settings), events=events).predict(texts))
        by = "the model's own layers" if form == "model" else "native bfloat16"
        assert events.choices["scoring"].startswith(f"{by}: ")
    for one, other in zip(*found):
        assert list(one.probabilities.values()) == pytest.approx(list(other.probabilities.values()), rel=0.05)


def test_classes_are_chosen_by_the_form_that_is_asked_for(tmp_path, runs):
    source = decoder_model("qwen3").spec.source
    model = load_model(source)
    native.prepare(model, "int8", Events())
    texts, labels = ["win prize", "see you"], ("spam", "ham")
    right = [one.probabilities for one in Labeller(model, labels).predict(list(zip("ab", texts)))]
    own = [one.probabilities for one in Labeller(load_model(source), labels).predict(list(zip("ab", texts)))]
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(f'{{"text": "{text}", "label": "{label}"}}' for text, label in zip(texts, labels))
    )
    for execution, by, shares in (("int8", "native int8", right), ("model", "the model's own layers", own)):
        said: list[dict] = []
        told = luthier.generate(
            model=source, prompt=texts[0], labels=labels, execution=execution, sinks=[said.append]
        )  # fmt: skip
        # The native decoder's are the same whatever is beside a text.
        assert told[0]["probabilities"] == (shares[0] if execution == "int8" else pytest.approx(shares[0], rel=1e-5))
        assert [one["value"] for one in said if one.get("name") == "scoring"] == [by]
        data = {"train": str(tmp_path / "rows.jsonl")}
        record = luthier.evaluate(model=source, data=data, labels=labels, execution=execution)
        assert record.choices["scoring"].startswith(f"{by}: ")
