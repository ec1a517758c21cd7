"""Tuning on liked and disliked answers from the outside: it learns, judges beside the model before, goes on, is used."""

import json

import pytest
import torch

from luthier.core.errors import ConfigError, DataError
from luthier.core.run import find_run, read_record
from luthier.models.load import load_model
from luthier.verbs.evaluate import evaluate
from luthier.verbs.generate import generate, inference, load
from luthier.verbs.prepare import show
from luthier.verbs.tune import tune
from tiny import tiny_model

PROMPTS = [
    "win a prize now",
    "free cash call now",
    "see you at seven",
    "call me when home",
    "lunch at noon then",
    "One two",
]
PAIRS = [{"prompt": text, "chosen": "yes", "rejected": f"{text} and so on"} for text in PROMPTS]
VERDICTS = [
    {"prompt": text, "completion": "yes" if at % 2 else f"{text} and so on", "label": bool(at % 2)}
    for at, text in enumerate(PROMPTS)
]
# Held-out rows are those of training: what is asked here is whether it is learned at all.
QUICK = {"steps": 12, "learning_rate": 1e-2, "batch_size": 6, "schedule": "constant"}


def tuned(objective, rows=PAIRS, **more):
    data = {"train": rows, "validation": rows}
    return tune(**{"model": str(tiny_model("llama")), "data": data, "objective": objective, **QUICK, **more})


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("objective", ["auto", "orpo", "simpo"])
def test_pairs_are_learned_and_judged(objective, adapter):
    record = tuned(objective, adapter=adapter, name="one")
    assert record.metrics["preference_accuracy"].value == 1.0 and record.metrics["preference_accuracy"].n == 6
    assert record.baselines["longer"]["preference_accuracy"].value == 0.0
    by_likelihood = "likelihood_accuracy" if objective == "auto" else "preference_accuracy"
    assert record.metrics[by_likelihood].value >= record.baselines["untuned"][by_likelihood].value
    kept = (find_run("run:one") / "artefacts" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in kept]
    assert {row["output"] for row in rows} == {"chosen"} and "rejected (" in rows[0]["input"]
    assert load_model("run:one").spec.learned == ("dpo" if objective == "auto" else objective)
    shown = (find_run("run:one") / "artefacts" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(shown[1])["id"].endswith("answer 2 of 2")


def test_verdicts_are_learned_and_judged():
    record = tuned("auto", VERDICTS, adapter="lora", name="one")
    assert record.metrics["roc_auc"].value == 1.0 and load_model("run:one").spec.learned == "kto"
    assert record.metrics["likelihood_auc"].value >= record.baselines["untuned"]["likelihood_auc"].value


def test_a_later_evaluation_takes_the_reference_that_it_is_given():
    inside = tuned("dpo", name="one")
    rows = {"train": PAIRS}
    alone = evaluate(model="run:one", data=rows)
    assert alone.metrics["preference_accuracy"] == inside.metrics["likelihood_accuracy"]
    beside = evaluate(model="run:one", data=rows, reference=str(tiny_model("llama")))
    assert beside.metrics == inside.metrics and beside.baselines == inside.baselines
    with pytest.raises(ConfigError, match="gives no likelihood"):
        evaluate(model="run:one", data=rows, reference=str(tiny_model("bert")))
    with pytest.raises(ConfigError, match="no plain baseline"):
        evaluate(model="run:one", data=rows, train=PAIRS)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_reward_model_scores_what_it_never_saw_as_rows(adapter, tmp_path):
    record = tuned("reward", adapter=adapter, name="judge")
    assert record.metrics["preference_accuracy"].value == 1.0 and "untuned" not in record.baselines
    again = evaluate(model="run:judge", data={"train": PAIRS})
    assert again.metrics == record.metrics
    with pytest.raises(ConfigError, match="needs none"):
        evaluate(model="run:judge", data={"train": PAIRS}, reference=str(tiny_model("llama")))
    talks = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[which]}]
        for row in PAIRS
        for which in ("chosen", "rejected")
    ]
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks), encoding="utf-8")
    found = [one["output"] for one in generate(model="run:judge", input=str(file))]
    assert all(good > bad for good, bad in zip(found[::2], found[1::2]))
    # The same as prompt and answer, and the same as while it learned.
    file.write_text(json.dumps({"text": PAIRS[0]["prompt"], "text_pair": "yes"}) + "\n", encoding="utf-8")
    assert generate(model="run:judge", input=str(file))[0]["output"] == pytest.approx(found[0], rel=1e-5)
    said = json.loads(
        (find_run("run:judge") / "artefacts" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()[0]
    )
    assert f"chosen ({found[0]:.3f})" in said["input"]
    assert isinstance(inference(*load("run:judge"), "yes"), float)
    file.write_text(json.dumps({"messages": [*talks[0], {"role": "user", "content": "?"}]}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="scores an answer"):
        generate(model="run:judge", input=str(file))


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_stopped_run_goes_on_with_the_reference_it_has(objective, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    made = VERDICTS if objective == "kto" else PAIRS
    file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    rows = str(file)
    more = {"steps": 8, "checkpoint_every": 4, "batch_size": 2, "adapter": "lora"}
    tuned(objective, rows, name="straight", **more)
    from luthier.training import loop

    take = loop.take_step

    def stop(learner, step_rows, events):
        if learner.progress.step == 6:
            raise KeyboardInterrupt
        return take(learner, step_rows, events)

    with monkeypatch.context() as held:
        held.setattr(loop, "take_step", stop)
        with pytest.raises(KeyboardInterrupt):
            tuned(objective, rows, name="broken", **more)
    assert read_record(find_run("run:broken")).state == "interrupted"
    kept = {path: path.stat().st_mtime_ns for path in (find_run("run:broken") / "reference").iterdir()}
    assert tune(resume="run:broken").state == "finished"
    assert {path: path.stat().st_mtime_ns for path in (find_run("run:broken") / "reference").iterdir()} == kept
    one, other = load_model("run:straight"), load_model("run:broken")
    for (name, mine), theirs in zip(one.module.state_dict().items(), other.module.state_dict().values()):
        assert torch.equal(mine, theirs), name


def test_an_adapter_that_is_trained_further_starts_from_itself():
    tuned("dpo", adapter="lora", name="first")
    record = tuned("dpo", model="run:first", adapter="lora", name="second", steps=1, learning_rate=1e-6)
    # One tiny step away from its start the log-ratios are next to nothing; against the base they would not be.
    assert record.metrics["likelihood_accuracy"] == record.baselines["untuned"]["likelihood_accuracy"]
    rows = (find_run("run:second") / "artefacts" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    margins = [abs(float(json.loads(row)["input"].split("chosen (")[1].split(")")[0])) for row in rows]
    assert max(margins) < 0.1


def test_micro_batches_change_nothing():
    losses = []
    for accumulate in (1, 3):
        events: list[dict] = []
        tune(
            model=str(tiny_model("llama")),
            data={"train": VERDICTS, "split": {"validation": 0}},
            objective="kto",
            accumulate=accumulate,
            sinks=[events.append],
            **QUICK,
        )
        losses.append([event["loss"] for event in events if event["event"] == "step"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-6)


def test_rows_are_shown_an_answer_at_a_time():
    found = show(model=str(tiny_model("llama")), data={"train": PAIRS, "split": {"validation": 0}}, rows=1)
    assert [row["id"].rpartition(", ")[2] for row in found] == ["answer 1 of 2", "answer 2 of 2"]
    learned = ["".join(text for text, weight in row["tokens"] if weight) for row in found]
    assert learned[0].startswith("yes") and learned[1].startswith(PROMPTS[0])
