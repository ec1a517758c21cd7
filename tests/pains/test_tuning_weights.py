"""Pains of tuning that are about the weights: merging, embeddings and added tokens, going on after a stop."""

import json

import pytest
import torch

from adapted import EDGES, TOKENS, logits
from luthier.core.config import resolve
from luthier.core.errors import ModelError, RunError
from luthier.core.events import read_events
from luthier.models.adapters import ADAPTERS
from luthier.models.load import load_model
from luthier.models.precision import cast_weights
from luthier.models.save import save_model
from luthier.verbs.merge import merge
from luthier.verbs.tune import Tune, tune
from tiny import tiny_model


def adapted(family, adapter, scale=0.05, precision="float32"):
    """A model whose adapter does something, as a tuning in `precision` leaves it; and the adapter."""
    loaded = load_model(str(tiny_model(family)))
    part = ADAPTERS.parse(adapter)
    part.apply(loaded)
    named = part.trainable(loaded)
    cast_weights(loaded, precision)
    with torch.no_grad():
        for name, parameter in named:
            parameter.add_((10 if "lora_b" in name else 1) * scale * torch.randn_like(parameter))
    return loaded, part


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa"])
def test_pain_08_merging_does_not_degrade_the_fine_tune(kind, tmp_path):
    """An adapter tuned on a bf16 base is merged into the base's own fp32 weights, not into the rounded ones."""
    settings = {"kind": kind, "rank": 4, "tokens": ["<tool>"], "also": ["norm"]}
    loaded, part = adapted("llama", settings, 0.002, "bfloat16")  # as small as what a short tuning learns
    save_model(loaded, tmp_path / "adapter")
    expected = logits(load_model(str(tmp_path / "adapter"), dtype="float32"))  # the fp32 base and the adapter beside it
    part.merge(loaded)
    assert loaded.spec.precision == "float32" and loaded.network.dtype == torch.float32
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    save_model(loaded, tmp_path / "whole")
    again = load_model(str(tmp_path / "whole"))
    assert again.network.dtype == torch.float32
    assert torch.equal(logits(again), logits(loaded))

    rounded = load_model(str(tmp_path / "whole"), dtype="bfloat16")  # what merging into bf16 would give at its best
    cast_weights(rounded, "float32")
    assert not torch.allclose(logits(rounded), expected, atol=1e-4)


def test_pain_08_a_merge_that_changes_the_model_is_not_written(tmp_path, monkeypatch):
    """Outputs before and after are compared each time, and the difference is in the result."""
    from luthier.models.adapters import merge as module

    save_model(adapted("llama", {"kind": "lora", "rank": 4})[0], tmp_path / "adapter")
    found = merge(model=str(tmp_path / "adapter"), output=tmp_path / "whole")
    assert found["difference"] < 1e-5 and found["rounding"] < 1e-5
    own = module.merge_adapter

    def spoil(loaded):
        own(loaded)
        with torch.no_grad():
            loaded.network.model.layers[0].mlp.up_proj.weight.mul_(1.01)

    monkeypatch.setattr(module, "merge_adapter", spoil)
    with pytest.raises(ModelError, match=r"differs from the adapted one by .* of its outputs, so nothing was written"):
        merge(model=str(tmp_path / "adapter"), output=tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "gemma"])  # with tied embeddings and without
@pytest.mark.parametrize("adapter", EDGES)
def test_pain_09_embeddings_and_added_tokens_survive_save_reload_and_merge(family, adapter, tmp_path):
    """Adapters on tied embeddings, and rows of new tokens, on the way to a whole model."""
    adapter = {"kind": "lora", "rank": 4, "targets": ["q_proj"], **adapter}
    if family == "gpt2":
        other = {"embed_tokens": "wte", "q_proj": "c_attn"}
        adapter |= {key: [other.get(one, one) for one in adapter.get(key, [])] for key in ("targets", "also")}
    loaded, part = adapted(family, adapter)
    ids = torch.tensor([5, 30, len(loaded.tokenizer) - 1, 32, len(loaded.tokenizer) - 2])
    expected = logits(loaded, ids)
    save_model(loaded, tmp_path / "adapter")
    again = load_model(str(tmp_path / "adapter"))
    assert torch.equal(logits(again, ids), expected)
    part.apply(again)  # learns on
    assert [name for name, _ in part.trainable(again)] == [name for name, _ in part.trainable(loaded)]
    part.merge(again)
    assert torch.allclose(logits(again, ids), expected, atol=1e-5)
    save_model(again, tmp_path / "whole")
    whole = load_model(str(tmp_path / "whole"))
    assert torch.equal(logits(whole, ids), logits(again, ids))
    assert whole.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()


def test_pain_09_tokens_that_were_learned_are_there_in_the_run(tmp_path):
    """A tuning with added tokens, from its data to its run and to a whole model."""
    rows = [{"prompt": "which", "completion": "<tool> fox <answer>"}] * 8
    adapter, data = {"kind": "lora", "rank": 4, "tokens": TOKENS}, {"train": rows, "split": {"validation": 0.0}}
    start = load_model(str(tiny_model("llama")))
    ADAPTERS.parse(adapter).apply(start)
    tune(model=str(tiny_model("llama")), data=data, adapter=adapter, steps=3, name="one", baselines=False)
    merge(model="run:one", output=tmp_path / "whole")
    for model in (load_model("run:one"), load_model(str(tmp_path / "whole"))):
        ids = torch.tensor(model.renderer.prompt("which <tool>, which <answer>?"))
        found = model.tokenizer.convert_tokens_to_ids(TOKENS)
        assert found == [400, 401] and set(found) <= set(ids.tolist())
        before, after = (one.network.get_input_embeddings()(torch.tensor(found)) for one in (start, model))
        assert not torch.equal(before, after) and (before - after).abs().max() < 0.1
    assert torch.allclose(logits(model, ids), logits(load_model("run:one"), ids), atol=1e-5)


CASES = {
    "full": {},
    "lora": {"adapter": {"kind": "lora", "dropout": 0.2}, "noise": 5, "ema": 0.9, "optimizer": "muon"},
}


@pytest.mark.parametrize("case", CASES)
def test_pain_10_an_interrupted_run_is_the_run(case, runs, tmp_path):
    """Weights, optimiser, averages, dropout, place in the data: what comes after a crash is what would have come."""
    rows = tmp_path / "rows.jsonl"
    texts = [{"prompt": f"say {at}", "completion": "the quick brown fox"[: at + 2]} for at in range(10)]
    rows.write_text("\n".join(map(json.dumps, texts)))
    values = {
        "model": str(tiny_model("llama")),
        "data": {"train": str(rows), "split": {"validation": 0.2}},
        "steps": 9,
    }
    values |= {"batch_size": 3, "checkpoint_every": 3, "validate_every": 9, "learning_rate": 1e-3, "baselines": False}
    values |= CASES[case]

    def crash(event):
        if event["event"] == "step" and event["step"] == 5:
            raise KeyError("crash")

    tune(resolve(Tune, values=values | {"name": "whole"}))
    with pytest.raises(KeyError):
        tune(resolve(Tune, values=values | {"name": "torn"}), sinks=[crash])
    record = tune(resume="run:torn")
    said = {name: read_events(runs / name / "events.jsonl") for name in ("whole", "torn")}
    steps = {name: [one for one in events if one["event"] == "step"] for name, events in said.items()}
    last = {one["step"]: one for one in steps["torn"]}
    assert [one["step"] for one in steps["torn"]] == [*range(1, 6), *range(4, 10)]  # from the checkpoint of step 3
    for one in steps["whole"]:
        assert [last[one["step"]][key] for key in ("loss", "epoch", "tokens")] == [
            one["loss"],
            one["epoch"],
            one["tokens"],
        ]
    assert record.numbers["steps"] == 9 and record.state == "finished"
    mine, other = (load_model(f"run:{name}").module.state_dict() for name in ("torn", "whole"))
    assert all(torch.equal(mine[name], other[name]) for name in other)
    with pytest.raises(RunError, match="is finished; to train it further start a new one with --model run:torn"):
        tune(resume="run:torn")
    # Weights alone are the other verb: a new run, from its first step.
    fresh = tune(resolve(Tune, values=values | {"model": "run:torn", "name": "fresh", "steps": 1}))
    assert fresh.numbers["steps"] == 1


def test_pain_10_a_run_does_not_go_on_with_other_data(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"say {at}", "completion": "fox"}) for at in range(8)))

    def crash(event):
        if event["event"] == "step" and event["step"] == 2:
            raise KeyError("crash")

    values = {"model": str(tiny_model("llama")), "data": {"train": str(rows), "split": {"validation": 0.0}}, "steps": 4}
    with pytest.raises(KeyError):
        tune(resolve(Tune, values=values | {"name": "torn"}), sinks=[crash])
    rows.write_text(rows.read_text().replace("say 3", "say no"))
    with pytest.raises(RunError, match="the data changed since this run began"):
        tune(resume="run:torn")
