"""The ways of a model on a CUDA device, taken on the processor: pages of 256 tokens, `varlen_attn` (as it is documented, in plain
torch) and, where that covers not all, attention text by text. Greedy tokens are those of transformers."""

import pytest
import torch
import torch.nn.attention.varlen

from flash import COVERED, LONG, model_of, on_the_cpu, written
from luthier.core.events import Events
from luthier.engine.beams import search
from luthier.engine.engine import Engine
from luthier.engine.generate import choose_engine
from luthier.engine.padded import write
from luthier.engine.sampling import Sampling
from luthier.models.pages import page_size
from luthier.models.varlen import PAGE
from writing import endless, prompts

SIZES = (1, 5, 17, 3, 33, 8, 64, 40, 2, 31, 32, 50)


@pytest.mark.parametrize("family", COVERED)
def test_greedy_tokens_are_those_of_transformers(monkeypatch, family):
    model = model_of(family, **{**LONG, **COVERED[family]})
    given, sampling = prompts((290, 5, 40, 255, 256, 1)), Sampling(max_tokens=6)
    right = [write(model, [one], sampling)[0] for one in given]
    with on_the_cpu(monkeypatch) as calls:
        assert page_size(model) == PAGE
        found, engine = written(model, given, sampling, waves=((0, 2), (2, 2), (1, 2)), tokens=100)
        assert found == right and engine.blocks.size == PAGE and model.plainly == ()
        # Prompts were read in pieces, beside others that wrote, and texts wrote beside one another.
        assert any(most > 1 and texts > 1 for most, _, texts in calls) and any(most == 1 for most, _, _ in calls)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_what_varlen_attn_does_not_cover_gives_the_same_too(monkeypatch, family):
    more = {"gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "head_dim": 32}}.get(
        family, {}
    )
    model = model_of(family, **{**LONG, **more})
    given, sampling = prompts((290, 5, 40, 256)), Sampling(max_tokens=6)
    right = [write(model, [one], sampling)[0] for one in given]
    with on_the_cpu(monkeypatch):
        assert written(model, given, sampling, tokens=100)[0] == right
        assert model.plainly == ({"gemma2": "soft-caps", "gpt_oss": "attention sinks"}[family],)


def test_in_fp32_blocks_are_small_and_texts_are_attended_one_by_one(monkeypatch):
    model, given, sampling = endless(), prompts(SIZES), Sampling(max_tokens=20)
    right = [write(model, [one], sampling)[0] for one in given]
    with on_the_cpu(monkeypatch, dtypes=(torch.bfloat16,)) as calls:
        found, engine = written(model, given, sampling, waves=((0, 3), (4, 2), (1, 5), (7, 2)), tokens=16, streams=3)
        assert found == right and engine.blocks.size == 32 and not calls and model.plainly == ("numbers in float32",)


def test_beginnings_are_found_again_by_the_page(monkeypatch):
    model, sampling = model_of("llama", **LONG), Sampling(max_tokens=4)
    (start,) = prompts((2 * PAGE + 5,))
    with on_the_cpu(monkeypatch):
        engine = Engine(model, 16 * PAGE)
        first = engine.add(start, sampling)
        engine.run()
        second = engine.add([*start[: PAGE + 200], 9, 8, 7], sampling)
        third = engine.add([*start, *first.written], sampling)
        engine.run()
        assert (first.reused, second.reused, third.reused) == (0, PAGE, 2 * PAGE)
        assert second.written == written(model, [second.prompt], sampling)[0][0]
    assert [first.written, second.written] == [write(model, [one.prompt], sampling)[0] for one in (first, second)]


def test_texts_that_must_give_way_are_read_anew(monkeypatch):
    model, given, sampling = model_of("qwen3", **LONG), prompts((250, 240, 255, 30)), Sampling(max_tokens=20)
    right = [write(model, [one], sampling)[0] for one in given]
    with on_the_cpu(monkeypatch):
        found, engine = written(model, given, sampling, room=3 * PAGE)
        assert found == right and engine.schedule.preempted > 0


def test_the_texts_of_a_search_share_pages(monkeypatch):
    model, given, sampling = model_of("llama", **LONG), prompts((300, 20)), Sampling(max_tokens=8, beams=3)
    right = search(model, given, sampling, 2)
    with on_the_cpu(monkeypatch):
        assert search(model, given, sampling, 2) == right
        engine = Engine(model, 32 * PAGE)
        searching = engine.search(given[0], sampling)
        while not searching.begin():
            pass
        while searching.busy:
            searching.step()
        assert searching.found[0] == right[0]
        searching.leave()
        assert engine.blocks.used == 0


def test_guesses_are_read_by_the_page_too(monkeypatch):
    model, sampling = model_of("llama", **LONG), Sampling(max_tokens=40)
    given = [[5, 6, 7, 8] * 10, [9, 10, 11] * 20]
    right = [write(model, [one], sampling)[0] for one in given]
    with on_the_cpu(monkeypatch):
        found, _ = written(model, given, sampling)
        assert found == right


def test_in_bf16_states_are_near_those_of_the_processor(monkeypatch):
    model = model_of("qwen3", **LONG)
    model.module.to(torch.bfloat16)
    given, sampling = prompts((270, 5, 40)), Sampling(max_tokens=3, logprobs=2)
    engine = Engine(model, 2048)
    right = [engine.add(one, sampling) for one in given]
    engine.run()
    with on_the_cpu(monkeypatch):
        engine = Engine(model, 4096)
        found = [engine.add(one, sampling) for one in given]
        engine.run()
    for one, other in zip(found, right):
        assert abs(one.logs[0].raw[0] - other.logs[0].raw[0]) < 0.1


def test_the_way_is_said(monkeypatch):
    for family, value, why in (
        ("llama", "varlen_attn", "over pages of 256 tokens; steps of single tokens as CUDA graphs"),
        ("gemma2", "plain torch", "text by text, slower: varlen_attn is not for soft-caps"),
    ):
        said = []
        with on_the_cpu(monkeypatch):
            model = model_of(family)
            model.as_stored = True
            choose_engine(model, Sampling(), "model", Events(sinks=[said.append]))
        found = {one["name"]: (one["value"], one["why"]) for one in said if one["event"] == "choice"}
        assert found["attention"] == (value, why) and found["weights"] == ("bfloat16", "as the files have them")
        assert found["engine"][0] == "paged"
