"""Steps of single tokens over standing buffers, as they are captured on a CUDA device: here they are run, not replayed."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.attention.varlen
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import flash
from flash import COVERED, LONG, model_of, on_the_cpu, written
from luthier.engine import decoding, paged
from luthier.engine.decoding import Buffers, Decoding
from luthier.engine.engine import Engine
from luthier.engine.padded import write
from luthier.engine.sampling import Sampling
from luthier.models.pages import Store, read_pages, writes_by_pages
from luthier.models.varlen import PAGE
from writing import prompts


class Captured:
    """Stands for what captures: what it was given runs again each time. Counts both."""

    def __init__(self):
        self.made = self.runs = 0

    def __call__(self, step):
        self.made += 1

        def again():
            self.runs += 1
            return step()

        return again


@pytest.fixture
def captured(monkeypatch):
    one = Captured()
    monkeypatch.setattr(paged, "capturer", lambda device: one)
    monkeypatch.setattr(decoding, "BEFORE", 0)
    return one


@pytest.mark.parametrize("family", COVERED)
def test_the_tokens_are_those_of_transformers(monkeypatch, captured, family):
    model = model_of(family, **{**LONG, **COVERED[family]})
    given, sampling = prompts((250, 5, 40, 255, 1)), Sampling(max_tokens=12)
    right = [write(model, [one], sampling)[0] for one in given]
    with on_the_cpu(monkeypatch):
        found, _ = written(model, given, sampling, waves=((0, 2), (2, 2), (3, 1)), guessed=0)
    assert found == right
    # Texts came and went, so that steps of several sizes were made; five texts were filled up to eight.
    assert captured.made >= 3 and captured.runs > 15
    alone = {texts for most, _, texts in flash.CALLS if most == 1}
    assert 8 in alone and 5 not in alone


def test_drawn_tokens_and_those_with_settings_are_the_same(monkeypatch, captured):
    model = model_of("qwen3", **LONG)
    given, sampling = (
        prompts((250, 5, 40)),
        Sampling(max_tokens=12, temperature=1.2, seed=3, repetition_penalty=1.2, logprobs=2),
    )
    with on_the_cpu(monkeypatch):
        found, _ = written(model, given, sampling, guessed=0)
        assert captured.runs
        monkeypatch.setattr(paged, "capturer", lambda device: None)
        assert written(model, given, sampling, guessed=0)[0] == found


def test_steps_with_guesses_prompts_or_too_many_texts_are_read_call_by_call(monkeypatch, captured):
    model = model_of("llama", **LONG)
    monkeypatch.setattr(decoding, "SIZES", (1, 2))
    with on_the_cpu(monkeypatch):
        engine = Engine(model, 16 * PAGE, guessed=0)
        requests = [engine.add(one, Sampling(max_tokens=9)) for one in prompts((9, 20, 30))]
        while len(engine.schedule.running) > 2 or not requests[0].written:
            engine.step()
            assert len(engine.schedule.running) < 3 or not captured.runs
        engine.run()
        before = captured.runs
        late = engine.add([5, 6, 7], Sampling(max_tokens=9))
        engine.run()
        # Its first token came with its prompt, its last is not read.
        assert captured.runs - before - 1 <= 8 and late.finish == "length"


def test_a_size_is_captured_when_it_has_been_asked_for_a_few_times(monkeypatch, captured):
    monkeypatch.setattr(decoding, "BEFORE", 4)
    model = model_of("llama", **LONG)
    with on_the_cpu(monkeypatch):
        engine = Engine(model, 16 * PAGE, guessed=0)
        engine.add([5, 6, 7], Sampling(max_tokens=20))
        for steps in range(1, 8):
            engine.step()
            assert captured.made == (steps > 5)  # the first reads the prompt


def test_rows_that_fill_a_step_up_touch_nothing_but_the_scratch_block(monkeypatch):
    model = model_of("llama", **LONG)
    with on_the_cpu(monkeypatch), torch.inference_mode():
        store = Store(4, PAGE)
        made = [Buffers(model, store, size, 2) for size in (1, 4)]
        for buffers in made:
            buffers.fill([7], [[2, 1]], [PAGE + 3], 3)
        # The first reading takes room that holds anything, even what is no number.
        read_pages(model, made[0].ids_N, made[0].pages)
        for pair in store._layers.values():
            for one in pair:
                one.fill_(0.5)
        keys, _ = store._layers[0]
        alone = read_pages(model, made[0].ids_N, made[0].pages)
        held = keys.clone()
        states, buffers = read_pages(model, made[1].ids_N, made[1].pages), made[1]
        touched = (keys != held).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert set(touched) <= {PAGE + 3, 3 * PAGE} and torch.allclose(states[:1], alone, atol=1e-5)
        assert buffers.pages.slots_N.tolist() == [PAGE + 3, 3 * PAGE, 3 * PAGE, 3 * PAGE]


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted when stream is capturing\nmore"), None])
def test_what_cannot_be_captured_is_read_call_by_call_and_said(monkeypatch, captured, error):
    model, given, sampling = model_of("llama", **LONG), prompts((9, 20)), Sampling(max_tokens=9)
    right = [write(model, [one], sampling)[0] for one in given]

    def capture(step):
        if error is not None:
            raise error
        return lambda: step() + 1  # what is replayed is not what was captured

    monkeypatch.setattr(paged, "capturer", lambda device: capture)
    why = "operation not permitted when stream is capturing$" if error is not None else "gives other numbers"
    with on_the_cpu(monkeypatch), pytest.warns(UserWarning, match=f"call by call, slower: .*{why}") as said:
        assert written(model, given, sampling, guessed=0)[0] == right
    assert len(said) == 1


class OnTheDevice(TorchDispatchMode):
    """Refuses what a capture refuses: values that go to the host, sizes that depend on values, numbers from the host."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "item", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            one.dtype == torch.bool for one in args[1] if one is not None
        )
        assert name not in self.REFUSED and not masks, f"{func} cannot be captured"
        return func(*args, **(kwargs or {}))


def test_that_mode_refuses_what_it_should():
    for step in (
        lambda: torch.ones(2).sum().item(),
        lambda: torch.ones(2)[torch.ones(2) > 0],
        lambda: torch.tensor([1]),
    ):
        with pytest.raises(AssertionError, match="cannot be captured"), OnTheDevice():
            step()


@pytest.mark.parametrize("family", COVERED)
def test_nothing_in_a_step_is_asked_of_the_host(monkeypatch, family):
    model = model_of(family, **{**LONG, **COVERED[family]})

    def opaque(*args, **kwargs):
        with _disable_current_modes():
            return flash.varlen_attn(*args, **kwargs)

    with on_the_cpu(monkeypatch), torch.inference_mode():
        assert writes_by_pages(model) and model.plainly == ()
        buffers = Buffers(model, Store(4, PAGE), 4, 2)
        buffers.fill([7, 8], [[2, 1], [0]], [PAGE + 3, 0], 3)
        read_pages(model, buffers.ids_N, buffers.pages)  # what is made once
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.attention.varlen, "varlen_attn", opaque)
            with OnTheDevice():
                read_pages(model, buffers.ids_N, buffers.pages)


def test_a_text_beyond_the_width_is_read_call_by_call(monkeypatch, captured):
    model = model_of("llama", **LONG)
    with on_the_cpu(monkeypatch), torch.inference_mode():
        made = Decoding(model, Store(4, PAGE), 3, 1, captured)
        assert made.read([7], [[0, 1]], [PAGE]) is None and made.read([7], [[0]], [PAGE - 1]) is not None


def test_a_graph_is_warmed_up_aside_and_gives_what_was_captured(monkeypatch):
    """In which order torch is asked; no device is needed."""
    told = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            told.append("replay")

    @contextmanager
    def noted(what, *args, **settings):
        told.append(f"{what} {settings}" if settings else what)
        yield
        told.append(f"end of {what}")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("here"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("aside"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: noted("aside"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **settings: noted("capture", **settings))
    made = []

    def step():
        told.append("step")
        made.append(torch.zeros(1))
        return made[-1]

    replay = decoding.Graphs(torch.device("cuda"))(step)
    assert replay() is made[2] and replay() is made[2]
    assert told == [
        "aside waits for here", "aside", "step", "step", "end of aside", "here waits for aside",
        "capture {'pool': 'pool', 'capture_error_mode': 'thread_local'}", "step", "end of capture", "replay", "replay",
    ]  # fmt: skip
