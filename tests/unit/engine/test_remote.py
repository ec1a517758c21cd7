"""A model whose weights a server holds: asked with our tokens, every setting said or refused, answered as by the engine here."""

import io
import json
import math
from dataclasses import replace

import pytest

from luthier.core.errors import ConfigError, DataError, ServerError
from luthier.core.events import Events
from luthier.core.types import Message, TokenLog
from luthier.engine.backend import Backend
from luthier.engine.generate import generate, stream
from luthier.engine.remote import UNKNOWN, body_of, load_served, write_each
from luthier.engine.sampling import Sampling
from luthier.faces.cli.main import main
from luthier.models.elsewhere import load_elsewhere
from luthier.models.load import load_model
from luthier.verbs.evaluate import evaluate
from luthier.verbs.generate import generate as answer_file
from serving import Live, as_events, chunked, completion, models, send, serving
from tiny import tiny_loaded, tiny_model

# One value for each setting that is not its default, and what it needs beside it.
CHANGED = {
    "max_tokens": 7,
    "min_tokens": 3,
    "temperature": 0.5,
    "top_k": 4,
    "top_p": 0.5,
    "min_p": 0.1,
    "typical_p": 0.5,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {7: -3.0},
    "banned": ("a",),
    "beams": 2,
    "length_penalty": 2.0,
    "structure": {"choices": ["a"]},
    "n": 2,
    "seed": 3,
    "stop": (".",),
    "stop_ids": (9,),
    "shown_ids": (9,),
    "after": (9,),
    "ignore_stop": True,
    "logprobs": 2,
    "prompt_logprobs": True,
}


def served(url, family="qwen3", **settings):
    """A tiny model that the server at `url` writes with, and what is said of it."""
    events = Events()
    return load_served(str(tiny_model(family)), Backend(url=url, **settings), events=events), events


def fixed(reply, **card):
    """A server that gives the same answer to everything, and what it was asked."""
    asked = []

    def answer(handler, path, body):
        if body is None:
            return send(handler, models("tuned", **card))
        asked.append(body)
        return handler.wfile.write(reply) if isinstance(reply, bytes) else send(handler, reply)

    return answer, asked


@pytest.mark.parametrize("name", Sampling.model_fields)
def test_every_setting_is_said_or_refused(name):
    with serving(fixed({})[0]) as url:
        model, _ = served(url)
    basis = {"temperature": 1.0} if name in ("top_k", "top_p", "min_p", "typical_p", "n", "seed") else {}
    basis |= {"beams": 2} if name == "length_penalty" else {}
    changed = Sampling(**basis, **{name: CHANGED[name]})
    if name in UNKNOWN:
        with pytest.raises(ConfigError, match=f"^{name}: the completions of vLLM know no such setting"):
            body_of(model, [5, 6], changed, 0)
    else:
        body, before = body_of(model, [5, 6], changed, 0), body_of(model, [5, 6], Sampling(**basis), 0)
        assert body != before
        value = {key: one for key, one in body.items() if before.get(key) != one}
        assert name in value or {"stop_ids": "stop_token_ids", "ignore_stop": "ignore_eos"}[name] in value


def test_what_is_left_to_the_server_is_said_too():
    """vLLM takes what is left out from the generation_config.json beside the weights."""
    with serving(fixed({})[0]) as url:
        model, _ = served(url)
    body = body_of(model, [5, 6], Sampling(max_tokens=500), 0)
    assert body["prompt"] == [5, 6] and body["model"] == "tuned" and body["max_tokens"] == 126
    neutral = {"temperature": 0.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "n": 1, "stop": [], "ignore_eos": False}
    neutral |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0}
    assert {name: body[name] for name in neutral} == neutral
    assert body["stop_token_ids"] == list(model.spec.stop_ids) and "seed" not in body
    assert body_of(model, [5], Sampling(ignore_stop=True, stop_ids=(9,)), 0)["stop_token_ids"] == [9]
    drawn = Sampling(temperature=1, seed=4)
    seeds = [body_of(model, [5], drawn, key)["seed"] for key in ("a", "b", "a")]
    assert seeds[0] == seeds[2] != seeds[1]


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_a_model_without_its_weights_reads_the_same(family):
    here, there = tiny_loaded(family), load_elsewhere(str(tiny_model(family)))
    # How a text becomes one vector is of no matter where there is no network.
    assert there.spec.model_copy(update={"pooling": here.spec.pooling}) == here.spec
    for prompt in ("Hello", [Message("system", "Be brief."), Message("user", "Hello")]):
        assert there.renderer.prompt(prompt) == here.renderer.prompt(prompt)
    assert here.network.get_input_embeddings().weight.shape[0] == there.network.get_input_embeddings().weight.shape[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 24},
        {"max_tokens": 24, "stop": ["e"]},
        {"max_tokens": 24, "stop": ["e"], "min_tokens": 9},
        {"max_tokens": 9, "logit_bias": {50: 4.0}, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"max_tokens": 24, "stop_ids": [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70]},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_text_is_that_of_the_engine_here_whole_and_streamed(family, settings):
    here, sampling = tiny_loaded(family), Sampling(**settings)
    prompts = [
        "Hello there",
        "房间很干净",
        "One two three",
        [Message("user", "Hi"), Message("assistant", "Yo"), Message("user", "?")],
    ]
    right = generate(here, prompts, sampling)
    assert len({one.text for one in right}) > 1
    live = Live(here)
    live.busy = 2
    with serving(live) as url:
        there, events = served(url, family, concurrency=3)
        assert generate(there, prompts, sampling) == right
        assert ["".join(stream(there, one, sampling)) for one in prompts] == [one.text for one in right]
    assert events.warnings == {f"requests to {url} were sent again after HTTP 429": 2}
    assert events.choices["backend"] == f"vllm: tuned at {url} writes; prompts are rendered here"
    assert live.asked[-1]["stream"] and live.asked[-1]["prompt"] == list(here.renderer.prompt(prompts[-1]))


def test_recorded_log_probabilities():
    text = load_elsewhere(str(tiny_model("llama"))).renderer.decode([40, 50])
    logs = {
        "text_offset": [0, 1, 2],
        "token_logprobs": [-0.5, -9999.0, -0.1],
        "tokens": ["token_id:40", "token_id:50", "token_id:2"],
        "top_logprobs": [
            {"token_id:40": -0.5, "token_id:41": -1.5},
            {"token_id:50": -9999.0, "token_id:9": -0.25, "token_id:8": -0.75},
            {"token_id:2": -0.1, "token_id:41": -2.5},
        ],
    }
    prompt_logs = [None, *({str(token): {"logprob": -token / 8, "rank": 3, "decoded_token": "x"}} for token in (6, 7))]
    one = {
        "text": text,
        "token_ids": [40, 50, 2],
        "finish_reason": "stop",
        "logprobs": logs,
        "prompt_logprobs": prompt_logs,
    }
    answer, asked = fixed(completion(one))
    sampling = Sampling(logprobs=2, prompt_logprobs=True)
    with serving(answer) as url:
        model, _ = served(url, "llama")
        (found,) = write_each(model, [[5, 6, 7]], sampling)
        (drawn,) = write_each(model, [[5, 6, 7]], Sampling(logprobs=2, temperature=1.0))
    assert (found.text, found.ids, found.finish, found.prompt_tokens) == (text, (40, 50), "stop", 3)
    assert [(log.id, log.raw, log.processed) for log in found.logprobs] == [
        (40, -0.5, -0.5),
        (50, -math.inf, -math.inf),
    ]
    assert [(log.id, log.raw) for log in found.logprobs[1].top] == [(9, -0.25), (8, -0.75)]
    assert found.prompt_logprobs == (-0.75, -0.875)
    # A draw changes them, and the server does not say how.
    assert drawn.logprobs == tuple(_unprocessed(log) for log in found.logprobs)
    assert asked[0]["logprobs"] == 2 and asked[0]["prompt_logprobs"] == 0 and asked[0]["return_tokens_as_token_ids"]


def _unprocessed(log: TokenLog) -> TokenLog:
    return replace(log, processed=None, top=tuple(map(_unprocessed, log.top)))


def test_several_answers_come_in_their_order():
    text = load_elsewhere(str(tiny_model("llama"))).renderer.decode
    choices = [{"text": text([at]), "token_ids": [at], "finish_reason": "length"} for at in (40, 50, 60)]
    mixed = completion(*choices)
    mixed["choices"].reverse()
    with serving(fixed(mixed)[0]) as url:
        model, _ = served(url, "llama")
        (found,) = write_each(model, [[5]], Sampling(temperature=1.0, n=3, max_tokens=1))
        with pytest.raises(ServerError, match="gives 3 answers in place of 1"):
            list(write_each(model, [[5]], Sampling()))
    assert [one.ids for one in (found, *found.others)] == [(40,), (50,), (60,)]


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        ([], "no answers"),
        ({"choices": None}, "no answers"),
        ({"choices": []}, "0 answers in place of 1"),
        (completion({"finish_reason": "stop"}), "an answer without text"),
        (completion({"text": "a", "finish_reason": "abort"}), "gave up an answer (finish_reason 'abort')"),
        (completion({"text": "a", "finish_reason": None}), "gave up an answer"),
        (completion({"text": "a", "finish_reason": "stop", "token_ids": [4, 99999]}), "tokens beyond the"),
        (completion({"text": "a", "finish_reason": "stop", "token_ids": "ab"}), "tokens beyond the"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_an_answer_that_is_none_is_said(reply, part):
    with serving(fixed(reply)[0]) as url:
        model, _ = served(url)
        with pytest.raises(ServerError) as said:
            list(write_each(model, [[5]], Sampling()))
    assert part in str(said.value)


@pytest.mark.parametrize(
    ("events", "part"),
    [
        (
            [completion({"text": "a", "token_ids": [40], "finish_reason": None})],
            "gave up an answer (finish_reason None)",
        ),
        ([completion({"text": "a", "token_ids": [40], "finish_reason": "abort"})], "gave up"),
        ([], "gave up an answer (finish_reason None)"),
        ([{"choices": [{"index": 0}]}], "a piece without text"),
        ([{"choices": "x"}], "a piece without text"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_stream_that_does_not_end_as_it_should_is_no_answer(events, part):
    with serving(fixed(chunked(as_events(events)))[0]) as url:
        model, _ = served(url)
        with pytest.raises(ServerError) as said:
            list(stream(model, "Hello", Sampling()))
    assert part in str(said.value)


def test_another_tokenizer_on_the_server_is_noticed():
    reply = completion({"text": "nothing like it", "token_ids": [40, 50], "finish_reason": "length"})
    with serving(fixed(reply)[0]) as url:
        model, events = served(url)
        list(write_each(model, [[5]] * 3, Sampling()))
    (said,) = events.warnings.items()
    assert "see that both have the same tokenizer" in said[0] and said[1] == 3


def test_a_server_without_token_ids_still_writes():
    events = [completion({"text": one, "finish_reason": None}) for one in ("One", " two")]
    events.append(completion({"text": "", "finish_reason": "stop"}))
    whole = completion({"text": "One two", "finish_reason": "stop"})
    with serving(fixed(whole)[0]) as url:
        model, said = served(url)
        (found,) = write_each(model, [[5]], Sampling())
        with pytest.raises(ServerError, match="no token ids, without which logprobs say nothing"):
            list(write_each(model, [[5]], Sampling(logprobs=0)))
    assert (found.text, found.finish) == ("One two", "stop") and model.renderer.decode(found.ids) == "One two"
    assert sum(said.warnings.values()) == 1 and "without token ids" in next(iter(said.warnings))
    with serving(fixed(chunked(as_events(events)))[0]) as url:
        model, _ = served(url)
        assert list(stream(model, "Hello")) == ["One", " two"]


@pytest.mark.parametrize(
    ("listed", "settings", "part"),
    [
        (models("tuned"), {"model": "tined"}, "has no model 'tined'; did you mean 'tuned'? (backend.model)"),
        (models("a", "b"), {}, "has 2 models; name the one to write with in backend.model: a, b"),
        (models(), {}, "has 0 models"),
        ({"object": "list"}, {}, "does not list its models"),
        ([], {}, "does not list its models"),
    ],
)
def test_a_server_of_other_models_is_refused_at_the_start(listed, settings, part):
    with serving(lambda handler, path, body: send(handler, listed)) as url, pytest.raises(ServerError) as said:
        served(url, **settings)
    assert part in str(said.value)


def test_an_adapter_is_not_taken_for_its_base(tmp_path):
    base = tiny_model("llama")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")

    def load(**card):
        with serving(fixed({}, **card)[0]) as url:
            return load_served(str(tmp_path), Backend(url=url), events=Events())

    with pytest.raises(ServerError, match=f"tuned is {base} alone, without what {tmp_path} learned"):
        load(root=str(base))
    model = load(root=str(tmp_path), parent="base")
    assert model.renderer.prompt("Hello") == load_model(str(base)).renderer.prompt("Hello")


def test_the_shorter_context_holds():
    with serving(fixed({}, max_model_len=20)[0]) as url:
        model, events = served(url)
        assert model.spec.max_length == 20 and "takes no more" in events.choices["max_length"]
        with pytest.raises(DataError, match="the context is 20"):
            generate(model, ["Hello " * 30], Sampling())
        with pytest.raises(ConfigError, match="64 tokens are asked for, and the server takes 20"):
            load_served(str(tiny_model("qwen3")), Backend(url=url), max_length=64, events=Events())


def test_models_that_do_not_write_stay_here():
    with pytest.raises(
        ConfigError, match="is made to masked, and a server elsewhere writes with language models alone"
    ):
        load_elsewhere(str(tiny_model("bert")))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"id": f"r{at}", "prompt": f"say {at}", "completion": f"{at}!"} for at in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


def unguessed(answer):
    """How many tokens were guessed right is said of the engine here alone."""
    return {name: one for name, one in answer.items() if name != "guessed"}


def test_the_verbs_say_the_same_here_and_there(place, capsys, monkeypatch):
    source = str(tiny_model("llama"))
    live = Live(load_model(source))
    flags = ["--max-tokens", "12"]
    with serving(live) as url:
        there = ["--backend", url]
        shown = []
        for arguments in (["Hello"], ["Hello", "--raw"], ["--input", "rows.jsonl"]):
            for more in ([], there):
                assert main(["generate", source, *arguments, *flags, *more]) == 0
                shown.append(capsys.readouterr().out)
            assert shown[-1] == shown[-2] and shown[-1].strip()
        for more in ([], there):
            assert main(["generate", source, "Hello", "--format", "json", *flags, *more]) == 0
            shown.append(unguessed(json.loads(capsys.readouterr().out)))
        assert shown[-1] == shown[-2] and shown[-1]["tokens"] > 1
        for more in ([], there):
            monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnd then?\n"))
            assert main(["chat", source, "--temperature", "0", *flags, *more]) == 0
            shown.append(capsys.readouterr().out)
        assert shown[-1] == shown[-2] and shown[-1].strip()
        here = evaluate(model=source, data="rows.jsonl", sampling={"max_tokens": 8}, name="here")
        record = evaluate(
            model=source,
            data="rows.jsonl",
            sampling={"max_tokens": 8},
            name="there",
            backend={"url": url, "concurrency": 2},
        )
    assert record.metrics == here.metrics
    assert record.choices["backend"] == f"vllm: tuned at {url} writes; prompts are rendered here"
    assert record.lineage["server"] == f"tuned at {url}" and "server" not in here.lineage


def test_a_file_goes_on_after_a_server_that_went_down(place):
    source = str(tiny_model("qwen3"))
    live, left = Live(load_model(source)), [3]

    def falling(handler, path, body):
        if body is not None:
            left[0] -= 1
            if left[0] < 0:
                return send(handler, {"error": {"message": "the engine died"}}, 500)
        return live(handler, path, body)

    asked = {"model": source, "input": "rows.jsonl", "sampling": {"max_tokens": 6}}
    right = list(map(unguessed, answer_file(**asked)))
    with serving(falling) as url:
        settings = {**asked, "output": "out.jsonl", "backend": {"url": url, "concurrency": 1}}
        with pytest.raises(ServerError, match="the engine died"):
            answer_file(**settings)
        written = (place / "out.jsonl").read_text().splitlines()
        assert [json.loads(one) for one in written] == right[:3]
        left[0] = 9
        assert answer_file(**settings) == right[3:]


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"device": "cpu"}, "device has no effect with a backend"),
        ({"execution": "int8"}, "execution has no effect with a backend"),
        ({"likelihood": True}, "likelihood: likelihoods are computed here"),
        ({"reference": "mini"}, "reference: likelihoods are computed here"),
    ],
)
def test_settings_of_this_machine_do_not_go_with_a_server(settings, part, place):
    with pytest.raises(ConfigError, match=part):
        evaluate(model="mini", data="rows.jsonl", backend="vllm", **settings)


def test_rows_that_are_scored_stay_here(place):
    (place / "text.jsonl").write_text('{"text": "Once upon a time"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="scored by likelihood, which is computed here"):
        evaluate(model=str(tiny_model("qwen3")), data="text.jsonl", backend="vllm")
