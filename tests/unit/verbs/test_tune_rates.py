"""Tuning with averages, rates by layer and noise, from the outside: what is kept, and that a stopped run ends the same."""

import json

import pytest
import torch

from luthier.core.config import resolve
from luthier.core.errors import ConfigError
from luthier.core.events import Events
from luthier.models.load import load_model
from luthier.training import loop
from luthier.training.checkpoint import Checkpoints, read_checkpoint
from luthier.training.learner import Learner
from luthier.training.optimizers import OPTIMIZERS
from luthier.training.schedules.shapes import Constant
from luthier.training.validation import validate
from luthier.verbs.encoding import encode
from luthier.verbs.reading import read
from luthier.verbs.tune import Tune, plan, tune, tune_model
from luthier.verbs.work import Work
from tiny import tiny_model

WORDS = [
    "win a prize now",
    "free cash call now",
    "see you at seven",
    "lunch at noon then",
    "call me when home",
    "ok then",
]
CHATS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[:at]}]}
    for text in WORDS
    for at in (4, 8)
]
SETTINGS = {
    "objective": "sft",
    "data": {"train": CHATS[:9], "validation": CHATS[9:]},
    "steps": 12,
    "learning_rate": 5e-3,
    "batch_size": 4,
    "validate_every": 4,
    "checkpoint_every": 3,
    "baselines": False,
    "accumulate": 2,
}
FAST = 0.7

CASES = {
    "schedule_free": {"optimizer": {"kind": "schedule_free"}},
    "schedule_free in bfloat16": {"optimizer": {"kind": "schedule_free"}, "precision": "bfloat16"},
    "ema": {"ema": FAST},
    "ema in bfloat16": {"ema": FAST, "precision": "bfloat16"},
    "ema of lora": {"ema": FAST, "adapter": {"kind": "lora", "rank": 4, "dropout": 0.1}},
    "noise and layers": {"noise": 5, "layer_decay": 0.7, "optimizer": {"kind": "lion"}},
    "adamw8bit": {"optimizer": {"kind": "adamw8bit", "small": 64}},
    "apollo": {"optimizer": {"kind": "apollo", "rank": 8, "refresh": 5}},
    "galore": {"optimizer": {"kind": "galore", "rank": 8, "refresh": 5}},
}


class Stop(Exception):
    """What ends a run in the middle of a step, as a fault would."""


class Spoiling(Constant):
    """Ever worse after the fourth step."""

    def factor(self, step: int, steps: int) -> float:
        return 1.0 if step < 4 else 100.0


def config(folder, name, case):
    """A run's config in a file, which a resumed run reads again."""
    data = {}
    for part, rows in SETTINGS["data"].items():
        file = folder / f"{part}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        data[part] = str(file)
    values = {"model": str(tiny_model("llama")), "name": name, **SETTINGS, **CASES[case], "data": data}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values))
    return resolve(Tune, file=path)


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_goes_on_to_the_same_end(case, runs, tmp_path):
    straight: list[dict] = []
    tune(config(tmp_path, "straight", case), sinks=[straight.append])

    def stop(event):
        if event["event"] == "step" and event["step"] == 8:
            raise Stop

    with pytest.raises(Stop):
        tune(config(tmp_path, "broken", case), sinks=[stop])
    again: list[dict] = []
    tune(resume="run:broken", sinks=[again.append])
    losses = [{e["step"]: e["loss"] for e in events if e["event"] == "step"} for events in (straight, again)]
    looks = [{e["step"]: e["loss"] for e in events if e["event"] == "validate"} for events in (straight, again)]
    assert min(losses[1]) == 7 and all(losses[0][step] == loss for step, loss in losses[1].items())
    assert looks[1] and all(looks[0][step] == loss for step, loss in looks[1].items())
    one, other = load_model("run:straight"), load_model("run:broken")
    for (name, mine), theirs in zip(one.module.state_dict().items(), other.module.state_dict().values()):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("best", ["last", "earlier", "none"])
@pytest.mark.parametrize("case", ["schedule_free", "ema", "ema in bfloat16"])
def test_the_average_is_what_is_validated_and_kept(case, best, tmp_path, monkeypatch):
    learners: list[Learner] = []
    monkeypatch.setattr(loop, "Learner", lambda *args, **more: learners.append(Learner(*args, **more)) or learners[-1])
    work = Work(config(tmp_path, "one", case), Events())
    read(work)
    encode(work)
    outcome = loop.train(
        work.model,
        work.objective,
        work.feed,
        [] if best == "none" else work.validation,
        parameters=work.parameters,
        optimizer=work.config.optimizer,
        schedule=Spoiling() if best == "earlier" else work.config.schedule,
        settings=work.settings,
        checkpoints=Checkpoints(tmp_path / "checkpoints"),
        events=work.events,
    )
    assert outcome.progress.best_step == {"last": 12, "earlier": 4, "none": 0}[best]
    trained, state = read_checkpoint(tmp_path / "checkpoints" / "step-00000012")
    model = dict(work.model.module.named_parameters())
    if best == "earlier":
        kept, _ = read_checkpoint(tmp_path / "checkpoints" / "best")
    elif case == "schedule_free":
        held = learners[0].engine.state
        kept = {name: trained[name].lerp(held[one]["fast"], 1 - 1 / 0.9) for name, one in learners[0].parameters}
    else:
        kept = dict(zip([name for name, _ in learners[0].parameters], state["averages"]["averages"]))
    for name, one in kept.items():
        assert torch.equal(model[name], one.to(model[name].dtype)) and not torch.equal(one, trained[name]), name
    if best != "none":
        seen = {one["step"]: one["loss"] for one in outcome.progress.history}
        found = validate(work.model, work.objective, work.validation, tokens=work.settings.micro_tokens)
        assert found["loss"] == seen[outcome.progress.best_step]


def test_an_average_beside_an_average_is_refused():
    with pytest.raises(ConfigError, match="schedule_free averages the weights itself; leave ema at 0"):
        tune(model=str(tiny_model("llama")), optimizer={"kind": "schedule_free"}, ema=0.9, **SETTINGS)


def test_what_suits_an_optimiser_is_chosen_and_said():
    def decided(**values):
        asked = resolve(Tune, values={"model": str(tiny_model("llama")), **SETTINGS, "learning_rate": "auto", **values})
        found = plan(asked)
        return {path: one["value"] for path, one in found["settings"].items()}, found["choices"], found["memory_bytes"]

    adamw, _, memory = decided()
    lion, why, less = decided(optimizer={"kind": "lion"})
    assert (
        lion["learning_rate"] == pytest.approx(adamw["learning_rate"] / 3, rel=0.03)
        and "times 0.333 for lion: every value moves by the whole rate" in why["learning_rate"]
    )
    assert (
        less["optimizer"] * 2 == memory["optimizer"] and decided(ema=0.9)[2]["optimizer"] * 2 == memory["optimizer"] * 3
    )
    free, why, _ = decided(optimizer={"kind": "schedule_free"})
    assert free["schedule.kind"] == "constant" and "in place of a falling rate" in why["schedule"]
    asked, why, _ = decided(optimizer={"kind": "schedule_free"}, schedule={"kind": "cosine"})
    assert asked["schedule.kind"] == "cosine" and "schedule" not in why


def test_the_chosen_rate_is_multiplied_and_a_given_one_is_not():
    def rate(**values):
        asked = resolve(Tune, values={"model": str(tiny_model("llama")), **SETTINGS, "learning_rate": "auto", **values})
        found = plan(asked)
        return found["settings"]["learning_rate"]["value"], found["choices"].get("learning_rate")

    chosen, why = rate()
    assert rate(rate_multiplier=0.5) == (
        pytest.approx(chosen / 2),
        f"{chosen / 2:g}: {why.partition(': ')[2]}, times 0.5 as asked",
    )
    with pytest.raises(ConfigError, match="moves the rate that auto chooses"):
        rate(rate_multiplier=0.5, learning_rate=1e-3)


def test_sgds_rate_goes_by_how_many_values_learn():
    # AdamW moves each of 10,000 values by the rate: a step as long as 100 rates. SGD's steps in one direction add up to
    # rate / (1 - momentum) times a gradient of length 1.
    assert OPTIMIZERS.parse("sgd").times(10_000) == pytest.approx(10)
    assert OPTIMIZERS.parse({"kind": "sgd", "momentum": 0}).times(10_000) == 100
    assert OPTIMIZERS.parse({"kind": "galore", "strength": 0.5}).times(10_000) == 2
    values = {"model": str(tiny_model("llama")), **SETTINGS, "learning_rate": "auto", "optimizer": "sgd"}
    few = plan(resolve(Tune, values={**values, "adapter": {"kind": "freeze", "layers": 0}}))
    all_of_it = plan(resolve(Tune, values=values))
    rates = [one["settings"]["learning_rate"]["value"] for one in (few, all_of_it)]
    learning = [one["trainable_parameters"] for one in (few, all_of_it)]
    assert rates[1] / rates[0] == pytest.approx((learning[1] / learning[0]) ** 0.5, rel=0.05) and rates[0] != rates[1]
    assert "for sgd: its step is as long as the clipped gradient" in few["choices"]["learning_rate"]


def test_the_lowest_layers_move_least(runs):
    start = dict(load_model(str(tiny_model("llama"))).module.named_parameters())
    values = {**SETTINGS, "steps": 1, "optimizer": {"kind": "adamw", "weight_decay": 0}, "layer_decay": 0.1}
    _, model = tune_model(resolve(Tune, values={"model": str(tiny_model("llama")), "schedule": "constant", **values}))
    moved = {name: float((one - start[name]).detach().abs().max()) for name, one in model.module.named_parameters()}
    parts = ("embed_tokens.weight", "layers.0.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight", "lm_head.weight")
    found = [next(size for name, size in moved.items() if name.endswith(part)) for part in parts]
    # Adam's first step is the rate itself.
    assert found == pytest.approx([5e-5, 5e-4, 5e-3, 5e-3], rel=0.01)


def test_the_shown_rate_is_that_of_unscaled_weights(runs):
    events: list[dict] = []
    values = {"model": str(tiny_model("llama")), **SETTINGS, "steps": 2, "layer_decay": 0.5, "schedule": "constant"}
    tune(resolve(Tune, values=values), sinks=[events.append])
    assert [event["learning_rate"] for event in events if event["event"] == "step"] == [5e-3, 5e-3]
