"""Rows through a model that does not learn: planned, with fewer at once where memory runs out, and the same numbers."""

import numpy as np
import pytest
import torch

from luthier.core.errors import ModelError
from luthier.core.events import Events
from luthier.core.types import Encoded, Labelled, Text
from luthier.engine import likelihood, passes
from luthier.engine.likelihood import score
from luthier.engine.passes import each_part, run_rows
from luthier.evals.predict import predict_examples
from luthier.models.load import load_model
from luthier.training.validation import validate
from tiny import tiny_loaded, tiny_model

ROWS = [Encoded(str(at), tuple(range(4, 8 + at)), (0.0, *[1.0] * (3 + at))) for at in range(12)]
FULL = torch.OutOfMemoryError("CUDA out of memory")


def full_beyond(room, seen):
    """Scoring that has room for `room` tokens at once."""

    def compute(model, batch):
        if batch.ids_N.is_meta:
            return likelihood.score_batch(model, batch)
        seen.append(batch.tokens)
        if batch.tokens > room:
            raise FULL
        return likelihood.score_batch(model, batch)

    return compute


def test_rows_are_read_again_with_fewer_at_once_where_memory_runs_out(monkeypatch):
    model, events, seen = tiny_loaded("llama"), Events(), []
    right = score(model, ROWS)
    found = {}

    def keep(part, scored):
        nll_N, _, sizes = scored
        found.update(zip(part, (float(one.double().sum()) for one in nll_N.split(sizes))))

    run_rows(model, ROWS, full_beyond(40, seen), keep, tokens=4096, events=events)
    assert [found[at] for at in range(12)] == pytest.approx([one for one, _ in right], rel=1e-6)
    assert seen[0] == sum(len(row.ids) for row in ROWS) and max(seen[2:]) <= 40
    assert sum(count for said, count in events.warnings.items() if "memory ran out" in said) == 2
    assert model.module.training is False


def test_memory_that_runs_out_at_one_row_is_an_error_with_a_way_out():
    def run(part):
        raise FULL

    with pytest.raises(ModelError, match=r"one row of 7 tokens.*shorter max_length"):
        each_part([7], 100, run, torch.device("cpu"), Events())


def test_other_errors_pass_and_nothing_is_halved():
    calls = []

    def run(part):
        calls.append(part)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        each_part([3, 3], 100, run, torch.device("cpu"))
    assert len(calls) == 1


def test_without_events_the_halving_is_a_warning_of_python():
    def run(part):
        if len(part) > 1:
            raise FULL

    with pytest.warns(UserWarning, match="memory ran out"):
        each_part([3, 3], 100, run, torch.device("cpu"))


def test_judging_is_planned_and_said():
    model, events = tiny_loaded("llama"), Events()
    predict_examples(model, [Text("a", "one two three"), Text("b", "four")], events=events)
    assert "tokens at once" in str(events.choices["memory of judging"])


def test_the_plan_fits_into_what_is_free(monkeypatch):
    model, events = tiny_loaded("llama"), Events()
    rows = [Encoded(str(at), tuple(range(4, 34)), (0.0, *[1.0] * 29)) for at in range(200)]
    roomy = passes.plan_tokens(model, rows, likelihood.score_batch, Events())
    monkeypatch.setattr(passes, "held_memory", lambda device: 0)
    monkeypatch.setattr(passes, "library_memory", lambda device, dtype: 0)
    largest = passes._foresee(model, rows[: roomy // 30], likelihood.score_batch)
    monkeypatch.setattr(passes, "free_memory", lambda device: int(largest / 3))
    tight = passes.plan_tokens(model, rows, likelihood.score_batch, events)
    assert roomy == passes.TOKENS and 30 <= tight <= roomy // 2
    assert passes._foresee(model, rows[: tight // 30], likelihood.score_batch) <= largest / 3 * passes.FILLED
    monkeypatch.setattr(passes, "free_memory", lambda device: 10)
    assert passes.plan_tokens(model, rows, likelihood.score_batch, events) < 60
    assert any("may not be enough to judge" in said for said in events.warnings)


def test_what_is_foreseen_of_scoring_is_what_a_ledger_of_real_tensors_counts():
    from luthier.data.batches import collate
    from luthier.models.rehearsal import SLACK, Ledger

    model = tiny_loaded("llama")
    foreseen = passes._foresee(model, ROWS, likelihood.score_batch) / SLACK
    batch, ledger = collate(ROWS), Ledger()
    with torch.no_grad(), ledger:
        ledger.know(model.module.parameters())
        ledger.know(model.module.buffers())
        before = ledger.held
        ledger.mark()
        likelihood.score_batch(model, batch)
    assert foreseen == pytest.approx(ledger.peak - before, rel=0.1)


def test_validation_halves_too(monkeypatch):
    from luthier.training.objectives import OBJECTIVES

    model, events = tiny_loaded("llama"), Events()
    objective = OBJECTIVES.parse("sft")
    right = validate(model, objective, ROWS, tokens=4096)
    whole = type(objective).measure

    def measure(batch):
        if batch.tokens > 40:
            raise FULL
        return whole(objective, model, batch)

    found = validate(model, objective, ROWS, tokens=4096, measure=measure, events=events)
    assert found["loss"] == pytest.approx(right["loss"], rel=1e-6)
    assert any("memory ran out" in said for said in events.warnings)


def test_a_text_beyond_the_context_of_an_encoder_is_judged_to_its_end():
    model = load_model(str(tiny_model("bert")), task="masked", max_length=16)
    long = Text("long", "one two three four five six seven eight nine ten " * 4)
    (found,) = predict_examples(model, [long])
    special = set(model.tokenizer.all_special_ids)
    ids = [one for one in model.tokenizer(long.text, verbose=False)["input_ids"] if one not in special]
    assert found.tokens == len(ids) > 16
    assert np.isfinite(found.nll)


def test_classes_do_not_depend_on_the_memory(monkeypatch):
    from luthier.engine import pooler

    model = load_model(str(tiny_model("bert")), task="classify", labels=("a", "b"))
    rows = [Labelled(str(at), "one two " * (at + 1), "a") for at in range(8)]
    right = predict_examples(model, rows)
    whole = pooler.score_batch

    def narrow(model, batch):
        if batch.tokens > 60 and not batch.ids_N.is_meta:
            raise FULL
        return whole(model, batch)

    monkeypatch.setattr(pooler, "score_batch", narrow)
    events = Events()
    found = predict_examples(model, rows, events=events)
    assert any("memory ran out" in said for said in events.warnings)
    for one, other in zip(found, right):
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-5)
