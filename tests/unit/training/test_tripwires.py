"""What ends a run at once: weights that do not move, weights that nobody moves, a file that is another model."""

import pytest
import torch

from luthier.core.errors import TrainingError
from luthier.models.adapters import ADAPTERS
from luthier.models.load import load_model
from luthier.training.tripwires import Watch, check_learning, same_model
from luthier.verbs.tune import tune
from tiny import tiny_model

ROWS = [{"prompt": f"say {at}", "completion": f"it is {at}"} for at in range(16)]
SETTINGS = {"data": {"train": ROWS, "split": {"validation": 0}}, "objective": "sft", "steps": 3, "baselines": False}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


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
