"""What ends a run at once: weights that do not move, weights that nobody moves, a file that is another model or reads
text otherwise."""

import json
import shutil

import pytest
import torch
from tokenizers import normalizers

from luthier.core.config import resolve
from luthier.core.errors import RunError, TrainingError
from luthier.models.adapters import ADAPTERS
from luthier.models.load import load_model
from luthier.training.tripwires import Watch, check_learning, same_model
from luthier.verbs.rendering import note_rendering
from luthier.verbs.tune import Tune, tune, tune_model
from tiny import tiny_model

ROWS = [{"prompt": f"say {at}", "completion": f"it is {at}"} for at in range(16)]
SETTINGS = {"data": {"train": ROWS, "split": {"validation": 0}}, "objective": "sft", "steps": 3, "baselines": False}


def test_weights_that_do_not_move_end_the_run(runs):
    with pytest.raises(TrainingError, match="no weight moved in the first step"):
        tune(model=str(tiny_model("llama")), learning_rate=1e-30, optimizer={"kind": "sgd"}, **SETTINGS)


def test_an_adapter_that_the_optimiser_does_not_hold_ends_the_run():
    model = load_model(str(tiny_model("llama")))
    adapter = ADAPTERS.parse("lora")
    adapter.apply(model)
    named = adapter.trainable(model)
    check_learning(model, named)
    with pytest.raises(TrainingError, match="would learn and is not moved"):
        check_learning(model, named[1:])
    with pytest.raises(TrainingError, match="is moved and cannot learn"):
        check_learning(model, [*named, ("copy", torch.nn.Parameter(torch.zeros(2)))])


def test_watching_sees_a_single_weight_move():
    still, moving = torch.nn.Parameter(torch.zeros(1000)), torch.nn.Parameter(torch.zeros(3))
    watch = Watch([("a", still), ("b", moving)])
    with pytest.raises(TrainingError):
        watch.check(1e-3)
    with torch.no_grad():
        moving[2] += 1e-6
    watch.check(1e-3)


@pytest.mark.parametrize("task", [None, "classify"])
def test_another_model_is_told_from_the_same(task):
    labels = ("a", "b") if task else ()
    torch.manual_seed(0)
    one = load_model(str(tiny_model("llama")), task=task, labels=labels)
    torch.manual_seed(0)
    two = load_model(str(tiny_model("llama")), task=task, labels=labels)
    ids = list(range(5, 30))
    assert same_model(one, two, ids)
    last = list(two.module.parameters())[-1]
    with torch.no_grad():
        last.add_(0.1)
    assert not same_model(one, two, ids)


def test_a_save_that_writes_another_model_ends_the_run(runs, monkeypatch):
    from luthier.models import save

    own = save._write

    def spoil(loaded, directory, dtype):
        with torch.no_grad():
            loaded.module.model.norm.weight.add_(0.5)
        own(loaded, directory, dtype)
        with torch.no_grad():
            loaded.module.model.norm.weight.sub_(0.5)

    monkeypatch.setattr(save, "_write", spoil)
    with pytest.raises(TrainingError, match="the saved model computes something else"):
        tune(model=str(tiny_model("llama")), name="spoilt", **SETTINGS)
    assert not (runs / "spoilt" / "artefacts" / "model").exists()


def spoil_tokenizer(directory):
    """What a tokenizer that does not survive its own save would leave."""
    path = directory / "tokenizer.json"
    core = json.loads(path.read_text())
    core["model"]["merges"] = core["model"]["merges"][:-40]
    path.write_text(json.dumps(core))


def spoil_template(directory):
    (directory / "chat_template.jinja").write_text("another")


@pytest.mark.parametrize("spoil", [spoil_tokenizer, spoil_template])
def test_a_save_that_reads_text_otherwise_ends_the_run(spoil, runs, monkeypatch):
    from luthier.models import save

    own = save._write

    def write(loaded, directory, dtype):
        own(loaded, directory, dtype)
        spoil(directory)

    monkeypatch.setattr(save, "_write", write)
    with pytest.raises(TrainingError, match="reads text otherwise than it was tuned to"):
        tune(model=str(tiny_model("qwen2")), name="spoilt", **SETTINGS)
    assert not (runs / "spoilt" / "artefacts" / "model").exists()


ROWS_OF = {
    "sft": ("llama", ROWS),
    "classify": ("bert", [{"text": f"say {at}", "text_pair": "no", "label": str(at % 2)} for at in range(16)]),
    "regress": ("bert", [{"text": f"say {at}", "score": at / 3} for at in range(16)]),
    "seq2seq": ("t5", [{"source": f"say {at}", "target": f"it is {at}"} for at in range(16)]),
    "pretrain": ("llama", [{"text": f"say it is {at}"} for at in range(16)]),
}


@pytest.mark.parametrize("objective", ROWS_OF)
def test_a_tokenizer_that_changes_while_training_ends_the_run(objective, runs):
    """The files then hold what is in memory, which is not what the rows were encoded with."""
    family, rows = ROWS_OF[objective]
    data = {"train": rows, "split": {"validation": 0}}
    asked = resolve(Tune, values={"model": str(tiny_model(family)), **SETTINGS, "objective": objective, "data": data})
    model = load_model(str(tiny_model(family)))

    def change(event):
        if event["event"] == "step" and event["step"] == 2:
            model.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("s", "z")

    with pytest.raises(
        TrainingError, match="reads text otherwise than the tuning did, so it was not put into place: from"
    ):
        tune_model(asked, sinks=[change], model=model)


def test_a_mask_that_changes_ends_the_run(runs, monkeypatch):
    """Same ids, other weights: `learn` is seen on the first row of the data, not on the fixed texts."""
    turns = [{"role": role, "content": "a b"} for role in ("user", "assistant", "user", "assistant")]
    settings = SETTINGS | {"data": {"train": [{"messages": turns}] * 8, "split": {"validation": 0}}}

    def change(work, model=None):
        found = note_rendering(work, model)
        if model is None:
            work.asked = work.asked.advise(learn="last")
        return found

    monkeypatch.setattr("luthier.verbs.encoding.note_rendering", change)
    with pytest.raises(TrainingError, match="the first training row is encoded otherwise than before training"):
        tune(model=str(tiny_model("qwen2")), **settings)


def test_no_training_row_is_written_beside_the_model(runs):
    rows = [{"prompt": f"zebra {at}", "completion": f"quagga {at}"} for at in range(8)]
    tune(model=str(tiny_model("llama")), name="one", **SETTINGS | {"data": {"train": rows, "split": {"validation": 0}}})
    model = runs / "one" / "artefacts" / "model"
    assert (model / "golden.json").is_file()
    held = (path.read_bytes() for path in model.iterdir() if path.suffix != ".safetensors")
    assert not any(b"zebra" in text or b"quagga" in text for text in held)


def test_another_template_is_said_aloud(runs):
    one = tune(model=str(tiny_model("qwen2")), name="one", **SETTINGS)
    same = tune(model="run:one", **SETTINGS)
    assert not any("template" in text for record in (one, same) for text in record.warnings)
    other = tune(model="run:one", template="plain", name="two", **SETTINGS)
    assert any("the template changes to 'plain'; the model comes with 'own'" in text for text in other.warnings)
    assert load_model("run:two").spec.template["name"] == "plain"  # and is what the run's own model now reads
    direct = tune(model=str(tiny_model("qwen2")), template="plain", **SETTINGS)
    assert any("'plain' is used in place of the tokenizer's own" in text for text in direct.warnings)


def test_a_run_does_not_go_on_with_another_template(runs, tmp_path):
    shutil.copytree(tiny_model("qwen2"), tmp_path / "base")

    def stop(event):
        if event["event"] == "step" and event["step"] == 2:
            raise KeyboardInterrupt

    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    values = SETTINGS | {"model": str(tmp_path / "base"), "name": "one"}
    values |= {"data": {"train": str(tmp_path / "rows.jsonl"), "split": {"validation": 0}}}
    with pytest.raises(KeyboardInterrupt):
        tune(resolve(Tune, values=values), sinks=[stop])
    template = tmp_path / "base" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "!<|im_end|>"))
    with pytest.raises(RunError, match="reads text otherwise than when this run began, so it cannot go on: its chat"):
        tune(resume="run:one")
    shutil.copy(tiny_model("qwen2") / "chat_template.jinja", template)
    assert tune(resume="run:one").state == "finished"
