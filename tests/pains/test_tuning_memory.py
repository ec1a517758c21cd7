"""Pains of tuning that are about memory: predicted, tried first, filled and no more, and halved where it runs out."""

import json
import re

import pytest
import torch

from luthier.core.config import resolve
from luthier.core.errors import ConfigError, TrainingError
from luthier.core.events import Events
from luthier.engine import paged as readers
from luthier.models import memory
from luthier.models.load import load_model
from luthier.models.pages import Store
from luthier.models.rehearsal import Ledger
from luthier.training import forecast
from luthier.training import probe as probing
from luthier.training.objectives.sft import SFT
from luthier.verbs import planning
from luthier.verbs.encoding import encode
from luthier.verbs.reading import read
from luthier.verbs.tune import Tune, plan, tune, tune_model
from luthier.verbs.work import Work
from tiny import tiny_model

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "one two " * (at % 5 + 1)},
            {"role": "assistant", "content": "six " * at},
        ]
    }
    for at in range(1, 13)
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {"train": str(path), "split": {"validation": 0.25, "test": 0}}


def ask(data, **values):
    settings = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "baselines": False}
    return resolve(Tune, values={"model": str(tiny_model("llama")), "data": data, **settings, **values})


class Full:
    """An objective's measure that has room for `tokens` at once."""

    def __init__(self, monkeypatch, tokens, error=None):
        error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.tokens, self.seen, self.failed = tokens, [], 0
        whole = SFT.measure

        def measure(objective, model, batch):
            if model.device.type == "meta":
                return whole(objective, model, batch)
            self.seen.append(batch.tokens)
            if batch.tokens > self.tokens:
                self.failed += 1
                raise error
            return whole(objective, model, batch)

        monkeypatch.setattr(SFT, "measure", measure)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."
        ),
        MemoryError(),
    ],
)
def test_pain_12_running_out_halves_the_micro_batch_and_keeps_the_step(data, monkeypatch, error):
    heard = []
    _, plain = tune_model(ask(data))
    full = Full(monkeypatch, 100, error)
    record, model = tune_model(ask(data), sinks=[heard.append])
    assert full.failed >= 1 and max(full.seen) > 100
    assert record.numbers["steps"] == 4
    for (name, one), other in zip(plain.module.named_parameters(), model.module.parameters()):
        assert torch.allclose(one, other, atol=1e-6), name
    said = [event["message"] for event in heard if event["event"] == "warning"]
    assert any("memory ran out, so " in one and "the result is the same" in one for one in said)
    # Halved for good: not tried again at every step.
    assert full.failed <= 3


def test_pain_12_one_row_that_does_not_fit_ends_the_run(data, monkeypatch):
    Full(monkeypatch, 5)
    with pytest.raises(
        TrainingError, match=r"memory ran out with one row of .* tokens at once; set checkpointing: layers"
    ):
        tune(ask(data))


def test_other_errors_are_not_taken_for_it(data, monkeypatch):
    full = Full(monkeypatch, 100, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        tune(ask(data))
    assert full.failed == 1


def test_pain_12_what_is_predicted_and_what_it_was_are_kept(data):
    record = tune(ask(data))
    numbers = record.numbers
    assert numbers["predicted_seconds"] > 0
    assert numbers["predicted_peak_bytes"] == pytest.approx(numbers["peak_bytes"], rel=0.5)
    found = plan(ask(data))
    parts = found["memory_bytes"]
    assert parts["total"] == sum(parts[name] for name in ("weights", "process", "masters", "optimizer")) + max(
        parts["gradients"] + parts["activations"], parts["validation"]
    )
    assert parts["gradients"] == 4 * found["trainable_parameters"] and parts["optimizer"] == 2 * parts["gradients"]
    assert "predicted at most: weights" in found["choices"]["memory"]


def test_a_bf16_model_has_masters(data):
    parts = plan(ask(data, precision="bfloat16"))["memory_bytes"]
    assert parts["masters"] == parts["gradients"]
    assert plan(ask(data, precision="float32"))["memory_bytes"]["masters"] == 0


def test_memory_that_is_given_is_filled(data, monkeypatch):
    monkeypatch.setattr(planning, "TOKENS", 512)
    # What the process holds would drown what a tiny model takes.
    monkeypatch.setattr(forecast, "held_memory", lambda device: 0)
    monkeypatch.setattr(forecast, "library_memory", lambda device, dtype: 0)
    free = plan(ask(data, batch_size=12))
    assert free["settings"]["micro_tokens"]["value"] == 512
    needed = free["memory_bytes"]
    given = (needed["total"] - needed["activations"] // 2) / planning.FILLED / 1e9
    less = plan(ask(data, batch_size=12, memory=given))
    assert less["settings"]["micro_tokens"]["value"] < 512 and "the most that fits" in less["choices"]["micro_tokens"]
    assert less["settings"]["checkpointing"]["value"] == "none"
    assert less["memory_bytes"]["total"] <= given * 1e9
    lean = plan(ask(data, batch_size=12, checkpointing="layers", micro_tokens=512))["memory_bytes"]["total"]
    between = (needed["total"] + lean) / 2 / planning.FILLED / 1e9
    asked = plan(ask(data, batch_size=12, memory=between, micro_tokens=512))
    assert asked["settings"]["micro_tokens"]["value"] == 512
    assert (
        asked["settings"]["checkpointing"]["value"] == "layers"
        and "computed again" in asked["choices"]["checkpointing"]
    )


def test_memory_that_cannot_do_is_refused_where_it_was_given_and_said_where_not(data, monkeypatch):
    with pytest.raises(ConfigError, match=r"memory: 1 MB are not enough, .* needed at least, .* held already; choose"):
        tune(ask(data, memory=0.001))
    held = memory.held_memory(torch.device("cpu")) / 1e9
    monkeypatch.setattr(memory, "held_memory", lambda device: int(held * 1e9))
    least = plan(ask(data, micro_tokens=512, checkpointing="none"))["memory_bytes"]["total"] / 1e9
    # What is left free of the memory given is part of what is needed.
    with pytest.raises(ConfigError) as why:
        plan(ask(data, micro_tokens=512, checkpointing="none", memory=least))
    said = re.search(r"enough, ([\d.]+) (MB|GB) \(", str(why.value))
    assert said is not None
    asked = float(said[1]) / (1000 if said[2] == "MB" else 1)
    assert asked > least
    plan(ask(data, micro_tokens=512, checkpointing="none", memory=asked + 0.01))
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    monkeypatch.setattr(memory, "held_memory", lambda device: 1000)
    found = plan(ask(data))
    assert any("the memory that is free may not be enough" in one for one in found["warnings"])


def test_the_result_does_not_hang_on_what_is_kept(data):
    _, plain = tune_model(ask(data))
    _, lean = tune_model(ask(data, checkpointing="layers", micro_tokens=64))
    for one, other in zip(plain.module.parameters(), lean.module.parameters()):
        assert torch.allclose(one, other, atol=1e-6)
    assert not any("own_forward" in vars(part) for part in lean.network.modules())


def test_offload_needs_a_gpu(data):
    with pytest.raises(ConfigError, match="offload moves what a GPU keeps to the host"):
        tune(ask(data, checkpointing="offload"))


def test_a_model_that_does_not_run_without_values_is_not_predicted(data, monkeypatch):
    whole = Ledger.__torch_dispatch__

    def refuse(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.mm:
            raise NotImplementedError("no meta kernel")
        return whole(self, func, types, args, kwargs)

    monkeypatch.setattr(Ledger, "__torch_dispatch__", refuse)
    heard = []
    record = tune(ask(data, validate_every=2), sinks=[heard.append])
    said = {event["name"]: event for event in heard if event["event"] == "choice"}
    assert said["memory"]["value"] == "not predicted" and "no meta kernel" in said["memory"]["why"]
    assert "measured with the largest batch" in said["probe"]["why"]
    assert record.state == "finished" and "predicted_peak_bytes" not in record.numbers


def test_pain_12_the_probe_leaves_everything_as_it_was(data, monkeypatch):
    """With dropout, so that a draw of the probe's would show."""
    adapter = {"kind": "lora", "rank": 4, "dropout": 0.2}
    steps = []
    for tried in (True, False):
        monkeypatch.setattr("luthier.training.loop.worth_probing", lambda plan, sharded, tried=tried: tried)
        heard = []
        tune(ask(data, adapter=adapter), sinks=[heard.append])
        assert tried == any(event.get("name") == "probe" for event in heard)
        steps.append([event["loss"] for event in heard if event["event"] == "step"])
    assert steps[0] == steps[1] and len(steps[0]) == 4


def test_pain_11_and_12_the_largest_batches_are_what_is_tried(data, monkeypatch):
    asked = ask(data, micro_tokens=150)
    work = Work(asked, Events())
    read(work)
    encode(work)
    every = [len(row.ids) for step in work.feed.plan.steps_from(0) for row in (work.rows[at] for at in step)]
    assert max(every) <= work.plan.forecast.tokens <= 150
    assert len(work.plan.held_out) >= 1
    monkeypatch.setattr("luthier.training.loop.worth_probing", lambda plan, sharded: True)
    full = Full(monkeypatch, 10**6)
    tune(asked)
    assert full.seen[0] == work.plan.forecast.tokens >= max(full.seen[2:])


def test_a_probe_is_for_long_runs_and_full_memory(data):
    work = Work(ask(data), Events())
    read(work)
    encode(work)
    assert not probing.worth_probing(work.plan, sharded=False)  # four steps, and plenty of memory
    work = Work(ask(data, steps=4000), Events())
    read(work)
    encode(work)
    assert probing.worth_probing(work.plan, sharded=False) and not probing.worth_probing(work.plan, sharded=True)


def test_limits_of_a_container_count(tmp_path, monkeypatch):
    device = torch.device("cpu")
    for name, text in (("max", "1000000"), ("current", "700000"), ("stat", "anon 5\ninactive_file 50000\n")):
        (tmp_path / name).write_text(text)
    files = tuple(str(tmp_path / name) for name in ("max", "current", "stat"))
    monkeypatch.setattr(memory, "GROUPS", ((*files, "inactive_file"),))
    assert memory.free_memory(device) == 350000
    (tmp_path / "max").write_text("max")
    assert memory.free_memory(device) > 10**7


def test_the_peak_is_that_since_the_watch_began():
    device = torch.device("cpu")
    large = torch.ones(60_000_000)
    del large
    memory.return_freed_memory(device)
    if not memory.start_peak(device):
        pytest.skip("this system does not let a process reset its peak")
    before = memory.peak_memory(device)
    another = torch.ones(20_000_000)
    assert 70e6 < memory.peak_memory(device) - before < 120e6
    del another


def test_a_dry_run_plans_for_as_many_processes_as_are_asked_for(data):
    alone, both = plan(ask(data)), plan(ask(data, processes=2))
    assert 0 < both["memory_bytes"]["activations"] < alone["memory_bytes"]["activations"]
    assert both["seconds"] < alone["seconds"]


def test_no_time_is_predicted_where_nobody_knows_how_long_the_rows_will_be(data):
    rows = {"train": [{"prompt": f"one {at}", "answer": "two"} for at in range(8)], "split": {"validation": 0}}
    asked = {"objective": {"kind": "grpo", "rewards": "exact_match", "max_tokens": 4, "samples": 2}}
    assert plan(ask(rows, **asked))["seconds"] is None
    assert plan(ask(data))["seconds"] > 0


def test_a_stream_is_planned_by_the_rows_that_were_seen_and_says_so(data):
    found = plan(ask({"train": data["train"], "stream": True}))
    assert "from the first" in found["choices"]["memory"] and found["seconds"] is None


def test_noise_is_part_of_the_forecast(data):
    plain, noisy = plan(ask(data)), plan(ask(data, noise=5))
    assert "predicted at most" in noisy["choices"]["memory"]
    assert noisy["memory_bytes"]["activations"] >= plain["memory_bytes"]["activations"] > 0


@pytest.mark.parametrize("where", ["luthier.training.step.Learner.rate", "torch.optim.AdamW.step"])
def test_memory_that_runs_out_anywhere_is_one_sentence_and_leaves_the_model_as_it_was(data, monkeypatch, where):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(where, property(fail) if where.endswith("rate") else fail)
    model = load_model(str(tiny_model("llama")))
    asked = ask(data, checkpointing="layers", precision="bfloat16")
    with pytest.raises(TrainingError, match="memory ran out; set checkpointing: layers, a shorter max_length"):
        tune_model(asked, model=model)
    assert not any("own_forward" in vars(layer) for layer in model.network.modules())
    assert not any(one._post_accumulate_grad_hooks for one in model.module.parameters())


def test_a_probe_says_no_memory_that_it_did_not_measure(data, monkeypatch):
    monkeypatch.setattr("luthier.training.loop.worth_probing", lambda plan, sharded: True)
    found = {}

    def note(event):
        if event["event"] == "choice" and event["name"] == "probe":
            found["said"] = event["value"]

    tune(ask(data), sinks=[note])
    assert "MB" in found["said"] or "GB" in found["said"]
    monkeypatch.setattr("luthier.training.loop.start_peak", lambda device: False)
    tune(ask(data), sinks=[note])
    assert "B" not in found["said"] and found["said"].endswith(" s")


def test_shared_weights_count_once_among_the_processes(data, monkeypatch):
    both = plan(ask(data, processes=2))["memory_bytes"]
    shared = plan(ask(data, processes=2, sharding="full"))["memory_bytes"]
    for name in ("weights", "gradients", "optimizer"):
        assert shared[name] == pytest.approx(both[name] / 2, abs=1)


def test_answers_written_between_steps_are_part_of_the_forecast(monkeypatch):
    rows = {"train": [{"prompt": f"one {at}", "answer": "two"} for at in range(8)], "split": {"validation": 0}}
    asked = {"objective": {"kind": "grpo", "rewards": "exact_match", "max_tokens": 40, "samples": 4}}
    made = []
    monkeypatch.setattr(readers, "Store", lambda *sizes: made.append(Store(*sizes)) or made[-1])
    foretold = plan(ask(rows, **asked))
    tune(ask(rows, **{**asked, "steps": 1}))
    assert foretold["memory_bytes"]["writing"] == pytest.approx(max(one.nbytes for one in made), rel=0.1)
    fewer = plan(ask(rows, objective={**asked["objective"], "samples": 2}))
    assert 0 < fewer["memory_bytes"]["writing"] < foretold["memory_bytes"]["writing"]


def test_nothing_is_set_aside_for_answers_that_nobody_writes(data):
    assert plan(ask(data))["memory_bytes"]["writing"] == 0
