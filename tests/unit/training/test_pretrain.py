"""Documents as rows: packed whole and apart, or run on."""

from collections import Counter

import pytest

from luthier.core.errors import DataError
from luthier.core.events import Events
from luthier.core.types import Text
from luthier.models.load import load_model
from luthier.training.objectives.pretrain import Pretrain
from tiny import tiny_model

TEXTS = [Text(f"t.txt:{at}", "the quick brown fox " * size) for at, size in enumerate((1, 40, 3, 7, 90, 2, 2), 1)]


def encoded(family="llama", texts=TEXTS, **settings):
    model = load_model(str(tiny_model(family)), max_length=64)
    return model, Pretrain(**settings).encode(texts, model, Events())


def test_apart_every_token_but_the_first_of_a_document_is_learned_once():
    model, rows = encoded()
    whole = [[*model.tokenizer(text.text)["input_ids"], model.tokenizer.eos_token_id] for text in TEXTS]
    learned = Counter(token for row in rows for token, weight in zip(row.ids, row.weights) if weight)
    assert learned == Counter(token for ids in whole for token in ids[1:])
    for row in rows:
        assert len(row.ids) <= 64 and sum(row.segments) == len(row.ids)
        starts = [sum(row.segments[:at]) for at in range(len(row.segments))]
        assert [at for at, weight in enumerate(row.weights) if not weight] == starts
    assert any(len(row.segments) > 1 and "more" in row.id for row in rows)
    assert {name for row in rows for name in [row.id.split(" ")[0]]} <= {text.id for text in TEXTS}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "opt"])
@pytest.mark.parametrize("documents", ["apart", "joined"])
def test_a_document_begins_as_a_text_that_is_gone_on_from(family, documents):
    """With BOS where the tokenizer puts one in front: what is evaluated and continued later begins so too."""
    model, rows = encoded(family, texts=TEXTS[:1], documents=documents)
    begin = model.renderer.prompt("the quick", raw=True)
    assert rows[0].ids[: len(begin)] == begin
    assert rows[0].weights[: len(begin)] == (0.0, *[1.0] * (len(begin) - 1))


def test_apart_long_documents_go_on_where_they_were_cut():
    _, rows = encoded(texts=TEXTS[4:5])
    pieces = [row.ids for row in rows if len(row.segments) == 1]
    assert len(pieces) > 2 and pieces[0][-1] == pieces[1][0]


def test_joined_documents_run_on():
    model, rows = encoded(documents="joined")
    whole = [[*model.tokenizer(text.text)["input_ids"], model.tokenizer.eos_token_id] for text in TEXTS]
    assert [token for row in rows for token in row.ids] == [token for ids in whole for token in ids]
    assert all(len(row.ids) == 64 for row in rows[:-1]) and all(row.weights[0] == 0 for row in rows)
    assert all(row.segments == () for row in rows)


@pytest.mark.parametrize("documents", ["apart", "joined"])
def test_nothing_to_predict_is_said(documents):
    with pytest.raises(DataError, match="fewer than two tokens"):
        encoded(texts=[Text("t.txt:1", "")], documents=documents)
