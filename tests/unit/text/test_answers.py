"""A prompt read once and its answers are together the tokens that each conversation has alone."""

import pytest

from luthier.core.errors import DataError
from luthier.core.types import Chat, Message
from luthier.models.load import load_model
from luthier.text.answers import render_answers, split_answers
from tiny import tiny_loaded, tiny_model

PROMPT = (
    Message("system", "Be brief."),
    Message("user", "One two"),
    Message("assistant", "three"),
    Message("user", "Go on"),
)
ANSWERS = [(Message("assistant", "four five"),), (Message("assistant", "four and so on"),)]


@pytest.mark.parametrize("template", ["auto", "plain"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma"])
def test_prompt_and_answer_are_the_whole(family, template):
    renderer = load_model(str(tiny_model(family)), template=template).renderer
    row = render_answers(renderer, PROMPT, ANSWERS, id="t")
    assert row.parents == (-1, 0, 0) and sum(row.segments) == len(row.ids) == len(row.weights)
    assert not any(row.weights[: row.segments[0]])
    for part, answer in zip(split_answers(row), ANSWERS):
        whole = renderer.chat(Chat("t", (*PROMPT, *answer)))
        assert part.ids == whole.ids[: len(part.ids)]
        # Of the whole conversation only the last turn is an answer; what comes after its end is left out.
        learned = [at for at, weight in enumerate(part.weights) if weight]
        assert learned == [at for at, weight in enumerate(whole.weights) if weight and at >= learned[0]]
        assert part.ids[-1] in renderer.stop_ids and part.weights[-1] == 1.0
        assert answer[0].content in renderer.decode(part.ids[learned[0] :])
    # Answers begin alike: the shared beginning of an answer still belongs to each.
    assert row.weights[row.segments[0]] == 1.0


@pytest.mark.parametrize(("one", "other", "shared"), [("fox", "dog", 4), ("fox", "for", 5)])
def test_a_token_across_the_edge_is_context(one, other, shared):
    renderer = load_model(str(tiny_model("gpt2")), template="raw").renderer
    # " do" and " fo" are tokens of their own, so the space that ends the prompt goes with the answer.
    texts = {
        name: [*renderer.tokenizer(f"The brown {name}")["input_ids"], renderer.tokenizer.eos_token_id]
        for name in (one, other)
    }
    row = render_answers(
        renderer, (Message("user", "The brown "),), [(Message("assistant", name),) for name in (one, other)]
    )
    assert [list(part.ids) for part in split_answers(row)] == list(texts.values())
    assert row.segments[0] == shared
    for part in split_answers(row):
        assert part.weights[-2:] == (1.0, 1.0) and not any(part.weights[:-2])


def test_an_answer_of_several_turns_learns_the_assistant_s():
    renderer = tiny_loaded("llama").renderer
    long = (Message("assistant", "four"), Message("user", "More"), Message("assistant", "five"))
    first, second = split_answers(render_answers(renderer, PROMPT, [long, ANSWERS[0]]))
    learned = renderer.decode([token for token, weight in zip(first.ids, first.weights) if weight])
    assert "four" in learned and "five" in learned and "More" not in learned
    assert second.weights[-1] == 1.0


def test_what_does_not_fit_is_refused_or_cut_and_counted():
    path = str(tiny_model("llama"))
    with pytest.raises(DataError, match=r"^t: \d+ tokens do not fit in 40"):
        render_answers(load_model(path, max_length=40).renderer, PROMPT, ANSWERS, id="t")
    renderer = load_model(path, max_length=60, truncate=True).renderer
    long = (Message("assistant", "word " * 50),)
    row = render_answers(renderer, PROMPT[-1:], [long, ANSWERS[0]], id="t")
    assert row.cut > 0 and row.segments[0] + row.segments[1] == 60


def test_other_rows_are_shown_as_they_are():
    row = tiny_loaded("llama").renderer.chat(Chat("t", PROMPT[1:3]))
    assert split_answers(row) == [row]
