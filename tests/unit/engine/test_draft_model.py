"""A smaller model that guesses: never seen in what is written, only in how soon; whatever it is and whatever is asked for."""

import json
from functools import cache

import pytest
import torch

import luthier
from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.engine.draft_model import DraftModel, check_draft
from luthier.engine.engine import Engine
from luthier.engine.generate import generate, tell_guesses
from luthier.engine.loading import take_draft
from luthier.engine.numbers import numbers_of
from luthier.engine.sampling import Sampling
from luthier.models.adapters import ADAPTERS
from luthier.models.adapters.inject import lora_layers
from luthier.models.load import load_model
from tiny import tiny_loaded, tiny_model
from writing import endless, prompts

SAMPLINGS = {
    "greedy": Sampling(max_tokens=28),
    "drawn": Sampling(max_tokens=28, temperature=1.0),
    "sharp": Sampling(max_tokens=28, temperature=0.3, top_p=0.9),
    "penalised": Sampling(max_tokens=28, repetition_penalty=1.3, frequency_penalty=0.2),
    "logs": Sampling(max_tokens=28, logprobs=2),
    "structure": Sampling(max_tokens=28, structure={"regex": "[a-z0-9 ]{30,}"}),
    "drawn structure": Sampling(max_tokens=28, temperature=1.0, structure={"regex": "[a-z0-9 ]{30,}"}),
}
SOME = prompts((3, 40, 17, 64))


def blurred(std=0.02):
    """A draft that is often right, and sometimes not."""
    draft = endless()
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in draft.network.parameters():
            weight.add_(torch.randn_like(weight) * std * weight.std())
    return draft


def with_lora(seed):
    model = endless()
    torch.manual_seed(seed)
    ADAPTERS.parse({"kind": "lora", "rank": 4, "alpha": 8}).apply(model)
    with torch.no_grad():
        for _, layer in lora_layers(model.network):
            layer.lora_b.normal_(std=0.1)
    return model


def written(sampling, draft=None, *, guessed=64, room=2048, adapters=(), **settings):
    model = endless()
    model.draft = draft
    engine = Engine(model, room, guessed=guessed, **settings)
    for name in adapters:
        engine.load_adapter(name, with_lora(int(name)))
    names = ["", *adapters]
    requests = [
        engine.add(one, sampling, draw=numbers_of(1, at), adapter=names[at % len(names)]) for at, one in enumerate(SOME)
    ]
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
    assert engine.blocks.used == 0 and all(one.error is None for one in requests)
    if engine._guessing is not None and engine._guessing.draft is not None:
        # It holds no more than it knows texts, and lets go of those with the next guess.
        engine._guessing.draft.guess({}, [])
        assert engine._guessing.draft._blocks.used == 0
    return requests, steps


@cache
def plainly(name):
    """Without a draft, all of it at once: the texts, which nothing changes, and the steps that they took."""
    return written(SAMPLINGS[name], guessed=0)


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("settings", [{}, {"tokens": 8}, {"room": 224}, {"streams": 2}], ids=str)
def test_what_is_written_is_the_same_with_a_draft_model(name, settings):
    plain, _ = plainly(name)
    found, _ = written(SAMPLINGS[name], blurred(), **settings)
    assert [one.written for one in found] == [one.written for one in plain]
    assert [one.logs for one in found] == [one.logs for one in plain]
    assert sum(one.accepted for one in found) > 0
    assert sum(one.accepted for one in found) < sum(one.drafted for one in found)


@pytest.mark.parametrize("name", ["greedy", "drawn"])
def test_what_is_written_is_the_same_with_adapters_on_the_target(name):
    plain, _ = written(SAMPLINGS[name], guessed=0, adapters=("1", "2"))
    found, _ = written(SAMPLINGS[name], blurred(), adapters=("1", "2"))
    assert [one.written for one in found] == [one.written for one in plain]
    assert sum(one.drafted for one in found) > 0


@pytest.mark.parametrize("name", ["greedy", "drawn", "penalised"])
def test_a_draft_that_is_the_model_itself_is_always_right(name):
    plain, steps = plainly(name)
    found, fewer = written(SAMPLINGS[name], endless(), guessed=64)
    assert [one.written for one in found] == [one.written for one in plain]
    # All that the text itself did not guess (which may be wrong) is right.
    assert sum(one.accepted for one in found) > 0.8 * sum(one.drafted for one in found)
    assert fewer < steps / 2


def test_a_draft_of_another_kind_that_is_never_right_changes_nothing():
    plain, _ = plainly("greedy")
    found, _ = written(SAMPLINGS["greedy"], load_model(str(tiny_model("llama", seed=9))))
    assert [one.written for one in found] == [one.written for one in plain]


@torch.inference_mode()
def test_what_the_draft_keeps_is_that_of_reading_the_text_anew():
    """After guesses that were right and wrong, it guesses as one that never saw the text before."""
    model, draft = endless(), blurred(0.1)
    model.draft = draft
    engine = Engine(model, 2048, guessed=64)
    request = engine.add(SOME[1], SAMPLINGS["drawn"], draw=numbers_of(1, 0))
    seen = 0
    while engine.busy:
        if request in engine.schedule.running and request.length - request.read == 1:
            kept = engine._guessing.draft
            fresh = DraftModel(draft, model, 64)
            left = request.room - len(request.written) - 1
            fresh.guess({request: min(3, left)}, [request])
            again, request.drafts = request.drafts, []
            text = kept._texts.get(request)
            if text is not None and text.pace._paused == 0 and text.pace._reach >= 3 and left >= 3:
                kept.guess({request: 3}, [request])
                assert request.drafts == again
                seen += 1
                kept._guessed.clear()
            request.drafts = []
        engine.step()
    assert seen > 3 and 0 < request.accepted < request.drafted


def test_long_prompts_are_caught_up_with_in_pieces(monkeypatch):
    monkeypatch.setattr("luthier.engine.draft_model.AT_ONCE", 20)
    plain, _ = plainly("greedy")
    found, _ = written(SAMPLINGS["greedy"], blurred())
    assert [one.written for one in found] == [one.written for one in plain]
    assert sum(one.accepted for one in found) > 0


def test_a_draft_with_a_shorter_context_stops_guessing_there():
    draft = blurred()
    draft.spec = draft.spec.model_copy(update={"max_length": 50})
    found, _ = written(SAMPLINGS["greedy"], draft)
    assert [one.written for one in found] == [one.written for one in plainly("greedy")[0]]
    assert found[3].drafted < found[0].drafted


def test_a_draft_of_another_vocabulary_or_kind_is_refused():
    with pytest.raises(ConfigError, match="have different vocabularies, so one cannot guess the tokens of the other"):
        check_draft(tiny_loaded("qwen2"), endless())
    with pytest.raises(ConfigError, match="does not write text by text side by side"):
        check_draft(tiny_loaded("t5"), endless())
    with pytest.raises(ConfigError, match=r"what .* writes from a source cannot be guessed"):
        take_draft(tiny_loaded("t5"), "mini", "auto", Events())
    with pytest.raises(ConfigError, match="nothing is written text by text by the engine here"):
        luthier.generate(model=str(tiny_model("bert")), prompt="one [MASK]", draft="mini")
    with pytest.raises(ConfigError, match="draft has no effect with a backend"):
        luthier.generate(model="mini", prompt="one", draft="mini", backend="http://127.0.0.1:1")


def test_it_is_told_what_was_guessed():
    model, said = load_model("mini"), []
    events = Events(sinks=[said.append])
    plain = generate(model, ["Once upon a time", "The parcel is"], Sampling(max_tokens=20), raw=True)
    take_draft(model, "mini", "auto", events)
    found = generate(model, ["Once upon a time", "The parcel is"], Sampling(max_tokens=20), raw=True)
    assert [one.ids for one in found] == [one.ids for one in plain] and sum(one.accepted for one in found) > 10
    tell_guesses(found, events)
    assert [(one["name"], one["event"]) for one in said] == [("draft", "choice"), ("guesses", "choice")]
    assert "tokens a pass" in said[1]["why"]


def test_the_verbs_take_a_draft(tmp_path):
    (plain,) = luthier.generate(model="mini", prompt="Once upon a time", raw=True)
    (found,) = luthier.generate(model="mini", prompt="Once upon a time", raw=True, draft="mini")
    assert found["output"] == plain["output"] and found["guessed"]["accepted"] > plain["guessed"]["accepted"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {at}", "completion": f"{at}"}) + "\n" for at in range(3)))
    asked = {"model": "mini", "data": str(rows), "sampling": {"max_tokens": 8}}
    record = luthier.evaluate(**asked, draft="mini")
    assert record.metrics == luthier.evaluate(**asked).metrics


@pytest.mark.parametrize("call", [0, 2])
@pytest.mark.parametrize("error", [RuntimeError("broken"), MemoryError()], ids=repr)
def test_a_draft_that_fails_is_turned_off_and_said_once(call, error, monkeypatch):
    plain, _ = written(SAMPLINGS["drawn"], guessed=0)
    read, calls = DraftModel._read, []

    def broken(*given, **more):
        calls.append(1)
        if len(calls) > call:
            raise error
        return read(*given, **more)

    monkeypatch.setattr(DraftModel, "_read", broken)
    with pytest.warns(UserWarning, match="the draft model failed and guesses nothing from here on") as said:
        found, _ = written(SAMPLINGS["drawn"], blurred())
    assert [one.written for one in found] == [one.written for one in plain]
    assert len(said) == 1 and len(calls) == call + 1


def test_a_draft_whose_logits_are_no_numbers_is_turned_off():
    draft = endless()
    with torch.no_grad():
        draft.network.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.warns(UserWarning, match="guesses nothing from here on"):
        found, _ = written(SAMPLINGS["greedy"], draft)
    assert [one.written for one in found] == [one.written for one in plainly("greedy")[0]]


@pytest.mark.parametrize("name", ["structure", "drawn structure"])
def test_a_draft_keeps_to_the_structure(name):
    plain, steps = plainly(name)
    found, fewer = written(SAMPLINGS[name], endless(), guessed=64)
    assert [one.written for one in found] == [one.written for one in plain]
    # The model itself, within the structure, is always right; only what the text itself guesses may be wrong.
    assert sum(one.accepted for one in found) > 0.8 * sum(one.drafted for one in found) and fewer < steps / 2
